"""How matrices are stored: as floating-point numbers, or as integers of 8 or 4 bits with scales.

    w ~ q * s        q integers, s a scale that several of them share

Decoding reads every weight once for each token, so its time depends on the number of bytes. If there is one scale for
each *output* of a product, the scale can be multiplied onto the result, and the product reads nothing but q. This is
the format `int8`. Fewer bits need finer scales, one for each group of neighbours in a row: the formats `int8:64` or
`int4:32`, for example. Groups lie along the width D of the model, so that a neuron's rows and their scales can be kept
or dropped together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from griffin_jax.utils.messages import shortened

FLOATING = ("float32", "bfloat16", "float16")
INTEGER = ("int8", "int4")
DEFAULT_GROUPS = {"int8": None, "int4": 32}
"""Numbers that share a scale if a format does not say; None if all numbers that make an output share one."""

GROUP_SCALE = jnp.float16
"""The dtype of group scales, as in GGUF files."""

VOCABULARY_MATRICES = ("embedding", "head")
"""The matrices with one row for each token of the vocabulary."""

CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Fractions of a 4-bit group's range that quantisation tries. If a few numbers of a group are far larger than the
others, clipping them costs less than rounding all the others more coarsely."""

Outputs = Literal["first", "last", "last_of_each"]
"""Which axes of a matrix count the outputs of its product: `first`, all but the last axis; `last`, the last axis;
`last_of_each`, the last axis of each of several matrices, which the first axis counts."""


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How the matrices of a model are stored.

    Attributes:
        dtype: name of the dtype of their numbers: float32, bfloat16, float16, int8 or int4.
        group: how many neighbouring numbers of a row share a scale; None if all numbers that make an output share one,
            and for floating dtypes.
    """

    dtype: str
    group: int | None = None

    @classmethod
    def parse(cls, text: str | WeightFormat | np.dtype | type) -> WeightFormat:
        """Parse the name of a format, such as `int8`, `int8:64`, `int4`, `int4:32` or `bfloat16`.

        Args:
            text: the name, a floating or integer dtype, or a `WeightFormat`, which is returned unchanged.

        Raises:
            ValueError: the text names none of these formats.
        """
        if isinstance(text, WeightFormat):
            return text
        with contextlib.suppress(TypeError):
            text = text if isinstance(text, str) else jnp.dtype(text).name
        name, colon, group = str(text).partition(":")
        allowed = f"allowed are {', '.join(FLOATING + INTEGER)}, and int8 and int4 with a group, as in int4:32"
        if name not in FLOATING + INTEGER or (colon and (name in FLOATING or not group.isdecimal() or int(group) < 2)):
            raise ValueError(f"weights are {str(text)!r}; {allowed}")
        return cls(name, int(group) if colon else DEFAULT_GROUPS.get(name))

    def __str__(self) -> str:
        return self.dtype if self.group == DEFAULT_GROUPS.get(self.dtype) else f"{self.dtype}:{self.group}"

    @property
    def quantised(self) -> bool:
        """Whether the numbers are integers with scales."""
        return self.dtype in INTEGER

    @property
    def bits(self) -> float:
        """Bits that a number takes, including its share of a group's scale."""
        return bits_of(self.dtype) + (0 if self.group is None else 16 / self.group)

    def of_vocabulary(self) -> WeightFormat:
        """The format of the embedding and of the head, which makes logits: int8 in place of int4.

        Four bits are too few for these two matrices: with int4 everywhere, a third of the quality that a small model
        loses is lost in them.
        """
        return WeightFormat("int8", self.group) if self.dtype == "int4" else self

    def dtype_of(self, path: str) -> str:
        """The dtype that this format gives to the integers of a parameter.

        A device may hold them in another dtype; see `held`.

        Args:
            path: path of the parameter in the module.
        """
        return (self.of_vocabulary() if path.rpartition(".")[-1] in VOCABULARY_MATRICES else self).dtype

    def check(self, width: int, embedding_width: int | None = None) -> None:
        """Raise `ValueError` unless the groups divide the rows of a model's matrices.

        Args:
            width: D, the width of the model.
            embedding_width: the width of the embedding and the head, if it is not D.
        """
        for size in {width, embedding_width or width}:
            if self.group is not None and size % self.group:
                divisors = [group for group in (16, 24, 32, 48, 64, 96, 128, 192, 256) if size % group == 0]
                possible = f"; possible are {shortened(list(map(str, divisors)), 9)}" if divisors else ""
                raise ValueError(f"groups of {self.group} do not divide rows of {size} weights{possible}")


def bits_of(dtype: DTypeLike) -> int:
    """Bits of a number of this dtype, not counting what XLA may pad it to."""
    dtype = jnp.dtype(dtype)
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def stored_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Bytes of an array in storage, where a byte holds two numbers of 4 bits."""
    return -(-math.prod(shape) * bits_of(dtype) // 8)


def held(numbers: Array) -> Array:
    """Convert integers to the dtype in which their devices hold them: on CPUs, numbers of 4 bits become int8.

    On CPUs, XLA keeps each of these numbers in a byte anyway, and its code reads them one by one (jax 0.10 to 0.12).
    Seen in timings of one token with a matrix of 8,960 x 1,536 in groups of 32: 13.5 ms as int4, 1.5 as int8.
    """
    on_cpu = numbers.dtype == jnp.int4 and all(device.platform == "cpu" for device in numbers.devices())
    return numbers.astype(jnp.int8) if on_cpu else numbers


def limit_of(dtype: DTypeLike) -> int:
    """The largest integer of this dtype that a symmetric format uses."""
    return int(jnp.iinfo(jnp.dtype(dtype)).max)


@functools.partial(jax.jit, static_argnames=("format", "outputs"))
def quantise(
    matrix: Float[Array, "*rows d"], format: WeightFormat, outputs: Outputs = "first"
) -> tuple[Int[Array, "*rows d"], Float[Array, "..."]]:
    """Round a matrix to the nearest integers, and compute their scales.

    Args:
        matrix: the matrix, of any floating dtype.
        format: an integer format.
        outputs: which axes of the matrix count outputs; it matters only for formats without groups.

    Returns:
        The integers, in the shape of the matrix, and their scales. For groups, the scales are float16 of the shape
        (*rows, D / group). Otherwise they are float32 of the shape (*rows, 1) if `outputs` is `first`, (D,) if it is
        `last`, and (E, D) if it is `last_of_each`, for E matrices.
    """
    wide = matrix.astype(jnp.float32)
    dtype, most = jnp.dtype(format.dtype), limit_of(format.dtype)
    if format.group is None:
        summed = {"first": (-1,), "last": range(matrix.ndim - 1), "last_of_each": range(1, matrix.ndim - 1)}
        axes = tuple(summed[outputs])
        scale = jnp.max(jnp.abs(wide), axis=axes, keepdims=True) / most
        numbers = jnp.round(wide / jnp.where(scale > 0, scale, 1))
        return numbers.astype(dtype), scale if outputs == "first" else jnp.squeeze(scale, axes)
    groups = wide.reshape(*matrix.shape[:-1], -1, format.group)
    numbers, scale = _rounded(groups, dtype)
    return numbers.astype(dtype).reshape(matrix.shape), scale


def _rounded(groups: Float[Array, "*rows n g"], dtype: np.dtype) -> tuple[Float[Array, "*rows n g"], Array]:
    """Round groups of numbers to integers, which are still floating, and compute the groups' float16 scales.

    Returns:
        The integers, (*rows, n, g), and the scales, (*rows, n).
    """
    most = limit_of(dtype)
    if dtype == jnp.int4:
        # The largest number of a group becomes -8, which has no positive counterpart (as llama.cpp does in Q4_0).
        at = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
        scales = [jnp.take_along_axis(groups, at, axis=-1) * (part / -(most + 1)) for part in CLIPPED]
    else:
        scales = [jnp.max(jnp.abs(groups), axis=-1, keepdims=True) / most]
    best = None
    for scale in scales:
        scale = scale.astype(GROUP_SCALE)
        wide = scale.astype(jnp.float32)
        numbers = jnp.clip(jnp.round(groups / jnp.where(wide == 0, 1, wide)), -most - 1, most)
        error = jnp.sum(jnp.square(numbers * wide - groups), axis=-1, keepdims=True)
        if best is not None:
            better = error < best[2]
            numbers, scale = jnp.where(better, numbers, best[0]), jnp.where(better, scale, best[1])
            error = jnp.where(better, error, best[2])
        best = numbers, scale, error
    assert best is not None
    return best[0], best[1][..., 0]


def dequantise(
    numbers: Int[Array, "*rows d"], scale: Float[Array, "..."], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*rows d"]:
    """Compute numbers * scale in float32.

    Args:
        numbers: the integers.
        scale: (D,), one scale for each output along the last axis, or (E, D) for each of E matrices; (*rows, 1), one
            for each row; or (*rows, n), one for each of n groups of a row.
        dtype: dtype of the result.
    """
    if scale.ndim < numbers.ndim:
        of_outputs = jnp.expand_dims(scale, tuple(range(scale.ndim - 1, numbers.ndim - 1)))
        return (numbers.astype(jnp.float32) * of_outputs.astype(jnp.float32)).astype(dtype)
    return grouped(numbers, scale).reshape(numbers.shape).astype(dtype)


def grouped(numbers: Int[Array, "*rows d"], scale: Float[Array, "*rows n"]) -> Float[Array, "*rows n g"]:
    """The float32 numbers that integers stand for, with the last axis split into one for the n groups and one for the g
    numbers of a group."""
    groups = numbers.astype(jnp.float32).reshape(*scale.shape, -1)
    return groups * scale[..., None].astype(jnp.float32)


def floating_rows(
    weight: Num[Array, "*rows d"], scale: Float[Array, "*b d"] | None, row_scale: Float[Array, "*rows n"] | None
) -> Float[Array, "*rows d"]:
    """A stored matrix as floating-point numbers.

    Args:
        weight: the stored numbers, floating or integers.
        scale: scales of the outputs along the last axis, (D,), or (B, D) if each of B sequences or experts has its own.
        row_scale: scales of n groups of each row, (*rows, n).
    """
    if scale is not None:
        return weight.astype(jnp.float32) * (scale if scale.ndim == 1 else scale[:, None])
    return weight if row_scale is None else dequantise(weight, row_scale)


@dataclasses.dataclass(frozen=True)
class Precision:
    """How a model computes, and how its matrices are stored.

    Attributes:
        dtype: dtype of the computation, of the cache, and of all parameters that are not matrices.
        weights: how the matrices are stored.
    """

    dtype: np.dtype
    weights: WeightFormat

    @classmethod
    def of(cls, dtype: DTypeLike, weights: WeightFormat | None = None) -> Precision:
        """The precision with this dtype; matrices are stored in the same dtype if `weights` is None."""
        name = jnp.dtype(dtype).name
        return cls(np.dtype(jnp.dtype(dtype)), WeightFormat(name) if weights is None else weights)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the computation, and so of a number in the cache."""
        return self.dtype.itemsize

    @property
    def read_as(self) -> np.dtype:
        """The dtype in which parameters are read from a checkpoint: `dtype` if matrices are stored in it too, otherwise
        float32, for example if they are to be rounded to integers."""
        same = self.weights == WeightFormat(self.dtype.name)
        return self.dtype if same else np.dtype(np.float32)

    def __str__(self) -> str:
        name = self.dtype.name
        return name if self.weights == WeightFormat(name) else f"{self.weights} in {name}"
