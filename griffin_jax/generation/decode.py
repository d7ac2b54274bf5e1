"""The way of the data: prefill -> select -> prune -> decode.

Four pure functions over pytrees (`select` and `prune` live in `griffin_jax.griffin.select`), each of which
can be called alone, under `jax.jit` or inside a user's own pipeline:

    prefilled = prefill(model, tokens, lengths, room=N)
    experts = select(prefilled.statistics, GriffinConfig(density=0.5))
    pruned = prune(model, experts)
    answer = decode(pruned, begin(prefilled), N)

Decoding does not know whether the model it was handed is pruned, so dense decoding is the same code
with the prune step left out.

Beyond GRIFFIN, the full model may read every N tokens what the pruned one wrote:

    answer, statistics, _ = refresh(model, answer, statistics, N)
    pruned = prune(model, select(statistics, config), reuse=pruned)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from griffin_jax.extensions.reconstruction import rows_at, spread
from griffin_jax.generation.sampling import Greedy, Sampler
from griffin_jax.griffin.select import Experts, Statistics, prune, select
from griffin_jax.model.cache import EMPTY, KVCache, empty_cache
from griffin_jax.model.config import GriffinConfig
from griffin_jax.model.transformer import Transformer, statistic
from griffin_jax.parallel.mesh import mesh_of, over_data

DEFAULT_CHUNK = 1024
"""Tokens that prefill reads at a time: its attention scores and intermediates are this high."""


def bucket(length: int) -> int:
    """The padded length: 16, 24, 32, 48, 64, ... up to 1,024, behind it four lengths up to each doubling.

    Few lengths mean few compilations: a second prompt of the same bucket compiles nothing. Of a long prompt, less than
    a fifth is padding.
    """
    below = 1 << max(4, (length - 1).bit_length() - 1)
    step = below // (2 if length <= DEFAULT_CHUNK else 4)
    return max(16, -(-length // step) * step)


def chunk_count(length: int, chunk: int) -> int:
    """In how many chunks of at most `chunk` tokens a length is read; they divide it evenly where they can."""
    fewest = -(-length // chunk)
    return next((count for count in range(fewest, 2 * fewest) if length % count == 0), fewest)


def by_chunk(x: Array, chunks: int) -> Array:
    """An array (B, T, ...) cut along T into equal chunks, which come first: (chunks, B, T / chunks, ...)."""
    return x.reshape(x.shape[0], chunks, -1, *x.shape[2:]).swapaxes(0, 1)


def pad(
    sequences: Sequence[Sequence[int] | Int[np.ndarray, "_n"]], length: int
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b"]]:
    """Token sequences as one array, padded on the right with 0 to `length`, and their lengths.

    Raises:
        ValueError: a sequence is longer.
    """
    if (longest := max(map(len, sequences), default=0)) > length:
        raise ValueError(f"a sequence of {longest} tokens does not fit into {length}")
    tokens = np.zeros((len(sequences), length), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return tokens, np.asarray([len(sequence) for sequence in sequences], np.int32)


_Observed = tuple[Array | None, Array | None]
"""What is kept of a layer: s^2, and relative activations of some tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """A prompt that was read by the full model.

    Attributes:
        logits: scores of the token behind each prompt, float32.
        hidden: the residual stream that they are computed from, behind the last layer.
        cache: keys and values of the prompt, with room for the answer.
        statistics: what GRIFFIN selects by; no layers if they were not collected.
        room: tokens that the cache has room for behind the prompt.
        rows: per layer, relative activations of some tokens of each prompt, in the model's dtype, for a
            `Reconstruction`; no layers unless they were asked for.
    """

    logits: Float[Array, "b v"]
    hidden: Float[Array, "b d"]
    cache: KVCache
    statistics: Statistics
    room: int = dataclasses.field(metadata={"static": True})
    rows: tuple[Float[Array, "b _r _f"], ...] = ()


def prefill(
    model: Transformer,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    *,
    room: int,
    longest: int | Int[Array, "..."] | None = None,
    chunk: int = DEFAULT_CHUNK,
    collect: bool = True,
    rows: int = 0,
) -> Prefilled:
    """Reads prompts with the model, exactly, and records how strongly each neuron takes part.

    If the model is on a mesh, prompts are divided along its axis `data`, and all that comes from them; where that does
    not divide their number, each part of the mesh has all of them.

    Args:
        model: the full model.
        tokens: prompts, padded on the right to a common length with any token.
        lengths: real tokens of each prompt, in [1, T].
        room: longest answer that the cache gets slots for, in tokens; static.
        longest: tokens that the answer (or that of each row) may come to have, by which LongRoPE chooses its
            wavelengths; `room` if None. Not static, so that `room` can be rounded up without meaning.
        chunk: tokens read at a time, at most; static. It bounds memory and changes no result.
        collect: whether to gather the statistics; static.
        rows: tokens of each prompt whose relative activations are kept for a `Reconstruction`: all of them, or this
            many that are spread evenly over a longer prompt; static.
    """
    batch, length = tokens.shape
    chunks = chunk_count(length, chunk)
    chunk = -(-length // chunks)
    padded = chunks * chunk
    mesh = mesh_of(model.embedding[...])
    tokens, lengths = over_data(mesh, jnp.pad(tokens, ((0, 0), (0, padded - length)))), over_data(mesh, lengths)
    positions = jnp.arange(padded, dtype=jnp.int32)
    positions = jnp.where(positions < lengths[:, None], positions, EMPTY)
    chosen = spread(lengths, rows) if rows else None

    def read(carry: tuple[KVCache, Array, tuple[_Observed, ...]], step: tuple[Array, Array]):
        cache, last, observed = carry
        chunk_tokens, chunk_positions = step
        # The cache was empty, so its cursor is the number of tokens before this chunk.
        before = cache.cursor

        def observe(layer: int, z: Array, real: Array) -> _Observed:
            squares = statistic(layer, z, real) if collect else None
            return squares, None if chosen is None else rows_at(z, chosen - before)

        x, cache, more = model(
            chunk_tokens,
            chunk_positions,
            cache,
            read_slots=0 if chunks == 1 else padded,
            observe=observe if collect or rows else None,
        )
        is_last = (chunk_positions == lengths[:, None] - 1)[..., None]
        last = last + jnp.sum(jnp.where(is_last, x, 0), axis=1)
        return (cache, last, jax.tree.map(jnp.add, observed, more)), None

    context = jnp.asarray(lengths + (room if longest is None else longest), jnp.int32)
    carry = (
        empty_cache(model.config, batch, padded + room, model.dtype, context=context),
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
        carry, _ = read(carry, (tokens, positions))
    else:
        carry, _ = jax.lax.scan(read, carry, (by_chunk(tokens, chunks), by_chunk(positions, chunks)))
    cache, last, observed = carry
    squares = tuple(square for square, _ in observed if square is not None)
    statistics = Statistics(squares, jnp.asarray(lengths, jnp.int32))
    logits = model.logits(last[:, None])[:, 0]
    return Prefilled(logits, last, cache, statistics, room, tuple(row for _, row in observed if row is not None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answer:
    """Answers in the making: everything that `decode` needs to go on.

    Attributes:
        tokens: the answers so far, `EMPTY` behind them and behind the end of a row.
        count: columns of `tokens` that are written.
        done: rows that have ended.
        lengths: real tokens of the prompts.
        cache: of the prompts and of all answer tokens but the newest.
        key: each token is drawn with a key of its own, derived from this, its column and its row; or from its row's
            key and its column, if every row has one.
    """

    tokens: Int[Array, "b n"]
    count: Int[Array, ""]
    done: Bool[Array, "b"]
    lengths: Int[Array, "b"]
    cache: KVCache
    key: Key[Array, "*b"]


def begin(
    prefilled: Prefilled,
    *,
    sampler: Sampler = Greedy(),
    eos: tuple[int, ...] = (),
    seed: int | Int[Array, "*b"] = 0,
) -> Answer:
    """The answer's first token, from the full model's logits behind the prompt.

    Args:
        prefilled: the prompts. Donate the cache: the answer goes on in it.
        sampler: how to draw.
        eos: any of these tokens ends a row; static.
        seed: of all randomness in the answer; or one for each row, whose draws then do not depend on its batch.

    Returns:
        Answers of one token each, with room for as many as the cache has.
    """
    batch = prefilled.logits.shape[0]
    answer = Answer(
        tokens=jnp.full((batch, prefilled.room), EMPTY, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        done=jnp.zeros((batch,), bool),
        lengths=prefilled.statistics.tokens,
        cache=prefilled.cache,
        key=jax.vmap(jax.random.key)(seed) if jnp.ndim(seed) else jax.random.key(seed),
    )
    return _append(answer, prefilled.logits, prefilled.cache, sampler, eos)


def decode(
    model: Transformer,
    answer: Answer,
    until: int | Int[Array, ""],
    *,
    sampler: Sampler = Greedy(),
    eos: tuple[int, ...] = (),
) -> Answer:
    """Goes on until every row holds `until` tokens or has ended: one loop on the device.

    Called again with a larger `until` it goes on where it stopped, with the same tokens as in one
    call. The model may be full or pruned.

    Args:
        model: what the next tokens are computed with.
        answer: from `begin` or `decode`. Donate it where it is not used again.
        until: tokens of the longest row, those before included; no more than there is room for.
        sampler: how to draw.
        eos: any of these tokens ends a row; static.

    Returns:
        The longer answers.
    """
    until = jnp.minimum(until, answer.tokens.shape[1])

    def unfinished(answer: Answer) -> Bool[Array, ""]:
        return (answer.count < until) & ~jnp.all(answer.done)

    def step(answer: Answer) -> Answer:
        newest = jax.lax.dynamic_slice_in_dim(answer.tokens, answer.count - 1, 1, axis=1)
        positions = jnp.where(answer.done, EMPTY, answer.lengths + answer.count - 1)[:, None]
        x, cache, _ = model(jnp.maximum(newest, 0), positions, answer.cache)
        return _append(answer, model.logits(x)[:, 0], cache, sampler, eos)

    return jax.lax.while_loop(unfinished, step, answer)


def refresh(
    model: Transformer,
    answer: Answer,
    statistics: Statistics,
    width: int,
    *,
    rows: tuple[Float[Array, "b _r _f"], ...] = (),
    sampler: Sampler = Greedy(),
    eos: tuple[int, ...] = (),
) -> tuple[Answer, Statistics, tuple[Float[Array, "b _r _f"], ...]]:
    """Beyond GRIFFIN: the full model reads the newest `width` tokens of the answers, in one pass, and writes the next.

    What the pruned model has put into the cache for these tokens is replaced by what the full model makes of them. If
    that is done at every `width` tokens (when `answer.count` is a multiple of it), each token is read by the full model
    once, so that cache and statistics are those of a prompt that had the answer in it. One token in `width` is the full
    model's, whose scores come with the pass; with a width of 1 all are, which is dense decoding.

    Args:
        model: the full model.
        answer: that holds at least `width` tokens and has room for one more. Donate it.
        statistics: of all that the full model has read before: of the prompts, or from the refresh before.
            With no layers none are added.
        width: how many tokens to read; static.
        rows: relative activations for a `Reconstruction`, from `prefill` or from the refresh before.
        sampler: how to draw.
        eos: any of these tokens ends a row; static.

    Returns:
        The answers, one token longer; the statistics with those of the tokens that were read; and the rows, in which
        the newest tokens have taken free places and then those of the oldest ones: what was read last is most like
        what comes next, and the fit costs no more than before.
    """
    first = answer.count - width
    tokens = jax.lax.dynamic_slice_in_dim(answer.tokens, first, width, axis=1)
    positions = answer.lengths[:, None] + first + jnp.arange(width, dtype=jnp.int32)
    positions = jnp.where(tokens == EMPTY, EMPTY, positions)
    cache = answer.cache.without_last(width - 1)
    x, cache, statistics, rows = read_on(model, cache, jnp.maximum(tokens, 0), positions, statistics, rows)
    return _append(answer, model.logits(x[:, -1:])[:, 0], cache, sampler, eos), statistics, rows


def read_on(
    model: Transformer,
    cache: KVCache,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    statistics: Statistics,
    rows: tuple[Float[Array, "b _r _f"], ...] = (),
) -> tuple[Float[Array, "b t d"], KVCache, Statistics, tuple[Float[Array, "b _r _f"], ...]]:
    """Reads tokens behind those of a cache, and takes them into what was recorded of these.

    Args:
        model: what reads.
        cache: of the tokens before, with room for T more.
        tokens: token ids.
        positions: of each in its row; `EMPTY` for padding, which is on the right.
        statistics: of the tokens before. With no layers none are gathered; its counts of tokens are needed for `rows`.
        rows: relative activations of some of the tokens before, the oldest first, zeros behind them.

    Returns:
        The residual stream, the longer cache, the statistics of all tokens, and as many rows as before: the newest
        there are, the oldest first.
    """
    more = jnp.sum(positions != EMPTY, axis=1, dtype=jnp.int32)

    def newest(old: Float[Array, "b r f"], z: Float[Array, "b t f"]) -> Float[Array, "b r f"]:
        size = old.shape[1]
        used = jnp.minimum(statistics.tokens, size)[:, None]
        # Old and new rows are one queue, of which the last `size` are kept.
        place = jnp.arange(size) + jnp.maximum(used + more[:, None] - size, 0)
        kept = jnp.take_along_axis(old, jnp.minimum(place, size - 1)[..., None], axis=1)
        column = jnp.where(place - used < more[:, None], place - used, EMPTY)
        return jnp.where((place < used)[..., None], kept, rows_at(z, column))

    def observe(layer: int, z: Array, real: Array) -> _Observed:
        squares = statistic(layer, z, real) if statistics.squares else None
        return squares, newest(rows[layer], z) if rows else None

    recorded = bool(statistics.squares or rows)
    x, cache, observed = model(tokens, positions, cache, observe=observe if recorded else None)
    squares = tuple(square for square, _ in observed if square is not None)
    rows = tuple(row for _, row in observed if row is not None)
    return x, cache, statistics + Statistics(squares, more), rows


def column_keys(answer: Answer, column: int | Int[Array, ""]) -> Key[Array, "b"]:
    """What the tokens of a column are drawn with, one key for each row."""
    if answer.key.ndim:
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(answer.key, column)
    key = jax.random.fold_in(answer.key, column)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(answer.done.shape[0]))


def _append(
    answer: Answer, logits: Float[Array, "b v"], cache: KVCache, sampler: Sampler, eos: tuple[int, ...]
) -> Answer:
    token = jnp.where(answer.done, EMPTY, sampler(logits, column_keys(answer, answer.count)))
    ended = jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros_like(answer.done)
    return dataclasses.replace(
        answer,
        tokens=jax.lax.dynamic_update_slice(answer.tokens, token[:, None], (0, answer.count)),
        count=answer.count + 1,
        done=answer.done | ended,
        cache=cache,
    )


def teacher_forced(
    model: Transformer,
    tokens: Int[Array, "b t"],
    prompt_length: int,
    config: GriffinConfig,
    *,
    experts: Experts | None = None,
    seed: int | Int[Array, ""] = 0,
) -> Float[Array, "b t v"]:
    """Logits behind every token when the first `prompt_length` are the prompt and the rest its answer.

    The prompt is read by the full model, the rest by the model pruned for that prompt: what decoding
    these tokens would have seen. (arXiv 2404.01365 scores classification so, with an answer of one.)
    Every T and prompt length compiles anew, and memory holds the logits of all T tokens.

    Args:
        model: the full model.
        tokens: prompts and answers without padding.
        prompt_length: tokens that are prompt, in [1, T]; static.
        config: how to prune; static.
        experts: neurons to keep instead of those that the prompt selects.
        seed: for the methods that draw.

    Returns:
        Float32; row t scores token t + 1.
    """
    batch, length = tokens.shape
    tokens = over_data(mesh_of(model.embedding[...]), tokens)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    cache = empty_cache(model.config, batch, length, model.dtype)
    prompt, cache, squares = model(
        tokens[:, :prompt_length],
        positions[:, :prompt_length],
        cache,
        read_slots=0,
        observe=statistic if experts is None else None,
    )
    logits = model.logits(prompt)
    if prompt_length == length:
        return logits
    if experts is None:
        statistics = Statistics(squares, jnp.full((batch,), prompt_length))
        experts = select(statistics, config, model=model, seed=seed)
    rest, _, _ = prune(model, experts)(tokens[:, prompt_length:], positions[:, prompt_length:], cache)
    return jnp.concatenate([logits, model.logits(rest)], axis=1)
