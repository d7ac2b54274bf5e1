"""Prefill: the full model reads prompts and records how strongly each neuron takes part."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from griffin_jax.generation.padding import DEFAULT_CHUNK, by_chunk, chunk_count
from griffin_jax.griffin.neurons import ranges_of
from griffin_jax.griffin.statistic import Statistics, rows_at, spread, statistic
from griffin_jax.model.cache import EMPTY, KVCache, empty_cache
from griffin_jax.model.routed import Activations
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import mesh_of, over_data
from griffin_jax.utils.deprecation import renamed_arguments, renamed_attribute

_Observed = tuple[Array | None, Array | None]
"""What is recorded of a layer: s^2, and relative activations of some tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """Prompts that were read by the full model.

    Attributes:
        logits: scores of the token after each prompt, float32.
        hidden: the residual stream after the last layer that they are computed from.
        cache: keys and values of the prompts, with room for the answers.
        statistics: what GRIFFIN selects by; without layers if it was not collected.
        max_new_tokens: number of tokens that the cache has room for after the prompts.
        rows: relative activations of some tokens of each prompt in each layer, in the model's dtype, for a
            `Reconstruction`; without layers unless they were asked for.
    """

    logits: Float[Array, "b v"]
    hidden: Float[Array, "b d"]
    cache: KVCache
    statistics: Statistics
    max_new_tokens: int = dataclasses.field(metadata={"static": True})
    rows: tuple[Float[Array, "b _r _f"], ...] = ()

    room = renamed_attribute("max_new_tokens")


@renamed_arguments(room="max_new_tokens")
def prefill(
    model: Transformer,
    tokens: Int[Array | np.ndarray, "b t"],
    lengths: Int[Array | np.ndarray, "b"],
    *,
    max_new_tokens: int,
    longest: int | Int[Array, "..."] | None = None,
    chunk: int = DEFAULT_CHUNK,
    collect: bool = True,
    rows: int = 0,
) -> Prefilled:
    """Read prompts with the full model, exactly, and record how strongly each neuron takes part.

    If the model is on a mesh, the prompts and all that comes from them are divided along its axis `data`, if that
    divides their number evenly.

    Args:
        model: the full model.
        tokens: the prompts, padded on the right to a common length with any token.
        lengths: number of real tokens of each prompt, in [1, T].
        max_new_tokens: length of the longest answer that the cache gets slots for, in tokens; static.
        longest: number of tokens that the answers (or that of each row) may come to have, by which LongRoPE chooses its
            wavelengths; `max_new_tokens` if None. Not static, so that `max_new_tokens` can be rounded up without
            changing a result.
        chunk: number of tokens read at a time, at most; static. It bounds memory and changes no result.
        collect: whether to collect the statistics; static.
        rows: number of tokens of each prompt whose relative activations are kept for a `Reconstruction`: all tokens of
            a shorter prompt, this many spread evenly over a longer one; static.
    """
    batch, length = tokens.shape
    chunks = chunk_count(length, chunk)
    chunk = -(-length // chunks)
    padded = chunks * chunk
    mesh = mesh_of(model.embedding[...])
    prompts: Array = over_data(mesh, jnp.pad(jnp.asarray(tokens), ((0, 0), (0, padded - length))))
    counts: Array = over_data(mesh, jnp.asarray(lengths))
    positions = jnp.arange(padded, dtype=jnp.int32)
    positions = jnp.where(positions < counts[:, None], positions, EMPTY)
    chosen = spread(counts, rows) if rows else None

    def read(carry: tuple[KVCache, Array, tuple[_Observed, ...]], step: tuple[Array, Array]):
        cache, last, observed = carry
        chunk_tokens, chunk_positions = step
        # The cache was empty, so its cursor is the number of tokens before this chunk.
        before = cache.cursor

        def observe(layer: int, z: Activations, real: Array) -> _Observed:
            squares = statistic(layer, z, real) if collect else None
            return squares, None if chosen is None else rows_at(z, chosen - before)

        x, cache, more = model(
            chunk_tokens,
            chunk_positions,
            cache,
            read_slots=0 if chunks == 1 else padded,
            observe=observe if collect or rows else None,
        )
        is_last = (chunk_positions == counts[:, None] - 1)[..., None]
        last = last + jnp.sum(jnp.where(is_last, x, 0), axis=1)
        return (cache, last, jax.tree.map(jnp.add, observed, more)), None

    context = jnp.asarray(counts + (max_new_tokens if longest is None else longest), jnp.int32)
    carry = (
        empty_cache(model.config, batch, padded + max_new_tokens, model.dtype, context=context),
        jnp.zeros((batch, model.config.width), model.dtype),
        tuple(
            (
                jnp.zeros((batch, neurons), jnp.float32) if collect else None,
                jnp.zeros((batch, rows, neurons), model.dtype) if rows else None,
            )
            for neurons in model.neurons
            if collect or rows
        ),
    )
    if chunks == 1:
        carry, _ = read(carry, (prompts, positions))
    else:
        carry, _ = jax.lax.scan(read, carry, (by_chunk(prompts, chunks), by_chunk(positions, chunks)))
    cache, last, observed = carry
    squares = tuple(square for square, _ in observed if square is not None)
    statistics = Statistics(squares, jnp.asarray(counts, jnp.int32), ranges_of(model) if collect else ())
    logits = model.logits(last[:, None])[:, 0]
    return Prefilled(
        logits, last, cache, statistics, max_new_tokens, tuple(row for _, row in observed if row is not None)
    )


def read_on(
    model: Transformer,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    statistics: Statistics,
    rows: tuple[Float[Array, "b _r _f"], ...] = (),
) -> tuple[Float[Array, "b t d"], KVCache, Statistics, tuple[Float[Array, "b _r _f"], ...]]:
    """Read more tokens after those of a cache, and add them to what was recorded before.

    Args:
        model: the model that reads, full or pruned.
        cache: the tokens before, with room for T more.
        tokens: token ids.
        positions: position of each token in its row; `EMPTY` for padding, which is on the right.
        statistics: statistics of the tokens before. Without layers none are collected; the numbers of tokens are needed
            for `rows`.
        rows: relative activations of some of the tokens before, the oldest first, followed by zeros.

    Returns:
        The residual stream, the longer cache, the statistics of all tokens, and as many rows as before, which are those
        of the newest tokens, the oldest first.
    """
    more = jnp.sum(positions != EMPTY, axis=1, dtype=jnp.int32)

    def newest(old: Float[Array, "b r f"], z: Activations) -> Float[Array, "b r f"]:
        size = old.shape[1]
        used = jnp.minimum(statistics.tokens, size)[:, None]
        # Old and new rows are one queue, of which the last `size` are kept.
        place = jnp.arange(size) + jnp.maximum(used + more[:, None] - size, 0)
        kept = jnp.take_along_axis(old, jnp.minimum(place, size - 1)[..., None], axis=1)
        column = jnp.where(place - used < more[:, None], place - used, EMPTY)
        return jnp.where((place < used)[..., None], kept, rows_at(z, column))

    def observe(layer: int, z: Activations, real: Array) -> _Observed:
        squares = statistic(layer, z, real) if statistics.squares else None
        return squares, newest(rows[layer], z) if rows else None

    recorded = bool(statistics.squares or rows)
    x, cache, observed = model(tokens, positions, cache, observe=observe if recorded else None)
    squares = tuple(square for square, _ in observed if square is not None)
    rows = tuple(row for _, row in observed if row is not None)
    return x, cache, statistics + Statistics(squares, more, statistics.ranges), rows
