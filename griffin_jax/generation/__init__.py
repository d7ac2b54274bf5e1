"""From tokens to tokens: prefill, decode, sampling, and scoring of given answers.

Each step is a pure function over pytrees. It can be called alone, under `jax.jit`, or in a pipeline of your own:

    prefilled = prefill(model, tokens, lengths, max_new_tokens=N)
    experts = select(prefilled.statistics, GriffinConfig(density=0.5))
    pruned = prune(model, experts)
    state = decode(pruned, init_decode(prefilled), N)

`decode` does not know whether its model is pruned, so dense decoding is the same code without the prune step.
`griffin_jax.generation.jitted` has a compiled version of each step.
"""
