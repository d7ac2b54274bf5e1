"""The parameters that make up a matrix, and initial values of parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from griffin_jax.model.weights import FLOATING, GROUP_SCALE, Outputs, WeightFormat, quantise


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The parameters that make up one matrix.

    Attributes:
        values: the numbers, floating or integers.
        scale: for integers, the scales of the outputs, or of groups that lie along the axis that the product sums over.
        row_scale: for integers, the scales of groups that lie along the outputs. At most one of `scale` and `row_scale`
            is set, and neither for floating-point numbers.
    """

    values: nnx.Param
    scale: nnx.Param | None = None
    row_scale: nnx.Param | None = None

    @classmethod
    def of_integers(cls, numbers: jax.Array, scale: jax.Array, weights: WeightFormat, outputs: Outputs) -> Matrix:
        """The parameters for integers and scales that `griffin_jax.model.weights.quantise` returns."""
        if outputs != "first" and weights.group is not None:
            return cls(nnx.Param(numbers), row_scale=nnx.Param(scale))
        return cls(nnx.Param(numbers), scale=nnx.Param(scale))


def matrix(
    rngs: nnx.Rngs | None, shape: tuple[int, ...], *, fan_in: int, weights: WeightFormat, outputs: Outputs = "first"
) -> Matrix:
    """A matrix of zeros or, with `rngs`, of normally distributed numbers with variance 1 / `fan_in`.

    Args:
        rngs: where the random numbers come from; None for zeros.
        shape: shape of the matrix.
        fan_in: how many products are summed for each output.
        weights: how the matrix is stored.
        outputs: which axes count outputs; see `griffin_jax.model.weights.quantise`.
    """
    if not weights.quantised:
        return Matrix(floating(rngs, shape, fan_in=fan_in, dtype=weights.dtype))
    if rngs is None:
        values, scale = jnp.zeros(shape, weights.dtype), _unit_scale(shape, weights, outputs)
    else:
        drawn = jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5
        values, scale = quantise(drawn, weights, outputs)
    return Matrix.of_integers(values, scale, weights, outputs)


def _unit_scale(shape: tuple[int, ...], weights: WeightFormat, outputs: Outputs) -> jax.Array:
    if weights.group is not None:
        return jnp.ones((*shape[:-1], shape[-1] // weights.group), GROUP_SCALE)
    shapes = {"first": (*shape[:-1], 1), "last": shape[-1:], "last_of_each": (shape[0], shape[-1])}
    return jnp.ones(shapes[outputs], jnp.float32)


def floating(rngs: nnx.Rngs | None, shape: tuple[int, ...], *, fan_in: int, dtype: DTypeLike) -> nnx.Param:
    """A matrix to which no weight format applies: zeros or, with `rngs`, normally distributed numbers with variance 1 /
    `fan_in`."""
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype))
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5)


def bias_vector(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    """A bias of zeros."""
    return nnx.Param(jnp.zeros(shape, dtype))


def as_format(weights: WeightFormat | None, dtype: DTypeLike) -> WeightFormat:
    """The format in which matrices are stored: `weights`, or `dtype` if that is None.

    Raises:
        ValueError: `dtype` is not a floating dtype that weights can have.
    """
    name = jnp.dtype(dtype).name
    if name not in FLOATING:
        raise ValueError(f"dtype is {name}; allowed are {', '.join(FLOATING)}")
    return WeightFormat(name) if weights is None else weights


def array_of(parameter: nnx.Param | None) -> jax.Array | None:
    """The array of a parameter; None if the module lacks the parameter."""
    return None if parameter is None else parameter[...]
