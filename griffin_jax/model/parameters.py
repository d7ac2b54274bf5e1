"""Initial values of the parameters of a module."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def matrix(rngs: nnx.Rngs | None, shape: tuple[int, ...], *, fan_in: int, dtype: DTypeLike) -> nnx.Param:
    """A matrix of zeros, or with `rngs` of normal numbers of variance 1 / `fan_in`."""
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype))
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5)


def bias_vector(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    """A bias of zeros."""
    return nnx.Param(jnp.zeros(shape, dtype))
