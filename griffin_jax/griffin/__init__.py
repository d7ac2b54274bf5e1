"""GRIFFIN (Dong, Chen, Chi, arXiv 2404.01365) as pure functions: statistic, select, prune.

    statistic   how strongly each neuron takes part in a prompt; recorded while the full model reads the prompt
    select      statistics -> expert neurons: the indices of the neurons to keep
    prune       model, expert neurons -> a smaller model

All of them can be called under `jax.jit`. Shapes use the letters of `griffin_jax.model`. Nothing in this package goes
beyond the paper. Extensions plug in from outside: `select` accepts a function that changes the scores, and `prune` one
that refits the kept rows. `griffin_jax.extensions` implements both.
"""
