"""Low-rank adapters (LoRA, arXiv 2106.09685), and libraries of independent adapters, one of which answers each prompt
(MoIN, arXiv 2410.09687).

    adapter = load_adapter("adapter", model.config)       a folder that PEFT or `save_adapter` wrote
    adapted = attach(model, adapter)                      a model like any other, with the same weights
    pruned = prune(adapted, experts)

**An adapted model is a model.** Like GRIFFIN's neurons, the adapter is chosen once for each sequence: prefill, select,
prune and decode need not know that there is one.
"""
