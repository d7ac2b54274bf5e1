"""GPTQ and AWQ: integers (I, O) of few bits, with a scale and a zero for each group of inputs and each output.

GPTQ ([arXiv 2210.17323](https://arxiv.org/abs/2210.17323)) and AWQ ([arXiv 2306.00978](https://arxiv.org/abs/2306.00978))
choose the integers; stored are (q - zero) * scale.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float32, Int32, UInt8

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

BITS = (2, 4, 8)
"""Bits of GPTQ's numbers that are read; three of them lie across words."""


@dataclasses.dataclass(frozen=True)
class Columns(Packed):
    """A matrix whose outputs are the columns of what is stored.

    Attributes:
        base, info: see `Packed`.
        bits: of a number.
        group: neighbouring inputs that share a scale.
        ordered: whether the group of each input is stored instead (`desc_act`).
    """

    base: str
    info: TensorInfo
    bits: int
    group: int
    ordered: bool = False

    @property
    def ends(self) -> tuple[str, ...]:
        return ".qweight", ".qzeros", ".scales", *((".g_idx",) if self.ordered else ())

    @abc.abstractmethod
    def numbers(self, qweight: Int32[np.ndarray, "..."], start: int, stop: int) -> UInt8[np.ndarray, "rows columns"]:
        """Those of some outputs."""

    @abc.abstractmethod
    def zeros(self, qzeros: Int32[np.ndarray, "groups words"]) -> UInt8[np.ndarray, "groups outputs"]:
        """The numbers that stand for zero."""

    def rows(self, read: Read, start: int, stop: int | None) -> Float32[np.ndarray, "rows columns"]:
        stop = self.info.shape[0] if stop is None else stop

        # Outputs are columns of what is stored, which is read whole for any of them.
        def stored(end: str) -> np.ndarray:
            return read(self.base + end, 0, None)

        zeros = self.zeros(stored(".qzeros"))[:, start:stop].T.astype(np.float32)
        scales = stored(".scales")[:, start:stop].T.astype(np.float32)
        values = self.numbers(stored(".qweight"), start, stop).astype(np.float32)
        groups = stored(".g_idx") if self.ordered else self.group
        return scale_groups(values, zeros, scales, groups, f"{self.base}.g_idx")


@dataclasses.dataclass(frozen=True)
class Gptq(Columns):
    """As AutoGPTQ and GPTQModel store it: numbers are packed along the inputs, and zeros along the outputs.

    Attributes:
        one_less: whether zeros are stored less one, as the first version of the format has them.
    """

    one_less: bool = True

    @classmethod
    def of(cls, parts: Parts, bits: int, group: int | None, one_less: bool, dynamic: bool) -> Gptq:
        """The matrix that parts make.

        Args:
            parts: the parts.
            bits: of a number, according to the configuration.
            group: inputs that share a scale; None for all.
            one_less: see `Gptq`.
            dynamic: whether a layer may have other bits and groups than these.

        Raises:
            UnfitError: they do not fit.
        """
        words, outputs = parts.need(".qweight", (None, None), "I32").shape
        groups, packed = parts.need(".qzeros", (None, None), "I32").shape
        if dynamic and outputs:
            bits = packed * WORD_BITS // outputs
        if bits not in BITS:
            allowed = ", ".join(map(str, BITS))
            raise UnfitError("not read", f"{parts.base}.qweight has numbers of {bits} bits, allowed are {allowed}")
        inputs = words * WORD_BITS // bits
        if not inputs or outputs * bits % WORD_BITS:
            raise UnfitError("not read", f"{parts.base}.qweight is {words, outputs}, with words that are not full")
        ordered = parts.get(".g_idx") is not None
        if ordered:
            parts.need(".g_idx", (inputs,), "I32")
        elif dynamic and groups not in (0, -(-inputs // (group or inputs))) and inputs % groups == 0:
            group = inputs // groups
        if not (ordered and dynamic):
            groups = -(-inputs // (group or inputs))
        parts.need(".scales", (groups, outputs), *SCALE_DTYPES)
        parts.need(".qzeros", (groups, outputs * bits // WORD_BITS), "I32")
        return cls(parts.base, TensorInfo((outputs, inputs), f"INT{bits}"), bits, group or inputs, ordered, one_less)

    def numbers(self, qweight: np.ndarray, start: int, stop: int) -> UInt8[np.ndarray, "rows columns"]:
        return unpacked(qweight[:, start:stop].T, self.bits)

    def zeros(self, qzeros: np.ndarray) -> UInt8[np.ndarray, "groups outputs"]:
        if self.one_less:
            # From words, not from each number: a zero of 0 has borrowed from the one above it.
            ones = np.uint32((2**WORD_BITS - 1) // (2**self.bits - 1))
            qzeros = (qzeros.view(np.uint32) + ones).view(np.int32)
        return unpacked(qzeros, self.bits)


@dataclasses.dataclass(frozen=True)
class Awq(Columns):
    """As AutoAWQ's GEMM version stores it: a word holds eight outputs, those with even numbers first."""

    PLACES: ClassVar[tuple[int, ...]] = (0, 4, 1, 5, 2, 6, 3, 7)
    """Where in its word each of eight outputs is."""

    @classmethod
    def of(cls, parts: Parts, group: int | None) -> Awq:
        """The matrix that parts make.

        Args:
            parts: the parts.
            group: inputs that share a scale; None for all.

        Raises:
            UnfitError: they do not fit.
        """
        inputs, words = parts.need(".qweight", (None, None), "I32").shape
        if not inputs:
            raise UnfitError("not read", f"{parts.base}.qweight is empty")
        groups, outputs = -(-inputs // (group or inputs)), words * len(cls.PLACES)
        parts.need(".scales", (groups, outputs), *SCALE_DTYPES)
        parts.need(".qzeros", (groups, words), "I32")
        return cls(parts.base, TensorInfo((outputs, inputs), "INT4"), WORD_BITS // len(cls.PLACES), group or inputs)

    def numbers(self, qweight: np.ndarray, start: int, stop: int) -> UInt8[np.ndarray, "rows columns"]:
        each = len(self.PLACES)
        first, last = start // each, -(-stop // each)
        return self._in_order(qweight[:, first:last])[:, start - first * each : stop - first * each].T

    def zeros(self, qzeros: np.ndarray) -> UInt8[np.ndarray, "groups outputs"]:
        return self._in_order(qzeros)

    def _in_order(self, words: Int32[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows outputs"]:
        eights = unpacked(words, self.bits).reshape(len(words), -1, len(self.PLACES))
        return eights[..., self.PLACES].reshape(len(words), -1)
