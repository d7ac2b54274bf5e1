"""Beyond GRIFFIN: the least density that keeps a promise about how far an answer's predictions are from the dense ones.

    prefilled = prefill(model, tokens, lengths, max_new_tokens=N, last=T)
    ends = ends_of(pruners)                                    of pruners by their density the first and the last
    found = try_pruners(model, prefilled, last_tokens, [pruners[density] for density in ends])
    promised = choose(list(pruners), {density: found[:, at] for at, density in enumerate(ends)}, 0.1)

What an answer will lose to pruning is not known before it is written. But the prompt's own last tokens were scored by
the full model, so a pruned one can be tried on them: its neurons are those that the tokens before these choose, as an
answer's are those that the prompt chooses. Of a few fixed densities the least one is taken whose divergence is small
enough, and none is pruned if it never is.

A trial is short, since it must cost little next to reading the prompt, and divergences of single tokens differ widely.
So what must be small enough is not their mean alone but the mean plus `MARGIN` standard errors of it. And only two of
the densities are tried, in one pass. Between them divergence is taken to follow a power of what is pruned,

    KL(d) = a (1 - d)^b

which is nothing where nothing is pruned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float

DENSITIES = (0.25, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Densities that may be taken, of which those above the least one count. Few, because each has shapes of its own."""

ENDS = 2
"""Densities that are tried, at most."""

TRIALS = (32, 16, 8)
"""Tokens of a trial: the most of these that the prompt is long enough for. Few, because each compiles anew."""

PART = 128
"""A prompt has so many tokens for each of a trial longer than the shortest, so that the pass reads little of it again.
Its tokens are more costly than a prompt's: they are few, all weights are read for them, and their scores over the
vocabulary are needed."""

SHORTEST = 256
"""Tokens of the shortest prompt that has a trial, the shortest one."""

MARGIN = 3.0
"""Standard errors of the mean divergence that are added to it: with so many the promise was kept for nine in ten of a
model's own answers to prompts of four kinds, as `griffin-jax eval promise` counts. Of texts by others it takes more."""

NOTHING = 1e-12
"""A divergence, in nats, that stands for smaller ones and those that rounding makes negative."""


def trial_tokens(prompt: int, new: int | None = None) -> int:
    """The number of tokens at the end of a prompt that are its trial; 0 if it is too short for one.

    Args:
        prompt: its tokens.
        new: how many of them are not read yet, at the end; all if None.
    """
    if prompt < SHORTEST:
        return 0
    most = min(max(prompt // PART, min(TRIALS)), prompt if new is None else new)
    return next((tokens for tokens in TRIALS if tokens <= most), 0)


def allowed_densities(least: float) -> tuple[float, ...]:
    """The densities that may be taken instead of all neurons, the least first."""
    return tuple(sorted({density for density in (least, *DENSITIES) if least <= density < 1}))


def ends_of(densities: Collection[float]) -> tuple[float, ...]:
    """The densities that are tried, of those that may be taken: the least and the largest."""
    return tuple(dict.fromkeys((min(densities), max(densities))))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a density does on a trial.

    Attributes:
        divergence: mean of each prompt's, in nats per token.
        bound: these with the margin, which must be small enough.
    """

    divergence: tuple[float, ...]
    bound: tuple[float, ...]

    @classmethod
    def of(cls, divergences: Float[np.ndarray, "b t"], margin: float = MARGIN) -> Outcome:
        """The outcome of the divergences of single tokens.

        Args:
            divergences: of each prompt's trial, in nats, at least two of each.
            margin: standard errors.
        """
        values = np.asarray(divergences, np.float64)
        mean = values.mean(axis=1)
        error = values.std(axis=1, ddof=1) / math.sqrt(values.shape[1])
        return cls(tuple(mean.tolist()), tuple((mean + margin * error).tolist()))

    def keeps(self, most: float) -> bool:
        """Whether the most demanding prompt is within so many nats per token."""
        return all(bound <= most for bound in self.bound)


def between(density: float, tried: Mapping[float, Outcome]) -> Outcome:
    """What a density does by those that were tried, the least and the largest: for each prompt, a power of 1 - density
    through what these do."""
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
        most: what was promised, in nats per token.
        density: what was taken; 1 if nothing was pruned.
        tokens: of each prompt's trial; 0 if there was none, because a prompt was too short.
        tried: what was found of the densities that were tried, the least and the largest.
        outcome: what the density that was taken does, by what was tried; None if nothing was pruned.
    """

    most: float
    density: float
    tokens: int
    tried: Mapping[float, Outcome]
    outcome: Outcome | None

    @property
    def divergence(self) -> float:
        """Mean divergence of the density on the trial of the prompt where it is largest; 0 if nothing was pruned."""
        return 0.0 if self.outcome is None else max(self.outcome.divergence)

    @classmethod
    def dense(cls, most: float) -> Promised:
        """A promise that is kept without a trial."""
        return cls(most, 1.0, 0, {}, None)


def choose(
    densities: Sequence[float],
    divergences: Mapping[float, Float[np.ndarray, "b t"]],
    most: float,
    margin: float = MARGIN,
) -> Promised:
    """The least density that keeps a promise for every prompt.

    Args:
        densities: those that may be taken, the least first.
        divergences: of each token of the trials, at the densities of `ends_of`.
        most: nats per token that are promised.
        margin: standard errors that are added to the mean of a trial.
    """
    tried = {density: Outcome.of(found, margin) for density, found in divergences.items()}
    (tokens,) = {found.shape[1] for found in divergences.values()}
    for density in densities:
        outcome = tried[density] if density in tried else between(density, tried)
        if outcome.keeps(most):
            return Promised(most, density, tokens, tried, outcome)
    return Promised(most, 1.0, tokens, tried, None)
