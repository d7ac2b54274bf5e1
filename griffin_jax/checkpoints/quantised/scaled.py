"""Numbers (O, I) times the scale of their block: FP8 of several makers, and the formats of compressed-tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

import numpy as np
from jaxtyping import Float32, Shaped

from griffin_jax.checkpoints.quantised import mxfp4
from griffin_jax.checkpoints.quantised.parts import (
    SCALE_DTYPES,
    WEIGHT,
    WORD_BITS,
    Packed,
    Parts,
    Read,
    UnfitError,
    scale_groups,
    unpacked,
)
from griffin_jax.checkpoints.sources import TensorInfo

FP8 = ("F8_E4M3", "F8_E5M2")
"""Dtypes of floating numbers of 8 bits."""

LAYOUT = ".weight_format"
"""End of the name of a number that says in which order LLM.int8() has stored a matrix."""

PACKED = ".weight_packed"
"""End of the name of numbers of which several are in a word or byte."""

PACKED_BITS = (4, 8)
"""Bits of integers in words that are read."""


@dataclasses.dataclass(frozen=True)
class Scaled(Packed):
    """A matrix of numbers, less their zero, times the scale of their block of outputs and inputs.

    Attributes:
        base, info: see `Packed`.
        numbers: end of the name of the numbers.
        scale: end of the name of the scales, one for each block, row or tensor.
        block: outputs and inputs of a block.
        bits: of a number, where several are packed into a word along I; None where each is stored by itself.
        zero: end of the name of the zeros, packed along O as numbers are along I; None where there are none.
        group: end of the name of the group of each input, where groups are no neighbours.
        divisor: end of the name of a number by which all scales are divided, or that number.
    """

    base: str
    info: TensorInfo
    numbers: str
    scale: str
    block: tuple[int, int]
    bits: int | None = None
    zero: str | None = None
    group: str | None = None
    divisor: str | float = 1.0

    @property
    def ends(self) -> tuple[str, ...]:
        ends = (self.numbers, self.scale, self.zero, self.group, self.divisor)
        return tuple(end for end in ends if isinstance(end, str))

    def rows(self, read: Read, start: int, stop: int | None) -> Float32[np.ndarray, "rows columns"]:
        outputs, inputs = self.info.shape
        stop = outputs if stop is None else stop

        def whole(end: str) -> np.ndarray:
            return read(self.base + end, 0, None)

        blocks = np.arange(start, stop) // self.block[0]
        groups = self.block[1]
        if self.group is not None and not (whole(self.group) < 0).any():
            # Negative ones were never set.
            groups = whole(self.group)
        divisor = whole(self.divisor).reshape(()) if isinstance(self.divisor, str) else np.float32(self.divisor)
        scale = _matrix(whole(self.scale)).astype(np.float32)[blocks] / divisor
        values = self._values(read(self.base + self.numbers, start, stop))[:, :inputs]
        zeros = None
        if self.zero is not None:
            zeros = whole(self.zero)
            zeros = _matrix(zeros).astype(np.float32) if self.bits is None else self._values(zeros.T).T
            zeros = zeros[blocks]
        return scale_groups(values, zeros, scale, groups, f"{self.base}{self.group}")

    def _values(self, stored: Shaped[np.ndarray, "rows stored"]) -> Float32[np.ndarray, "rows columns"]:
        """The numbers, without scales."""
        if self.info.dtype == "NVFP4":
            return mxfp4.numbers(stored)
        if self.bits is None:
            return stored.astype(np.float32)
        return unpacked(stored, self.bits).astype(np.float32) - np.float32(2 ** (self.bits - 1))


def _matrix(values: np.ndarray) -> Shaped[np.ndarray, "rows columns"]:
    """Scales or zeros with two axes: those of a tensor or of its rows have one, or none."""
    return values if values.ndim == 2 else values.reshape(-1, 1)


def _scales(
    parts: Parts,
    shape: tuple[int, int],
    stated: Collection[tuple[int, int]],
    *ends: str,
    dtypes: Collection[str] = SCALE_DTYPES,
) -> tuple[str, TensorInfo, tuple[int, int]]:
    """The scales of a matrix.

    Args:
        parts: the parts.
        shape: that of the matrix.
        stated: outputs and inputs that share a scale, where the configuration says so.
        ends: ends of the names that scales may have, of which the first is taken that there is.
        dtypes: those that they may have.

    Returns:
        The end of their name; what is stored; and the outputs and inputs that share one: a stated block, a group of a
        row, a row or all.

    Raises:
        UnfitError: there are none, they are of another dtype, or they do not go with the matrix.
    """
    end = next((end for end in ends if parts.get(end) is not None), ends[-1])
    scale = parts.get(end)
    if scale is None:
        raise UnfitError("missing", f"{parts.base}{end}")
    parts.need(end, scale.shape, *dtypes)
    outputs, inputs = shape
    counts = scale.shape if len(scale.shape) == 2 else (math.prod(scale.shape), 1)
    for block in stated:
        if counts == (-(-outputs // block[0]), -(-inputs // block[1])):
            return end, scale, block
    if len(scale.shape) <= 2 and counts == (1, 1):
        return end, scale, (max(outputs, 1), max(inputs, 1))
    if len(scale.shape) <= 2 and counts[0] == outputs and counts[1] and inputs % counts[1] == 0:
        return end, scale, (1, max(inputs // counts[1], 1))
    blocks = f" in blocks of {' or '.join(map(str, stated))}" if stated else ""
    raise UnfitError("misshapen", f"{parts.base}{end} is {scale.shape}, which does not divide {shape}{blocks}")


def whole_numbers(parts: Parts, blocks: Collection[tuple[int, int]] = ()) -> Scaled:
    """A matrix with each number by itself: FP8, and compressed-tensors' float-, int- and naive-quantized.

    Args:
        parts: the parts.
        blocks: outputs and inputs that share a scale, where the configuration says so.

    Raises:
        UnfitError: they do not fit.
    """
    numbers = parts.need(WEIGHT, (None, None), *FP8, "I8")
    shape = (numbers.shape[0], numbers.shape[1])
    ends, dtypes = (".weight_scale_inv", ".weight_scale"), (*SCALE_DTYPES, "F8_E8M0")
    end, scale, block = _scales(parts, shape, blocks, *ends, dtypes=dtypes)
    zero = None
    if parts.get(".weight_zero_point") is not None:
        zero = ".weight_zero_point"
        parts.need(zero, scale.shape, *FP8, "I8")
    dtype = "INT8" if numbers.dtype == "I8" else "FP8"
    return Scaled(parts.base, TensorInfo(shape, dtype), WEIGHT, end, block, zero=zero)


def rows_of_int8(parts: Parts) -> Scaled:
    """A matrix in LLM.int8() of bitsandbytes ([arXiv 2208.07339](https://arxiv.org/abs/2208.07339)).

    Stored is the largest absolute value of each row, which 127 stands for.

    Raises:
        UnfitError: the parts do not fit.
    """
    outputs, inputs = parts.need(WEIGHT, (None, None), "I8").shape
    parts.need(".SCB", (outputs,), "F32")
    if parts.get(LAYOUT) is not None:
        parts.need(LAYOUT, (), "U8")
        if layout := int(parts.read(parts.base + LAYOUT, 0, None)):
            raise UnfitError("not read", f"{parts.base}{LAYOUT} is {layout}, and only 0 is read: rows as they are")
    return Scaled(parts.base, TensorInfo((outputs, inputs), "INT8"), WEIGHT, ".SCB", (1, inputs), divisor=127.0)


def nvfp4(parts: Parts) -> Scaled:
    """A matrix with two numbers in a byte, and scales that share one of their own: compressed-tensors' NVFP4.

    Raises:
        UnfitError: the parts do not fit.
    """
    outputs, octets = parts.need(PACKED, (None, None), "U8").shape
    shape = (outputs, 2 * octets)
    end, _, block = _scales(parts, shape, (), ".weight_scale", dtypes=("F8_E4M3",))
    parts.need(".weight_global_scale", (1,), "F32")
    return Scaled(parts.base, TensorInfo(shape, "NVFP4"), PACKED, end, block, divisor=".weight_global_scale")


def packed_numbers(parts: Parts, blocks: Collection[tuple[int, int]]) -> Scaled:
    """A matrix with several numbers in a word: compressed-tensors' pack-quantized.

    Args:
        parts: the parts.
        blocks: see `whole_numbers`.

    Raises:
        UnfitError: they do not fit.
    """
    outputs, words = parts.need(PACKED, (None, None), "I32").shape
    parts.need(".weight_shape", (2,), "I64", "I32")
    said = tuple(map(int, parts.read(f"{parts.base}.weight_shape", 0, None)))
    shape = (outputs, said[1])
    fitting = [bits for bits in PACKED_BITS if said == shape and words == -(-said[1] * bits // WORD_BITS) > 0]
    if not fitting:
        allowed = " or ".join(map(str, PACKED_BITS))
        what = f"{parts.base}{PACKED} is {outputs, words}, which is no matrix of {said} with {allowed} bits"
        raise UnfitError("not read", what)
    bits = fitting[0]
    end, scale, block = _scales(parts, shape, blocks, ".weight_scale")
    zero = group = None
    if parts.get(".weight_zero_point") is not None:
        zero = ".weight_zero_point"
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        parts.need(zero, (-(-outputs * bits // WORD_BITS), groups), "I32")
    if parts.get(".weight_g_idx") is not None:
        group = ".weight_g_idx"
        parts.need(group, (shape[1],), "I32", "I64")
    return Scaled(parts.base, TensorInfo(shape, f"INT{bits}"), PACKED, end, block, bits, zero, group)
