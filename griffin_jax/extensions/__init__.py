"""Beyond GRIFFIN: optional steps that are not in the paper, all of them off by default.

    prior, sensitivity, sketch    what neurons do in general text, measured once per model
    reconstruction                refits the kept rows to the output that all neurons had for the prompt
    healing                       what the pruner needs of an adapter for pruned models
    refresh                       the full model reads the answer every few tokens, and neurons are selected again
    speculative, lookup, drafter  speculative decoding, in which the full model verifies all drafts
    promise, trial                takes the lowest density whose divergence stays within a limit
    mixed                         reads less important kept neurons in fewer bits
    in_place                      prunes without a copy of the kept rows
    pruner                        joins select, prune, refit and healing
    config                        the options of all of these: `Extensions`

They build on the functions of `griffin_jax.griffin` and `griffin_jax.generation`, which import nothing from here.
"""
