"""Numbers (O, I) times the scale of their block: FP8 of several makers, and the formats of compressed-tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

import numpy as np
from jaxtyping import Float32, Shaped

from griffin_jax.checkpoints.quantised import mxfp4
from griffin_jax.checkpoints.quantised.parts import (
    SCALES,
    WORD_BITS,
    Packed,
    Parts,
    Read,
    UnfitError,
    of_each,
    unpacked,
)
from griffin_jax.checkpoints.sources import TensorInfo

FP8 = ("F8_E4M3", "F8_E5M2")
"""Dtypes of floating numbers of 8 bits."""


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
        groups = np.arange(inputs) // self.block[1] if self.group is None else whole(self.group)
        divisor = whole(self.divisor).reshape(()) if isinstance(self.divisor, str) else np.float32(self.divisor)
        scale = _matrix(whole(self.scale)).astype(np.float32)[blocks] / divisor
        values = self._values(read(self.base + self.numbers, start, stop))
        if self.zero is not None:
            zeros = whole(self.zero)
            zeros = _matrix(zeros).astype(np.float32) if self.bits is None else self._values(zeros.T).T
            values -= of_each(groups, zeros[blocks], f"{self.base}{self.group}")
        values *= of_each(groups, scale, f"{self.base}{self.group}")
        return values

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


def _block_of(parts: Parts, end: str, shape: tuple[int, int], stated: tuple[int, int] | None) -> tuple[int, int]:
    """Outputs and inputs that share a scale: those that the configuration states, or what divides the matrix.

    Raises:
        UnfitError: the scales do not go with the matrix.
    """
    scale = parts.get(end)
    assert scale is not None
    counts = scale.shape if len(scale.shape) == 2 else (math.prod(scale.shape), 1)
    if stated is not None and counts == tuple(-(-size // each) for size, each in zip(shape, stated, strict=True)):
        return stated
    if len(scale.shape) <= 2 and all(count and not size % count for size, count in zip(shape, counts, strict=True)):
        return shape[0] // counts[0], shape[1] // counts[1]
    raise UnfitError("misshapen", f"{parts.base}{end} is {scale.shape}, which does not divide {shape}")


def _scales(parts: Parts, *ends: str, dtypes: Collection[str] = SCALES) -> tuple[str, TensorInfo]:
    """The first of these parts that there is, of any shape.

    Raises:
        UnfitError: there is none, or it is of another dtype.
    """
    end = next((end for end in ends if parts.get(end) is not None), ends[-1])
    info = parts.get(end)
    if info is None:
        raise UnfitError("missing", f"{parts.base}{end}")
    return end, parts.need(end, info.shape, *dtypes)


def whole_numbers(parts: Parts, block: tuple[int, int] | None = None) -> Scaled:
    """A matrix with each number by itself: FP8, and compressed-tensors' float-, int- and naive-quantized.

    Args:
        parts: the parts.
        block: outputs and inputs that share a scale, if the configuration says so.

    Raises:
        UnfitError: they do not fit.
    """
    numbers = parts.need(".weight", (None, None), *FP8, "I8")
    shape = (numbers.shape[0], numbers.shape[1])
    end, scale = _scales(parts, ".weight_scale_inv", ".weight_scale", dtypes=(*SCALES, "F8_E8M0"))
    zero = None
    if parts.get(".weight_zero_point") is not None:
        zero = ".weight_zero_point"
        parts.need(zero, scale.shape, *FP8, "I8")
    dtype = "INT8" if numbers.dtype == "I8" else "FP8"
    return Scaled(parts.base, TensorInfo(shape, dtype), ".weight", end, _block_of(parts, end, shape, block), zero=zero)


def rows_of_int8(parts: Parts) -> Scaled:
    """A matrix in LLM.int8() of bitsandbytes ([arXiv 2208.07339](https://arxiv.org/abs/2208.07339)).

    Stored is the largest absolute value of each row, which 127 stands for.

    Raises:
        UnfitError: the parts do not fit.
    """
    outputs, inputs = parts.need(".weight", (None, None), "I8").shape
    parts.need(".SCB", (outputs,), "F32")
    return Scaled(parts.base, TensorInfo((outputs, inputs), "INT8"), ".weight", ".SCB", (1, inputs), divisor=127.0)


def packed_numbers(parts: Parts, bits: Collection[int], block: tuple[int, int] | None = None) -> Scaled:
    """A matrix with several numbers in a word, or two in a byte: compressed-tensors' pack- and nvfp4-pack-quantized.

    Args:
        parts: the parts.
        bits: those of integers, according to the configuration.
        block: outputs and inputs that share a scale, if it says so.

    Raises:
        UnfitError: they do not fit.
    """
    outputs, stored = parts.need(".weight_packed", (None, None), "I32", "U8").shape
    if parts.need(".weight_packed", (outputs, stored), "I32", "U8").dtype == "U8":
        shape = (outputs, 2 * stored)
        end, _ = _scales(parts, ".weight_scale", dtypes=("F8_E4M3",))
        parts.need(".weight_global_scale", (1,), "F32")
        blocks = _block_of(parts, end, shape, None)
        info = TensorInfo(shape, "NVFP4")
        return Scaled(parts.base, info, ".weight_packed", end, blocks, divisor=".weight_global_scale")
    if len(bits) != 1 or not {4, 8}.issuperset(bits):
        said = " and ".join(map(str, sorted(bits))) or "unknown"
        raise UnfitError("not read", f"{parts.base}.weight_packed, whose numbers have {said} bits; allowed is 4, or 8")
    (each,) = bits
    shape = (outputs, stored * WORD_BITS // each)
    end, scale = _scales(parts, ".weight_scale")
    zero = group = None
    if parts.get(".weight_zero_point") is not None:
        zero = ".weight_zero_point"
        parts.need(zero, (-(-outputs * each // WORD_BITS), scale.shape[-1]), "I32")
    if parts.get(".weight_g_idx") is not None:
        group = ".weight_g_idx"
        parts.need(group, (shape[1],), "I32", "I64")
    blocks, info = _block_of(parts, end, shape, block), TensorInfo(shape, f"INT{each}")
    return Scaled(parts.base, info, ".weight_packed", end, blocks, each, zero, group)
