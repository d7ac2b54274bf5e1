"""The models that are compared: the dense model, GRIFFIN and its baselines, at several densities."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.prior import DEFAULT_WEIGHT, check_fusion
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.griffin.config import GriffinConfig, Method, check_density
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.transformer import Transformer

DENSE, ORACLE = "dense", "oracle"
METHODS = get_args(Method)
BASELINES = (ORACLE, "magnitude", "random")
"""Baselines of every method: the best that this kind of selection can be, and two that ignore the prompt."""

PRIOR, BUDGETS, RECONSTRUCTION, CALIBRATION = "prior", "budgets", "reconstruction", "calibration"
HEALING, REFRESH = "healing", "refresh"
STEPS = (PRIOR, BUDGETS, RECONSTRUCTION, CALIBRATION, HEALING, REFRESH)
"""Steps beyond GRIFFIN, each of which may follow a method after a `+`, in this order: fuse ranks with those of a prior,
let layers keep different shares, refit the kept rows, also fit them to the calibration rows of the prior, add an
adapter that was trained for pruned models, and do all of this anew every few tokens."""
MEASURED = (PRIOR, BUDGETS, CALIBRATION)
"""The steps that need a prior."""


DEFAULTS = Extensions(refit=True, refresh_every=32)
"""Default options of the steps."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model that is evaluated.

    Attributes:
        method: `dense`, a method of `GriffinConfig`, or `oracle`, which keeps the k best neurons by the statistic of
            the answer itself instead of the prompt's. Any of `STEPS` may follow, each after a `+`.
        density: share of feed-forward neurons that are kept.
    """

    method: str
    density: float

    @property
    def selection(self) -> str:
        """The method, without the steps that follow it."""
        return self.method.split("+")[0]

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps that follow the method, which are among `STEPS`."""
        return tuple(self.method.split("+")[1:])

    @property
    def name(self) -> str:
        """The variant's name, for people and files."""
        return DENSE if self.method == DENSE else f"{self.method} {self.density:.12g}"

    def pruner(self, extensions: Extensions = DEFAULTS) -> Pruner:
        """How the variant prunes; each sequence keeps its own neurons.

        Args:
            extensions: options of the steps: prior, rows, weights. Only those of the variant's own steps are used.
        """
        prior, steps = extensions.prior, self.steps
        rows = extensions.rows if RECONSTRUCTION in steps else 0
        method: Any = "topk" if self.selection == ORACLE else self.selection
        # Neurons that are the same for all sequences can be held once, unless they are refitted for each.
        config = GriffinConfig(self.density, method, shared=method == "magnitude" and not rows)
        return Pruner(
            prior.budgeted(config) if prior is not None and BUDGETS in steps else config,
            rows,
            prior.fusion(extensions.prior_weight) if prior is not None and PRIOR in steps else None,
            prior.rows if prior is not None and CALIBRATION in steps else (),
            extensions.ridge,
            extensions.calibration_weight,
            extensions.healing if HEALING in steps else None,
        )


def grid(
    methods: Sequence[str], densities: Sequence[float], baselines: Sequence[str] = BASELINES
) -> tuple[Variant, ...]:
    """The dense model, and each method and baseline at every density below 1, the largest first.

    Args:
        methods: methods of `GriffinConfig`, each with any of `STEPS` after it.
        densities: shares of neurons that are kept.
        baselines: any of `BASELINES`.

    Raises:
        ValueError: a method is unknown, its steps do not go together, or a density is outside (0, 1].
    """
    for method in methods:
        _check_method(Variant(method, 1.0))
    for density in densities:
        check_density(density)
    below = sorted({density for density in densities if density < 1}, reverse=True)
    every = dict.fromkeys([*methods, *baselines])
    return (Variant(DENSE, 1.0), *(Variant(method, density) for density in below for method in every))


def _check_method(variant: Variant) -> None:
    if variant.selection not in METHODS:
        raise ValueError(f"method is {variant.selection!r}; allowed are {', '.join(METHODS)}")
    if variant.steps != tuple(step for step in STEPS if step in variant.steps):
        raise ValueError(f"method is {variant.method!r}; after it may be any of +{' +'.join(STEPS)}, in this order")
    if CALIBRATION in variant.steps and RECONSTRUCTION not in variant.steps:
        raise ValueError(f"method is {variant.method!r}; +{CALIBRATION} is a part of +{RECONSTRUCTION}")
    if BUDGETS in variant.steps and variant.selection == "magnitude":
        raise ValueError(f"method is {variant.method!r}; +{BUDGETS} is for methods that look at the prompt")
    if REFRESH in variant.steps and variant.selection != "topk":
        raise ValueError(f"method is {variant.method!r}; +{REFRESH} is for method topk, by what was read last")
    if PRIOR in variant.steps:
        check_fusion(variant.selection, DEFAULT_WEIGHT)  # pyright: ignore[reportArgumentType]


def rows_of(variants: Sequence[Variant], extensions: Extensions) -> int:
    """The number of tokens of each prompt whose activations must be recorded: 0 unless a variant is refitted."""
    return extensions.rows if any(RECONSTRUCTION in variant.steps for variant in variants) else 0


def seed_of(seed: int, text: str) -> int:
    """The seed of a text's draws, which does not depend on the batch that the text is in."""
    return zlib.crc32(f"{seed} {text}".encode()) & 0x7FFFFFFF


def models(
    model: Transformer,
    variants: Sequence[Variant],
    prompts: Prefilled,
    answers: Statistics,
    seeds: Int[np.ndarray, "b"],
    extensions: Extensions = DEFAULTS,
    *,
    masked: bool = False,
) -> Iterator[tuple[Variant, Transformer]]:
    """Yields every variant's model for a batch of prompts, one after the other.

    Each sequence keeps its own neurons, drawn with its own seed, so that the result for a text does not depend on its
    batch. A model must not be used after the next one is asked for, which may take over its memory.

    Args:
        model: the full model.
        variants: variants of `grid`, without those that have `REFRESH`.
        prompts: the prompts, with the statistics by which the methods select, and with `rows_of(variants, extensions)`
            rows.
        answers: statistics of the answers, by which the oracle selects.
        seeds: seed of the draws for each sequence.
        extensions: options of the steps beyond GRIFFIN.
        masked: whether the models are masked, to score given tokens without copies of weights; otherwise they are
            pruned, to write answers.
    """
    spare = None
    for variant in variants:
        if variant.method == DENSE:
            yield variant, model
            continue
        statistics = answers if variant.selection == ORACLE else prompts.statistics
        pruner, drawn = variant.pruner(extensions), jnp.asarray(seeds)
        if masked:
            yield variant, pruner.scorer(model, statistics, prompts.rows, seed=drawn)
            continue
        _, spare = pruner(model, statistics, prompts.rows, seed=drawn, reuse=spare)
        yield variant, spare
