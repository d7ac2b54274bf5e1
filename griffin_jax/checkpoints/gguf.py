"""GGUF files, llama.cpp's format."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from griffin_jax.checkpoints.families import families, gguf_family_of
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import GgufFamily, fitting_rules, rules_by_path
from griffin_jax.checkpoints.schema.layouts import sizes_of
from griffin_jax.checkpoints.sources import FLOATS, Reader, TensorInfo, check_plausible, is_supported
from griffin_jax.model.config import ModelConfig
from griffin_jax.text.gguf_tokenizer import UnknownTokenizerError, end_tokens
from griffin_jax.text.tokenizer import Tokenizer
from griffin_jax.utils.messages import CheckpointWarning, brief, is_panic, printable

NO_TOKENIZER = (None, "none", "no_vocab")
"""Values of `tokenizer.ggml.model` of files that have none."""

OF_EXPERTS = ("expert_count", "expert_used_count")
"""Metadata that some files of dense models have, too, as zeros."""

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
        self.copies = {}
        self._tensors = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.problems = []
        self._numbers: dict[str, np.ndarray] = {}
        try:
            self.config = self._read_config(gguf)
        except ValueError as error:
            raise error if self.name in str(error) else ValueError(f"{file}: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{file}: malformed, its metadata do not go together ({brief(error)})") from error
        check_plausible(self.name, self.config, list(self.shapes.values()))
        self.ignored = gguf.ignored + self._drafting_layers()
        self.rules = fitting_rules((gguf.rules, *gguf.alternatives), self.config, tensors)
        self._tensors = self._with_outer_axes_of_one()
        self.tensors = {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}
        self._numbers = self._read_numbers(gguf)
        self.tensors |= {name: TensorInfo(number.shape, "F32") for name, number in self._numbers.items()}

    def read(self, name: str) -> np.ndarray:
        if name in self._numbers:
            return self._numbers[name]
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
        if self.metadata.get("tokenizer.ggml.model") in NO_TOKENIZER:
            return None
        try:
            return read_gguf_tokenizer(self.metadata, self.name)
        except UnknownTokenizerError as error:
            warnings.warn(
                f"{error}. It is read without its tokenizer: prompts must be token ids",
                CheckpointWarning,
                stacklevel=2,
            )
            return None

    def _read_config(self, gguf: GgufFamily) -> ModelConfig:
        prefix = f"{self.metadata['general.architecture']}."
        fields = {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}
        for name in OF_EXPERTS:
            if fields.get(name) == 0:
                del fields[name]
        attributes = Attributes(fields, f"{self.name}: {prefix[:-1]} metadata")
        values = gguf.read_config(attributes, self)
        self.family = families()[values.pop("model_type", self.family.model_type)]
        embedding = self.shapes.get("token_embd.weight")
        vocabulary = attributes.take("vocab_size", int, default=embedding[0] if embedding else None)
        if rest := attributes.rest():
            listed = ", ".join(f"{prefix}{name}={value!r}" for name, value in sorted(rest.items()))
            raise ValueError(f"{self.name}: griffin_jax does not know what to do with {listed}")
        tokens = Attributes(self.metadata, self.name)
        if "tokenizer.ggml.tokens" in self.metadata:
            ends = end_tokens(self.metadata)
        else:
            named = [tokens.take(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
            ends = [token for token in named if token is not None]
        values |= {
            "vocab_size": vocabulary,
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "bos_token_id": tokens.take("tokenizer.ggml.bos_token_id", int),
            "eos_token_id": ends,
        }
        return self.family.model_config(values, self.name)

    def _drafting_layers(self) -> tuple[str, ...]:
        """Regular expressions of what is in the layers after the last one, which draft the token after the next one."""
        drafting = self.metadata.get(f"{self.metadata['general.architecture']}.nextn_predict_layers", 0)
        layers = self.config.num_layers
        return tuple(rf"blk\.{layer}\..*" for layer in range(layers, layers + drafting))

    def _with_outer_axes_of_one(self) -> dict[str, _GgufTensor]:
        """The tensors with as many axes as the rules say: outermost ones of one entry are left out in some files."""
        sizes, tensors = sizes_of(self.config), dict(self._tensors)
        for rule in rules_by_path(self.rules, self.config).values():
            for name, shape in rule.tensors(sizes).items():
                if name in tensors and _inner(tensors[name].shape) == _inner(shape):
                    tensors[name] = dataclasses.replace(tensors[name], shape=shape)
        return tensors

    def _read_numbers(self, gguf: GgufFamily) -> dict[str, np.ndarray]:
        """Parameters that are not tensors, but numbers in the metadata, by the names of `GgufFamily.numbers`."""
        found: dict[str, np.ndarray] = {}
        for field in gguf.numbers:
            values = self.metadata.get(field)
            if values is None:
                continue
            listed = values if isinstance(values, list) else [values] * self.config.num_layers
            if len(listed) != self.config.num_layers or not all(isinstance(value, float) for value in listed):
                raise ValueError(
                    f"{self.name}: {field} must be a number for each of {self.config.num_layers} layers, "
                    f"got {values!r:.200}"
                )
            for layer, value in enumerate(listed):
                name = f"blk.{layer}.{field}"
                if name in self.tensors:
                    raise ValueError(f"{self.name}: {name} is a tensor, and {field} is in the metadata, too")
                found[name] = np.array([value], np.float32)
        return found

    def _values(self, name: str, tensor: _GgufTensor) -> np.ndarray:
        if not is_supported(tensor.dtype):
            raise ValueError(f"{self.name}: tensor {name} has the dtype {tensor.dtype}, which is not supported")
        raw = np.fromfile(self._file, np.uint8, tensor.size, offset=tensor.start)
        if raw.size != tensor.size:
            raise ValueError(f"{self.name}: tensor {name} ends early")
        if tensor.dtype in FLOATS:
            return raw.view(FLOATS[tensor.dtype]).reshape(tensor.shape)
        return _dequantise(raw, tensor.dtype, tensor.shape)


def _inner(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its outermost axes of one entry."""
    return tuple(itertools.dropwhile(lambda size: size == 1, shape))


def read_gguf_tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata.

    Raises:
        UnknownTokenizerError: it is of a kind that is not supported.
        ValueError: its fields are missing or malformed. All messages begin with `where`.
    """
    try:
        return Tokenizer.from_gguf(metadata)
    except UnknownTokenizerError as error:
        raise UnknownTokenizerError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except BaseException as error:
        if not isinstance(error, ArithmeticError | AttributeError | LookupError | TypeError) and not is_panic(error):
            raise
        raise ValueError(f"{where}: malformed, its tokenizer's fields do not go together ({brief(error)})") from error


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


_GGUF_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_NESTING = 8
"""Depth of arrays of arrays, at most; real files have none at all."""
MOST_ALIGNMENT = 1 << 31
"""The largest power of two that `general.alignment`, of 32 bits, can hold."""


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
            raise ValueError(f"{file}: not a readable GGUF file ({printable(str(error))[:500]})") from error


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
        whole = isinstance(alignment, int) and not isinstance(alignment, bool)
        if not whole or not 1 <= alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r:.100}, not a power of two up to {MOST_ALIGNMENT}")
        data = -(-self._at // alignment) * alignment
        tensors: dict[str, _GgufTensor] = {}
        # As llama.cpp demands it: one tensor after the other, without gaps but for the alignment.
        expected = 0
        for name, tensor in infos:
            if name in tensors:
                raise ValueError(f"duplicate tensor {name}")
            if tensor.start != expected:
                raise ValueError(
                    f"tensor {name} begins at {tensor.start}, not at {expected}, where the one before ends"
                )
            expected += -(-tensor.size // alignment) * alignment
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
