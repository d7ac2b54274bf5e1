"""Means over texts with 95% bootstrap intervals."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value and its 95% percentile bootstrap interval over texts; the bounds are NaN if there is only one text."""

    value: float
    low: float
    high: float


def ratio_of_sums(
    numerators: Sequence[float], denominators: Sequence[float], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """sum(numerators) / sum(denominators), such as the loss per token; the bootstrap resamples whole texts.

    Args:
        numerators: one number for each text.
        denominators: one positive number for each text.
        seed: seed of the draws. The same seed draws the same texts, so that methods are compared on the same ones.
        resamples: number of bootstrap resamples.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    value = float(above.sum() / below.sum())
    if len(above) < 2:
        return Interval(value, math.nan, math.nan)
    from scipy import stats

    with warnings.catch_warnings():
        # If all texts are alike, the interval is the value itself.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (above, below),
            lambda a, b, axis=-1: a.sum(axis=axis) / b.sum(axis=axis),
            n_resamples=resamples,
            paired=True,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    return Interval(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def mean(values: Sequence[float], seed: int, resamples: int = RESAMPLES) -> Interval:
    """The mean of values, one for each text."""
    return ratio_of_sums(values, [1.0] * len(values), seed, resamples)


def share(outcomes: Sequence[bool]) -> Interval:
    """The share of texts for which something is true, with its Wilson interval, which is informative even if it is true
    for all texts or for none."""
    from scipy import stats

    value = sum(outcomes) / len(outcomes)
    if len(outcomes) < 2:
        return Interval(value, math.nan, math.nan)
    found = stats.binomtest(sum(outcomes), len(outcomes)).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(value, float(found.low), float(found.high))


def exponential(interval: Interval) -> Interval:
    """The exponential of a mean loss and of its bounds: a perplexity."""
    return Interval(*(_exp(bound) for bound in dataclasses.astuple(interval)))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
