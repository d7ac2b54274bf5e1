"""Scores given answers with the dense model and every pruned one, text by text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from griffin_jax.evaluation.grid import DEFAULTS, REFRESH, Variant, models
from griffin_jax.extensions import jitted as jitted_extensions
from griffin_jax.extensions.config import Extensions
from griffin_jax.generation import jitted
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import to_host

SCORES = ("loss", "kl", "agree")
"""Sums over the tokens of an answer: of -log p in nats, of KL(dense || pruned) in nats, and the number of tokens for
which both models find the same token most probable."""


def score_answers(
    model: Transformer,
    variants: Sequence[Variant],
    prefilled: Prefilled,
    answers: Int[np.ndarray, "b r"],
    lengths: Int[np.ndarray, "b"],
    seeds: Int[np.ndarray, "b"],
    upto: Sequence[int],
    extensions: Extensions = DEFAULTS,
) -> list[dict[str, Any]]:
    """Scores given answers with every variant's model, one entry for each sequence.

    Args:
        model: the full model.
        variants: the variants to compare with it.
        prefilled: the prompts, with statistics, with room for the answers and with `grid.rows_of(variants, extensions)`
            rows.
        answers: token ids of the answers, padded on the right.
        lengths: number of real tokens of each answer.
        seeds: seed of the draws for each sequence.
        upto: numbers of tokens. For each of them, the scores are summed over that many first tokens of an answer, or
            over all of it if it is shorter.
        extensions: options of the steps beyond GRIFFIN.

    Returns:
        For each sequence, `tokens`, the number of tokens that were scored, and, by the name of each variant, the sums
        of `SCORES`. All of these are lists with one value for each number of `upto`.
    """

    def every(answers: Statistics) -> Iterator[tuple[Variant, Transformer]]:
        at_once = [variant for variant in variants if REFRESH not in variant.steps]
        return models(model, at_once, prefilled, answers, seeds, extensions, masked=True)

    tokens, real = jnp.asarray(answers), jnp.asarray(lengths)
    later, width = [variant for variant in variants if REFRESH in variant.steps], extensions.refresh_every
    if later and width is None:
        raise ValueError(f"{later[0].name} is refreshed: give extensions with refresh_every=N")
    refreshed = {
        variant: jitted_extensions.teacher_force_refreshed(
            model, prefilled, tokens, real, variant.pruner(extensions), width or 1
        )
        for variant in later
    }
    return score_models(model, every, prefilled, answers, lengths, upto, refreshed)


def score_models(
    model: Transformer,
    every: Callable[[Statistics], Iterable[tuple[Variant, Transformer]]],
    prefilled: Prefilled,
    answers: Int[np.ndarray, "b r"],
    lengths: Int[np.ndarray, "b"],
    upto: Sequence[int],
    more: Mapping[Variant, Float[Array, "b r d"]] = MappingProxyType({}),
    against: tuple[Transformer, Float[Array | np.ndarray, "b r d"]] | None = None,
) -> list[dict[str, Any]]:
    """`score_answers` for any models.

    Args:
        model: the full model.
        every: returns the variants with their models, given the statistics of the answers.
        prefilled: the prompts, with room for the answers.
        answers: token ids of the answers, padded on the right.
        lengths: number of real tokens of each answer.
        upto: as in `score_answers`.
        more: variants whose residual streams are known already, in the form that `teacher_force` returns.
        against: the full model that the variants are compared with, and its residual streams of the same answers; None
            to compare with `model`.
    """
    tokens, real = jnp.asarray(answers), jnp.asarray(lengths)
    dense, following = jitted.teacher_force(model, prefilled, tokens, real, collect=True)
    found = dict(more)
    for variant, pruned in every(following):
        found[variant] = dense if pruned is model else jitted.teacher_force(pruned, prefilled, tokens, real)[0]
    if against is None:
        comparisons = jitted.compare(model, dense, tuple(found.values()), tokens)
    else:
        comparisons = jitted.compare(*against, tuple(found.values()), tokens, other=model)
    compared = [{name: to_host(getattr(comparison, name)) for name in SCORES} for comparison in comparisons]
    ends = np.minimum(np.asarray(upto)[:, None], lengths).T
    scores = []
    for sequence, end in enumerate(ends):
        scores.append({"tokens": end.tolist()})
        for variant, comparison in zip(found, compared, strict=True):
            sums = {name: np.cumsum(np.append(0.0, values[sequence])) for name, values in comparison.items()}
            scores[-1][variant.name] = {name: sums[name][end].tolist() for name in SCORES}
    return scores
