"""Teacher forcing: how probable given answers are, and how far pruned predictions are from the dense model's.

    prefilled = prefill(model, tokens, lengths, max_new_tokens=R)             as for an answer that is written
    dense, statistics = teacher_force(model, prefilled, answers, lengths)     reads given answers instead
    pruned, _ = teacher_force(prune(model, experts), prefilled, answers, lengths)
    losses(model, dense, answers)                                             how well the answers were predicted
    compare(model, dense, (pruned,), answers)                                 how much the pruned predictions differ
    hidden, longer = extend(model, prefilled, tokens, lengths)                continues the prompts, and scores them

Prompts and answers may be ragged, and prompts that were read once serve any number of pruned models. Logits over the
vocabulary are computed for a few tokens at a time, which bounds their memory; see `LOGITS_BYTES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.generation.padding import DEFAULT_CHUNK, by_chunk, chunk_count
from griffin_jax.generation.prefill import LastTokens, Prefilled, read_on
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.masked import mask
from griffin_jax.griffin.neurons import ExpertNeurons, ranges_of
from griffin_jax.griffin.select import select
from griffin_jax.griffin.statistic import Statistics, statistic
from griffin_jax.model.cache import EMPTY, KVCache, empty_cache
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import mesh_of, over_data

LOGITS_BYTES = 1 << 27
"""Largest size of the logits that exist at a time, unless those of one token of each row are larger already."""


def teacher_force(
    model: Transformer,
    prefilled: Prefilled,
    answers: Int[Array, "b r"],
    lengths: Int[Array, "b"],
    *,
    collect: bool = False,
) -> tuple[Float[Array, "b r d"], Statistics]:
    """Read given answers after prompts that were prefilled, as if they were being decoded.

    If R is larger than `DEFAULT_CHUNK`, the answers are read in equal chunks of at most that many tokens, provided that
    R can be divided so; all R from `bucket` can. This bounds the size of attention scores and intermediates.

    Args:
        model: the full model or a pruned one.
        prefilled: the prompts, with room for R tokens. It stays as it is.
        answers: token ids of the answers, (B, R), padded on the right with any token.
        lengths: number of real tokens of each answer, (B,), in [0, R].
        collect: whether to collect GRIFFIN's statistic over the answers; static.

    Returns:
        The residual stream that scores each answer token, (B, R, D), for `losses` and `compare`; and the statistics of
        the answers, without layers unless `collect`. Each token is scored by the residual stream at the token before
        it, the first one therefore by that of the prompt, which is the full model's.
    """
    batch = answers.shape[0]
    nothing = tuple(jnp.zeros((batch, neurons), jnp.float32) for neurons in model.neurons if collect)
    nothing = Statistics(nothing, jnp.zeros((batch,), jnp.int32), ranges_of(model) if collect else ())
    hidden, _, statistics, _, _ = _read(model, prefilled, answers, lengths, nothing)
    return _shifted(prefilled, hidden), statistics


def extend(
    model: Transformer, prefilled: Prefilled, tokens: Int[Array, "b r"], lengths: Int[Array, "b"], *, last: int = 0
) -> tuple[Float[Array, "b r d"], Prefilled]:
    """Read more tokens of prompts, as if the prompts had been prefilled with them.

    Args:
        model: the full model.
        prefilled: the prompts, with room for at least R tokens. It stays as it is.
        tokens: ids of the tokens that follow, (B, R), padded on the right with any token.
        lengths: number of real tokens of each row, (B,), in [0, R].
        last: number of tokens at the end of each row that are recorded in `Prefilled.last`; 0 for none; static. With
            it, R may be at most `DEFAULT_CHUNK`.

    Returns:
        The residual stream that scores each of the tokens, (B, R, D), as from `teacher_force`; and the longer prompts,
        with room for R tokens less. They have statistics if `prefilled` had any. They have as many rows for a
        `Reconstruction` as before, in which the newest tokens have replaced the oldest.

    Raises:
        ValueError: the last tokens are to be recorded, and R is so large that the tokens are read in chunks.
    """
    recorded = prefilled.statistics, prefilled.rows
    hidden, cache, statistics, rows, before = _read(model, prefilled, tokens, lengths, *recorded, last)
    at = jnp.maximum(lengths - 1, 0)[:, None, None]
    newest = jnp.where(lengths[:, None] > 0, jnp.take_along_axis(hidden, at, axis=1)[:, 0], prefilled.hidden)
    logits = model.logits(newest[:, None])[:, 0]
    max_new_tokens = prefilled.max_new_tokens - tokens.shape[1]
    return _shifted(prefilled, hidden), Prefilled(logits, newest, cache, statistics, max_new_tokens, rows, before)


def _shifted(prefilled: Prefilled, hidden: Float[Array, "b r d"]) -> Float[Array, "b r d"]:
    """The residual stream that scores each token, which is the one at the token before it."""
    return jnp.concatenate([prefilled.hidden[:, None], hidden[:, :-1]], axis=1)


def _read(
    model: Transformer,
    prefilled: Prefilled,
    tokens: Int[Array, "b r"],
    lengths: Int[Array, "b"],
    statistics: Statistics,
    rows: tuple[Float[Array, "b _r _f"], ...] = (),
    last: int = 0,
) -> tuple[Float[Array, "b r d"], KVCache, Statistics, tuple[Float[Array, "b _r _f"], ...], LastTokens | None]:
    batch, length = tokens.shape
    steps = jnp.arange(length, dtype=jnp.int32)
    positions = jnp.where(steps < lengths[:, None], prefilled.statistics.tokens[:, None] + steps, EMPTY)
    chunks = chunk_count(length, DEFAULT_CHUNK) if length else 1
    if chunks == 1 or length % chunks:
        return read_on(model, prefilled.cache, tokens, positions, statistics, rows, last)
    if last:
        raise ValueError(f"the last tokens are recorded of {DEFAULT_CHUNK} tokens at most, got {length}")

    def read(state: tuple[KVCache, Statistics, Any], chunk: tuple[Array, Array]):
        cache, statistics, rows = state
        hidden, cache, statistics, rows, _ = read_on(model, cache, *chunk, statistics, rows)
        return (cache, statistics, rows), hidden

    parts = by_chunk(tokens, chunks), by_chunk(positions, chunks)
    (cache, statistics, rows), hidden = jax.lax.scan(read, (prefilled.cache, statistics, rows), parts)
    return hidden.swapaxes(0, 1).reshape(batch, length, -1), cache, statistics, rows, None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """How well each token of an answer was predicted. Values at padding are meaningless.

    Attributes:
        loss: -log p of the token, in nats, (B, R), float32.
        greedy: whether the token is the most probable one, (B, R).
    """

    loss: Float[Array, "b r"]
    greedy: Bool[Array, "b r"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Comparison:
    """A pruned model's predictions compared with the dense model's. Values at padding are meaningless.

    Attributes:
        loss: -log p of the answer's token in the pruned model, in nats, (B, R), float32.
        kl: KL(dense || pruned) of the distributions over the token, in nats, (B, R), float32.
        agree: whether both models have the same most probable token, (B, R).
    """

    loss: Float[Array, "b r"]
    kl: Float[Array, "b r"]
    agree: Bool[Array, "b r"]


def losses(model: Transformer, hidden: Float[Array, "b r d"], answers: Int[Array, "b r"]) -> Losses:
    """Score how well answers were predicted.

    Args:
        model: the model whose final norm and head compute the logits; pruned models share those of the full one.
        hidden: the residual stream from `teacher_force`, (B, R, D).
        answers: the tokens that were predicted, (B, R).
    """

    def few(hidden: Array, answers: Array) -> tuple[Array, Array]:
        logits = model.logits(hidden)
        return _loss(jax.nn.log_softmax(logits), answers), jnp.argmax(logits, axis=-1) == answers

    return Losses(*_few_at_a_time(model, few, hidden, answers))


def compare(
    model: Transformer,
    dense: Float[Array, "b r d"],
    pruned: tuple[Float[Array, "b r d"], ...],
    answers: Int[Array, "b r"],
    *,
    other: Transformer | None = None,
) -> tuple[Comparison, ...]:
    """Compare the predictions of several pruned models with the dense model's.

    Args:
        model: the full model, whose final norm and head the pruned models share.
        dense: the full model's residual stream from `teacher_force`, (B, R, D).
        pruned: the residual stream of each pruned model, (B, R, D).
        answers: the tokens that were predicted, (B, R).
        other: the model whose final norm and head the pruned models share, if they were not made from `model`; for
            example the same model with quantised weights.

    Returns:
        A comparison for each pruned model.
    """
    scored = model if other is None else other

    def few(dense: Array, pruned: tuple[Array, ...], answers: Array) -> list[tuple[Array, Array, Array]]:
        p = jax.nn.log_softmax(model.logits(dense))
        probability, best = jnp.exp(p), jnp.argmax(p, axis=-1)
        found = []
        for hidden in pruned:
            q = jax.nn.log_softmax(scored.logits(hidden))
            kl = jnp.sum(probability * (p - q), axis=-1)
            found.append((_loss(q, answers), kl, jnp.argmax(q, axis=-1) == best))
        return found

    return tuple(Comparison(*scores) for scores in _few_at_a_time(model, few, dense, pruned, answers))


def divergences(
    model: Transformer, dense: Float[Array, "b r d"], pruned: Float[Array, "b c r d"]
) -> Float[Array, "b c r"]:
    """KL(dense || pruned) alone, for several pruned models whose logits are computed together: the head is read once.

    Args:
        model: the full model, whose final norm and head the pruned models share.
        dense: the full model's residual stream, (B, R, D).
        pruned: the residual streams of C pruned models, (B, C, R, D).

    Returns:
        The divergence of each pruned model at each token, (B, C, R), in nats, float32.
    """

    def few(every: Array) -> Array:
        b, t, c, d = every.shape
        log_p = jax.nn.log_softmax(model.logits(every.reshape(b, t * c, d))).reshape(b, t, c, -1)
        p, q = log_p[:, :, :1], log_p[:, :, 1:]
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    every = jnp.concatenate([dense[:, None], pruned], axis=1).swapaxes(1, 2)
    return _few_at_a_time(model, few, every, each=every.shape[2]).swapaxes(1, 2)


def _loss(log_probabilities: Float[Array, "b r v"], answers: Int[Array, "b r"]) -> Float[Array, "b r"]:
    return -jnp.take_along_axis(log_probabilities, answers[..., None], axis=-1)[..., 0]


def _few_at_a_time(model: Transformer, score: Callable[..., Any], *arrays: Any, each: int = 1) -> Any:
    """Calls `score` on arrays (B, R, ...), with as many of the R columns at a time as `LOGITS_BYTES` allows.

    Args:
        model: the model that computes the logits.
        score: a function of arrays (B, columns, ...) that returns arrays of that form.
        arrays: the arguments of `score`.
        each: number of tokens per row in each column for which `score` computes logits.
    """
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    columns = max(1, min(length, LOGITS_BYTES // (4 * each * batch * model.config.vocab_size)))
    blocks = -(-length // columns)

    def split(x: Array) -> Array:
        return by_chunk(jnp.pad(x, ((0, 0), (0, blocks * columns - length), *[(0, 0)] * (x.ndim - 2))), blocks)

    def join(y: Array) -> Array:
        return y.swapaxes(0, 1).reshape(batch, blocks * columns, *y.shape[3:])[:, :length]

    if blocks == 1:
        return score(*arrays)
    return jax.tree.map(join, jax.lax.map(lambda block: score(*block), jax.tree.map(split, arrays)))


def teacher_forced(
    model: Transformer,
    tokens: Int[Array, "b t"],
    prompt_length: int,
    config: GriffinConfig,
    *,
    experts: ExpertNeurons | None = None,
    seed: int | Int[Array, ""] = 0,
) -> Float[Array, "b t v"]:
    """Logits after every token of sequences whose first `prompt_length` tokens are the prompt and the rest its answer.

    The full model reads the prompt, and the model pruned for that prompt reads the answer, as in decoding these tokens.
    (arXiv 2404.01365 scores classification in this way, with answers of one token.) Every T and every prompt length
    compile a new program, and the logits of all T tokens are in memory.

    Args:
        model: the full model.
        tokens: token ids of prompts and answers, (B, T), without padding.
        prompt_length: number of tokens that are the prompt, in [1, T]; static.
        config: how to prune; static.
        experts: the neurons to keep; None for those that the prompt selects.
        seed: seed for the methods that draw neurons.

    Returns:
        Logits, (B, T, V), float32; those at index t score token t + 1.
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
        statistics = Statistics(squares, jnp.full((batch,), prompt_length, jnp.int32), ranges_of(model))
        experts = select(statistics, config, model=model, seed=seed)
    rest, _, _ = mask(model, experts)(tokens[:, prompt_length:], positions[:, prompt_length:], cache)
    return jnp.concatenate([logits, model.logits(rest)], axis=1)
