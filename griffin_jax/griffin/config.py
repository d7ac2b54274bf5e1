"""How a model is pruned for an answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, cast, get_args

import jax
import numpy as np

from griffin_jax.utils.deprecation import renamed_arguments, renamed_attribute
from griffin_jax.utils.options import check_choice, flag, number, option, plain, whole

Method = Literal["topk", "sample", "topk_sample", "random", "magnitude"]


@renamed_arguments(multiple="round_to")
def kept_neurons(ff_width: int, density: float, round_to: int = 1) -> int:
    """k = floor(F * density), rounded up to a multiple of `round_to` and never above F.

    The density is taken as the decimal number that was written: 0.29 of 100 neurons is 29, although the nearest float64
    is less than 0.29.

    Args:
        ff_width: F, the number of neurons of a layer.
        density: share of neurons to keep, in (0, 1].
        round_to: k is rounded up to a multiple of this; 128 suits the tiles of GPUs and TPUs.

    Raises:
        ValueError: `density` is outside (0, 1], `round_to` is below 1, or k would be 0.
    """
    density = as_density(density)
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}")
    k = math.floor(ff_width * Fraction(repr(float(density))))
    k = min(ff_width, -(-k // round_to) * round_to)
    if k < 1:
        raise ValueError(
            f"density {density} keeps 0 of {ff_width} neurons; it must be at least 1/{ff_width} to keep one"
        )
    return k


def density_that_keeps(k: int, ff_width: int) -> float:
    """A density for which `kept_neurons` returns k of F neurons: k / F, or the next float if that rounds down."""
    density = k / ff_width
    return density if ff_width * Fraction(repr(density)) >= k else math.nextafter(density, 1.0)


def check_density(density: object) -> None:
    """Raise `ValueError` unless `density` is a number in (0, 1]."""
    as_density(density)


def as_density(density: object) -> float:
    """Returns a density as a Python number.

    Raises:
        ValueError: `density` is not a number in (0, 1].
    """
    return number("density", density, "in (0, 1]", lambda density: 0 < density <= 1)


def parse_density(text: str) -> float | tuple[float, ...]:
    """Parses one density, or one for each layer, separated by commas.

    Raises:
        ValueError: `text` is not such a list, or a density is outside (0, 1].
    """
    values = tuple(float(value) for value in text.split(","))
    for value in values:
        check_density(value)
    return values[0] if len(values) == 1 else values


@dataclasses.dataclass(frozen=True)
class GriffinConfig:
    """How a model is pruned for an answer.

    Attributes:
        density: share of feed-forward neurons to keep, in (0, 1]; one number, or one for each layer.
        method: how neurons are chosen. `topk` keeps those with the largest statistic, as the paper does. `sample` draws
            without replacement, with probabilities in proportion to the statistic, and `topk_sample` chooses half of
            them in each way. `random` and `magnitude` ignore the prompt; they are baselines.
        shared: keep one set of neurons for the whole batch, which decodes faster. Otherwise every sequence keeps its
            own, and its answer is the one that it would get alone (unless neurons or tokens are drawn).
        round_to: the number of kept neurons is rounded up to a multiple of this, to fit the tiles of an accelerator.
        groups: divide the neurons of each layer into this many equal ranges and keep the k / groups best of each; 1
            keeps the k best of all. With as many groups as devices that share the model (or a multiple of that
            number), every device keeps equally many of its own rows, and `prune` moves none between devices (see
            `griffin_jax.model.sharding`). None leaves the choice to the caller: `select` uses 1, and an `LLM` the
            number of devices that share its model.

    Raises:
        ValueError: a value is outside its range.
    """

    density: float | Sequence[float] = option(
        0.5,
        "share of feed-forward neurons to keep, in (0, 1], where 1 is the dense model; one number, or one for each"
        " layer, separated by commas",
        type=parse_density,
    )
    method: Method = option("topk", "how neurons are chosen", choices=get_args(Method))
    shared: bool = option(False, "keep one set of neurons for the whole batch, which decodes faster")
    round_to: int = option(
        1, "round the number of kept neurons up to a multiple of N, for an accelerator's tiles", metavar="N"
    )
    groups: int | None = option(
        None,
        "divide the neurons of each layer into M equal ranges and keep equally many of each (default: one range for"
        " each device that shares the model by --mesh, so that they exchange no rows; 1 keeps the best of all)",
        type=int,
        metavar="M",
    )

    multiple = renamed_attribute("round_to")
    shards = renamed_attribute("groups")

    def __post_init__(self) -> None:
        density: Any = plain(self.density)
        each = isinstance(density, Sequence | np.ndarray | jax.Array) and not isinstance(density, str | bytes)
        found = tuple(map(as_density, cast(Any, density))) if each else as_density(density)
        object.__setattr__(self, "density", found)
        check_choice("method", self.method, get_args(Method))
        object.__setattr__(self, "shared", flag("shared", self.shared))
        object.__setattr__(self, "round_to", whole("round_to", self.round_to, 1))
        if self.groups is not None:
            object.__setattr__(self, "groups", whole("groups", self.groups, 1))

    @property
    def group_count(self) -> int:
        """The number of groups; 1 if the caller has not chosen."""
        return 1 if self.groups is None else self.groups

    def kept(self, layers: Sequence[int | Sequence[int]]) -> tuple[int, ...]:
        """The number of neurons that each layer keeps.

        Args:
            layers: F of each layer, or the sizes of the ranges into which its neurons are divided, such as the experts
                of a routed layer (`ModelConfig.neuron_ranges`). Each range keeps its share of its own neurons.

        Raises:
            ValueError: the number of densities is not that of the layers, a range would keep no neuron, or its groups
                cannot have or keep equally many neurons.
        """
        return tuple(map(sum, self.kept_of_ranges(layers)))

    def kept_of_ranges(self, layers: Sequence[int | Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        """The number of neurons that each range of each layer keeps. Arguments and errors are those of `kept`."""
        if not isinstance(self.density, Sequence):
            densities = [self.density] * len(layers)
        elif len(self.density) == len(layers):
            densities = self.density
        else:
            raise ValueError(f"{len(self.density)} densities for {len(layers)} layers; give one, or one for each")

        def share(neurons: int, density: float) -> int:
            k = kept_neurons(neurons, density, self.round_to)
            check_groups(self.group_count, neurons, k)
            return k

        ranges = [layer if isinstance(layer, Sequence) else (layer,) for layer in layers]
        return tuple(
            tuple(share(neurons, density) for neurons in sizes)
            for sizes, density in zip(ranges, densities, strict=True)
        )


GriffinConfig.__init__ = renamed_arguments(multiple="round_to", shards="groups")(GriffinConfig.__init__)


def check_groups(groups: int, neurons: int, kept: int) -> None:
    """Raise `ValueError` unless groups of equal size can keep equally many neurons."""
    if groups < 1 or neurons % groups:
        raise ValueError(f"{groups} groups cannot have equally many of {neurons} neurons: groups must divide them")
    if kept % groups:
        raise ValueError(
            f"{groups} groups cannot keep equally many of {kept} neurons: round them up to a multiple of {groups}"
            f" (round_to={groups}; --round-to {groups})"
        )
