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

PACKED_BITS = (4, 8)
"""Bits of integers in words that are read."""


@dataclasses.dataclass(frozen=True)
class Scaled(Packed):
    """A matrix of numbers, less their zero, times the scale of their block of outputs and inputs.

    Attributes:
        base: name of the layer.
        info: see `Packed`.
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
    def name(self) -> str:  # type: ignore[override]
        return f"{self.base}.weight"

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        ends = (self.numbers, self.scale, self.zero, self.group, self.divisor)
        return tuple(self.base + end for end in ends if isinstance(end, str))

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


def _block_of(parts: Parts, end: str, shape: tuple[int, int], stated: Collection[tuple[int, int]]) -> tuple[int, int]:
    """Outputs and inputs that share a scale: those that the configuration states, a group of a row, a row or all.

    Raises:
        UnfitError: the scales do not go with the matrix.
    """
    scale = parts.get(end)
    assert scale is not None
    outputs, inputs = shape
    counts = scale.shape if len(scale.shape) == 2 else (math.prod(scale.shape), 1)
    for block in stated:
        if counts == (-(-outputs // block[0]), -(-inputs // block[1])):
            return block
    if len(scale.shape) <= 2 and counts == (1, 1):
        return max(outputs, 1), max(inputs, 1)
    if len(scale.shape) <= 2 and counts[0] == outputs and counts[1] and inputs % counts[1] == 0:
        return 1, max(inputs // counts[1], 1)
    blocks = f" in blocks of {' or '.join(map(str, stated))}" if stated else ""
    raise UnfitError("misshapen", f"{parts.base}{end} is {scale.shape}, which does not divide {shape}{blocks}")


def _scales(parts: Parts, *ends: str, dtypes: Collection[str] = SCALE_DTYPES) -> tuple[str, TensorInfo]:
    """The first of these parts that there is, of any shape.

    Raises:
        UnfitError: there is none, or it is of another dtype.
    """
    end = next((end for end in ends if parts.get(end) is not None), ends[-1])
    info = parts.get(end)
    if info is None:
        raise UnfitError("missing", f"{parts.base}{end}")
    return end, parts.need(end, info.shape, *dtypes)


def whole_numbers(parts: Parts, blocks: Collection[tuple[int, int]] = ()) -> Scaled:
    """A matrix with each number by itself: FP8, and compressed-tensors' float-, int- and naive-quantized.

    Args:
        parts: the parts.
        blocks: outputs and inputs that share a scale, where the configuration says so.

    Raises:
        UnfitError: they do not fit.
    """
    numbers = parts.need(".weight", (None, None), *FP8, "I8")
    shape = (numbers.shape[0], numbers.shape[1])
    end, scale = _scales(parts, ".weight_scale_inv", ".weight_scale", dtypes=(*SCALE_DTYPES, "F8_E8M0"))
    zero = None
    if parts.get(".weight_zero_point") is not None:
        zero = ".weight_zero_point"
        parts.need(zero, scale.shape, *FP8, "I8")
    dtype = "INT8" if numbers.dtype == "I8" else "FP8"
    return Scaled(parts.base, TensorInfo(shape, dtype), ".weight", end, _block_of(parts, end, shape, blocks), zero=zero)


def rows_of_int8(parts: Parts) -> Scaled:
    """A matrix in LLM.int8() of bitsandbytes ([arXiv 2208.07339](https://arxiv.org/abs/2208.07339)).

    Stored is the largest absolute value of each row, which 127 stands for.

    Raises:
        UnfitError: the parts do not fit.
    """
    outputs, inputs = parts.need(".weight", (None, None), "I8").shape
    parts.need(".SCB", (outputs,), "F32")
    if parts.get(LAYOUT) is not None:
        parts.need(LAYOUT, (), "U8")
        if layout := int(parts.read(parts.base + LAYOUT, 0, None)):
            raise UnfitError("not read", f"{parts.base}{LAYOUT} is {layout}, and only 0 is read: rows as they are")
    return Scaled(parts.base, TensorInfo((outputs, inputs), "INT8"), ".weight", ".SCB", (1, inputs), divisor=127.0)


def packed_numbers(parts: Parts, blocks: Collection[tuple[int, int]] = ()) -> Scaled:
    """A matrix with several numbers in a word, or two in a byte: compressed-tensors' pack- and nvfp4-pack-quantized.

    Args:
        parts: the parts.
        blocks: outputs and inputs that share a scale, where the configuration says so.

    Raises:
        UnfitError: they do not fit.
    """
    packed = parts.need(".weight_packed", (None, None), "I32", "U8")
    outputs, stored = packed.shape
    if packed.dtype == "U8":
        shape = (outputs, 2 * stored)
        end, _ = _scales(parts, ".weight_scale", dtypes=("F8_E4M3",))
        parts.need(".weight_global_scale", (1,), "F32")
        info, groups = TensorInfo(shape, "NVFP4"), _block_of(parts, end, shape, ())
        return Scaled(parts.base, info, ".weight_packed", end, groups, divisor=".weight_global_scale")
    parts.need(".weight_shape", (2,), "I64", "I32")
    said = tuple(map(int, parts.read(f"{parts.base}.weight_shape", 0, None)))
    bits = [bits for bits in PACKED_BITS if said[0] == outputs and stored == -(-said[1] * bits // WORD_BITS) > 0]
    if not bits:
        allowed = " or ".join(map(str, PACKED_BITS))
        what = f"{parts.base}.weight_packed is {packed.shape}, which is no matrix of {said} with {allowed} bits"
        raise UnfitError("not read", what)
    end, scale = _scales(parts, ".weight_scale")
    zero = group = None
    if parts.get(".weight_zero_point") is not None:
        zero = ".weight_zero_point"
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        parts.need(zero, (-(-outputs * bits[0] // WORD_BITS), groups), "I32")
    if parts.get(".weight_g_idx") is not None:
        group = ".weight_g_idx"
        parts.need(group, (said[1],), "I32", "I64")
    info, block = TensorInfo((outputs, said[1]), f"INT{bits[0]}"), _block_of(parts, end, (outputs, said[1]), blocks)
    return Scaled(parts.base, info, ".weight_packed", end, block, bits[0], zero, group)
