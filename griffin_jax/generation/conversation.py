"""A KV cache that is kept from turn to turn of a conversation, so that only new tokens are read.

    read = start(model, slots)
    read = read_more(model, read, tokens, count)        the full model reads a turn
    ...                                                 an answer is written into the cache
    read = dataclasses.replace(read, cache=cut(cache, length))

All functions handle one conversation at a time: the batch size is one.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from griffin_jax.generation.prefill import Prefilled
from griffin_jax.generation.scoring import extend
from griffin_jax.griffin.neurons import ranges_of
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.cache import EMPTY, KVCache, empty_cache
from griffin_jax.model.transformer import Transformer


def start(model: Transformer, slots: int, *, rows: int = 0) -> Prefilled:
    """An empty conversation, of which nothing has been read yet.

    Args:
        model: the full model.
        slots: number of tokens that the cache has room for; static.
        rows: number of tokens whose relative activations are kept for a `Reconstruction`; static.
    """
    width, neurons = model.config.width, model.neurons
    return Prefilled(
        logits=jnp.zeros((1, model.config.vocab_size), jnp.float32),
        hidden=jnp.zeros((1, width), model.dtype),
        cache=empty_cache(model.config, 1, slots, model.dtype),
        statistics=Statistics(
            tuple(jnp.zeros((1, f), jnp.float32) for f in neurons), jnp.zeros((1,), jnp.int32), ranges_of(model)
        ),
        max_new_tokens=0,
        rows=tuple(jnp.zeros((1, rows, f), model.dtype) for f in neurons) if rows else (),
    )


def read_more(
    model: Transformer, read: Prefilled, tokens: Int[Array, "1 t"], count: int | Int[Array, ""], *, last: int = 0
) -> Prefilled:
    """Read more of a conversation with the full model, and add to the statistics that were recorded so far.

    Args:
        model: the full model.
        read: the conversation so far, with room for T more tokens. Donate it.
        tokens: token ids, (1, T), padded on the right with any token.
        count: number of real tokens among them, at least 1. Padding takes no slots in the end.
        last: number of tokens at the end that are recorded in `Prefilled.last`, see
            `griffin_jax.generation.scoring.extend`; static.

    Returns:
        The longer conversation.
    """
    _, longer = extend(model, read, tokens, jnp.asarray(count, jnp.int32)[None], last=last)
    cache = longer.cache.without_last(tokens.shape[1] - count)
    return dataclasses.replace(longer, cache=cache, max_new_tokens=read.max_new_tokens)


def cut(cache: KVCache, length: int | Int[Array, ""]) -> KVCache:
    """The cache of a conversation, cut after its first `length` tokens. Donate it."""
    return cache.without_last(cache.cursor - length)


def with_room(cache: KVCache, slots: int) -> KVCache:
    """The cache enlarged to `slots` slots in all; static."""
    more = slots - cache.slots

    def padded(array: Array, axis: int, value: int = 0) -> Array:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, more)
        return jnp.pad(array, widths, constant_values=value)

    return dataclasses.replace(
        cache,
        keys=tuple(padded(keys, 3) for keys in cache.keys),
        values=tuple(padded(values, 2) for values in cache.values),
        positions=padded(cache.positions, 1, EMPTY),
    )
