"""Beyond GRIFFIN: every few tokens the full model reads what the pruned one wrote.

    state, statistics, _ = refresh(model, state, statistics, N)
    pruned = prune(model, select(statistics, config), reuse=pruned)

So the neurons that are kept follow the answer, and errors of the pruned model do not accumulate in the cache.
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
    """Beyond GRIFFIN: the full model reads the newest `width` tokens of the answers in one pass, and writes the next.

    The keys and values that the pruned model wrote for these tokens are replaced by the full model's. If that is done
    after every `width` tokens (when `state.count` is a multiple of it), the full model reads each token once, so that
    cache and statistics are those of a prompt with the answer in it. One token in `width` is the full model's, because
    the pass gives its scores; with a width of 1 all are, which is dense decoding.

    Args:
        model: the full model.
        state: answers with at least `width` tokens and room for one more. Donate it.
        statistics: statistics of all that the full model has read before: those of the prompts, or from the refresh
            before. Without layers none are added.
        width: number of tokens to read; static.
        rows: relative activations for a `Reconstruction`, from `prefill` or from the refresh before.
        sampler: how tokens are drawn from the logits.
        eos: tokens that end a row; static.

    Returns:
        The answers, one token longer; the statistics including those of the tokens that were read; and the rows, in
        which the newest tokens have taken free places and then those of the oldest tokens: what was read last is most
        similar to what comes next, and the fit costs no more than before.
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
    """Read given answers like decoding with a refresh after every `width` tokens, where neurons are selected anew.

    Each stretch of `width` tokens is read by the pruned model, and then again by the full one, which scores the token
    after it; see `refresh`. The steps are jitted one by one: in one program, the systems of a refit of all layers would
    be in memory together.

    Args:
        model: the full model.
        prefilled: the prompts, with statistics, with the rows that the pruner fits to, and with room for R tokens. It
            stays as it is. Its rows give way to those of the answer.
        answers: token ids, padded on the right with any token.
        lengths: real tokens of each answer, in [0, R].
        pruner: how to prune.
        width: tokens between two refreshes; static.
        seed: for the methods that draw.

    Returns:
        The residual stream that scores each answer token, as from `teacher_force`.
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
            # All stretches have one type, of which the room is a part.
            state = dataclasses.replace(longer, max_new_tokens=state.max_new_tokens)
    return jnp.concatenate(found, axis=1)
