"""FactorLLM (arXiv 2408.11855): a dense model is divided into experts, and routers learn to choose among them.

    factored = factorize(model, experts=4, active=2, grouping="kmeans")      neurons in groups, routers at random
    routers, _ = train_routers(factored, ...)                                 forward passes only
    trained, _ = train_experts(...)                                           experts and routers, end to end

The neurons of each feed-forward layer are divided into equal groups, whose values stay as they are: all groups together
are the dense layer, exactly. The result is a model with routed experts (`griffin_jax.model.routed`) like any other.
"""
