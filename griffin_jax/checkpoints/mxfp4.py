"""Tensors of four bits as gpt-oss is published with them: MXFP4 of the OCP Microscaling Formats (MX) 1.0.

A number has a sign, two bits of an exponent and one of a mantissa (E2M1); 32 of a row share a power of two (E8M0).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt8

from griffin_jax.checkpoints.sources import MXFP4, TensorInfo

BLOCK = 32
"""Numbers that share a scale."""

BLOCKS, SCALES = "_blocks", "_scales"
"""Ends of the names of both parts of a tensor."""

SCALE_BIAS = 127
"""What is subtracted from a stored scale for the exponent."""

_POSITIVE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NUMBERS = np.concatenate([_POSITIVE, -_POSITIVE])
_OF_BYTE = np.stack([_NUMBERS[np.arange(256) & 15], _NUMBERS[np.arange(256) >> 4]], axis=-1)
"""Both numbers of each byte: those of its lower bits come first."""


def whole(blocks: TensorInfo) -> TensorInfo:
    """The tensor that stored blocks are the numbers of."""
    *rows, count, _ = blocks.shape
    return TensorInfo((*rows, count * BLOCK), MXFP4)


def problem(name: str, blocks: TensorInfo, scales: TensorInfo | None) -> str | None:
    """What is wrong with the parts of a tensor, in words; None if nothing is.

    Args:
        name: name of the tensor, without the ends of its parts.
        blocks: what is stored of its numbers.
        scales: what is stored of its scales; None if nothing is.
    """
    if scales is None:
        return f"1 missing: {name}{SCALES}"
    for part, info, shape in (
        (BLOCKS, blocks, (*blocks.shape[:-1], BLOCK // 2)),
        (SCALES, scales, blocks.shape[:-1]),
    ):
        if info != TensorInfo(shape, "U8"):
            return f"1 misshapen: {name}{part} is {info.shape} of {info.dtype}, not {shape} of U8"
    return None


def dequantise(
    blocks: UInt8[np.ndarray, "*rows n 16"], scales: UInt8[np.ndarray, "*rows n"]
) -> Float32[np.ndarray, "*rows d"]:
    """The numbers as they are meant, which bfloat16 can hold as well; infinite where a scale is none."""
    numbers = _OF_BYTE[blocks].reshape(*blocks.shape[:-1], BLOCK)
    with np.errstate(over="ignore", invalid="ignore"):
        numbers *= np.ldexp(np.float32(1), scales.astype(np.int32) - SCALE_BIAS)[..., None]
    return numbers.reshape(*blocks.shape[:-2], -1)
