"""Scores of given answers in the dense and every pruned model, text by text."""

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
"""Sums over the tokens of an answer: -log p in nats, KL(dense || pruned) in nats, equal most probable tokens."""


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
    """Scores of given answers in every variant's model, one for each sequence.

    Args:
        model: the full model.
        variants: what to compare with it.
        prefilled: the prompts, with statistics, with room for the answers and with `grid.rows_of(variants, extensions)`
            rows.
        answers: token ids, padded on the right.
        lengths: real ones of each.
        seeds: of the draws for each.
        upto: the sums are over the first tokens of an answer, as many as each of these says, or all if it has fewer.
        extensions: what the steps beyond GRIFFIN take.

    Returns:
        For each sequence `tokens`, how many were scored, and for each variant's name the sums of `SCORES`; all of these
        are lists along `upto`.
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
    """`score_answers` of any models.

    Args:
        model: the full model.
        every: gives the variants with their models, from the statistics of the answers.
        prefilled: the prompts, with room for the answers.
        answers: token ids, padded on the right.
        lengths: real ones of each.
        upto: as in `score_answers`.
        more: variants whose residual streams are there already, as from `teacher_force`.
        against: what the variants are compared with, where it is not `model`: another full model, and its residual
            streams of the same answers.
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
