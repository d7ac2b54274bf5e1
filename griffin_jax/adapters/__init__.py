"""Adapters of low rank (LoRA, arXiv 2106.09685), and a library of independent ones, of which each prompt takes one
(MoIN, arXiv 2410.09687).

    adapter = load_adapter("adapter", model.config)       a folder that PEFT or `save_adapter` wrote
    adapted = attach(model, adapter)                      a model like any other, with the same weights
    pruned = prune(adapted, experts)

**An adapted model is a model**, chosen once for each sequence as GRIFFIN's neurons are: prefill, select, prune and
decode do not know that there is an adapter.
"""
