"""Checkpoints in foreign formats, read tensor by tensor: Hugging Face folders and GGUF files.

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
import mmap
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from griffin_jax.checkpoints.families import Family, Layout, family_of, gguf_family_of
from griffin_jax.checkpoints.pytorch import PickleFile
from griffin_jax.checkpoints.schema.family import (
    Attributes,
    Factor,
    GgufFamily,
    Rules,
    is_ignored,
    rules_by_path,
    sizes_of,
)
from griffin_jax.model.assembly import parameter_shapes
from griffin_jax.model.config import ModelConfig
from griffin_jax.text.tokenizer import Tokenizer
from griffin_jax.utils.messages import brief, shortened

FLOATS = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}  # fmt: skip
"""Floating dtypes of weights, by their names in safetensors and GGUF."""

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


class Source(abc.ABC):
    """A model that can be loaded or converted.

    Attributes:
        name: name of the source, for messages.
        config: the architecture.
        shapes: shape of every parameter, by path.
        dtype: dtype of most of the stored weights; float32 where they are quantised or have 64 bits.
        files: files that the weights and the architecture are read from.
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

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that lies with the model, if one does."""

    @abc.abstractmethod
    def origin(self, path: str) -> Origin:
        """Where a parameter comes from."""

    def parameters(
        self, dtype: np.dtype, shardings: Mapping[str, jax.sharding.Sharding] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Path and weights of all parameters, one after the other.

        Args:
            dtype: dtype of the weights.
            shardings: sharding of each parameter by path; with them every array is on its devices.
        """
        for path in self.shapes:
            array = self.read(path, dtype)
            if shardings is not None:
                # Every process has all of the tensor, and gives its own devices what they need of it.
                array = jax.make_array_from_callback(array.shape, shardings[path], array.__getitem__)
            yield path, array

    def reference(self) -> dict[str, Any] | None:
        """What `from_pretrained` of transformers takes to load the same files; None if it cannot."""
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
        files: files that the tensors and the configuration are in.
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
        """What `from_pretrained` of transformers takes to load the same files."""


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
        names = list(rule.tensors(self._sizes))
        what = f"{self.name}: {names[0]}"
        info = self._reader.tensors[names[0]]
        is_large = math.prod(info.shape) * max(_itemsize(info.dtype), dtype.itemsize) > PIECE_BYTES
        if is_large and _is_permutation(layout) and len(names) == 1 and not rule.add:
            return self._read_in_pieces(rule.name, layout, dtype, what)
        parts = [self._reader.read(name) for name in names]
        stored = np.stack(parts) if "{head}" in rule.name else parts[0]
        array = layout.apply(stored, self._sizes)
        if rule.add:
            array = array.astype(np.float32) + np.float32(rule.add)
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, dtype)
        check_finite(array, stored, what)
        return array

    def _read_in_pieces(self, tensor: str, layout: Layout, dtype: np.dtype, what: str) -> np.ndarray:
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
        info = self._reader.tensors[tensor]
        step = max(1, PIECE_BYTES // (math.prod(shape[1:]) * max(_itemsize(info.dtype), dtype.itemsize)))
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
            *_listed("missing", sorted(expected.keys() - tensors.keys())),
            *_listed("unexpected", sorted(name for name in surplus if not is_ignored(name, reader.ignored))),
            *_listed(
                "misshapen",
                [
                    f"{name} is {tensors[name].shape}, not {shape}"
                    for name, shape in expected.items()
                    if name in tensors and tensors[name].shape != shape
                ],
            ),
            *_listed(
                "not of a supported dtype",
                [
                    f"{name} is {tensors[name].dtype}"
                    for name in expected
                    if name in tensors and not _is_supported(tensors[name].dtype)
                ],
            ),
        ]
        if not problems:
            for name, of in copies.items():
                if tensors[name] != tensors[of] or self._digest(name) != self._digest(of):
                    problems.append(
                        f"{name} should be the same as {of}, which the configuration ties it to, but is not"
                    )
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


def _is_finite(array: np.ndarray, step: int = 1 << 22) -> bool:
    # In steps, because the mask of a whole embedding would be one more array of its size.
    rows = array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)
    step = max(1, step // max(rows.shape[1], 1))
    return all(bool(np.isfinite(rows[start : start + step]).all()) for start in range(0, len(rows), step))


def _listed(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {kind}: {shortened(names, LISTED)}"]


def _is_supported(dtype: str) -> bool:
    return dtype in FLOATS or _is_quantised(dtype)


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


# ---- Hugging Face folders ----


@dataclasses.dataclass(frozen=True)
class _Format:
    """A format of weights in a Hugging Face folder: the file of unsharded weights, or the index of sharded ones."""

    single: str
    index: str
    suffix: str

    def is_in(self, folder: Path) -> bool:
        return (folder / self.single).exists() or (folder / self.index).exists()


_SAFETENSORS = _Format("model.safetensors", "model.safetensors.index.json", ".safetensors")
_PICKLE = _Format("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin")


def has_safetensors(folder: Path) -> bool:
    """Whether a folder has weights as safetensors."""
    return _SAFETENSORS.is_in(folder)


class HuggingFaceFolder(Reader):
    """A folder with config.json and safetensors files, or PyTorch's if they are allowed.

    Args:
        folder: the folder. Where it has both safetensors and PyTorch's files, the latter are not read.
        allow_pickle: whether PyTorch's pickle files may be read.

    Raises:
        FileNotFoundError: the folder lacks config.json or weights.
        ImportError: PyTorch's files are to be read, and torch is not installed.
        ValueError: a file is malformed, or the configuration is not supported.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False):
        self.name = str(folder)
        self._folder = folder
        self.family, self.config = read_hf_config(folder)
        self.rules, self.ignored, self.copies = self.family.rules, self.family.ignored, self.family.copies
        self.tensors, self.problems = {}, []
        self._files: dict[str, Path] = {}
        self._pickles: dict[Path, PickleFile] = {}
        self._starts: dict[str, int] = {}
        self._format = self._choose_format(allow_pickle)
        listed = self._shards()
        shards = list(dict.fromkeys(listed.values())) if listed else [folder / self._format.single]
        for file in shards:
            self._open(file)
        self.files = [folder / "config.json", *shards]
        if listed:
            self._check_index(listed)
        check_plausible(self.name, self.config, [info.shape for info in self.tensors.values()])
        # In checkpoints of the bare model, as AutoModel saves it, names lack the prefix of the part in the whole.
        prefix = self.family.prefix
        self._prefix = "" if any(name.startswith(prefix) for name in self.tensors) else prefix
        self.tensors = {
            name if name in self.copies else self._prefix + name: tensor for name, tensor in self.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        return self.read_rows(name, 0, None)

    def read_rows(self, name: str, start: int, stop: int | None) -> np.ndarray:
        info, name = self.tensors[name], name.removeprefix(self._prefix)
        file = self._files[name]
        if pickle := self._pickles.get(file):
            for other in self._pickles.values():
                if other is not pickle:
                    other.release()
            return pickle.read(name, start, stop)
        num_rows, *row = info.shape or (1,)
        stop = num_rows if stop is None else stop
        count = math.prod(row)
        dtype = FLOATS[info.dtype]
        try:
            at = self._starts[name] + start * count * dtype.itemsize
            values = np.fromfile(file, dtype, (stop - start) * count, offset=at)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: tensor {name} cannot be read ({brief(error)})") from error
        if values.size != (stop - start) * count:
            raise ValueError(f"{file}: tensor {name} cannot be read (the file has become shorter)")
        return values.reshape(stop - start, *row) if info.shape else values.reshape(())

    def reference(self) -> dict[str, Any]:
        return {
            "pretrained_model_name_or_path": str(self._folder),
            "use_safetensors": self._format is _SAFETENSORS,
        }

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_folder(self._folder) if Tokenizer.is_in(self._folder) else None

    def _choose_format(self, allow_pickle: bool) -> _Format:
        if _SAFETENSORS.is_in(self._folder):
            return _SAFETENSORS
        if _PICKLE.is_in(self._folder):
            if allow_pickle:
                return _PICKLE
            raise FileNotFoundError(f"{self._folder}: has no safetensors. {PICKLE_HELP}")
        raise FileNotFoundError(f"{self._folder}: has neither {_SAFETENSORS.single} nor {_SAFETENSORS.index}")

    def _shards(self) -> dict[str, Path]:
        """The file of every tensor according to the index; empty if all are in one file."""
        if (self._folder / self._format.single).exists():
            return {}
        index = self._folder / self._format.index
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ValueError(f"{index}: has no weight_map")
        suffix = self._format.suffix
        for name in files.values():
            # An index from somebody else must not point out of the folder, on any system.
            if not isinstance(name, str) or re.search(r"[/\\:\x00-\x1f]", name) or not name.endswith(suffix):
                raise ValueError(f"{index}: {name!r:.200} is not the name of a {suffix} file in the folder")
        shards = {tensor: self._folder / name for tensor, name in files.items()}
        if absent := sorted({file.name for file in shards.values() if not os.path.isfile(file)}):
            raise FileNotFoundError(f"{index}: names files that do not exist: {', '.join(absent)}")
        return shards

    def _open(self, file: Path) -> None:
        if self._format is _PICKLE:
            opened = self._pickles[file] = PickleFile(file)
            opened.release()
            tensors = {name: TensorInfo(*info) for name, info in opened.tensors.items()}
            self.problems += _listed("entries that are no tensors", opened.problems)
            duplicates = []
        else:
            tensors, starts, duplicates = _safetensors_header(file)
            self._starts.update(starts)
        self.problems += _listed("duplicate", [f"{name} twice in {file.name}" for name in duplicates])
        self.problems += _listed(
            "duplicate",
            [f"{name} in {self._files[name].name} and {file.name}" for name in tensors if name in self._files],
        )
        self.tensors.update(tensors)
        self._files.update(dict.fromkeys(tensors, file))

    def _check_index(self, listed: Mapping[str, Path]) -> None:
        misplaced = [
            f"{name} is in {self._files[name].name}, not {file.name}"
            for name, file in listed.items()
            if name in self._files and self._files[name] != file
        ]
        self.problems += _listed("not where the index says", misplaced)
        self.problems += _listed("in the index but in no file", sorted(listed.keys() - self._files.keys()))
        self.problems += _listed("in a file but not in the index", sorted(self._files.keys() - listed.keys()))


def read_hf_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Family and architecture from config.json, and from generation_config.json the tokens that end an answer.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is malformed or not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: has no config.json, so it is not a Hugging Face checkpoint")
    values = read_json(path)
    family = family_of(values.get("model_type"), str(path))
    generation = folder / "generation_config.json"
    if generation.is_file():
        # What transformers' generate() stops at; for chat models often more than config.json has.
        eos = read_json(generation).get("eos_token_id")
        values = values if eos is None else {**values, "eos_token_id": eos}
    return family, family.model_config(values, str(path))


def _safe_open(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="numpy", backend="pread")


def _safetensors_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, int], list[str]]:
    """The tensors of a file, the bytes at which they begin, and the names that its header has more than once.

    Raises:
        ValueError: the file is truncated or its header is corrupt.
    """
    try:
        with _safe_open(file) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            tensors = {
                name: TensorInfo(tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()
            }
        pairs, data = _raw_header(file)
        starts = {name: data + entry["data_offsets"][0] for name, entry in pairs if name in tensors}
    except Exception as error:
        raise ValueError(f"{file}: not a readable safetensors file ({brief(error)})") from error
    return tensors, starts, [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]


def _raw_header(file: Path) -> tuple[list[tuple[str, Any]], int]:
    """The header's entries as they are written, and the byte at which the data begin.

    The safetensors library keeps only the last of several entries with the same name. It also does not tell where
    tensors are, and reads a whole tensor for each slice of it.
    """
    pairs: list[tuple[str, Any]] = []

    def note(items: list[tuple[str, Any]]) -> dict[str, Any]:
        # Objects close from the inside out, so the last call is that of the header itself.
        pairs[:] = items
        return dict(items)

    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        json.loads(opened.read(size), object_pairs_hook=note)
    return pairs, 8 + size


# ---- GGUF files ----


@dataclasses.dataclass(frozen=True)
class _GgufTensor:
    """A tensor in the header of a GGUF file: its shape, outermost axis first, and its place in the file, in bytes."""

    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int


class GgufFile(Reader):
    """A GGUF file, quantised or not.

    Raises:
        ValueError: the file is malformed, or its model is not supported.
    """

    def __init__(self, file: Path):
        self.name = str(file)
        self._file = file
        self.metadata, tensors = read_gguf_header(file)
        if Attributes(self.metadata, self.name).take("split.count", int, default=1) > 1:
            raise ValueError(f"{file}: is one part of several; join them with llama.cpp's llama-gguf-split --merge")
        self.family = gguf_family_of(self.metadata.get("general.architecture"), self.name)
        gguf = self.family.gguf
        assert gguf is not None
        self.files = [file]
        self.rules, self.ignored, self.copies = gguf.rules, gguf.ignored, {}
        self._tensors = tensors
        self.tensors = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.problems = []
        try:
            self.config = self._read_config(gguf)
        except ValueError as error:
            raise error if self.name in str(error) else ValueError(f"{file}: {error}") from error
        check_plausible(self.name, self.config, list(self.shapes.values()))

    def read(self, name: str) -> np.ndarray:
        return self._values(name, self._tensors[name])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        stored = self._tensors[name]
        # A quantised block cannot be read in part.
        if len(stored.shape) == 1:
            return self.read(name)[start:stop]
        row = stored.size // stored.shape[0]
        part = dataclasses.replace(
            stored,
            shape=(stop - start, *stored.shape[1:]),
            start=stored.start + start * row,
            size=(stop - start) * row,
        )
        return self._values(name, part)

    def reference(self) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": str(self._file.parent), "gguf_file": self._file.name}

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_gguf(self.metadata) if "tokenizer.ggml.model" in self.metadata else None

    def _read_config(self, gguf: GgufFamily) -> ModelConfig:
        prefix = f"{self.metadata['general.architecture']}."
        attributes = Attributes(
            {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)},
            f"{self.name}: {prefix[:-1]} metadata",
        )
        values = gguf.read_config(attributes, self)
        embedding = self.shapes.get("token_embd.weight")
        vocabulary = attributes.take("vocab_size", int, default=embedding[0] if embedding else None)
        if rest := attributes.rest():
            listed = ", ".join(f"{prefix}{name}={value!r}" for name, value in sorted(rest.items()))
            raise ValueError(f"{self.name}: griffin_jax does not know what to do with {listed}")
        tokens = Attributes(self.metadata, self.name)
        ends = [tokens.take(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot")]
        values |= {
            "vocab_size": vocabulary,
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "bos_token_id": tokens.take("tokenizer.ggml.bos_token_id", int),
            "eos_token_id": [token for token in ends if token is not None],
        }
        return self.family.model_config(values, self.name)

    def _values(self, name: str, tensor: _GgufTensor) -> np.ndarray:
        if not _is_supported(tensor.dtype):
            raise ValueError(f"{self.name}: tensor {name} has the dtype {tensor.dtype}, which is not supported")
        raw = np.fromfile(self._file, np.uint8, tensor.size, offset=tensor.start)
        if raw.size != tensor.size:
            raise ValueError(f"{self.name}: tensor {name} ends early")
        if tensor.dtype in FLOATS:
            return raw.view(FLOATS[tensor.dtype]).reshape(tensor.shape)
        return _dequantise(raw, tensor.dtype, tensor.shape)


def _dequantise(raw: np.ndarray, dtype: str, shape: tuple[int, ...], step: int = 1 << 22) -> np.ndarray:
    """float32 values of a quantised tensor, computed in steps, since the formulas need several arrays of that size."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = raw.reshape(int(np.prod(shape[:-1])), -1)
    values = np.empty((len(rows), shape[-1]), np.float32)
    step = max(1, step // shape[-1])
    with np.errstate(all="ignore"):
        for start in range(0, len(rows), step):
            values[start : start + step] = dequantize(rows[start : start + step], GGMLQuantizationType[dtype])
    return values.reshape(shape)


@functools.cache
def _is_quantised(dtype: str) -> bool:
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


_GGUF_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_NESTING = 8
"""Depth of arrays of arrays, at most; real files have none at all."""


def read_gguf_header(file: Path) -> tuple[dict[str, Any], dict[str, _GgufTensor]]:
    """Metadata and tensors of a GGUF file.

    The gguf package has a reader too, but it takes seconds for the vocabulary of a small model, and does not return on
    a corrupt length.

    Raises:
        ValueError: the file is truncated, corrupt, or of an unsupported version.
    """
    if file.stat().st_size < 24:
        raise ValueError(f"{file}: not a GGUF file ({file.stat().st_size} bytes)")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        if buffer[:4] != b"GGUF":
            raise ValueError(f"{file}: not a GGUF file (it begins with {buffer[:4]!r})")
        try:
            return _GgufHeader(buffer).parse()
        except (KeyError, ValueError) as error:
            raise ValueError(f"{file}: not a readable GGUF file ({error})") from error


class _GgufHeader:
    """Parses the header of a GGUF file of version 2 or 3."""

    def __init__(self, buffer: mmap.mmap):
        self._buffer = buffer
        self._at = 4

    def parse(self) -> tuple[dict[str, Any], dict[str, _GgufTensor]]:
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version}; supported are 2 and 3, little-endian")
        num_tensors, num_fields = self._scalar("<Q"), self._scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            if key in metadata:
                raise ValueError(f"{key} is given twice")
            metadata[key] = self._value(self._scalar("<I"))
        infos = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        data = -(-self._at // alignment) * alignment
        tensors: dict[str, _GgufTensor] = {}
        for name, tensor in infos:
            if name in tensors:
                raise ValueError(f"duplicate tensor {name}")
            tensors[name] = dataclasses.replace(tensor, start=data + tensor.start)
            if tensors[name].start + tensor.size > len(self._buffer):
                raise ValueError(f"truncated: tensor {name} goes beyond the end of the file")
        return metadata, tensors

    def _tensor(self) -> tuple[str, _GgufTensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string()
        num_axes = self._scalar("<I")
        if not 1 <= num_axes <= 4:
            raise ValueError(f"tensor {name} has {num_axes} axes")
        shape = tuple(self._scalar("<Q") for _ in range(num_axes))[::-1]
        if 0 in shape:
            raise ValueError(f"tensor {name} is empty, its shape is {shape}")
        kind = GGMLQuantizationType(self._scalar("<I"))
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(
                f"tensor {name}: rows of {shape[-1]} values do not divide into {kind.name} blocks of {block}"
            )
        size = block_bytes
        for axis in (*shape[:-1], shape[-1] // block):
            size *= axis
        return name, _GgufTensor(shape, kind.name, self._scalar("<Q"), size)

    def _take(self, size: int) -> bytes:
        if size > len(self._buffer) - self._at:
            raise ValueError(f"it ends at byte {len(self._buffer)}, within the header")
        self._at += size
        return self._buffer[self._at - size : self._at]

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack(code, self._take(struct.calcsize(code)))
        # The shortest decimal that is this float32, so that 1e-5 is 1e-05 and not 9.999999747378752e-06.
        return float(str(np.float32(value))) if code == "<f" else value

    def _string(self) -> str:
        return self._take(self._scalar("<Q")).decode("utf-8")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if depth > _GGUF_NESTING:
            raise ValueError(f"arrays nested more than {_GGUF_NESTING} times at byte {self._at}")
        if kind == _GGUF_STRING:
            return self._string()
        if kind == _GGUF_ARRAY:
            element, count = self._scalar("<I"), self._scalar("<Q")
            if element in _GGUF_SCALARS:
                code = _GGUF_SCALARS[element]
                return list(np.frombuffer(self._take(count * struct.calcsize(code)), np.dtype(code)).tolist())
            return [self._value(element, depth + 1) for _ in range(count)]
        if kind not in _GGUF_SCALARS:
            raise ValueError(f"unknown type {kind} of a value at byte {self._at}")
        return self._scalar(_GGUF_SCALARS[kind])
