"""One entrance for all models: what a user names becomes a model, or a checkpoint in the native format.

    open_source   a name or path -> where the weights come from; reads configuration and headers only
    load_model    ... -> the model on its device or devices, and its tokenizer
    convert       ... -> a folder in the native format, with memory for one tensor at a time
    plan          ... -> what `convert` would do
    verify        ... -> whether what `convert` wrote computes what PyTorch computes

Each of them first finds the model and checks that it is supported, before any weight is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from griffin_jax.checkpoints import demo, native, verification
from griffin_jax.checkpoints.gguf import GgufFile
from griffin_jax.checkpoints.huggingface import (
    HuggingFaceFolder,
    has_safetensors,
    has_weights,
    read_hf_config,
    weight_files,
)
from griffin_jax.checkpoints.native import DTYPES, MANIFEST, NativeCheckpoint
from griffin_jax.checkpoints.planning import NarrowingWarning, Plan, narrowing, plan_of
from griffin_jax.checkpoints.sources import PICKLE_HELP, FamilySource, Source, loading_bytes
from griffin_jax.checkpoints.verification import Verification, VerificationError
from griffin_jax.model.assembly import assemble, divides, in_format, in_format_by_pieces, matrix_of, stored_arrays
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.sharding import check_mesh, parameter_spec, with_kv_copies, with_whole_experts
from griffin_jax.model.sizes import bytes_of, held_bytes, local_arrays
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size, checked_mesh
from griffin_jax.text.tokenizer import Tokenizer, check_fits
from griffin_jax.utils import memory
from griffin_jax.utils.messages import CheckpointWarning, shortened

__all__ = [
    "ConversionReport",
    "ShardingLike",
    "convert",
    "default_dtype",
    "load_model",
    "open_source",
    "parse_dtype",
    "plan",
    "verify",
]

SOURCES = (
    "a folder that `griffin-jax convert` wrote, a Hugging Face folder (config.json and safetensors), a GGUF file, "
    f"the id of a Hugging Face repository (owner/name), or {demo.NAME!r}"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = [
    "config.json", "generation_config.json", "*.safetensors.index.json", "pytorch_model.bin.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
]  # fmt: skip

ShardingLike = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""How parameters are divided among devices: one sharding for all, or a function of a parameter's path and shape."""


def open_source(source: str | Path, allow_pickle: bool = False) -> Source:
    """Find a model and check that it can be loaded, without reading its weights.

    Args:
        source: a native folder, a Hugging Face folder, a GGUF file, a Hugging Face repository or the
            demo model. What exists on the disk comes first.
        allow_pickle: whether weights may be read from PyTorch's pickle files (pytorch_model.bin), if
            there are no safetensors. Such a file is a program; torch runs it with `weights_only=True`.
            Files in the format from before PyTorch 1.6 need memory for the whole file.

    Raises:
        FileNotFoundError: there is nothing of that name, or only pickle files and they are not allowed.
        ImportError: pickle files are to be read, and torch is not installed.
        ValueError: it is not a supported model, or its files are malformed.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return _open_folder(path, allow_pickle)
    if path.exists():
        if path.suffix in (".safetensors", ".bin"):
            raise ValueError(f"{path}: give the folder that holds it together with config.json")
        return FamilySource(GgufFile(path))
    name = str(source)
    if name == demo.NAME:
        return FamilySource(GgufFile(demo.fetch()))
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return FamilySource(HuggingFaceFolder(_from_hub(name, allow_pickle), allow_pickle))
    raise FileNotFoundError(f"there is no model {name!r}; give {SOURCES}")


def describe(source: str | Path, allow_pickle: bool = False) -> tuple[ModelConfig, Source | None]:
    """The architecture of a model, whose weights need not be there: a config.json is enough.

    Args:
        source: see `open_source`; also a config.json file, or a folder with one. Of a Hugging Face repository only the
            small files are downloaded.
        allow_pickle: see `open_source`.

    Returns:
        The architecture, and the opened source; None if only its configuration was read.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it is not a supported model, or its files are malformed.
    """
    path = Path(os.path.expanduser(source))
    folder = path.parent if path.name == "config.json" and path.is_file() else path
    on_hub = not path.exists() and HUB_ID.fullmatch(str(source)) is not None and path.suffix != ".gguf"
    if on_hub:
        folder = _from_hub(str(source), allow_pickle, weights=False)
    foreign = (folder / "config.json").is_file() and not (folder / MANIFEST).exists()
    # Of the hub the rest of the weights would be downloaded; in a folder it is an error if only some are there.
    if foreign and not has_weights(folder, whole=on_hub):
        return read_hf_config(folder)[1], None
    opened = open_source(source if on_hub else folder, allow_pickle)
    return opened.config, opened


def _open_folder(folder: Path, allow_pickle: bool) -> Source:
    # By nothing else: other formats have files with names like those of ours, such as Mistral's params.json.
    if (folder / MANIFEST).exists():
        return NativeCheckpoint(folder)
    if not (folder / "config.json").exists() and (files := sorted(folder.glob("*.gguf"))):
        raise ValueError(f"{folder}: has no config.json; did you mean {files[0]}?")
    return FamilySource(HuggingFaceFolder(folder, allow_pickle))


def _from_hub(name: str, allow_pickle: bool, weights: bool = True) -> Path:
    """The local copy of a repository; the configuration comes first, so that no unsupported model is downloaded."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
        read_hf_config(folder)
        if not weights:
            return folder
        wanted = HUB_FILES + weight_files(folder, pickle=False)
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
        if has_safetensors(folder):
            return folder
        if not allow_pickle:
            raise FileNotFoundError(f"{name}: the repository has no safetensors. {PICKLE_HELP}")
        wanted = HUB_FILES + weight_files(folder, pickle=True)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except GatedRepoError as error:
        raise ValueError(
            f"{name}: its licence must be accepted on its page of the Hugging Face hub, and `hf auth login` done"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name!r}, and no such repository on the Hugging Face hub; give {SOURCES}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name!r}, it is not in the cache of the Hugging Face hub, and the hub cannot be "
            f"reached; give {SOURCES}"
        ) from error
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{name}: cannot be downloaded ({type(error).__name__}: {error})") from error


def parse_dtype(dtype: str | jnp.dtype | None) -> np.dtype | None:
    """A dtype of weights by its name; None stays None.

    Raises:
        ValueError: it is not one that weights can have.
    """
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    return np.dtype(jnp.dtype(name))


def parse_weights(weights: str | WeightFormat | None) -> WeightFormat | None:
    """A format of matrices by its name; None stays None.

    Raises:
        ValueError: there is no such format.
    """
    return None if weights is None else WeightFormat.parse(weights)


def load_model(
    source: str | Path,
    dtype: str | jnp.dtype | None = None,
    sharding: ShardingLike | None = None,
    allow_pickle: bool = False,
    mesh: Mesh | None = None,
    weights: str | WeightFormat | None = None,
    expert_parallel: bool = False,
) -> tuple[Transformer, Tokenizer | None]:
    """A model ready to run, and its tokenizer if it has one.

    Args:
        source: see `open_source`.
        dtype: dtype of the computation, of the cache, and of the weights that `weights` is not about: float32,
            bfloat16 or float16. By default float32 on CPUs and bfloat16 on accelerators.
        sharding: how the parameters are divided among devices: a `jax.sharding.Sharding` for all of them, or
            a function that gives one for a parameter's path (such as `layers.3.ff.gate`) and shape. By
            default they are whole on the default device. From a native folder every device reads its own
            shards; from other sources one tensor after the other goes from the host to its devices.
        allow_pickle: see `open_source`.
        mesh: a mesh with the axes `data` and `model`, or one of them, on which the parameters are divided as
            `griffin_jax.model.sharding` says.
        weights: how the matrices are stored: `int8`, `int8:64` (with a scale for each group of 64), `int4`, `int4:64`,
            or a dtype, with products computed in `dtype` nevertheless. By default integers stay what they are in a
            native folder, and everything else is of `dtype`. See `griffin_jax.model.weights`.
        expert_parallel: of a model with routed experts, whether devices along the mesh's axis `model` have whole
            experts each, instead of a part of the neurons of every one.

    Raises:
        FileNotFoundError: there is nothing of that name, or only pickle files and they are not allowed.
        ImportError: pickle files are to be read, and torch is not installed.
        ValueError: the dtype or the format of weights is not allowed, groups do not divide the rows, the model is not
            supported, its files are malformed or its weights not finite, the tokenizer does not fit, or a sharding does
            not divide a parameter; or there are both a mesh and a sharding, the mesh has other axes, or it cannot share
            the neurons or experts evenly; or devices are to have whole experts where there is no mesh or no expert.

    Warns:
        NarrowingWarning: `dtype` or a floating dtype of `weights` is given and is narrower than that of stored weights.
    """
    wanted, stored_as = parse_dtype(dtype), parse_weights(weights)
    if mesh is not None and sharding is not None:
        raise ValueError("a mesh says how the parameters are divided: give it or a sharding, not both")
    mesh = None if mesh is None else checked_mesh(mesh)
    opened = open_source(source, allow_pickle)
    config = with_whole_experts(opened.config, mesh) if expert_parallel else opened.config
    if mesh is not None:
        devices = axis_size(mesh, MODEL_AXIS)
        check_mesh(config, devices)
        config = with_kv_copies(config, devices)
        sharding = functools.partial(_sharding_on, mesh, config)
    precision = precision_of(config, wanted, stored_as, opened)
    if (wanted is not None or stored_as is not None) and (lost := narrowing(opened, precision)):
        warnings.warn(lost, NarrowingWarning, stacklevel=2)
    shardings = None if sharding is None else _shardings(sharding, opened.shapes)
    tokenizer = _fitting_tokenizer(opened)
    if sharding is None or mesh is not None:
        _check_memory(config, precision, mesh)
    arrays = opened.parameters(precision, shardings)
    return assemble(config, arrays, precision.dtype, precision.weights), tokenizer


def precision_of(
    config: ModelConfig, dtype: np.dtype | None, weights: WeightFormat | None, source: Source | None = None
) -> Precision:
    """How a model computes and is stored, where some of it is not said.

    Args:
        config: the architecture.
        dtype: dtype of the computation; `default_dtype` if None.
        weights: how the matrices are stored; if None, as the source stores integers, and else in `dtype`.
        source: where the weights come from; None if they are random, or not needed.

    Raises:
        ValueError: groups do not divide the rows of the matrices.
    """
    if weights is None and source is not None:
        weights = source.weights
    precision = Precision.of(default_dtype() if dtype is None else dtype, weights)
    precision.weights.check(config.width, config.embedding_width)
    return precision


def _check_memory(config: ModelConfig, precision: Precision, mesh: Mesh | None) -> None:
    """Raise `MemoryError` unless the weights fit into what is free on each device."""
    arrays = local_arrays(config, axis_size(mesh, MODEL_AXIS), precision).values()
    counts = [math.prod(array.shape) for array in arrays]
    devices = [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)
    platform = devices[0].platform
    # Devices that are one processor's have one memory.
    together = len(devices) if platform == "cpu" else 1
    weights = sum(held_bytes(array, platform) for array in arrays)
    parts = {"weights": weights, "those on their way": loading_bytes(counts, precision.itemsize)}
    parts = {part: size * together for part, size in parts.items()}
    memory.check(parts, memory.free(devices), "take weights of fewer bits, or a mesh of more devices")


def default_dtype() -> np.dtype:
    """That of weights where nobody says anything: float32 on CPUs, bfloat16 on accelerators."""
    return np.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _sharding_on(mesh: Mesh, config: ModelConfig, path: str, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, parameter_spec(path, shape, config, mesh))


def _shardings(sharding: ShardingLike, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.sharding.Sharding]:
    """The sharding of every parameter.

    Raises:
        ValueError: what `sharding` gives is not a sharding, or does not divide its parameter.
    """
    found = {}
    for path, shape in shapes.items():
        one = sharding if isinstance(sharding, jax.sharding.Sharding) else sharding(path, shape)
        if not isinstance(one, jax.sharding.Sharding):
            raise ValueError(f"the sharding of parameter {path} is {one!r}, not a jax.sharding.Sharding")
        try:
            if isinstance(one, jax.sharding.NamedSharding):
                one.check_compatible_aval(shape)
            one.shard_shape(shape)
        except (ValueError, IndexError, AssertionError) as error:
            raise ValueError(
                f"parameter {path} of the shape {shape} cannot be divided as {one} says: "
                f"{' '.join(str(error).split())}; give a function (path, shape) -> sharding to treat it differently"
            ) from error
        found[path] = one
    return found


def _fitting_tokenizer(source: Source) -> Tokenizer | None:
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        try:
            check_fits(tokenizer, source.config)
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}") from error
        if beyond := tokenizer.beyond(source.config.vocab_size):
            warnings.warn(
                f"{source.name}: the model has {source.config.vocab_size} tokens and no embedding for"
                f" {shortened(beyond, 5)} of its tokenizer; texts with them are refused",
                CheckpointWarning,
                stacklevel=3,
            )
            tokenizer = tokenizer.within(source.config.vocab_size)
    return tokenizer


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        path: the folder that was written.
        dtype: name of the dtype of its weights.
        tensors: number of parameters.
        bytes: size of all parameters together.
        largest_bytes: size of the largest parameter.
        seconds: time of the conversion.
        memory_before: peak resident memory of the process before the conversion, in bytes; None where
            the platform does not tell.
        peak_memory: the same at the end of the conversion, before any verification.
        verification: how the result compares with PyTorch, if that was asked for.
    """

    path: Path
    dtype: str
    tensors: int
    bytes: int
    largest_bytes: int
    seconds: float
    memory_before: int | None
    peak_memory: int | None
    verification: Verification | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.tensors} tensors, {self.bytes / 1e6:,.1f} MB in {self.dtype}, in {self.seconds:.1f} s"
        ]
        if self.peak_memory is not None and self.memory_before is not None:
            lines.append(
                f"peak memory {self.peak_memory / 1e6:,.0f} MB, of which {self.memory_before / 1e6:,.0f} MB before the "
                f"first tensor; the largest tensor has {self.largest_bytes / 1e6:,.1f} MB"
            )
        if self.verification is not None:
            lines.append(str(self.verification))
        return "\n".join(lines)


def convert(
    source: str | Path,
    output: str | Path,
    dtype: str | jnp.dtype | None = None,
    progress: bool = True,
    allow_pickle: bool = False,
    verify: bool = False,
    weights: str | WeightFormat | None = None,
) -> ConversionReport:
    """Write a model in the native format, tensor by tensor.

    Args:
        source: see `open_source`.
        output: a folder that does not exist yet. It appears when it is complete.
        dtype: dtype of the weights that `weights` is not about: float32, bfloat16 or float16. By default that of most
            of the source's weights, float32 where they are quantised.
        progress: whether to show a progress bar on stderr.
        allow_pickle: see `open_source`.
        verify: whether to compare the result with PyTorch, see `verify`.
        weights: how the matrices are stored: `int8`, `int4`, `bfloat16`, ...; see `load_model`.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: there is nothing of the name `source`, or only pickle files.
        ImportError: torch is needed and not installed; nothing has been converted.
        ValueError: see `load_model`; or the source cannot be verified, and nothing has been converted.
        OSError: the disk is full, or `output` cannot be written.
        VerificationError: the result differs from what PyTorch computes. It stays, so that it can be
            looked at.

    Warns:
        NarrowingWarning: the dtype is narrower than that of stored weights.
    """
    from tqdm import tqdm

    start = time.perf_counter()
    folder = native.check_free(output)
    wanted = parse_dtype(dtype)
    stored_as = parse_weights(weights)
    opened = open_source(source, allow_pickle)
    precision = precision_of(opened.config, opened.dtype if wanted is None else wanted, stored_as, opened)
    if verify:
        verification.check_verifiable(opened, precision.weights)
    if lost := narrowing(opened, precision):
        warnings.warn(lost, NarrowingWarning, stacklevel=2)
    tokenizer = _fitting_tokenizer(opened)
    arrays = stored_arrays(opened.config, precision)
    sizes = {path: bytes_of(array) for path, array in arrays.items()}
    counts = [math.prod(shape) for shape in opened.shapes.values()]
    # As it is stored or in float32, and in the dtype that is wanted.
    parts = {"the largest tensor": 2 * 4 * max(counts)}
    if verify:
        # PyTorch holds what is stored and what it loads it to, at the same time.
        parts["the model in PyTorch"] = 2 * 4 * sum(counts)
    memory.check(parts, memory.free_of_host(), "convert on a machine with more" + (", or without verify" * verify))
    before = memory.peak()
    total = sum(sizes.values())
    with (
        _hashing(opened.files) as hashes,
        tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc=folder.name, delay=0.5) as bar,
    ):
        of_matrix: dict[str, np.ndarray] = {}

        def read(path: str) -> np.ndarray:
            bar.update(sizes[path])
            if path in of_matrix:
                return of_matrix.pop(path)
            if path in opened.shapes and not jnp.issubdtype(arrays[path].dtype, jnp.integer):
                return opened.read(path, arrays[path].dtype)
            # Integers and their scales are made together; whichever is asked for first, the other one comes next.
            matrix, floating = matrix_of(path), np.dtype(np.float32)
            if divides(matrix, precision):
                made = in_format_by_pieces(matrix, opened.pieces(matrix, floating), opened.config, precision)
            else:
                made = dict(in_format([(matrix, opened.read(matrix, floating))], opened.config, precision))
            of_matrix.update({name: np.asarray(array) for name, array in made.items()})
            return of_matrix.pop(path)

        native.write(folder, opened.config, precision, read, tokenizer, opened.name, hashes)
    report = ConversionReport(
        path=folder,
        dtype=str(precision),
        tensors=len(opened.shapes),
        bytes=total,
        largest_bytes=max(sizes.values()),
        seconds=time.perf_counter() - start,
        memory_before=before,
        peak_memory=memory.peak(),
    )
    if verify:
        found = verification.verify_source(opened, folder)
        if not found.ok:
            raise VerificationError(found)
        report = dataclasses.replace(report, verification=found)
    return report


def plan(
    source: str | Path,
    dtype: str | jnp.dtype | None = None,
    allow_pickle: bool = False,
    weights: str | WeightFormat | None = None,
) -> Plan:
    """What `convert` would do: every parameter with the tensor it comes from. Nothing is written.

    Args:
        source: see `open_source`.
        dtype: as for `convert`.
        allow_pickle: see `open_source`.
        weights: as for `convert`.

    Raises:
        FileNotFoundError: there is nothing of that name, or only pickle files and they are not allowed.
        ImportError: pickle files are to be read, and torch is not installed.
        ValueError: the dtype is not allowed, the model not supported, its files malformed, or the
            tokenizer does not fit.
    """
    wanted = parse_dtype(dtype)
    stored_as = parse_weights(weights)
    opened = open_source(source, allow_pickle)
    precision = precision_of(opened.config, opened.dtype if wanted is None else wanted, stored_as, opened)
    return plan_of(opened, precision, _fitting_tokenizer(opened) is not None)


def verify(source: str | Path, folder: str | Path, allow_pickle: bool = False) -> Verification:
    """Compare a native folder with the model it was converted from, as transformers and PyTorch run it.

    A few random sequences of tokens, always the same ones, go through both models in float32, with one model in
    memory at a time. Where the folder holds the stored values, the logits may differ by 1e-4 of the
    largest one; where they were rounded to bfloat16 or float16, by 20 roundings.

    Args:
        source: a Hugging Face folder, repository or GGUF file.
        folder: the folder that `convert` wrote.
        allow_pickle: see `open_source`.

    Returns:
        What was found; its `ok` says whether it is within the tolerance.

    Raises:
        FileNotFoundError: there is no such source or folder.
        ImportError: torch is not installed.
        ValueError: transformers cannot load the source, or the folder is of another model.
    """
    return verification.verify_source(open_source(source, allow_pickle), Path(os.path.expanduser(folder)))


@contextlib.contextmanager
def _hashing(files: Sequence[Path]) -> Iterator[Callable[[], Mapping[str, str]]]:
    """Hash files in a thread during a block; gives a function that waits for the sha256 of each."""
    stop = threading.Event()

    def hash_all() -> dict[str, str]:
        return {file.relative_to(files[0].parent).as_posix(): _sha256(file, stop) for file in files}

    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(hash_all)
        try:
            yield future.result
        finally:
            stop.set()


def _sha256(file: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        # hashlib lets other threads run while it works on so much at a time.
        while (piece := opened.read(1 << 20)) and not stop.is_set():
            digest.update(piece)
    return digest.hexdigest()
