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

from griffin_jax import jitted
from griffin_jax.config import GriffinConfig, Method, check_density
from griffin_jax.griffin import Experts, Statistics, prune, select
from griffin_jax.model import Transformer

DENSE, ORACLE = "dense", "oracle"
METHODS = get_args(Method)
ALWAYS = (ORACLE, "magnitude", "random")
"""What stands beside every method: the best that this kind of selection can be, and two that ignore the prompt."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A model that is evaluated.

    Attributes:
        method: `dense`, one of `GriffinConfig.method`, or `oracle`: the k best neurons by the statistic of the answer
            itself instead of the prompt's.
        density: share of feed-forward neurons kept.
    """

    method: str
    density: float

    @property
    def name(self) -> str:
        """For people and files."""
        return DENSE if self.method == DENSE else f"{self.method} {self.density:g}"


def grid(methods: Sequence[str], densities: Sequence[float]) -> tuple[Row, ...]:
    """The dense model, and each method and all of `ALWAYS` at every density below 1, the largest first.

    Raises:
        ValueError: there is no such method, or a density is outside (0, 1].
    """
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; allowed are {', '.join(METHODS)}")
    for density in densities:
        check_density(density)
    below = sorted({density for density in densities if density < 1}, reverse=True)
    every = dict.fromkeys([*methods, *ALWAYS])
    return (Row(DENSE, 1.0), *(Row(method, density) for density in below for method in every))


def seed_of(seed: int, text: str) -> int:
    """The seed of a text's draws: always the same, whichever batch the text is in."""
    return zlib.crc32(f"{seed} {text}".encode()) & 0x7FFFFFFF


def models(
    model: Transformer, rows: Sequence[Row], prompts: Statistics, answers: Statistics, seeds: Int[np.ndarray, "b"]
) -> Iterator[tuple[Row, Transformer]]:
    """Every row's model for a batch of prompts, one after the other.

    Each sequence keeps neurons of its own, drawn with its own seed, so that what is found for a text does not depend
    on its batch. A model is used up when the next one is asked for: its memory may be given to that one.

    Args:
        model: the full one.
        rows: those of `grid`.
        prompts: the statistics of the prompts, which the methods select by.
        answers: those of the answers, which the oracle selects by.
        seeds: one for each sequence.
    """
    spare = None
    for row in rows:
        if row.method == DENSE:
            yield row, model
        elif row.method == "magnitude":
            config = GriffinConfig(row.density, "magnitude", shared=True)
            yield row, prune(model, jitted.select(prompts, config, model=model))
        else:
            oracle = row.method == ORACLE
            config = GriffinConfig(row.density, "topk" if oracle else row.method)  # pyright: ignore[reportArgumentType]
            spare = prune(model, select_each(answers if oracle else prompts, config, seeds), reuse=spare)
            yield row, spare


@functools.partial(jax.jit, static_argnames=("config",))
def select_each(statistics: Statistics, config: GriffinConfig, seeds: Int[Array, "b"]) -> Experts:
    """`select` for each sequence with a seed of its own, so that what is drawn does not depend on its batch."""

    def select_one(squares: tuple[Array, ...], tokens: Array, seed: Array) -> tuple[Array, ...]:
        alone = Statistics(tuple(s[None] for s in squares), tokens[None])
        return tuple(kept[0] for kept in select(alone, config, seed=seed))

    indices = jax.vmap(select_one)(statistics.squares, statistics.tokens, jnp.asarray(seeds))
    return Experts(indices, tuple(squares.shape[-1] for squares in statistics.squares))
