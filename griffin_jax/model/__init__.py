"""The transformer: its architecture as a config, its layers, its KV cache, and how devices share it.

Letters in names and shapes (shape annotations have them in lower case): B batch, T query tokens of a call, S slots of
the cache, D width of the residual stream, F neurons of a feed-forward layer (K after pruning), N query heads, G
key/value heads, R = N / G, H head size, V vocabulary.

A module is a pytree, so a model can be an argument of a jitted function, as in `jax.jit(prefill)(model, ...)`. A pruned
model is the same module tree, with feed-forward matrices of K rows where the full model's have F. No module has to know
which of the two it runs.
"""
