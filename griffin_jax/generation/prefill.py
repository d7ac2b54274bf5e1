"""Prefill: the full model reads prompts and records how strongly each neuron takes part.

    prefilled = prefill(model, tokens, lengths, max_new_tokens=N)
    prefilled.logits                the scores of the answers' first tokens
    prefilled.cache                 keys and values of the prompts, with room for N tokens more
    prefilled.statistics            GRIFFIN's s^2 of every neuron, for `select`

Prompts are read in chunks of equal length, in one loop on the device. The model calls an observer with the
intermediates z of each feed-forward layer (see `griffin_jax.model.transformer.Observer`); what it returns is added up
over the chunks, and z itself is not kept.
"""

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
"""What is recorded in a layer: s^2, (B, F), and the relative activations of some tokens, (B, R, F)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LastTokens:
    """The full model's output at the last tokens of prompts, and what was recorded of the tokens before them.

    With it, a pruned model can be tried on the last tokens; see `griffin_jax.extensions.promise`.

    Attributes:
        hidden: the residual stream after the last layer at each of the N last tokens, (B, N, D).
        statistics: statistics of the tokens before them.
        rows: relative activations of some of the tokens before them, (B, R, F) for each layer, as in `Prefilled.rows`.
    """

    hidden: Float[Array, "b n d"]
    statistics: Statistics
    rows: tuple[Float[Array, "b _r _f"], ...] = ()


@dataclasses.dataclass(frozen=True)
class _End:
    """Where a prompt's last tokens are in the chunk that is being read.

    Attributes:
        early: which tokens of the chunk come before the last tokens, (B, T).
        columns: the columns of the last tokens, (B, N); outside [0, T) for those in another chunk.
    """

    early: Bool[Array, "b t"]
    columns: Int[Array, "b n"]

    def squares(self, layer: int, z: Activations, real: Bool[Array, "b t"]) -> tuple[Array, Array]:
        """s^2 of the tokens before the last ones, and s^2 of the last ones. (They are few, and gathered.)"""
        return statistic(layer, z, real & self.early), token_statistic(*tokens_at(z, self.columns))

    def hidden(self, x: Float[Array, "b t d"]) -> Float[Array, "b n d"]:
        """The residual stream at the last tokens, zero for those in another chunk."""
        found, present = tokens_at(x, self.columns)
        return jnp.where(present[..., None], found, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """Prompts that the full model has read.

    Attributes:
        logits: scores of the token after each prompt, (B, V), float32.
        hidden: the residual stream after the last layer at the last token of each prompt, (B, D), from which `logits`
            are computed.
        cache: keys and values of the prompts, with room for the answers.
        statistics: the statistics that GRIFFIN selects by; without layers if they were not collected.
        max_new_tokens: number of tokens that the cache has room for after the prompts.
        rows: relative activations of some tokens of each prompt, (B, R, F) for each layer, in the model's dtype, for a
            `Reconstruction`; without layers unless `rows` were asked for.
        last: the full model's output at the last tokens of each prompt; None unless `last` was asked for.
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
    """Read prompts with the full model and record how strongly each neuron takes part.

    The prompts are read exactly: nothing is pruned here. If the model is on a mesh, the prompts and all results are
    divided along the mesh's axis `data`, provided that it divides the number of prompts evenly.

    Args:
        model: the full model.
        tokens: token ids of the prompts, (B, T), padded on the right to a common length with any token.
        lengths: number of real tokens of each prompt, (B,), in [1, T].
        max_new_tokens: number of tokens of an answer that the cache has slots for; static.
        longest: the largest number of tokens that the answers may have, one number or one per row, by which LongRoPE
            chooses its wavelengths; `max_new_tokens` if None. It is not static, so that `max_new_tokens` can be rounded
            up without changing a result.
        chunk: the largest number of tokens that are read at a time; static. It bounds memory and changes no result.
        collect: whether to collect the statistics; static.
        rows: R, the number of tokens of each prompt whose relative activations are kept for a `Reconstruction`: all
            tokens of a shorter prompt, R tokens spread evenly over a longer one; 0 for none; static.
        last: N, the number of tokens at the end of each prompt that are recorded in `Prefilled.last`; 0 for none;
            static. Every prompt must have more than N tokens.

    Returns:
        The prompts with their logits, cache and statistics, and with `rows` and `last` if they were asked for.
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
        cache: keys and values of the tokens before, with room for T more tokens.
        tokens: token ids, (B, T).
        positions: position of each token in its row, (B, T); `EMPTY` for padding, which must be on the right.
        statistics: statistics of the tokens before. If they have no layers, none are collected. The numbers of tokens
            in them are needed for `rows` in any case.
        rows: relative activations of some of the tokens before, (B, R, F) for each layer, the oldest first, followed by
            rows of zeros if there are fewer than R.
        last: number of tokens at the end of each row that are recorded as in `Prefilled.last`; 0 for none; static. No
            row may have fewer real tokens in `tokens`.

    Returns:
        A tuple of the residual stream after the last layer, (B, T, D); the longer cache; the statistics of all tokens;
        the relative activations of the newest tokens, as many rows as before, the oldest first; and the last tokens
        (None if `last` is 0).
    """
    more = jnp.sum(positions != EMPTY, axis=1, dtype=jnp.int32)
    early = more - last
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    end = _End(steps < early[:, None], early[:, None] + steps[:last])

    def newest(old: Float[Array, "b r f"], z: Activations, more: Int[Array, "b"]) -> Float[Array, "b r f"]:
        size = old.shape[1]
        used = jnp.minimum(statistics.tokens, size)[:, None]
        # Old and new rows form one queue, whose last `size` rows are kept.
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
    """s^2 and rows of all layers (both without layers if not recorded), from one part of what the observers returned.

    Args:
        observed: for each layer, the parts that its observer returned.
        part: the part to take. There is one, or with `last` two: part 0 has s^2 and rows of the tokens before the last
            ones, part 1 has s^2 of the last ones and rows of all tokens.
    """
    squares, rows = zip(*(layer[part] for layer in observed), strict=True) if observed else ((), ())
    return tuple(s for s in squares if s is not None), tuple(r for r in rows if r is not None)
