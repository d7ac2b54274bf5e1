"""FactorLLM (arXiv 2408.11855): divide a dense model into experts, and train routers that choose among them.

    factored = factorize(model, experts=4, active=2, grouping="kmeans")      neurons in groups, random routers
    routers, _ = train_routers(factored, ...)                                 forward passes only
    trained, _ = train_experts(...)                                           experts and routers, end to end

The neurons of each feed-forward layer are divided into equal groups. Their values do not change, so all groups together
are exactly the dense layer. The result is a model with routed experts (`griffin_jax.model.routed`) like any other.
"""
