"""Hugging Face folders: config.json with safetensors or PyTorch's pickles."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from griffin_jax.checkpoints.families import Family, family_of
from griffin_jax.checkpoints.pytorch import PickleFile
from griffin_jax.checkpoints.quantised.methods import BESIDE, join, kinds_of
from griffin_jax.checkpoints.schema.family import fitting_rules, is_ignored, known_names, method_of, quantisation_of
from griffin_jax.checkpoints.schema.layouts import Rules
from griffin_jax.checkpoints.sources import (
    FLOATS,
    PICKLE_HELP,
    Reader,
    TensorInfo,
    check_plausible,
    listed_names,
    read_json,
)
from griffin_jax.model.config import ModelConfig
from griffin_jax.text.tokenizer import Tokenizer
from griffin_jax.utils.messages import CheckpointWarning, brief, is_out_of_memory

# ---- Hugging Face folders ----


@dataclasses.dataclass(frozen=True)
class _Format:
    """A format of weights in a Hugging Face folder: the file of unsharded weights, or the index of sharded ones."""

    single: str
    index: str
    suffix: str

    def is_in(self, folder: Path) -> bool:
        return (folder / self.single).exists() or (folder / self.index).exists()

    def shards(self, folder: Path) -> list[str]:
        """The files that an index names; of a malformed one, none."""
        try:
            names = read_json(folder / self.index)["weight_map"].values()
        except (OSError, ValueError, KeyError, AttributeError):
            return []
        return list(dict.fromkeys(name for name in names if isinstance(name, str)))

    def is_there(self, folder: Path, whole: bool) -> bool:
        """Whether there are weights, and not only an index of them; all of them, or some."""
        if (folder / self.single).exists() or not (folder / self.index).exists():
            return (folder / self.single).exists()
        shards = self.shards(folder)
        there = [(folder / name).exists() for name in shards]
        # What is wrong with an index is said where it is read.
        return not shards or (all(there) if whole else any(there))


_SAFETENSORS = _Format("model.safetensors", "model.safetensors.index.json", ".safetensors")
_PICKLE = _Format("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin")


def has_safetensors(folder: Path) -> bool:
    """Whether a folder has weights as safetensors."""
    return _SAFETENSORS.is_in(folder)


def has_weights(folder: Path, whole: bool = False) -> bool:
    """Whether a folder has weights in any format that is read, allowed or not.

    Args:
        folder: the folder.
        whole: whether all files that an index names must be there; else one of them is enough.
    """
    return _SAFETENSORS.is_there(folder, whole) or _PICKLE.is_there(folder, whole)


def weight_files(folder: Path, pickle: bool) -> list[str]:
    """The files that weights are in, whether they are there or not: one, and those of an index.

    Args:
        folder: where the index is, if there is one.
        pickle: of PyTorch's files; else of safetensors.
    """
    form = _PICKLE if pickle else _SAFETENSORS
    return [form.single, *form.shards(folder)]


STORED = {
    **FLOATS, "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip
"""Dtypes of what is read from safetensors, the parts of quantised tensors among them."""

WRAPPERS = re.compile(r"^(module\.)+|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
"""What torch's DataParallel, compile, FSDP and checkpointing put into the names of tensors."""

ADAPTER = "base_model.model."


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
        self.ignored, self.copies = self.family.ignored, self.family.copies
        self.tensors, self.problems = {}, []
        self._files: dict[str, Path] = {}
        self._pickles: dict[Path, PickleFile] = {}
        self._starts: dict[str, int] = {}
        self._whole: tuple[str, dict[str, np.ndarray]] = "", {}
        self._format = self._choose_format(allow_pickle)
        listed = self._shards()
        shards = list(dict.fromkeys(listed.values())) if listed else [folder / self._format.single]
        for file in shards:
            self._open(file)
        values = read_json(folder / "config.json")
        quantisation = quantisation_of(values)
        kinds = kinds_of(quantisation, str(folder))
        self._method = method_of(quantisation)
        self._parts = self.tensors
        try:
            self.tensors, self._packed = join(self._parts, kinds, self._read_stored, self._is_needless)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        if quantisation:
            self.ignored += BESIDE
        named = ("config.json", "generation_config.json", *((self._format.index,) if listed else ()))
        there = [folder / name for name in named if (folder / name).is_file()]
        self.files = [*there, *shards, *Tokenizer.files_in(folder)]
        if listed:
            self._check_index(listed)
        check_plausible(self.name, self.config, [info.shape for info in self.tensors.values()])
        self.rules, self._stored = self._rules_and_names()
        self._resolve_ties(said="tie_word_embeddings" in values)
        self.tensors = {name: self.tensors[stored] for name, stored in self._stored.items()}
        self.ignored += self._empty_biases()
        if self.family.leaves_out:
            message = f"{folder}: of this {self.family.model_type} only the text model is read, without"
            warnings.warn(f"{message} {self.family.leaves_out}", CheckpointWarning, stacklevel=2)
        if any(name.startswith(ADAPTER) for name in self.tensors):
            self.problems.append(
                f"names that begin with {ADAPTER} are those of an adapter of PEFT; merge it into its model with"
                " merge_and_unload(), and save that"
            )

    def read(self, name: str) -> np.ndarray:
        return self.read_rows(name, 0, None)

    def read_rows(self, name: str, start: int, stop: int | None) -> np.ndarray:
        name = self._stored[name]
        if packed := self._packed.get(name):
            if self._whole[0] != name:
                self._whole = name, {}
            return packed.rows(self._read_part, start, stop)
        return self._read_stored(name, start, stop)

    def _read_part(self, name: str, start: int, stop: int | None) -> np.ndarray:
        """Rows of a part as they are stored; what is read whole is kept until another tensor's parts are read."""
        if (start, stop) != (0, None):
            return self._read_stored(name, start, stop)
        _, parts = self._whole
        if name not in parts:
            parts[name] = self._read_stored(name, 0, None)
        return parts[name]

    def _is_needless(self, name: str) -> bool:
        return is_ignored(self.family.name_of(name), self.ignored)

    def _read_stored(self, name: str, start: int, stop: int | None) -> np.ndarray:
        """Rows of a tensor as they are stored."""
        info, file = self._parts[name], self._files[name]
        if pickle := self._pickles.get(file):
            for other in self._pickles.values():
                if other is not pickle:
                    other.release()
            return pickle.read(name, start, stop)
        num_rows, *row = info.shape or (1,)
        stop = num_rows if stop is None else stop
        count = math.prod(row)
        dtype = STORED[info.dtype]
        try:
            at = self._starts[name] + start * count * dtype.itemsize
            values = np.fromfile(file, dtype, (stop - start) * count, offset=at)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: tensor {name} cannot be read ({brief(error)})") from error
        if values.size != (stop - start) * count:
            raise ValueError(f"{file}: tensor {name} cannot be read (the file has become shorter)")
        return values.reshape(stop - start, *row) if info.shape else values.reshape(())

    def reference(self) -> dict[str, Any]:
        if self._method not in (None, "fp8"):
            raise ValueError(
                f"{self._folder}: transformers multiplies weights of {self._method} with other packages, or in 16 bits,"
                " and is no reference for them: leave out --verify"
            )
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
        missing = f"{self._folder}: has neither {_SAFETENSORS.single} nor {_SAFETENSORS.index}"
        if files := sorted(self._folder.glob("*.gguf")):
            missing += f"; did you mean {files[0]}?"
        raise FileNotFoundError(missing)

    def _rules_and_names(self) -> tuple[Rules, dict[str, str]]:
        """The rules for this checkpoint, and the stored name of every tensor by its name in them.

        In checkpoints of the bare model, as AutoModel saves it, names lack the prefix of the part in the whole; torch's
        wrappers leave names of their own in them. What is taken away or added is what gives the most names that the
        family has. Names that it does not have then either stay as they are stored.
        """
        plain = self.family.name_of

        def bare(name: str) -> str:
            return plain(WRAPPERS.sub("", name))

        def whole(name: str) -> str:
            return name if name in self.copies else self.family.prefix + name

        ways: list[Callable[[str], str]] = [
            plain, lambda name: whole(plain(name)), bare, lambda name: whole(bare(name))
        ]  # fmt: skip
        renamed = [{way(name): name for name in self.tensors} for way in ways]
        every = (self.family.rules, *self.family.alternatives)
        rules = fitting_rules(every, self.config, set().union(*renamed))
        known = known_names(rules, self.config)
        best = max(renamed, key=lambda names: len(known & names.keys()))

        def belongs(name: str) -> bool:
            return name in known or name in self.copies or is_ignored(name, self.ignored)

        return rules, {name if belongs(name) else stored: stored for name, stored in best.items()}

    def _resolve_ties(self, said: bool) -> None:
        """Read a tied tensor from its copy, where a tool that writes each value once has kept that one.

        Args:
            said: whether the configuration says if the head is tied.
        """
        if self.family.unsaid_tie and not said:
            both = any({name, of} <= self._stored.keys() for name, of in self.copies.items())
            self.config = dataclasses.replace(self.config, tied_head=not both)
        for name, of in self.copies.items():
            if self.config.tied_head and of not in self._stored and name in self._stored:
                self._stored[of] = self._stored.pop(name)

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
            self.problems += listed_names("entries that are no tensors", opened.problems)
            duplicates = []
        else:
            tensors, starts, duplicates = _safetensors_header(file)
            self._starts.update(starts)
        self.problems += listed_names("duplicate", [f"{name} twice in {file.name}" for name in duplicates])
        self.problems += listed_names(
            "duplicate",
            [f"{name} in {self._files[name].name} and {file.name}" for name in tensors if name in self._files],
        )
        self.tensors.update(tensors)
        self._files.update(dict.fromkeys(tensors, file))

    def _empty_biases(self) -> tuple[str, ...]:
        """A pattern of the biases of zeros that quantised layers have: a model that has no biases may ignore them.

        AutoGPTQ wrote one for every layer.
        """
        layers = (name.removesuffix("weight") for name, stored in self._stored.items() if stored in self._packed)
        biases = [name for layer in layers if (name := f"{layer}bias") in self.tensors]
        floating = [name for name in biases if self.tensors[name].dtype in FLOATS]
        empty = [re.escape(name) for name in floating if not self.read(name).any()]
        # One for all, since experts may have thousands.
        return ("|".join(empty),) if empty else ()

    def _check_index(self, listed: Mapping[str, Path]) -> None:
        misplaced = [
            f"{name} is in {self._files[name].name}, not {file.name}"
            for name, file in listed.items()
            if name in self._files and self._files[name] != file
        ]
        self.problems += listed_names("not where the index says", misplaced)
        # An index may list a tensor that is tied to another and was not written. If it is needed, it is missing.
        self.problems += listed_names("in a file but not in the index", sorted(self._files.keys() - listed.keys()))


def read_hf_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Family and architecture from config.json, and from generation_config.json the tokens that end an answer.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is malformed or not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: has no config.json, as Hugging Face checkpoints have, and no griffin_jax.json, which a "
            "conversion writes last"
        )
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
        if is_out_of_memory(error):
            raise
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
