"""From tokens to tokens: prefill, decode, sampling, and the scores of given answers.

Each step is a pure function over pytrees, which can be called alone, under `jax.jit` or inside a user's own pipeline:

    prefilled = prefill(model, tokens, lengths, max_new_tokens=N)
    experts = select(prefilled.statistics, GriffinConfig(density=0.5))
    pruned = prune(model, experts)
    state = decode(pruned, init_decode(prefilled), N)

Decoding does not know whether the model it was handed is pruned, so dense decoding is the same code with the prune step
left out. `griffin_jax.generation.jitted` has each step compiled alone.
"""
