"""How matrices are stored: as floating numbers, or as integers of 8 or 4 bits with scales.

    w ~ q * s        q integers, s a scale that several of them share

Decoding reads every weight once for each token, so bytes are time. With one scale for each *output* of a product, the
scale is multiplied onto the result, and nothing but q is read: that is `int8`. Fewer bits need finer scales: one for
each group of neighbours in a row, `int8:64` or `int4:32`. Groups lie along the width of the model, so that a neuron's
rows and their scales can be kept or dropped together.
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
"""Numbers that share a scale, if nothing is said; None for all that make an output."""

GROUP_SCALE = jnp.float16
"""The dtype of the scales of groups, as in GGUF files."""

VOCABULARY_MATRICES = ("embedding", "head")
"""The matrices with a row for each token."""

CLIPPED = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of the range of a group of 4 bits that are tried: where a few numbers are far larger than the others, it costs
less to clip them than to round all others more coarsely."""

Outputs = Literal["first", "last", "last_of_each"]
"""Which axes of a matrix count the outputs of its product: all but the last one, the last one, or the last one of each
of several matrices, which the first axis counts."""


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How the matrices of a model are stored.

    Attributes:
        dtype: name of their dtype: float32, bfloat16, float16, int8 or int4.
        group: numbers next to each other in a row that share a scale; None where all that make an output do, and for
            floating dtypes.
    """

    dtype: str
    group: int | None = None

    @classmethod
    def parse(cls, text: str | WeightFormat | np.dtype | type) -> WeightFormat:
        """`int8`, `int8:64`, `int4`, `int4:32`, `bfloat16`, ...

        Raises:
            ValueError: it is none of them.
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
        """Bits of a number, with its part of the scale of a group."""
        return bits_of(self.dtype) + (0 if self.group is None else 16 / self.group)

    def of_vocabulary(self) -> WeightFormat:
        """The format of the embedding and of the matrix that makes logits: 4 bits are too few for them.

        A third of what int4 takes from a small model's quality is taken there.
        """
        return WeightFormat("int8", self.group) if self.dtype == "int4" else self

    def dtype_of(self, path: str) -> str:
        """The dtype that the format gives to the integers of this parameter, however a device holds them."""
        return (self.of_vocabulary() if path.rpartition(".")[-1] in VOCABULARY_MATRICES else self).dtype

    def check(self, width: int, embedding_width: int | None = None) -> None:
        """Raise `ValueError` unless the groups divide rows of a model of this width."""
        for size in {width, embedding_width or width}:
            if self.group is not None and size % self.group:
                divisors = [group for group in (16, 24, 32, 48, 64, 96, 128, 192, 256) if size % group == 0]
                possible = f"; possible are {shortened(list(map(str, divisors)), 9)}" if divisors else ""
                raise ValueError(f"groups of {self.group} do not divide rows of {size} weights{possible}")


def bits_of(dtype: DTypeLike) -> int:
    """Bits of a number of this dtype; what XLA pads them to does not count."""
    dtype = jnp.dtype(dtype)
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def stored_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Bytes of an array, two numbers of 4 bits in each."""
    return -(-math.prod(shape) * bits_of(dtype) // 8)


def held(numbers: Array) -> Array:
    """Integers in the dtype that their devices hold them in: on CPUs, numbers of 4 bits are int8.

    There XLA keeps each of them in a byte anyway, and its code reads them one by one (jax 0.10 to 0.12). Seen in
    timings of one token with a matrix of 8,960 x 1,536 in groups of 32: 13.5 ms as int4, 1.5 as int8.
    """
    on_cpu = numbers.dtype == jnp.int4 and all(device.platform == "cpu" for device in numbers.devices())
    return numbers.astype(jnp.int8) if on_cpu else numbers


def limit_of(dtype: DTypeLike) -> int:
    """The largest integer that a symmetric format uses."""
    return int(jnp.iinfo(jnp.dtype(dtype)).max)


@functools.partial(jax.jit, static_argnames=("format", "outputs"))
def quantise(
    matrix: Float[Array, "*rows d"], format: WeightFormat, outputs: Outputs = "first"
) -> tuple[Int[Array, "*rows d"], Float[Array, "..."]]:
    """The integers nearest to a matrix, and their scales.

    Args:
        matrix: the matrix, of any floating dtype.
        format: an integer format.
        outputs: the axes that count outputs, for formats without groups.

    Returns:
        The integers; and their scales, as `dequantise` takes them: (*rows, D / group) of float16 for groups; else
        float32 of the shape (*rows, 1) if all axes but the last one count outputs, (D,) if the last one does, and
        (E, D)
        if it does so in each of E matrices.
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
    """Integers, still floating, and float16 scales of groups."""
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
    """numbers * scale, computed in float32; the scale is one of those that `quantise` gives."""
    if scale.ndim == 1 and numbers.ndim > 1:
        return (numbers.astype(jnp.float32) * scale.astype(jnp.float32)).astype(dtype)
    return grouped(numbers, scale).reshape(numbers.shape).astype(dtype)


def grouped(numbers: Int[Array, "*rows d"], scale: Float[Array, "*rows n"]) -> Float[Array, "*rows n g"]:
    """What integers stand for, in float32, with an axis for the groups and one for the numbers of a group."""
    groups = numbers.astype(jnp.float32).reshape(*scale.shape, -1)
    return groups * scale[..., None].astype(jnp.float32)


def floating_rows(
    weight: Num[Array, "*rows d"], scale: Float[Array, "*b d"] | None, row_scale: Float[Array, "*rows n"] | None
) -> Float[Array, "*rows d"]:
    """A matrix as floating numbers, from what is stored of it.

    Args:
        weight: its numbers, floating or integers.
        scale: the scale of each output along the last axis, for all sequences or for each its own.
        row_scale: the scales of groups of each row.
    """
    if scale is not None:
        return weight.astype(jnp.float32) * (scale if scale.ndim == 1 else scale[:, None])
    return weight if row_scale is None else dequantise(weight, row_scale)


@dataclasses.dataclass(frozen=True)
class Precision:
    """How a model computes, and how its matrices are stored.

    Attributes:
        dtype: dtype of the computation, of the cache, and of all parameters that are no matrices.
        weights: how the matrices are stored.
    """

    dtype: np.dtype
    weights: WeightFormat

    @classmethod
    def of(cls, dtype: DTypeLike, weights: WeightFormat | None = None) -> Precision:
        """With matrices in the same dtype, if nothing else is said."""
        name = jnp.dtype(dtype).name
        return cls(np.dtype(jnp.dtype(dtype)), WeightFormat(name) if weights is None else weights)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the computation, and so of a key or value."""
        return self.dtype.itemsize

    @property
    def read_as(self) -> np.dtype:
        """The dtype that parameters are read in: the wider one, or float32 for what is to be rounded to integers."""
        same = self.weights == WeightFormat(self.dtype.name)
        return self.dtype if same else np.dtype(np.float32)

    def __str__(self) -> str:
        name = self.dtype.name
        return name if self.weights == WeightFormat(name) else f"{self.weights} in {name}"
