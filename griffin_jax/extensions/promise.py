"""Beyond GRIFFIN: the least density that keeps a promise about how far an answer's predictions are from the dense ones.

    before = prefill(model, tokens, lengths, max_new_tokens=T + N)       prompts without their last T tokens
    prefilled, last = read_last(model, before, last_tokens)              which the full model reads, and scores
    promised = choose(lambda at: last.divergences(model, pruners[at]), densities, 0.1)

What an answer will lose to pruning is not known before it is written. But the prompt's own last tokens were scored by
the full model, so a pruned one can be tried on them: its neurons are those that the tokens before these choose, as an
answer's are those that the prompt chooses. Of a few fixed densities the least one is taken whose divergence on the
trial is small enough, and none is pruned if it never is.

A trial is short, since it must cost little next to reading the prompt, and divergences of single tokens differ widely.
So what must be small enough is not their mean alone but the mean plus `MARGIN` standard errors of it.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation import jitted
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import to_host

DENSITIES = (0.25, 0.35, 0.5, 0.65, 0.8, 0.9)
"""Densities that are tried, of which those above the least one count. Few, because each has shapes of its own."""

TRIALS = (32, 16, 8)
"""Tokens of a trial: the most of these that the prompt is long enough for. Few, because each compiles anew."""

PART = 32
"""A prompt has at least so many tokens for each of the trial. Two densities are tried, or three where much can be
pruned, so that a trial reads a tenth of the prompt once more. Its passes are short, and each of them reads, and of
integers on CPUs converts, all weights: seen in timings on CPUs, trial and reading the prompt in two parts add a quarter
to reading 1,024 tokens in float32, and three fifths to 512 in int8."""

SHORTEST = min(TRIALS) * PART
"""Tokens of the shortest prompt that has a trial."""

MARGIN = 3.0
"""Standard errors of the mean divergence that are added to it: with so many the promise was kept for nine in ten of a
model's own answers to prompts of four kinds, as `griffin-jax eval promise` counts. Of texts by others it takes more."""


def trial_tokens(prompt: int, new: int | None = None) -> int:
    """The number of tokens at the end of a prompt that are its trial; 0 if it is too short for one.

    Args:
        prompt: its tokens.
        new: how many of them are not read yet, at the end; all if None.
    """
    most = min(prompt // PART, prompt if new is None else new)
    return next((tokens for tokens in TRIALS if tokens <= most), 0)


def tried_densities(least: float) -> tuple[float, ...]:
    """The densities that may be taken instead of all neurons, the least first."""
    return tuple(sorted({density for density in (least, *DENSITIES) if least <= density < 1}))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LastTokens:
    """The last tokens of prompts, for a trial.

    Attributes:
        before: the prompts without them, with room for them.
        tokens: themselves, the same number for every prompt.
        dense: the full model's log p of each of them but the first.
    """

    before: Prefilled
    tokens: Int[Array | np.ndarray, "b t"]
    dense: Float[Array, "b s v"]

    def divergences(
        self, model: Transformer, pruner: Pruner, seed: int | Int[Array, "*b"] = 0
    ) -> Float[np.ndarray, "b s"]:
        """KL(dense || pruned) of each token but the first, in nats, float32.

        The pruned model keeps the neurons that the tokens before choose. It is the full one with a mask, so that no
        weight is copied, and the same program serves every density. The first token is left out: the full model, which
        has read the one before it, scores it whatever is pruned.

        Args:
            model: the full model.
            pruner: how it is pruned.
            seed: for the methods that draw.
        """
        scorer = pruner.scorer(model, self.before.statistics, self.before.rows, seed=seed)
        hidden, _ = jitted.teacher_force(scorer, self.before, self.tokens, _all_of(self.tokens))
        return to_host(jitted.divergences(model, self.dense, hidden[:, 1:]))


def read_last(
    model: Transformer, before: Prefilled, tokens: Int[Array | np.ndarray, "b t"]
) -> tuple[Prefilled, LastTokens]:
    """Read the last tokens of prompts, and keep what a trial needs of them.

    Args:
        model: the full model.
        before: the prompts without these tokens, with statistics and with room for the tokens.
        tokens: the last T tokens of every prompt.

    Returns:
        The whole prompts, as from `griffin_jax.generation.scoring.extend`, and their last tokens.
    """
    hidden, prefilled = jitted.extend(model, before, tokens, _all_of(tokens))
    # The cache of the whole prompts begins with that of the tokens before: one of them is enough.
    before = dataclasses.replace(before, cache=prefilled.cache.without_last(tokens.shape[1]))
    return prefilled, LastTokens(before, tokens, jitted.log_probabilities(model, hidden[:, 1:]))


def _all_of(tokens: Int[Array | np.ndarray, "b t"]) -> Int[np.ndarray, "b"]:
    return np.full(tokens.shape[0], tokens.shape[1], np.int32)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a density was found to do on a trial.

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


@dataclasses.dataclass(frozen=True)
class Promised:
    """How a promise was kept.

    Attributes:
        most: what was promised, in nats per token.
        density: what was taken; 1 if nothing was pruned.
        tokens: of each prompt's trial that the pruned models scored; 0 if there was none, because a prompt was too
            short.
        tried: densities, in the order in which they were tried.
    """

    most: float
    density: float
    tokens: int
    tried: Mapping[float, Outcome]

    @property
    def divergence(self) -> float:
        """Mean divergence of the density on the trial of the prompt where it was largest; 0 if nothing was pruned."""
        return max(self.tried[self.density].divergence) if self.density in self.tried else 0.0


def choose(
    divergences: Callable[[int], Float[np.ndarray, "b t"]],
    densities: Sequence[float],
    most: float,
    margin: float = MARGIN,
) -> Promised:
    """The least density that keeps a promise for every prompt, by bisection: divergence falls as density grows.

    Where it does not, the density is still one that was tried and kept the promise, or 1.

    Args:
        divergences: of each token of the trials, by the index of a density.
        densities: those that may be taken, the least first.
        most: nats per token that are promised.
        margin: standard errors that are added to the mean of a trial.
    """
    tried, tokens = {}, 0

    def keeps(at: int) -> bool:
        nonlocal tokens
        found = divergences(at)
        tokens = found.shape[1]
        outcome = tried[densities[at]] = Outcome.of(found, margin)
        return outcome.keeps(most)

    taken = bisect.bisect_left(range(len(densities)), True, key=keeps)
    return Promised(most, densities[taken] if taken < len(densities) else 1.0, tokens, tried)
