"""Prefill: the full model reads prompts and records how strongly each neuron takes part."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.generation.padding import DEFAULT_CHUNK, by_chunk, chunk_count
from griffin_jax.griffin.neurons import ranges_of
from griffin_jax.griffin.statistic import Statistics, rows_at, spread, statistic, token_statistic, tokens_at
from griffin_jax.model.cache import EMPTY, KVCache, empty_cache
from griffin_jax.model.routed import Activations
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import mesh_of, over_data
from griffin_jax.utils.deprecation import renamed_arguments, renamed_attribute

_Observed = tuple[Array | None, Array | None]
"""What is recorded of a layer: s^2, and relative activations of some tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LastTokens:
    """The last tokens of prompts, and what was recorded of the tokens before them.

    With it a pruned model can be tried on these tokens, see `griffin_jax.extensions.promise`.

    Attributes:
        hidden: the residual stream after the last layer of each of them.
        statistics: of the tokens before.
        rows: relative activations of some of the tokens before, as those of `Prefilled`.
    """

    hidden: Float[Array, "b n d"]
    statistics: Statistics
    rows: tuple[Float[Array, "b _r _f"], ...] = ()


@dataclasses.dataclass(frozen=True)
class _End:
    """Where the last tokens are among those that are read at a time.

    Attributes:
        early: which tokens come before them.
        columns: where they are; outside of what is read if they are read at another time.
    """

    early: Bool[Array, "b t"]
    columns: Int[Array, "b n"]

    def squares(self, layer: int, z: Activations, real: Bool[Array, "b t"]) -> tuple[Array, Array]:
        """s^2 of the tokens before, and of the last ones, which are few."""
        return statistic(layer, z, real & self.early), token_statistic(*tokens_at(z, self.columns))

    def hidden(self, x: Float[Array, "b t d"]) -> Float[Array, "b n d"]:
        """The residual stream of the last tokens, zero for those that are read at another time."""
        found, present = tokens_at(x, self.columns)
        return jnp.where(present[..., None], found, 0)


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
        last: the last tokens of each prompt; None unless they were asked for.
    """

    logits: Float[Array, "b v"]
    hidden: Float[Array, "b d"]
    cache: KVCache
    statistics: Statistics
    max_new_tokens: int = dataclasses.field(metadata={"static": True})
    rows: tuple[Float[Array, "b _r _f"], ...] = ()
    last: LastTokens | None = None

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
    last: int = 0,
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
        last: number of tokens at the end of each prompt that `Prefilled.last` is to be about, 0 for none; static.
            Every prompt has more tokens.
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
    early = counts - last
    at_end = early[:, None] + jnp.arange(last, dtype=jnp.int32)
    chosen = spread(counts, rows) if rows else None
    chosen_early = spread(early, rows) if rows and last else None

    def read(carry: tuple[KVCache, Array, Array | None, tuple[tuple[_Observed, ...], ...]], step: tuple[Array, Array]):
        cache, hidden, of_last, observed = carry
        chunk_tokens, chunk_positions = step
        # The cache was empty, so its cursor is the number of tokens before this chunk.
        before = cache.cursor
        end = _End(chunk_positions < early[:, None], at_end - before)

        def rows_of(z: Activations, chosen: Array | None) -> Array | None:
            return None if chosen is None else rows_at(z, chosen - before)

        def observe(layer: int, z: Activations, real: Array) -> tuple[_Observed, ...]:
            if not last:
                return ((statistic(layer, z, real) if collect else None, rows_of(z, chosen)),)
            squares, more = end.squares(layer, z, real)
            return (squares, rows_of(z, chosen_early)), (more, rows_of(z, chosen))

        x, cache, more = model(
            chunk_tokens,
            chunk_positions,
            cache,
            read_slots=0 if chunks == 1 else padded,
            observe=observe if collect or rows else None,
        )
        is_last = (chunk_positions == counts[:, None] - 1)[..., None]
        hidden = hidden + jnp.sum(jnp.where(is_last, x, 0), axis=1)
        of_last = None if of_last is None else of_last + end.hidden(x)
        return (cache, hidden, of_last, jax.tree.map(jnp.add, observed, more)), None

    context = jnp.asarray(counts + (max_new_tokens if longest is None else longest), jnp.int32)
    carry = (
        empty_cache(model.config, batch, padded + max_new_tokens, model.dtype, context=context),
        jnp.zeros((batch, model.config.width), model.dtype),
        jnp.zeros((batch, last, model.config.width), model.dtype) if last else None,
        tuple(
            (
                (
                    jnp.zeros((batch, neurons), jnp.float32) if collect else None,
                    jnp.zeros((batch, rows, neurons), model.dtype) if rows else None,
                ),
            )
            * (2 if last else 1)
            for neurons in model.neurons
            if collect or rows
        ),
    )
    if chunks == 1:
        carry, _ = read(carry, (prompts, positions))
    else:
        carry, _ = jax.lax.scan(read, carry, (by_chunk(prompts, chunks), by_chunk(positions, chunks)))
    cache, hidden, of_last, observed = carry
    ranges = ranges_of(model) if collect else ()
    squares, kept_rows = _recorded(observed, -1)
    statistics, before = Statistics(squares, jnp.asarray(counts - early if last else counts, jnp.int32), ranges), None
    if of_last is not None:
        squares, rows_before = _recorded(observed, 0)
        before = LastTokens(of_last, Statistics(squares, jnp.asarray(early, jnp.int32), ranges), rows_before)
        statistics = before.statistics + statistics
    logits = model.logits(hidden[:, None])[:, 0]
    return Prefilled(logits, hidden, cache, statistics, max_new_tokens, kept_rows, before)


def read_on(
    model: Transformer,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    statistics: Statistics,
    rows: tuple[Float[Array, "b _r _f"], ...] = (),
    last: int = 0,
) -> tuple[Float[Array, "b t d"], KVCache, Statistics, tuple[Float[Array, "b _r _f"], ...], LastTokens | None]:
    """Read more tokens after those of a cache, and add them to what was recorded before.

    Args:
        model: the model that reads, full or pruned.
        cache: the tokens before, with room for T more.
        tokens: token ids.
        positions: position of each token in its row; `EMPTY` for padding, which is on the right.
        statistics: statistics of the tokens before. Without layers none are collected; the numbers of tokens are needed
            for `rows`.
        rows: relative activations of some of the tokens before, the oldest first, followed by zeros.
        last: number of tokens at the end of each row to record as those of `Prefilled.last`, of which no row has fewer;
            0 for none; static.

    Returns:
        The residual stream, the longer cache, the statistics of all tokens, as many rows as before, which are those
        of the newest tokens, the oldest first, and the last tokens.
    """
    more = jnp.sum(positions != EMPTY, axis=1, dtype=jnp.int32)
    early = more - last
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    end = _End(steps < early[:, None], early[:, None] + steps[:last])

    def newest(old: Float[Array, "b r f"], z: Activations, more: Int[Array, "b"]) -> Float[Array, "b r f"]:
        size = old.shape[1]
        used = jnp.minimum(statistics.tokens, size)[:, None]
        # Old and new rows are one queue, of which the last `size` are kept.
        place = jnp.arange(size) + jnp.maximum(used + more[:, None] - size, 0)
        kept = jnp.take_along_axis(old, jnp.minimum(place, size - 1)[..., None], axis=1)
        column = jnp.where(place - used < more[:, None], place - used, EMPTY)
        return jnp.where((place < used)[..., None], kept, rows_at(z, column))

    def observe(layer: int, z: Activations, real: Array) -> tuple[_Observed, ...]:
        every = newest(rows[layer], z, more) if rows else None
        if not last:
            return ((statistic(layer, z, real) if statistics.squares else None, every),)
        squares, of_last = end.squares(layer, z, real)
        return (squares, newest(rows[layer], z, early) if rows else None), (of_last, every)

    recorded = bool(statistics.squares or rows)
    x, cache, observed = model(tokens, positions, cache, observe=observe if recorded else None)
    if not last:
        squares, rows = _recorded(observed, 0)
        return x, cache, statistics + Statistics(squares, more, statistics.ranges), rows, None
    (squares, rows_before), (of_last, rows) = _recorded(observed, 0), _recorded(observed, 1)
    before = LastTokens(end.hidden(x), statistics + Statistics(squares, early, statistics.ranges), rows_before)
    added = Statistics(of_last, more - early, statistics.ranges)
    return x, cache, before.statistics + added, rows, before


def _recorded(
    observed: Sequence[tuple[_Observed, ...]], part: int
) -> tuple[tuple[Float[Array, "b _f"], ...], tuple[Float[Array, "b _r _f"], ...]]:
    """s^2 and rows of all layers, those that there are: one part of what was recorded."""
    squares, rows = zip(*(layer[part] for layer in observed), strict=True) if observed else ((), ())
    return tuple(s for s in squares if s is not None), tuple(r for r in rows if r is not None)
