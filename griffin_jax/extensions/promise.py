"""Beyond GRIFFIN: take the lowest density that keeps a promise about the divergence from the dense model's predictions.

    prefilled = prefill(model, tokens, lengths, max_new_tokens=N, last=T)
    ends = ends_of(pruners)                         pruners: a pruner for each density; ends: lowest and highest density
    found = try_pruners(model, prefilled, last_tokens, [pruners[density] for density in ends])
    promised = choose(list(pruners), {density: found[:, at] for at, density in enumerate(ends)}, 0.1)

How much an answer loses to pruning is not known before it is written. But the full model has scored the last tokens of
the prompt, so pruned models can be tried on these. In a trial, the tokens before the last ones choose the neurons, just
as the prompt chooses those of the answer. From a few fixed densities, the lowest one whose divergence is small enough
is taken. If there is none, the answer is dense.

A trial must be short, because it must cost little next to reading the prompt, and the divergences of single tokens
differ widely. Therefore not only the mean divergence must be small enough, but the mean plus `MARGIN` of its standard
errors. Moreover, only two densities d are tried, in one pass. Between them, the divergence is assumed to be a power of
the pruned share,

    KL(d) = a (1 - d)^b

which is 0 if nothing is pruned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float

DENSITIES = (0.25, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Densities that may be taken; those below the lowest density that the user allows are left out. They are few, because
each has its own shapes and so its own programs."""

ENDS = 2
"""Largest number of densities that are tried."""

TRIALS = (32, 16, 8)
"""Numbers of tokens that a trial may have; the largest one that the prompt is long enough for is taken. They are few,
because each compiles another program."""

PART = 128
"""Number of tokens that a prompt must have for each token of a trial, unless it is the shortest trial, so that little
of the prompt is read again. A token of a trial costs more than one of a prompt: all weights are read for few tokens,
and their logits over the vocabulary are needed."""

SHORTEST = 256
"""Number of tokens of the shortest prompt that has a trial."""

MARGIN = 3.0
"""Number of standard errors that are added to the mean divergence. With this number, the promise was kept for nine in
ten of a model's own answers to prompts of four kinds, as counted by `griffin-jax eval promise`. Texts that others wrote
take more."""

NOTHING = 1e-12
"""Smallest divergence, in nats; it replaces smaller ones and those that rounding makes negative."""


def trial_tokens(prompt: int, new: int | None = None) -> int:
    """The number of tokens at the end of a prompt that form its trial; 0 if the prompt is too short for one.

    Args:
        prompt: number of tokens of the prompt.
        new: number of tokens at its end that have not been read yet; all if None.
    """
    if prompt < SHORTEST:
        return 0
    most = min(max(prompt // PART, min(TRIALS)), prompt if new is None else new)
    return next((tokens for tokens in TRIALS if tokens <= most), 0)


def allowed_densities(least: float) -> tuple[float, ...]:
    """The densities below 1 that may be taken, ascending.

    Args:
        least: the lowest density that the user allows.
    """
    return tuple(sorted({density for density in (least, *DENSITIES) if least <= density < 1}))


def ends_of(densities: Collection[float]) -> tuple[float, ...]:
    """The densities that are tried: the lowest and the highest of those that may be taken."""
    return tuple(dict.fromkeys((min(densities), max(densities))))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The divergence of a density on a trial.

    Attributes:
        divergence: mean divergence over the trial of each prompt, in nats per token.
        bound: the same plus the margin, for each prompt; this is what must be small enough.
    """

    divergence: tuple[float, ...]
    bound: tuple[float, ...]

    @classmethod
    def of(cls, divergences: Float[np.ndarray, "b t"], margin: float = MARGIN) -> Outcome:
        """The outcome for given divergences of single tokens.

        Args:
            divergences: divergences at the T tokens of each prompt's trial, (B, T), in nats; T is at least 2.
            margin: number of standard errors to add to the mean.
        """
        values = np.asarray(divergences, np.float64)
        mean = values.mean(axis=1)
        error = values.std(axis=1, ddof=1) / math.sqrt(values.shape[1])
        return cls(tuple(mean.tolist()), tuple((mean + margin * error).tolist()))

    def keeps(self, most: float) -> bool:
        """Whether the bound of every prompt is at most `most` nats per token."""
        return all(bound <= most for bound in self.bound)


def between(density: float, tried: Mapping[float, Outcome]) -> Outcome:
    """The outcome of a density between the two that were tried.

    For each prompt, the power law KL(d) = a (1 - d)^b is drawn through the two outcomes.

    Args:
        density: the density, below 1.
        tried: the outcomes of the lowest and the highest density, in this order.
    """
    (low, first), (high, second) = tried.items()
    part = math.log((1 - density) / (1 - low)) / math.log((1 - high) / (1 - low))

    def power(first: tuple[float, ...], second: tuple[float, ...]) -> tuple[float, ...]:
        low, high = (np.log(np.maximum(values, NOTHING)) for values in (first, second))
        return tuple(np.exp(low + part * (high - low)).tolist())

    return Outcome(power(first.divergence, second.divergence), power(first.bound, second.bound))


@dataclasses.dataclass(frozen=True)
class Promised:
    """How a promise was kept.

    Attributes:
        most: the promised divergence, in nats per token.
        density: the density that was taken; 1 if nothing was pruned.
        tokens: number of tokens of each prompt's trial; 0 if there was no trial, because a prompt was too short.
        tried: the outcomes of the densities that were tried, the lowest and the highest.
        outcome: the outcome of the density that was taken, measured or derived from those that were tried; None if
            nothing was pruned.
    """

    most: float
    density: float
    tokens: int
    tried: Mapping[float, Outcome]
    outcome: Outcome | None

    @property
    def divergence(self) -> float:
        """The largest mean divergence that the density has on the trial of any prompt; 0 if nothing was pruned."""
        return 0.0 if self.outcome is None else max(self.outcome.divergence)

    @classmethod
    def dense(cls, most: float) -> Promised:
        """A promise that is kept without a trial, because nothing is pruned."""
        return cls(most, 1.0, 0, {}, None)


def choose(
    densities: Sequence[float],
    divergences: Mapping[float, Float[np.ndarray, "b t"]],
    most: float,
    margin: float = MARGIN,
) -> Promised:
    """Choose the lowest density that keeps a promise for every prompt; 1 if none does.

    Args:
        densities: the densities that may be taken, ascending.
        divergences: the divergences at the tokens of the trials, (B, T), for each of the densities from `ends_of`, the
            lowest first.
        most: the promised divergence, in nats per token.
        margin: number of standard errors to add to the mean of a trial.
    """
    tried = {density: Outcome.of(found, margin) for density, found in divergences.items()}
    (tokens,) = {found.shape[1] for found in divergences.values()}
    for density in densities:
        outcome = tried[density] if density in tried else between(density, tried)
        if outcome.keeps(most):
            return Promised(most, density, tokens, tried, outcome)
    return Promised(most, 1.0, tokens, tried, None)
