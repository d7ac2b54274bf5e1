"""The installed systems that griffin_jax is measured against, with the same weights on the same work.

`torchpeers.py` has transformers' dense model and GRIFFIN as its authors run it. llama-cpp-python runs llama.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np

import griffin_jax as gj
from griffin_jax.bench.runner import Peer, threads
from griffin_jax.checkpoints import demo
from griffin_jax.model.weights import WeightFormat

TRANSFORMERS, PUBLISHED, LLAMA_CPP = "transformers", "published GRIFFIN", "llama.cpp"

FLOAT32 = f"{LLAMA_CPP} F32"
MADE = {f"{LLAMA_CPP} F16": gguf.LlamaFileType.MOSTLY_F16, f"{LLAMA_CPP} Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
"""The formats that llama.cpp's own tool makes from the model in float32, by the name of the peer."""


class Unavailable(Exception):
    """A peer cannot run; the message says why."""


def find(
    models: Mapping[WeightFormat, gj.Transformer], source: str, names: Sequence[str], stack: contextlib.ExitStack
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run here, and why the others cannot, by name.

    Args:
        models: the model, by the format of its weights; the peers in PyTorch get the weights of the float32 one.
        source: what the model was loaded from; llama.cpp needs its GGUF file.
        names: names of the wanted peers.
        stack: receives the clean-up to be done at the end.
    """
    found: list[Peer] = []
    skipped: dict[str, str] = {}
    in_torch = [name for name in names if name in (TRANSFORMERS, PUBLISHED)]
    in_llama_cpp = [name for name in names if name not in in_torch]
    for wanted, make in (
        (in_torch, lambda: _in_torch(models)),
        (in_llama_cpp, lambda: _in_llama_cpp(source, in_llama_cpp, stack)),
    ):
        if not wanted:
            continue
        try:
            if (platform := jax.default_backend()) != "cpu":
                raise Unavailable(f"peers run on the CPU, griffin_jax on {platform} here; use JAX_PLATFORMS=cpu")
            found += [peer for peer in make() if peer.name in wanted]
        except Unavailable as reason:
            skipped |= dict.fromkeys(wanted, str(reason))
    return found, skipped


def _version(package: str) -> str:
    """Name and version of a package, which must be installed."""
    if importlib.util.find_spec(package.replace("-", "_").removesuffix("_python")) is None:
        raise Unavailable(f"{package} is not installed")
    return f"{package} {importlib.metadata.version(package)}"


def _in_torch(models: Mapping[WeightFormat, gj.Transformer]) -> list[Peer]:
    model = models.get(WeightFormat("float32"))
    if model is None:
        raise Unavailable("it takes the weights of a model in float32, which is not measured; see --weights")
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


def _in_llama_cpp(source: str, names: Sequence[str], stack: contextlib.ExitStack) -> list[Peer]:
    version = _version("llama-cpp-python")
    file = demo.fetch() if source == demo.NAME else Path(os.path.expanduser(source))
    if file.suffix != ".gguf" or not file.is_file():
        raise Unavailable(f"it reads GGUF files, and {source} is none")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="griffin-jax-peer-")))
    peers: list[Peer] = []
    wide = None if all(name == LLAMA_CPP for name in names) else write_float32(file, folder / "float32.gguf")
    for name in names:
        if wide is None or name == LLAMA_CPP:
            weights, made = file, f"{file.name} as it is ({stored_as(file)})"
        elif name == FLOAT32:
            weights, made = wide, f"{file.name}, dequantised to float32"
        else:
            weights = quantised(wide, folder / f"{MADE[name].name}.gguf", MADE[name])
            made = f"{file.name}, dequantised to float32, then {stored_as(weights)}"
        # llama.cpp's cache is float16 by default. Next to weights in float32 it gets the dtype of ours.
        cache = gguf.GGMLQuantizationType.F32 if name == FLOAT32 else gguf.GGMLQuantizationType.F16
        peer = LlamaCpp(weights, cache)
        stack.callback(peer.close)
        peers.append(
            Peer(
                name, version, prunes=False, baseline=name, measure=peer.measure, weights=made,
                weights_bytes=bytes_per_step(weights), cache_itemsize=4 if name == FLOAT32 else 2,
            )
        )  # fmt: skip
    return peers


def stored_as(file: Path) -> str:
    """The format of most tensors of a GGUF file, by llama.cpp's name: Q4_K_M, F16, ..."""
    field = gguf.GGUFReader(file).get_field(gguf.Keys.General.FILE_TYPE)
    if field is None:
        return "of no name"
    return gguf.LlamaFileType(field.contents()).name.removeprefix("MOSTLY_").removeprefix("ALL_")


def bytes_per_step(file: Path) -> int:
    """Bytes of the tensors that a decode step reads: all except an embedding that is not also the head."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors}
    return sum(sizes.values()) - ("output.weight" in sizes) * sizes.get("token_embd.weight", 0)


def quantised(source: Path, target: Path, kind: gguf.LlamaFileType) -> Path:
    """Write the file that llama.cpp makes from a GGUF file in float32; returns `target`.

    Raises:
        Unavailable: llama.cpp could not make this file.
    """
    llama_cpp: Any = importlib.import_module("llama_cpp")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = int(kind), threads()
    # It logs a line for every tensor.
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    if failed := llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings)):
        raise Unavailable(f"llama.cpp could not make {kind.name} of it (code {failed})")
    return target


class LlamaCpp:
    """A GGUF model in llama.cpp.

    Args:
        file: the GGUF file.
        cache: format in which keys and values are stored.
    """

    def __init__(self, file: Path, cache: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32):
        self._file, self._cache = file, int(cache)
        self._slots = 0
        self._llama: Any = None

    def measure(self, prompt: Sequence[int], new: int, density: float = 1.0) -> dict[str, float]:
        """Seconds of prefill and of each decoded token."""
        _, prefill, token = self.greedy(prompt, new)
        return {"prefill": prefill, "token": token}

    def greedy(self, prompt: Sequence[int], new: int) -> tuple[list[int], float, float]:
        """Greedy tokens, seconds of prefill, and seconds of each decoded token."""
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
        """Free the model."""
        if self._llama is not None:
            self._llama.close()
            self._llama = None

    def _with_room(self, slots: int) -> Any:
        """The model with a cache of `slots` tokens: a new one for each pair of lengths, as in griffin_jax."""
        if slots != self._slots:
            import llama_cpp  # pyright: ignore[reportMissingImports]

            self.close()
            self._llama = llama_cpp.Llama(
                str(self._file), n_ctx=slots, n_batch=512, n_threads=threads(), n_threads_batch=threads(),
                logits_all=False, verbose=False, type_k=self._cache, type_v=self._cache,
            )  # fmt: skip
            self._slots = slots
        return self._llama


def write_float32(source: Path, target: Path) -> Path:
    """Write a GGUF file with every tensor dequantised to float32 and all else unchanged; returns `target`.

    Only one tensor at a time is in memory.
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
