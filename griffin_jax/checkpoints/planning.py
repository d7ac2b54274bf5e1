"""What a conversion would do, before it is done: where every parameter comes from, and what is lost."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from griffin_jax.checkpoints.sources import FLOATS, Origin, Source
from griffin_jax.model.assembly import scale_of, stored_arrays
from griffin_jax.model.sizes import bytes_of
from griffin_jax.model.weights import Precision
from griffin_jax.utils.messages import CheckpointWarning, shortened

LISTED = 20
"""Number of ignored tensors that a table names, at most."""


class NarrowingWarning(CheckpointWarning):
    """Warns that weights are cast to a dtype that cannot hold them as they are stored."""


class UncheckedWarning(CheckpointWarning):
    """Warns that stored weights have no checksums, because an earlier version wrote them."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One parameter of a plan.

    Attributes:
        path: path of the parameter.
        shape: shape of the parameter.
        origin: the tensor that it comes from.
        dtype: name of the dtype that it will have.
        bytes: size that it will have, with its scales.
    """

    path: str
    shape: tuple[int, ...]
    origin: Origin
    dtype: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion would do. `str` makes a table of it.

    Attributes:
        source: name of the source.
        dtype: what the weights would be stored in.
        steps: one step for every parameter.
        ignored: tensors of the source that are knowingly ignored.
        has_tokenizer: whether the source has a tokenizer.
        narrowing: what the dtype loses, in words; None if nothing.
    """

    source: str
    dtype: str
    steps: tuple[Step, ...]
    ignored: tuple[str, ...]
    has_tokenizer: bool
    narrowing: str | None

    @property
    def bytes(self) -> int:
        """Size of all parameters together."""
        return sum(step.bytes for step in self.steps)

    def __str__(self) -> str:
        header = ("parameter", "shape", "from", "shape", "layout", "dtype", "MB")
        lines = [*_aligned([header, *_collapsed(self.steps)])]
        ignored = f"{len(self.ignored)} ({shortened(self.ignored, LISTED)})" if self.ignored else "none"
        return "\n".join(
            [
                *lines,
                f"{self.source}: {len(self.steps)} parameters, {self.bytes / 1e6:,.1f} MB in {self.dtype}",
                f"tensors knowingly ignored: {ignored}; tokenizer: {'yes' if self.has_tokenizer else 'none'}",
            ]
        )


def plan_of(source: Source, precision: Precision, has_tokenizer: bool) -> Plan:
    """The plan of converting an opened source.

    Args:
        source: what is converted.
        precision: what it is converted to.
        has_tokenizer: whether it has a tokenizer.
    """
    arrays = stored_arrays(source.config, precision)

    def size(path: str) -> int:
        scale = arrays.get(scale_of(path, precision.weights))
        return bytes_of(arrays[path]) + (0 if scale is None else bytes_of(scale))

    steps = [
        Step(path, shape, source.origin(path), arrays[path].dtype.name, size(path))
        for path, shape in source.shapes.items()
    ]
    lost = narrowing(source, precision)
    return Plan(source.name, str(precision), tuple(steps), tuple(source.ignored), has_tokenizer, lost)


def narrowing(source: Source, precision: Precision) -> str | None:
    """What is lost when parameters of a source get narrower floating dtypes, in one sentence; None if nothing is.

    Quantised weights do not count: rounding them to 16 bits loses less than their quantisation already did. Nor does
    what becomes integers, which is what somebody wants who asks for these.
    """
    if source.weights is not None:
        return None
    arrays = stored_arrays(source.config, precision)
    floating = [path for path in source.shapes if not jnp.issubdtype(arrays[path].dtype, jnp.integer)]
    counts = Counter((source.origin(path).dtype, arrays[path].dtype) for path in floating)
    losses = {change: loss for change in counts if (loss := _loss(*change))}
    if not losses:
        return None
    parts = [
        f"{counts[change]} stored as {change[0]} become {change[1].name}: {loss}" for change, loss in losses.items()
    ]
    kept = "" if any(stored == "F64" for stored, _ in losses) else "; float32 keeps everything"
    return f"{source.name}: of {len(source.shapes)} parameters, {'; '.join(parts)}{kept}"


def _loss(stored: str, dtype: np.dtype) -> str | None:
    if stored not in FLOATS:
        return None
    before, after = ml_dtypes.finfo(FLOATS[stored]), ml_dtypes.finfo(dtype)
    losses = []
    if after.nmant < before.nmant:
        losses.append(f"{before.nmant + 1} bits of precision become {after.nmant + 1}")
    if after.maxexp < before.maxexp:
        largest, smallest = float(after.max), float(after.smallest_subnormal)
        losses.append(f"values beyond {largest:.5g} are refused, those below {smallest:.1g} become 0")
    return " and ".join(losses) or None


def _collapsed(steps: Iterable[Step]) -> Iterator[tuple[str, ...]]:
    """Rows of the table; those of layers that differ only in their number are made one."""
    groups: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
    for step in steps:
        path, tensor, layer = step.path, step.origin.tensor, re.match(r"layers\.(\d+)\.", step.path)
        if layer:
            path = f"layers.\0{path[layer.end(1) :]}"
            tensor = re.sub(rf"(?<=\.){layer[1]}(?=\.)", "\0", tensor, count=1)
        origin = step.origin
        layout = origin.layout if "->" in origin.layout else ""
        row = (path, _shape(step.shape), tensor, _shape(origin.shape), layout, f"{origin.dtype} -> {step.dtype}")
        layers, sizes = groups.setdefault(row, ([], []))
        layers += [int(layer[1])] if layer else []
        sizes.append(step.bytes)
    for row, (layers, sizes) in groups.items():
        yield (*(cell.replace("\0", _ranges(layers)) for cell in row), f"{sum(sizes) / 1e6:,.1f}")


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` -> `"{0..2,5}"`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table whose last column is aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *cells, last in rows:
        left = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
        yield "  ".join([*left, last.rjust(widths[-1])])
