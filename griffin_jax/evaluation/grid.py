"""What is compared: the dense model, GRIFFIN and what stands beside it, at several densities."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from griffin_jax.extensions.prior import DEFAULT_WEIGHT, Fusion, Prior, check_fusion
from griffin_jax.extensions.reconstruction import CALIBRATION_WEIGHT, DEFAULT_ROWS, Reconstruction
from griffin_jax.generation import jitted
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.griffin.config import GriffinConfig, Method, check_density
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.griffin.prune import prune
from griffin_jax.griffin.select import Fuse, select
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.transformer import Transformer

DENSE, ORACLE = "dense", "oracle"
METHODS = get_args(Method)
BASELINES = (ORACLE, "magnitude", "random")
"""What stands beside every method: the best that this kind of selection can be, and two that ignore the prompt."""

PRIOR, BUDGETS, RECONSTRUCTION, CALIBRATION = "prior", "budgets", "reconstruction", "calibration"
REFRESH = "refresh"
STEPS = (PRIOR, BUDGETS, RECONSTRUCTION, CALIBRATION, REFRESH)
"""Beyond GRIFFIN, each behind a `+`: the prior's rank, a share of its own for each layer, refitted rows, these fitted
to the prior's rows, too, and all of it anew every few tokens."""
MEASURED = (PRIOR, BUDGETS, CALIBRATION)
"""Those that need a prior."""


@dataclasses.dataclass(frozen=True)
class Beyond:
    """What the steps beyond GRIFFIN take.

    Attributes:
        prior: for the steps in `MEASURED`; None if no variant has one of them.
        prior_weight: of the prior's rank.
        rows: tokens of each prompt for `RECONSTRUCTION`.
        ridge: of the same.
        calibration_weight: tokens that `CALIBRATION` counts for.
        refresh_every: tokens, for `REFRESH`.
    """

    prior: Prior | None = None
    prior_weight: float = DEFAULT_WEIGHT
    rows: int = DEFAULT_ROWS
    ridge: float = 1.0
    calibration_weight: float = CALIBRATION_WEIGHT
    refresh_every: int = 32

    def config(self, variant: Variant) -> GriffinConfig:
        """How a variant's neurons are selected, for each sequence its own."""
        config = GriffinConfig(variant.density, "topk" if variant.selection == ORACLE else variant.selection)  # pyright: ignore[reportArgumentType]
        return self.prior.budgeted(config) if BUDGETS in variant.steps and self.prior is not None else config

    def fusion(self, variant: Variant) -> Fusion | None:
        """What a variant's scores are fused with, if they are."""
        return self.prior.fusion(self.prior_weight) if PRIOR in variant.steps and self.prior is not None else None

    def reconstruction(self, variant: Variant, rows: tuple[Array, ...]) -> Reconstruction | None:
        """What a variant's kept neurons are refitted to, if they are; `rows` are those of the prompts."""
        if RECONSTRUCTION not in variant.steps:
            return None
        calibration = self.prior.rows if CALIBRATION in variant.steps and self.prior is not None else ()
        return Reconstruction(rows, self.ridge, calibration, self.calibration_weight)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model that is evaluated.

    Attributes:
        method: `dense`, one of `GriffinConfig.method`, or `oracle`: the k best neurons by the statistic of the answer
            itself instead of the prompt's. Behind it any of `STEPS`, each after a `+`.
        density: share of feed-forward neurons kept.
    """

    method: str
    density: float

    @property
    def selection(self) -> str:
        """The method without the steps behind it."""
        return self.method.split("+")[0]

    @property
    def steps(self) -> tuple[str, ...]:
        """Those of `STEPS` that the variant has."""
        return tuple(self.method.split("+")[1:])

    @property
    def name(self) -> str:
        """For people and files."""
        return DENSE if self.method == DENSE else f"{self.method} {self.density:g}"


def grid(
    methods: Sequence[str], densities: Sequence[float], baselines: Sequence[str] = BASELINES
) -> tuple[Variant, ...]:
    """The dense model, and each method and baseline at every density below 1, the largest first.

    Args:
        methods: those of `GriffinConfig.method`, each with any of `STEPS` behind it.
        densities: shares of neurons kept.
        baselines: of `BASELINES`.

    Raises:
        ValueError: there is no such method, its steps do not go together, or a density is outside (0, 1].
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
        raise ValueError(f"method is {variant.method!r}; behind it may be any of +{' +'.join(STEPS)}, in this order")
    if CALIBRATION in variant.steps and RECONSTRUCTION not in variant.steps:
        raise ValueError(f"method is {variant.method!r}; +{CALIBRATION} is a part of +{RECONSTRUCTION}")
    if BUDGETS in variant.steps and variant.selection == "magnitude":
        raise ValueError(f"method is {variant.method!r}; +{BUDGETS} is for methods that look at the prompt")
    if REFRESH in variant.steps and variant.selection != "topk":
        raise ValueError(f"method is {variant.method!r}; +{REFRESH} is for method topk, by what was read last")
    if PRIOR in variant.steps:
        check_fusion(variant.selection, DEFAULT_WEIGHT)  # pyright: ignore[reportArgumentType]


def rows_of(variants: Sequence[Variant], beyond: Beyond) -> int:
    """Tokens of each prompt whose activations must be kept: none unless a variant is reconstructed."""
    return beyond.rows if any(RECONSTRUCTION in variant.steps for variant in variants) else 0


def seed_of(seed: int, text: str) -> int:
    """The seed of a text's draws: always the same, whichever batch the text is in."""
    return zlib.crc32(f"{seed} {text}".encode()) & 0x7FFFFFFF


def models(
    model: Transformer,
    variants: Sequence[Variant],
    prompts: Prefilled,
    answers: Statistics,
    seeds: Int[np.ndarray, "b"],
    beyond: Beyond = Beyond(),
) -> Iterator[tuple[Variant, Transformer]]:
    """Every variant's model for a batch of prompts, one after the other.

    Each sequence keeps neurons of its own, drawn with its own seed, so that what is found for a text does not depend
    on its batch. A model is used up when the next one is asked for: its memory may be given to that one.

    Args:
        model: the full one.
        variants: those of `grid`, without `REFRESH`.
        prompts: with the statistics that the methods select by, and with `rows_of(variants, beyond)` rows.
        answers: the statistics of the answers, which the oracle selects by.
        seeds: one for each sequence.
        beyond: for the variants that have steps beyond GRIFFIN.
    """
    spare = None
    for variant in variants:
        if variant.method == DENSE:
            yield variant, model
            continue
        reconstruction = beyond.reconstruction(variant, prompts.rows)
        if variant.selection == "magnitude":
            # Neurons that are the same for all can be held once, unless each sequence has them refitted.
            config = GriffinConfig(variant.density, "magnitude", shared=reconstruction is None)
            experts = jitted.select(prompts.statistics, config, model=model)
            yield variant, prune(model, experts, refit=reconstruction)
            continue
        statistics = answers if variant.selection == ORACLE else prompts.statistics
        experts = select_each(statistics, beyond.config(variant), seeds, beyond.fusion(variant))
        spare = prune(model, experts, reuse=spare, refit=reconstruction)
        yield variant, spare


@functools.partial(jax.jit, static_argnames=("config",))
def select_each(
    statistics: Statistics,
    config: GriffinConfig,
    seeds: Int[Array, "b"],
    fuse: Fuse | None = None,
) -> ExpertNeurons:
    """`select` for each sequence with a seed of its own, so that what is drawn does not depend on its batch."""

    def select_one(squares: tuple[Array, ...], tokens: Array, seed: Array) -> tuple[Array, ...]:
        alone = Statistics(tuple(s[None] for s in squares), tokens[None])
        return tuple(kept[0] for kept in select(alone, config, seed=seed, fuse=fuse))

    indices = jax.vmap(select_one)(statistics.squares, statistics.tokens, jnp.asarray(seeds))
    return ExpertNeurons(indices, tuple(squares.shape[-1] for squares in statistics.squares), config.groups)
