"""Training: texts that are packed into sequences, a pure step, and a loop around the step that can be interrupted.

    packed = pack(documents, length=256, end=eos)
    step = jax.jit(make_step(loss, make_optimizer(config)))
    state, losses = train(step, init_state(parameters, optimizer), frozen, packed.batches(8, seed=0), config.steps)

The parameters that are trained, and whatever else the loss needs, may be any pytrees, such as an adapter and a frozen
model.
"""
