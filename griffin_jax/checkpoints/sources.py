"""Checkpoints in foreign formats, read tensor by tensor: what `huggingface` and `gguf` have in common.

There are two steps. A `Reader` presents what is in the files: a configuration, shapes and dtypes, and one tensor at a
time. A `FamilySource` joins it with the rules of its family, checks that the two fit completely, and from then on gives
the parameters of `griffin_jax.model.transformer`.

Files are read with plain reads and not mapped into memory, because the pages of a mapped checkpoint would count as
resident until the last tensor was read. (PyTorch files are mapped anew for every read.) Large tensors are read, cast
and laid out a few rows at a time, so that a conversion needs memory for only one of them.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from griffin_jax.checkpoints.families import Family, Layout
from griffin_jax.checkpoints.schema.family import is_ignored, rules_by_path
from griffin_jax.checkpoints.schema.layouts import EACH, Factor, Rules, TensorRule, sizes_of
from griffin_jax.model.assembly import parameter_shapes, wider_parameters
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.text.tokenizer import Tokenizer
from griffin_jax.utils.messages import printable, shortened

FLOATS = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip
"""Floating dtypes of weights, by their names in safetensors and GGUF."""

MXFP4 = "MXFP4"
"""Name of the dtype of `griffin_jax.checkpoints.quantised.mxfp4`, and of the same numbers in GGUF files."""

PACKED = (MXFP4, "NVFP4", "NF4", "FP4", "FP8", "INT2", "INT4", "INT8")
"""Names of the dtypes of quantised safetensors' numbers."""

LISTED = 8
"""Number of tensors of a kind that a message names, at most."""

PIECE_BYTES = 64 << 20
"""Size above which tensors are read in pieces of about this size."""

PICKLE_HELP = (
    "PyTorch's pickle files (pytorch_model.bin) are read only where allow_pickle=True is given, --allow-pickle on the "
    "command line, since such a file is a program; they are run by torch with weights_only=True"
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a parameter comes from.

    Attributes:
        tensor: name of the tensor in the source.
        layout: how the tensor's axes become the parameter's, see `griffin_jax.checkpoints.schema.family.Layout`.
        shape: shape of the tensor.
        dtype: dtype of the tensor, as the source names it.
    """

    tensor: str
    layout: str
    shape: tuple[int, ...]
    dtype: str


BATCHES, SMALLEST_BATCH = 16, 32 << 20
"""Into how many batches the arrays of a native folder are divided for reading, and the size of a batch in any case: an
array is in memory twice until it is assembled, and every batch takes some time to begin."""


def batch_bytes(sizes: Sequence[int]) -> int:
    """Bytes of weights that are read together from a native folder; an array that is larger is read by itself.

    Args:
        sizes: bytes of each array.
    """
    return max(SMALLEST_BATCH, sum(sizes) // BATCHES)


def loading_bytes(counts: Sequence[int], itemsize: int) -> int:
    """Bytes that loading needs at most next to the weights, on each device.

    Args:
        counts: how many numbers each array has there.
        itemsize: bytes of each number in the model; on its way it may have four.
    """
    wide = max(4, itemsize)
    sizes = [count * wide for count in counts]
    # What is read together, from whatever source, and what one array of it is assembled into or cast to.
    return min(sum(sizes), max(batch_bytes(sizes), *sizes)) + max(sizes)


class Source(abc.ABC):
    """A model that can be loaded or converted.

    Attributes:
        name: name of the source, for messages.
        config: the architecture.
        shapes: shape of every parameter, by path.
        dtype: dtype of most of the stored weights; float32 where they are quantised or have 64 bits.
        files: files that weights, architecture and tokenizer are read from.
        ignored: names of tensors that are knowingly ignored.
    """

    name: str
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    dtype: np.dtype
    files: list[Path]
    ignored: list[str]

    @abc.abstractmethod
    def read(self, path: str, dtype: np.dtype) -> np.ndarray:
        """One parameter, as a contiguous array.

        Raises:
            ValueError: the parameter cannot be read, or holds values that are not finite in `dtype`.
        """

    def pieces(self, path: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        """A parameter, some entries of its first axis after the other; all together where that needs little memory.

        Raises:
            ValueError: see `read`.
        """
        yield self.read(path, dtype)

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that lies with the model, if one does."""

    @abc.abstractmethod
    def origin(self, path: str) -> Origin:
        """Where a parameter comes from."""

    @property
    def weights(self) -> WeightFormat | None:
        """How the matrices are stored, if as integers that a model can hold as they are."""
        return None

    def parameters(
        self, precision: Precision, shardings: Mapping[str, jax.sharding.Sharding] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Path and weights of all parameters, one after the other.

        Args:
            precision: how they are to be stored. They may come as floating numbers where they are to be integers.
            shardings: sharding of each parameter by path; with them every array is on its devices.
        """
        dtype = precision.read_as
        wider = wider_parameters(self.config, precision, dtype)
        for path in self.shapes:
            array = self.read(path, wider.get(path, dtype))
            if shardings is not None:
                # Every process has all of the tensor, and gives its own devices what they need of it.
                array = jax.make_array_from_callback(array.shape, shardings[path], array.__getitem__)
            yield path, array

    def reference(self) -> dict[str, Any] | None:
        """What `from_pretrained` of transformers takes to load the same files; None if it cannot.

        Raises:
            ValueError: what it computes with them is no reference.
        """
        return None


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file's header says about a tensor.

    Attributes:
        shape: shape of the tensor, outermost axis first.
        dtype: dtype of the tensor, as the file names it.
    """

    shape: tuple[int, ...]
    dtype: str


class Reader(abc.ABC):
    """The files of a checkpoint, with tensors by the names that they have there.

    Attributes:
        name: name of the checkpoint, for messages.
        family: family of the model.
        config: architecture of the model.
        rules: rules that say which tensor goes where.
        tensors: shape and dtype of every tensor of the checkpoint, by name.
        ignored: regular expressions of tensors that are knowingly ignored.
        copies: tensors that may be present although their rule does not apply, each with the one that it must equal.
        problems: what is wrong with the files themselves, in words.
        files: files that the tensors, the configuration and the tokenizer are in.
    """

    name: str
    family: Family
    config: ModelConfig
    rules: Rules
    tensors: dict[str, TensorInfo]
    ignored: tuple[str, ...]
    copies: Mapping[str, str]
    problems: list[str]
    files: list[Path]

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, in the stored dtype (float32 where quantised)."""

    @abc.abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """`read(name)[start:stop]`, with memory for these rows only, where that is possible."""

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that lies with the model, if one does."""

    @abc.abstractmethod
    def reference(self) -> dict[str, Any]:
        """What `from_pretrained` of transformers takes to load the same files.

        Raises:
            ValueError: what it computes with them is no reference.
        """


class FamilySource(Source):
    """A reader's checkpoint as parameters of the model.

    Raises:
        ValueError: tensors are missing, unexpected, duplicate, misshapen or not of a floating dtype;
            one message lists them.
    """

    def __init__(self, reader: Reader):
        self.name = reader.name
        self.config = reader.config
        self.shapes = parameter_shapes(reader.config)
        # Without ignored tensors: the causal masks of old checkpoints may have more values than the weights.
        self.dtype = _stored_dtype(
            tensor for name, tensor in reader.tensors.items() if not is_ignored(name, reader.ignored)
        )
        self._reader = reader
        self._sizes = sizes_of(reader.config)
        self.files = reader.files
        rules = rules_by_path(reader.rules, reader.config)
        self._rules = {path: rules[path] for path in self.shapes}
        expected: dict[str, tuple[int, ...]] = {}
        for rule in self._rules.values():
            expected |= rule.tensors(self._sizes)
        self._check(expected)
        self.ignored = sorted(reader.tensors.keys() - expected.keys())

    def read(self, path: str, dtype: np.dtype) -> np.ndarray:
        rule, layout = self._rules[path], Layout.parse(self._rules[path].layout)
        if self._in_pieces(rule, layout, dtype):
            array, stop = np.empty(layout.shape_after(self._sizes), dtype), 0
            for piece in self.pieces(path, dtype):
                start, stop = stop, stop + len(piece)
                array[start:stop] = piece
            return array
        what = f"{self.name}: {rule.name}"
        if self._is_large(rule.name, dtype) and _is_permutation(layout) and not rule.add:
            return self._read_turned(rule.name, layout, dtype, what)
        return self._laid_out(self._reader.read(rule.name), rule, self._sizes, dtype, what)

    def pieces(self, path: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        rule, layout = self._rules[path], Layout.parse(self._rules[path].layout)
        if not self._in_pieces(rule, layout, dtype):
            yield self.read(path, dtype)
            return
        names, letter = list(rule.tensors(self._sizes)), layout.before[0][0].letter
        if len(names) > 1:
            # Each entry of the first axis is a tensor.
            for name in names:
                part = self._reader.read(name)[None]
                yield self._laid_out(part, rule, self._sizes | {letter: 1}, dtype, f"{self.name}: {name}")
            return
        count, *row = self._reader.tensors[rule.name].shape
        step = max(1, PIECE_BYTES // (math.prod(row) * self._widest(rule.name, dtype)))
        for start in range(0, count, step):
            stop = min(start + step, count)
            stored = self._reader.read_rows(rule.name, start, stop)
            sizes = self._sizes | {letter: stop - start}
            yield self._laid_out(stored, rule, sizes, dtype, f"{self.name}: {rule.name}")

    def _in_pieces(self, rule: TensorRule, layout: Layout, dtype: np.dtype) -> bool:
        """Whether a parameter is read some entries of its first axis after the other."""
        if any(each in rule.name for each in EACH):
            return True
        return _keeps_first_axis(layout) and self._is_large(rule.name, dtype)

    def _is_large(self, name: str, dtype: np.dtype) -> bool:
        return math.prod(self._reader.tensors[name].shape) * self._widest(name, dtype) > PIECE_BYTES

    def _widest(self, name: str, dtype: np.dtype) -> int:
        """Bytes of a number of a tensor, as it is stored or wanted."""
        return max(_itemsize(self._reader.tensors[name].dtype), dtype.itemsize)

    @staticmethod
    def _laid_out(
        stored: np.ndarray, rule: TensorRule, sizes: Mapping[str, int], dtype: np.dtype, what: str
    ) -> np.ndarray:
        """The parameter, or the part of it, that a tensor is."""
        array = Layout.parse(rule.layout).apply(stored, sizes)
        if rule.add:
            array = array.astype(np.float32) + np.float32(rule.add)
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, dtype)
        check_finite(array, stored, what)
        return array

    def _read_turned(self, tensor: str, layout: Layout, dtype: np.dtype, what: str) -> np.ndarray:
        """A parameter, read with memory for it and for some rows of the tensor."""
        before, after = _factors(layout.before), _factors(layout.after)
        shape = [factor.size(self._sizes) for factor in before]
        array = np.empty(layout.shape_after(self._sizes), dtype)
        # A view of the parameter with the tensor's axes: what is written to its rows gets to the right places.
        in_order = array.reshape([factor.size(self._sizes) for factor in after]).transpose(
            [after.index(factor) for factor in before]
        )
        # Rows of the tensor for each index of the first factor.
        rows = math.prod(factor.size(self._sizes) for factor in layout.before[0][1:])
        step = max(1, PIECE_BYTES // (math.prod(shape[1:]) * self._widest(tensor, dtype)))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            stored = self._reader.read_rows(tensor, start * rows, stop * rows)
            with np.errstate(over="ignore"):
                piece = stored.astype(dtype, copy=False)
            check_finite(piece, stored, what)
            in_order[start:stop] = piece.reshape(stop - start, *shape[1:])
        return array

    def tokenizer(self) -> Tokenizer | None:
        return self._reader.tokenizer()

    def origin(self, path: str) -> Origin:
        rule = self._rules[path]
        names = list(rule.tensors(self._sizes))
        info = self._reader.tensors[names[0]]
        shape = info.shape if len(names) == 1 else (len(names), *info.shape)
        return Origin(rule.name, rule.layout, shape, info.dtype)

    def reference(self) -> dict[str, Any]:
        return self._reader.reference()

    def _check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ValueError` unless the tensors have these names and shapes, or are known not to matter."""
        reader, tensors = self._reader, self._reader.tensors
        copies = {name: of for name, of in reader.copies.items() if name in tensors and name not in expected}
        surplus = tensors.keys() - expected.keys() - copies.keys()
        problems = [
            *reader.problems,
            *listed_names("missing", sorted(expected.keys() - tensors.keys())),
            *listed_names("unexpected", sorted(name for name in surplus if not is_ignored(name, reader.ignored))),
            *listed_names(
                "misshapen",
                [
                    f"{name} is {tensors[name].shape}, not {shape}"
                    for name, shape in expected.items()
                    if name in tensors and tensors[name].shape != shape
                ],
            ),
            *listed_names(
                "not of a supported dtype",
                [
                    f"{name} is {tensors[name].dtype}"
                    for name in expected
                    if name in tensors and not is_supported(tensors[name].dtype)
                ],
            ),
        ]
        if not problems:
            for name, of in copies.items():
                if tensors[name] != tensors[of] or self._digest(name) != self._digest(of):
                    problems.append(
                        f"{name} should be the same as {of}, which the configuration ties it to, but is not"
                    )
            for pattern, constant in reader.family.constants.items():
                for name in surplus:
                    # bfloat16 has three digits.
                    if is_ignored(name, (pattern,)) and not np.allclose(reader.read(name), constant, rtol=1e-2, atol=0):
                        problems.append(f"{name} is {reader.read(name)}, and only {constant} is supported")
        if problems:
            raise ValueError(
                f"{self.name}: the tensors are not those of a {reader.family.model_type} model with this "
                f"configuration: {'; '.join(problems)}"
            )

    def _digest(self, name: str) -> bytes:
        digest = hashlib.sha256()
        num_rows, *row = self._reader.tensors[name].shape
        step = max(1, PIECE_BYTES // max(math.prod(row) * 8, 1))
        for start in range(0, num_rows, step):
            rows = self._reader.read_rows(name, start, min(start + step, num_rows))
            digest.update(np.ascontiguousarray(rows).view(np.uint8).data)
        return digest.digest()


def _factors(axes: tuple[tuple[Factor, ...], ...]) -> list[Factor]:
    return [factor for axis in axes for factor in axis]


def _is_permutation(layout: Layout) -> bool:
    """Whether a layout only moves axes, and names each of them once."""
    before, after = _factors(layout.before), _factors(layout.after)
    return set(before) == set(after) and len(set(before)) == len(before) == len(after)


def _keeps_first_axis(layout: Layout) -> bool:
    """Whether the first axis of a tensor is that of the parameter, whole and by itself."""
    before, after = layout.before[0], layout.after[0]
    return before == after and len(before) == 1 and len(before[0].parts) == 1


def _itemsize(dtype: str) -> int:
    """Bytes of a value of a stored dtype; quantised ones become float32."""
    return FLOATS.get(dtype, FLOATS["F32"]).itemsize


def check_plausible(name: str, config: ModelConfig, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise `ValueError` on absurd sizes, which may be garbage, before memory of that size is taken."""
    if config.num_layers > max(len(shapes), 256):
        raise ValueError(f"{name}: {len(shapes)} tensors are too few for {config.num_layers} layers")
    largest = max(map(math.prod, shapes), default=0)
    for letter, size in sizes_of(config).items():
        if size > max(largest, 1 << 20):
            raise ValueError(
                f"{name}: the configuration has a size of {size} ({letter}), the largest tensor only {largest} values"
            )


def check_finite(array: np.ndarray, stored: np.ndarray, what: str) -> None:
    """Raise `ValueError` if `array`, which was cast from `stored`, holds NaN or infinities."""
    if _is_finite(array):
        return
    if _is_finite(stored):
        raise ValueError(f"{what}: values up to {np.abs(stored).max():.3g} do not fit into {array.dtype}")
    raise ValueError(f"{what}: holds NaN or infinite values")


def is_finite_on_devices(array: jax.Array) -> bool:
    """Whether an array of JAX holds finite values only; of several processes, each looks at what it has."""
    if all(device.platform == "cpu" for device in array.sharding.device_set):
        # Where they lie, without a program for every shape.
        return all(_is_finite(np.asarray(shard.data)) for shard in array.addressable_shards)
    return all(bool(_all_finite(shard.data)) for shard in array.addressable_shards)


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


_EXPONENTS = {"bfloat16": np.uint16(0x7F80), "float16": np.uint16(0x7C00)}
"""The bits of the exponent, which are all set in NaN and infinities only."""


def _is_finite(array: np.ndarray, step: int = 1 << 20) -> bool:
    if (exponent := _EXPONENTS.get(array.dtype.name)) is not None:
        # NumPy's own test would convert every value of 16 bits.
        array = np.ascontiguousarray(array).view(np.uint16)
        return all(((part & exponent) != exponent).all() for part in _in_steps(array, step))
    return all(bool(np.isfinite(part).all()) for part in _in_steps(array, step))


def _in_steps(array: np.ndarray, step: int) -> Iterator[np.ndarray]:
    # In steps, because the mask of a whole embedding would be one more array of its size.
    rows = array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)
    step = max(1, step // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def listed_names(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {kind}: {printable(shortened(names, LISTED))}"]


def is_supported(dtype: str) -> bool:
    return dtype in FLOATS or dtype in PACKED or is_quantised(dtype)


def _stored_dtype(tensors: Iterable[TensorInfo]) -> np.dtype:
    """The dtype of most of the weights; float32 where they are quantised or have 64 bits."""
    weights = Counter()
    for tensor in tensors:
        weights[tensor.dtype] += math.prod(tensor.shape)
    most = max(weights, key=lambda dtype: weights[dtype], default="F32")
    return FLOATS[most] if most in ("F16", "BF16") else FLOATS["F32"]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file is not valid JSON, or holds something else.
    """
    try:
        values = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path}: not valid JSON for us (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {type(values).__name__}, not an object")
    return values


@functools.cache
def is_quantised(dtype: str) -> bool:
    """Whether a GGUF dtype is a quantised one that the gguf package can dequantise."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if dtype in FLOATS or dtype not in GGMLQuantizationType.__members__:
        return False
    kind = GGMLQuantizationType[dtype]
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:  # by which gguf says that it cannot dequantise a type
        return False
    return True
