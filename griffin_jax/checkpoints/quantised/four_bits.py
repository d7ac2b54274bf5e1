"""Matrices of four bits of bitsandbytes: NF4 and FP4 ([arXiv 2305.14314](https://arxiv.org/abs/2305.14314))."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
from jaxtyping import Float32

from griffin_jax.checkpoints.quantised.parts import WEIGHT, Packed, Parts, Read, UnfitError
from griffin_jax.checkpoints.sources import TensorInfo
from griffin_jax.utils.messages import brief

SCALES, STATE = f"{WEIGHT}.absmax", f"{WEIGHT}.quant_state.bitsandbytes__"
"""Ends of the names of the scales, and of the tensor whose bytes are JSON, which the kind follows."""

KINDS = ("nf4", "fp4")

STORAGE = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Bytes of the dtypes that the numbers may be stored as (`bnb_4bit_quant_storage`): only their bits count."""


@dataclasses.dataclass(frozen=True)
class FourBits(Packed):
    """Numbers of a table, times the scale of their block; blocks go on from row to row.

    Attributes:
        base, info: see `Packed`.
        kind: of `KINDS`.
        stored: bytes of an entry of the array that numbers are stored as.
        block: numbers that share a scale.
        nested: scales that share a scale of their own, if scales are of 8 bits (double quantisation); else None.
        offset: what is added to such scales.
    """

    base: str
    info: TensorInfo
    kind: str
    stored: int
    block: int
    nested: int | None
    offset: float

    @property
    def ends(self) -> tuple[str, ...]:
        ends = ["", ".absmax", ".quant_map", *((".nested_absmax", ".nested_quant_map") if self.nested else ())]
        return *(WEIGHT + end for end in ends), STATE + self.kind

    @classmethod
    def of(cls, parts: Parts) -> FourBits:
        """The matrix that parts make.

        Raises:
            UnfitError: they do not fit.
        """
        kind = next((kind for kind in KINDS if parts.get(STATE + kind) is not None), KINDS[0])
        parts.need(STATE + kind, (None,), "U8")
        try:
            state = json.loads(parts.read(f"{parts.base}{STATE}{kind}", 0, None).tobytes())
            outputs, inputs = map(int, state["shape"])
            block, nested = int(state["blocksize"]), None
            if parts.get(f"{WEIGHT}.nested_absmax") is not None:
                nested = int(state["nested_blocksize"])
            offset = float(state.get("nested_offset", 0.0))
            if min(outputs, inputs, block, 1 if nested is None else nested) < 1 or inputs % 2:
                raise ValueError(f"{outputs} rows of {inputs} numbers in blocks of {block}")
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            raise UnfitError("malformed", f"{parts.base}{STATE}{kind} ({brief(error)})") from error
        count = outputs * inputs
        stored = parts.need(WEIGHT, (None, 1), *STORAGE)
        size = STORAGE[stored.dtype]
        parts.need(WEIGHT, (-(-count // 2 // size), 1), *STORAGE)
        parts.need(f"{WEIGHT}.quant_map", (16,), "F32")
        scales = -(-count // block)
        parts.need(SCALES, (scales,), "F32" if nested is None else "U8")
        if nested is not None:
            parts.need(f"{WEIGHT}.nested_absmax", (-(-scales // nested),), "F32")
            parts.need(f"{WEIGHT}.nested_quant_map", (256,), "F32")
        return cls(parts.base, TensorInfo((outputs, inputs), kind.upper()), kind, size, block, nested, offset)

    def rows(self, read: Read, start: int, stop: int | None) -> Float32[np.ndarray, "rows columns"]:
        outputs, inputs = self.info.shape
        first, last = start * inputs, (outputs if stop is None else stop) * inputs
        lead = first // 2 // self.stored
        entries = read(self.name, lead, -(-last // 2 // self.stored))
        octets = np.ascontiguousarray(entries).view(np.uint8).reshape(-1)[first // 2 - lead * self.stored :]
        octets = octets[: (last - first) // 2]
        table = read(f"{self.name}.quant_map", 0, None)
        # The upper bits of a byte come first.
        values = table[np.stack([octets >> 4, octets & 15], axis=-1)].reshape(-1)
        begin, end = first // self.block, math.ceil(last / self.block)
        scales = np.repeat(self._scales(read, begin, end), self.block)
        values *= scales[first - begin * self.block : last - begin * self.block]
        return values.reshape(-1, inputs)

    def _scales(self, read: Read, start: int, stop: int) -> Float32[np.ndarray, " blocks"]:
        scales = read(f"{self.name}.absmax", start, stop)
        if self.nested is None:
            return scales
        table, own = (read(f"{self.name}.nested_{end}", 0, None) for end in ("quant_map", "absmax"))
        return table[scales] * own[np.arange(start, stop) // self.nested] + np.float32(self.offset)
