"""GRIFFIN (Dong, Chen, Chi, arXiv 2404.01365) as pure functions: statistic, select, prune.

    statistic   how strongly each neuron takes part in a prompt; recorded while the prompt is read
    select      statistics -> expert neurons: the indices of the neurons to keep
    prune       model, expert neurons -> a smaller model

All of them can be called under `jax.jit`. The letters in shapes are those of `griffin_jax.model`. Nothing here goes
beyond the paper: `select` takes a function that fuses scores, and `prune` one that refits the kept rows;
`griffin_jax.extensions` has both.
"""
