"""Tensors that are stored in parts: integers or small floats, with their scales.

They are found by the names and dtypes of their parts, and read as the numbers that they mean, in float32; what becomes
of these is up to the format that the model is loaded in. A linear layer's matrix is (O, I): outputs, inputs.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8

from griffin_jax.checkpoints.sources import TensorInfo

WORD_BITS = 32
"""Bits of the integers that smaller ones are packed into."""

WEIGHT = ".weight"
"""End of the name that a matrix has in an unquantised checkpoint, after that of its layer."""

SCALE_DTYPES = ("F32", "BF16", "F16")
"""Dtypes of scales."""

Read = Callable[[str, int, int | None], np.ndarray]
"""Rows of a stored tensor: its name, the first row, and the one after the last or None."""


class UnfitError(Exception):
    """Raised where parts do not make a tensor.

    Attributes:
        problem: what is wrong with one of them, in a word or two.
        what: which one, and how.
    """

    def __init__(self, problem: str, what: str):
        super().__init__(f"{problem}: {what}")
        self.problem, self.what = problem, what


@dataclasses.dataclass(frozen=True)
class Parts:
    """The stored tensors of a layer.

    Attributes:
        base: what their names begin with: that of the layer.
        stored: all tensors of the checkpoint, by name.
        read: function that reads rows of one.
    """

    base: str
    stored: Mapping[str, TensorInfo]
    read: Read

    def get(self, end: str) -> TensorInfo | None:
        """The part whose name ends so, if there is one."""
        return self.stored.get(self.base + end)

    def need(self, end: str, shape: tuple[int | None, ...], *dtypes: str) -> TensorInfo:
        """A part of this shape, of which None stands for any size, and of one of these dtypes.

        Raises:
            UnfitError: it is not there, or is not like this.
        """
        info = self.get(end)
        if info is None:
            raise UnfitError("missing", f"{self.base}{end}")
        fits = len(info.shape) == len(shape) and all(
            size in (None, got) for size, got in zip(shape, info.shape, strict=True)
        )
        if not fits or info.dtype not in dtypes:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise UnfitError(
                "misshapen",
                f"{self.base}{end} is {info.shape} of {info.dtype}, not ({sizes}{',' * (len(shape) == 1)}) of "
                f"{' or '.join(dtypes)}",
            )
        return info


class Packed(abc.ABC):
    """A tensor that is stored in parts.

    Attributes:
        base: what the names of its parts begin with: that of the layer.
        info: its shape, and a name for the dtype of its numbers, which is one of `sources.PACKED`.
    """

    base: str
    info: TensorInfo

    @property
    def name(self) -> str:
        """Its name, as an unquantised checkpoint has it."""
        return self.base + WEIGHT

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the stored tensors that make it."""
        return tuple(self.base + end for end in self.ends)

    @property
    @abc.abstractmethod
    def ends(self) -> tuple[str, ...]:
        """Ends of these names."""

    @abc.abstractmethod
    def rows(self, read: Read, start: int, stop: int | None) -> Float32[np.ndarray, "rows *rest"]:
        """The numbers of some rows, as they are meant.

        Raises:
            ValueError: the parts contradict each other.
        """


def unpacked(words: Int32[np.ndarray, "*rows n"], bits: int) -> UInt8[np.ndarray, "*rows m"]:
    """The unsigned numbers of 2, 4 or 8 bits in words of 32; those in the lower bits come first."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return octets
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((octets[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(
        *octets.shape[:-1], octets.shape[-1] * 8 // bits
    )


def scale_groups(
    values: Float32[np.ndarray, "rows columns"],
    zeros: Float32[np.ndarray, "rows groups"] | None,
    scales: Float32[np.ndarray, "rows groups"],
    groups: int | Int[np.ndarray, " columns"],
    what: str,
) -> Float32[np.ndarray, "rows columns"]:
    """(values - zeros) * scales, written to the values.

    Args:
        values: numbers as they are stored.
        zeros: what stands for zero in each group of columns; None for 0.
        scales: what the numbers of each group are times.
        groups: neighbouring columns of a group, or the group of each column.
        what: what to call the latter in a message.

    Raises:
        ValueError: a group is not there.
    """
    rows, columns = values.shape
    if isinstance(groups, int) and columns and columns % groups == 0:
        cut = values.reshape(rows, columns // groups, groups)
        if zeros is not None:
            cut -= zeros[..., None]
        cut *= scales[..., None]
        return values
    of_column = np.arange(columns) // groups if isinstance(groups, int) else groups
    if of_column.size and not 0 <= of_column.min() <= of_column.max() < scales.shape[1]:
        named = f"{of_column.min()} to {of_column.max()}"
        raise ValueError(f"{what}: names groups from {named}, and there are {scales.shape[1]}")
    if zeros is not None:
        values -= zeros[:, of_column]
    values *= scales[:, of_column]
    return values
