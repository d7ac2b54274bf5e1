"""Beyond GRIFFIN: every few tokens, the full model reads what the pruned one wrote, and neurons are selected again.

    state, statistics, _ = refresh(model, state, statistics, N)
    pruned = prune(model, select(statistics, config), reuse=pruned)

The kept neurons thus follow the answer, and errors of the pruned model do not accumulate in the KV cache.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation import jitted
from griffin_jax.generation.decode import DecodeState, append_token
from griffin_jax.generation.prefill import Prefilled, read_on
from griffin_jax.generation.sampling import Greedy, Sampler
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.cache import EMPTY
from griffin_jax.model.transformer import Transformer
from griffin_jax.utils.deprecation import renamed_arguments


@renamed_arguments(answer="state")
def refresh(
    model: Transformer,
    state: DecodeState,
    statistics: Statistics,
    width: int,
    *,
    rows: tuple[Float[Array, "b _r _f"], ...] = (),
    sampler: Sampler = Greedy(),
    eos: tuple[int, ...] = (),
) -> tuple[DecodeState, Statistics, tuple[Float[Array, "b _r _f"], ...]]:
    """Read the newest `width` tokens of the answers with the full model, in one pass, and write the next token.

    The full model's keys and values replace those that the pruned model wrote for these tokens. If `refresh` is called
    after every `width` tokens (whenever `state.count` is a multiple of `width`), the full model reads each token once,
    and cache and statistics are as if the answer so far had been part of the prompt. The pass also gives the scores of
    the next token, so one token in `width` is the full model's. With a width of 1 all of them are, which is dense
    decoding.

    Args:
        model: the full model.
        state: answers with at least `width` tokens and room for one more. Donate it.
        statistics: statistics of everything that the full model has read so far, from `prefill` or the previous
            refresh. If they have no layers, none are collected.
        width: number of tokens to read; static.
        rows: relative activations for a `Reconstruction`, (B, R, F) for each layer, from `prefill` or the previous
            refresh.
        sampler: how tokens are drawn from the logits.
        eos: ids of the tokens that end a row; static.

    Returns:
        The answers, one token longer; the statistics, with the tokens that were read; and the rows. Rows of the newest
        tokens fill the free places first and then replace those of the oldest tokens: what was read last is most
        similar to what comes next, and with the same number of rows the fit costs no more than before.
    """
    first = state.count - width
    tokens = jax.lax.dynamic_slice_in_dim(state.tokens, first, width, axis=1)
    positions = state.lengths[:, None] + first + jnp.arange(width, dtype=jnp.int32)
    positions = jnp.where(tokens == EMPTY, EMPTY, positions)
    cache = state.cache.without_last(width - 1)
    x, cache, statistics, rows, _ = read_on(model, cache, jnp.maximum(tokens, 0), positions, statistics, rows)
    return append_token(state, model.logits(x[:, -1:])[:, 0], cache, sampler, eos), statistics, rows


def teacher_force_refreshed(
    model: Transformer,
    prefilled: Prefilled,
    answers: Int[Array | np.ndarray, "b r"],
    lengths: Int[Array | np.ndarray, "b"],
    pruner: Pruner,
    width: int,
    *,
    seed: int | Int[Array, "*b"] = 0,
) -> Float[Array, "b r d"]:
    """Read given answers as decoding would that refreshes and selects neurons again after every `width` tokens.

    Each stretch of `width` tokens is read by the pruned model, and then again by the full one, which scores the token
    after the stretch; see `refresh`. The steps are jitted one by one: in a single program, the linear systems by which
    all layers are refitted would be in memory together.

    Args:
        model: the full model.
        prefilled: the prompts, with statistics, with the rows that the pruner fits to, and with room for R tokens. It
            stays as it is. In later stretches, rows of the answer replace those of the prompt.
        answers: token ids of the answers, (B, R), padded on the right with any token.
        lengths: number of real tokens of each answer, (B,), in [0, R].
        pruner: how to prune.
        width: number of tokens between two refreshes; static.
        seed: seed for the methods that draw neurons; one, or one for each sequence, (B,).

    Returns:
        The residual stream that scores each answer token, (B, R, D), as from `teacher_force`.
    """

    length = answers.shape[1]
    refreshes = max(length - 1, 0) // width
    state, found = dataclasses.replace(prefilled, rows=prefilled.rows if pruner.rows else ()), []
    for number in range(refreshes + 1):
        start, last = number * width, number == refreshes
        tokens = answers[:, start:] if last else answers[:, start : start + width]
        left = jnp.clip(lengths - start, 0, tokens.shape[1])
        scorer = pruner.scorer(model, state.statistics, state.rows, seed=seed)
        found.append(jitted.teacher_force(scorer, state, tokens, left)[0])
        if not last:
            _, longer = jitted.extend(model, state, tokens, left)
            # The room is static; if it changed, every stretch would compile another program.
            state = dataclasses.replace(longer, max_new_tokens=state.max_new_tokens)
    return jnp.concatenate(found, axis=1)
