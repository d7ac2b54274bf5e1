"""PyTorch's own files, and PyTorch as the reference of a conversion.

This is the only module that ever imports torch, and only when a user asks for it by an option: `allow_pickle` to read
pytorch_model.bin files, or `verify` to compare a conversion with the model it came from.

A pickle is a program. torch runs it with `weights_only=True`, which knows the few calls that rebuild tensors and
refuses all others. Archives are checked before torch gets them, so that a small file cannot unpack to a large one.
"""

from __future__ import annotations

import contextlib
import io
import pickletools
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import ml_dtypes
import numpy as np

from griffin_jax.utils.messages import brief, is_out_of_memory
from griffin_jax.utils.transformers_import import import_transformers

OLDEST = (2, 10)
"""Oldest allowed release of torch; before it a crafted file could run code in spite of weights_only (CVE-2025-32434,
CVE-2026-24747)."""


def import_torch(purpose: str) -> ModuleType:
    """The torch package.

    Args:
        purpose: what torch is needed for; the message begins with it.

    Raises:
        ImportError: torch is not installed, or too old to read files from others safely.
    """
    needed = ".".join(map(str, OLDEST))
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs PyTorch, which is not installed; install it with: pip install 'torch>={needed}'"
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        raise ImportError(
            f"{purpose} needs PyTorch {needed} or later, and {torch.__version__} is installed: a crafted file can make "
            f"earlier ones run code; update it with: pip install 'torch>={needed}'"
        )
    return torch


class PickleFile:
    """A state dict as `torch.save` writes it, read tensor by tensor.

    The file is mapped into memory but does not stay mapped: mapped pages count as resident memory until the mapping is
    closed, so every read makes its own mapping, which costs milliseconds. Files in the format from before PyTorch 1.6
    cannot be mapped; they are read and kept whole.

    Attributes:
        tensors: shape and dtype by name; dtypes that weights can have are named as in safetensors.
        problems: what is wrong with the entries, in words.

    Raises:
        ImportError: torch is not installed.
        ValueError: the file is malformed, does not hold a dictionary, or would do more than hold tensors.
    """

    def __init__(self, file: Path):
        self._file = file
        self._torch = import_torch(f"{file}: reading PyTorch's pickle format")
        self._mapped = _is_archive(file)
        _check_pickles(file, self._mapped)
        self._kept: dict[str, Any] | None = None
        entries = self._entries()
        self.tensors: dict[str, tuple[tuple[int, ...], str]] = {}
        self.problems: list[str] = []
        for name, value in entries.items():
            if isinstance(value, self._torch.Tensor):
                self.tensors[name] = self._describe(value)
            else:
                self.problems.append(f"{name} is not a tensor but {type(value).__name__}")
        if not self.tensors:
            listed = ", ".join(map(repr, list(entries)[:8])) or "nothing"
            raise ValueError(
                f"{file}: has no tensors at its top level, only {listed}; griffin_jax reads the dictionary of tensors "
                "that model.state_dict() gives"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A copy of the rows from `start` to `stop` of a tensor, in its stored dtype.

        Raises:
            ValueError: the tensor cannot be read, because the file has changed.
        """
        torch = self._torch
        try:
            tensor = self._entries()[name].detach()
            if start or stop is not None:
                tensor = tensor[start:stop]
            if tensor.dtype == torch.bfloat16:  # NumPy alone has no such dtype
                return tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
            return tensor.numpy().copy()
        except (KeyError, AttributeError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{self._file}: tensor {name} cannot be read ({brief(error)})") from error

    def release(self) -> None:
        """Forget what is kept of the file."""
        self._kept = None

    def _entries(self) -> dict[str, Any]:
        if self._kept is not None:
            return self._kept
        payload = self._load()
        if not isinstance(payload, dict):
            raise ValueError(f"{self._file}: holds {type(payload).__name__}, not a dictionary of tensors")
        if strange := [name for name in payload if not isinstance(name, str)]:
            raise ValueError(f"{self._file}: names of tensors are texts, {strange[0]!r:.100} is not")
        if not self._mapped:
            self._kept = payload
        return payload

    def _load(self) -> Any:
        try:
            # What torch warns about concerns those who wrote the file.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._torch.load(self._file, map_location="cpu", weights_only=True, mmap=self._mapped)
        except (MemoryError, FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # torch's own message advises to load the file without weights_only, or to file an issue.
            message = str(error)
            if wanted := re.search(r"GLOBAL (\S+)", message):
                raise ValueError(
                    f"{self._file}: is not only weights: it asks for {wanted[1]}, which may run code, so it is refused "
                    "and nothing of it was run"
                ) from error
            message = message.rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
            raise ValueError(
                f"{self._file}: not a readable file of tensors in PyTorch's format "
                f"({type(error).__name__}: {' '.join(message.split())[:300]})"
            ) from error

    def _describe(self, tensor: Any) -> tuple[tuple[int, ...], str]:
        torch = self._torch
        names = {
            torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
            torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64",
        }  # fmt: skip
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        dtype = str(tensor.dtype).removeprefix("torch.")
        if not plain:
            return (), f"{dtype} ({tensor.layout}, {tensor.device})"
        return tuple(tensor.shape), names.get(tensor.dtype, dtype)


def _is_archive(file: Path) -> bool:
    """Whether a file is the zip archive that `torch.save` writes, and not in the format from before PyTorch 1.6.

    Raises:
        ValueError: the file is an archive that `torch.save` would not write.
    """
    with file.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{file}: damaged, not a readable zip archive ({brief(error)})") from error
    size = file.stat().st_size
    names = Counter(entry.filename for entry in entries)
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise ValueError(f"{file}: a TorchScript archive, which is a program; only what state_dict() gives is read")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            reason = f"{entry.filename} is compressed"
        elif entry.flag_bits & 1:
            reason = f"{entry.filename} is encrypted"
        elif names[entry.filename] > 1:
            reason = f"{entry.filename} is there {names[entry.filename]} times"
        else:
            continue
        raise ValueError(f"{file}: not an archive that torch.save writes: {reason}")
    for entry in entries:
        if entry.compress_size != entry.file_size:
            raise ValueError(
                f"{file}: not an archive that torch.save writes: {entry.filename} claims {entry.file_size:,} bytes and "
                f"has {entry.compress_size:,}"
            )
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise ValueError(
            f"{file}: not an archive that torch.save writes: its entries claim {total:,} bytes, the file has {size:,}"
        )
    _check_members(file)
    return True


LEGACY_PICKLES = 5
"""That a file from before PyTorch 1.6 begins with."""


def _check_pickles(file: Path, archive: bool) -> None:
    """Raise `ValueError` where a pickle would make a `bytearray`, which torch allows, and which may be of any size."""
    if archive:
        with zipfile.ZipFile(file) as opened:
            for name in opened.namelist():
                if name.endswith(".pkl"):
                    _check_pickle(file, io.BytesIO(opened.read(name)))
        return
    with file.open("rb") as opened:
        for _ in range(LEGACY_PICKLES):
            _check_pickle(file, opened)


def _check_pickle(file: Path, opened: IO[bytes]) -> None:
    if _makes_bytes(opened):
        raise ValueError(
            f"{file}: is not only weights: it asks for bytearray, so it is refused and nothing of it was run"
        )


def _makes_bytes(pickle: IO[bytes]) -> bool:
    texts = set()
    # What is malformed torch refuses, with a better reason.
    with contextlib.suppress(Exception):
        for code, argument, _ in pickletools.genops(pickle):
            if isinstance(argument, str):
                texts.add(argument)
            if code.name == "GLOBAL" and str(argument).endswith("bytearray"):
                return True
            if code.name == "STACK_GLOBAL" and "bytearray" in texts:
                return True
    return False


def _check_members(file: Path) -> None:
    """Raise `ValueError` unless every member has its CRC-32, which torch does not look at."""
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{file}: damaged, not a readable zip archive ({brief(error)})") from error
    if wrong is not None:
        raise ValueError(f"{file}: damaged, the CRC-32 of {wrong} is not that of its contents")


def reference_logits(name: str, arguments: dict[str, Any], batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits of transformers' torch model in float32 on the CPU.

    Args:
        name: name of the model, for messages.
        arguments: arguments of `from_pretrained` that say which files to load.
        batches: batches of tokens, (B, T) each.

    Returns:
        Logits of every batch, (B, T, V).

    Raises:
        ImportError: torch is not installed.
        ValueError: transformers cannot load the model.
    """
    torch = import_torch("verifying a conversion")
    transformers = import_transformers()
    settings = transformers.utils.logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            try:
                model = (
                    _auto_class(arguments)
                    .from_pretrained(**arguments, dtype=torch.float32, trust_remote_code=False, local_files_only=True)
                    .eval()
                )
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise ValueError(
                    f"{name}: transformers cannot load it, so there is nothing to compare with ({brief(error)})"
                ) from error
            return [
                model(torch.from_numpy(batch.astype(np.int64)), use_cache=False).logits.float().numpy()
                for batch in batches
            ]
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()


def _auto_class(arguments: Mapping[str, Any]) -> Any:
    """The class that loads a model: some with a text model in them are none of transformers' causal models."""
    transformers = import_transformers()
    places = {name: arguments[name] for name in ("pretrained_model_name_or_path", "gguf_file") if name in arguments}
    config = transformers.AutoConfig.from_pretrained(**places, trust_remote_code=False, local_files_only=True)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
