"""What griffin_jax is measured against, on the same weights and work, of what is installed.

torchpeers.py has transformers' dense model and GRIFFIN as its authors run it; llama.cpp is run by llama-cpp-python.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

import griffin_jax as gj
from griffin_jax.bench.runner import Peer, threads
from griffin_jax.checkpoints import demo

TRANSFORMERS, PUBLISHED, LLAMA_CPP = "transformers", "published GRIFFIN", "llama.cpp"


class Unavailable(Exception):
    """A peer cannot run; the message says why."""


def find(model: gj.Transformer, source: str, stack: contextlib.ExitStack) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run here, and why others cannot, by name.

    Args:
        model: whose weights they get.
        source: that the model was loaded from; llama.cpp needs its GGUF file.
        stack: gets what must be undone in the end.
    """
    found: list[Peer] = []
    skipped: dict[str, str] = {}
    for names, make in (
        ((TRANSFORMERS, PUBLISHED), lambda: _in_torch(model)),
        ((LLAMA_CPP,), lambda: _in_llama_cpp(model, source, stack)),
    ):
        try:
            if jax.default_backend() != "cpu" or model.dtype != np.float32:
                raise Unavailable(
                    f"peers compare float32 on the CPU, this is {model.dtype} on {jax.default_backend()}; use"
                    " --dtype float32 and JAX_PLATFORMS=cpu"
                )
            found += make()
        except Unavailable as reason:
            skipped |= dict.fromkeys(names, str(reason))
    return found, skipped


def _version(package: str) -> str:
    """Name and version of an installed package."""
    if importlib.util.find_spec(package.replace("-", "_").removesuffix("_python")) is None:
        raise Unavailable(f"{package} is not installed")
    return f"{package} {importlib.metadata.version(package)}"


def _in_torch(model: gj.Transformer) -> list[Peer]:
    version = f"{_version('torch')}, {_version('transformers')}"
    import torch

    from benchmarks import torchpeers

    torch.set_num_threads(threads())
    try:
        peer = torchpeers.from_jax(model)
    except ValueError as error:
        raise Unavailable(str(error)) from error

    def measure(prompt: Sequence[int], new: int, density: float) -> dict[str, float]:
        with torchpeers.pruned(peer, density):
            _, prefill, token = torchpeers.greedy(peer, prompt, new)
        return {"prefill": prefill, "token": token}

    return [
        Peer(TRANSFORMERS, version, prunes=False, baseline=TRANSFORMERS, measure=measure),
        Peer(PUBLISHED, version, prunes=True, baseline=TRANSFORMERS, measure=measure),
    ]


def _in_llama_cpp(model: gj.Transformer, source: str, stack: contextlib.ExitStack) -> list[Peer]:
    version = _version("llama-cpp-python")
    file = demo.fetch() if source == demo.NAME else Path(os.path.expanduser(source))
    if file.suffix != ".gguf" or not file.is_file():
        raise Unavailable(f"it reads GGUF files, and {source} is none")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="griffin-jax-peer-")))
    weights = write_float32(file, folder / "float32.gguf")
    peer = LlamaCpp(weights)
    stack.callback(peer.close)
    return [
        Peer(
            LLAMA_CPP, version, prunes=False, baseline=LLAMA_CPP, measure=peer.measure,
            weights=f"{file.name}, dequantised to float32",
        )
    ]  # fmt: skip


class LlamaCpp:
    """A GGUF model in llama.cpp, with a float32 cache.

    Args:
        file: the model.
    """

    def __init__(self, file: Path):
        self._file = file
        self._slots = 0
        self._llama: Any = None

    def measure(self, prompt: Sequence[int], new: int, density: float = 1.0) -> dict[str, float]:
        """Seconds of prefill, and of each decoded token."""
        _, prefill, token = self.greedy(prompt, new)
        return {"prefill": prefill, "token": token}

    def greedy(self, prompt: Sequence[int], new: int) -> tuple[list[int], float, float]:
        """Greedy tokens, seconds of prefill, and seconds for each decoded token."""
        llama = self._with_room(len(prompt) + new)
        llama.reset()
        start = time.perf_counter()
        llama.eval(list(prompt))
        tokens = [llama.sample(temp=0.0)]
        prefilled = time.perf_counter()
        while len(tokens) < new:
            llama.eval(tokens[-1:])
            tokens.append(llama.sample(temp=0.0))
        return tokens, prefilled - start, (time.perf_counter() - prefilled) / max(1, new - 1)

    def close(self) -> None:
        """Frees the model."""
        if self._llama is not None:
            self._llama.close()
            self._llama = None

    def _with_room(self, slots: int) -> Any:
        """The model with a cache of so many tokens: for each pair of lengths one of its own, as griffin_jax has."""
        if slots != self._slots:
            import llama_cpp  # pyright: ignore[reportMissingImports]

            self.close()
            self._llama = llama_cpp.Llama(
                str(self._file), n_ctx=slots, n_batch=512, n_threads=threads(), n_threads_batch=threads(),
                logits_all=False, verbose=False, type_k=int(gguf.GGMLQuantizationType.F32),
                type_v=int(gguf.GGMLQuantizationType.F32),
            )  # fmt: skip
            self._slots = slots
        return self._llama


def write_float32(source: Path, target: Path) -> Path:
    """A GGUF file with every tensor dequantised to float32 and all else as it is; returns `target`.

    Memory is needed for one tensor at a time.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    of_file = (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE, gguf.Keys.General.QUANTIZATION_VERSION)
    for name, field in reader.fields.items():
        if name in of_file or name.startswith("GGUF."):
            continue
        kind = field.types[0]
        sub_kind = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub_kind)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.close()
    return target
