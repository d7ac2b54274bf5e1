"""A cache that goes on from turn to turn: what was read stays, and only what is new is read.

    read = start(model, slots)
    read = read_more(model, read, tokens, count)        the full model reads a turn
    ...                                                 an answer is written into the cache
    read = dataclasses.replace(read, cache=cut(cache, length))

For one conversation at a time: all functions have a batch of one.
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
    """A conversation of which nothing was read yet.

    Args:
        model: the full model.
        slots: tokens that the cache has room for; static.
        rows: tokens whose relative activations are kept for a `Reconstruction`; static.
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
    """The full model reads more of a conversation, and adds to what it recorded of the part before.

    Args:
        model: the full model.
        read: the part before, with room for T tokens. Donate it.
        tokens: token ids, padded on the right with any token.
        count: how many of them are real, at least 1. The others take no slots.
        last: how many of them `Prefilled.last` is to be about, see `griffin_jax.generation.scoring.extend`; static.
    """
    _, longer = extend(model, read, tokens, jnp.asarray(count, jnp.int32)[None], last=last)
    cache = longer.cache.without_last(tokens.shape[1] - count)
    return dataclasses.replace(longer, cache=cache, max_new_tokens=read.max_new_tokens)


def cut(cache: KVCache, length: int | Int[Array, ""]) -> KVCache:
    """The cache of a conversation without what was written after its first `length` tokens. Donate it."""
    return cache.without_last(cache.cursor - length)


def with_room(cache: KVCache, slots: int) -> KVCache:
    """The cache with more slots, `slots` in all; static."""
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
