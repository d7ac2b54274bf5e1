"""Floating numbers of four bits: MXFP4, as gpt-oss is published, of the OCP Microscaling Formats (MX) 1.0.

A number has a sign, two bits of an exponent and one of a mantissa (E2M1); 32 of a row share a power of two (E8M0).
NVFP4 has the same numbers with other scales (`griffin_jax.checkpoints.quantised.scaled`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float32, UInt8

from griffin_jax.checkpoints.quantised.parts import Packed, Parts, Read
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


@dataclasses.dataclass(frozen=True)
class Mxfp4(Packed):
    """The matrices of experts (E, O, I), stored as blocks (E, O, I / 32, 16) and scales (E, O, I / 32).

    Attributes:
        base: name of the tensor, without the ends of its parts.
        info: see `Packed`.
    """

    base: str
    info: TensorInfo

    @property
    def name(self) -> str:
        return self.base + BLOCKS

    @property
    def ends(self) -> tuple[str, ...]:
        return BLOCKS, SCALES

    @classmethod
    def of(cls, parts: Parts) -> Mxfp4:
        """The tensor that parts make.

        Raises:
            UnfitError: they do not fit.
        """
        blocks = parts.get(BLOCKS)
        assert blocks is not None
        *rows, count, _ = blocks.shape
        parts.need(BLOCKS, (*rows, count, BLOCK // 2), "U8")
        parts.need(SCALES, (*rows, count), "U8")
        return cls(parts.base, TensorInfo((*rows, count * BLOCK), MXFP4))

    def rows(self, read: Read, start: int, stop: int | None) -> Float32[np.ndarray, "rows *rest"]:
        return dequantise(*(read(part, start, stop) for part in self.parts))


def numbers(octets: UInt8[np.ndarray, "*rows n"]) -> Float32[np.ndarray, "*rows m"]:
    """The numbers in bytes, two in each, without scales."""
    return _OF_BYTE[octets].reshape(*octets.shape[:-1], -1)


def dequantise(
    blocks: UInt8[np.ndarray, "*rows n 16"], scales: UInt8[np.ndarray, "*rows n"]
) -> Float32[np.ndarray, "*rows d"]:
    """The numbers as they are meant, which bfloat16 can hold as well; infinite where a scale is none."""
    values = numbers(blocks)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= np.ldexp(np.float32(1), scales.astype(np.int32) - SCALE_BIAS)[..., None]
    return values.reshape(*blocks.shape[:-2], -1)
