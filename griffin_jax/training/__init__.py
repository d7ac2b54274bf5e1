"""Training: texts packed into sequences, a pure step, and a loop around it that can be interrupted.

    packed = pack(documents, length=256, end=eos)
    step = jax.jit(make_step(loss, make_optimizer(config)))
    state, losses = train(step, init_state(parameters, optimizer), frozen, packed.batches(8, seed=0), config.steps)

What is trained, and what else the loss needs, are pytrees: an adapter next to a frozen model, or anything else.
"""
