"""The transformer: its architecture as a config, its layers, its cache, and how devices share it.

Letters in names and shapes: B batch, T query tokens, S cache slots, D width, F neurons of a feed-forward layer (K after
pruning), N query heads, G key/value heads, R = N / G, H head size, V vocabulary.

A module is a pytree, so `jax.jit(prefill)(model, ...)` takes it as it is. A pruned model is the same module tree with
feed-forward matrices of K rows where the full one has F; nothing here knows which one it runs.
"""
