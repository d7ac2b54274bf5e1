"""The native format: a folder that loads fast and in which nothing is missing.

    griffin_jax.json   format, version, dtype, weights (if the matrices are stored in another way), source with its
                       hashes, and `ModelConfig`; written last
    params/            the parameters, one Orbax checkpoint; the tree of the module, with text keys; arrays in pieces of
                       their own checksums (Zarr 3 with crc32c)
    tokenizer/         files of the tokenizer, if the model has one

A folder appears whole or not at all: it is written under a hidden name next to its place, flushed to the disk, and then
renamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from griffin_jax.checkpoints.planning import UncheckedWarning
from griffin_jax.checkpoints.sources import (
    FLOATS,
    Origin,
    Source,
    batch_bytes,
    check_finite,
    check_plausible,
    is_finite_on_devices,
    read_json,
)
from griffin_jax.model.assembly import (
    assemble,
    disassemble,
    dotted,
    matrix_of,
    parameter_shapes,
    scale_of,
    stored_arrays,
    wider_parameters,
)
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.sharding import parameter_spec
from griffin_jax.model.sizes import bytes_of
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import Precision, WeightFormat, dequantise
from griffin_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS
from griffin_jax.text.tokenizer import Tokenizer, check_fits
from griffin_jax.utils import memory
from griffin_jax.utils.messages import brief, is_out_of_memory
from griffin_jax.utils.wholefile import hidden_folder, sweep

FORMAT, VERSION = "griffin_jax", 2
UNCHECKED_VERSION = 1
"""The version without checksums of the weights, which is still read."""
INTEGER_VERSION = 3
"""The version of folders whose matrices are integers with scales."""
MANIFEST, PARAMETERS, TOKENIZER = "griffin_jax.json", "params", "tokenizer"
DTYPES = ("float32", "bfloat16", "float16")
CHUNK_BYTES = 64 << 20
"""Size of the pieces that arrays are stored in, at most, so that writing one needs little further memory."""
HASHED_BYTES = 1 << 20
"""Size up to which files of the parameters have a sha256; what is in larger ones has checksums of its own."""
SEAL = "sha256_of_the_rest"
"""Field of the manifest."""
CODECS = ({"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"})
"""How pieces of arrays are stored. TensorStore compares the checksum of a piece whenever it reads it, also where a
device reads only its part; CRC-32C, because processors have an instruction for it."""
BATCH_BYTES = 256 << 20
"""Size up to which arrays are written together, because every write is flushed to the disk, which takes time."""


def save(model: Transformer, folder: str | Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write a model in the native format.

    Args:
        model: the full model; a pruned model belongs to its prompt.
        folder: a folder that does not exist yet.
        tokenizer: tokenizer to save with the model.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists.
        ValueError: the model is pruned or has an adapter, holds values that are not finite, or does not fit the
            tokenizer.
        OSError: the disk is full, or the folder cannot be written.
    """
    folder = check_free(folder)
    precision = Precision.of(model.dtype, model.weights)
    stored = stored_arrays(model.config, precision)
    shapes = {path: array.shape for path, array in stored.items()}
    if model.adapted:
        raise ValueError("the model has an adapter; save that on its own, and the model without it, or merged with it")
    arrays = None if model.neurons != model.config.neurons else dict(disassemble(model))
    if arrays is None or {path: array.shape for path, array in arrays.items()} != shapes:
        raise ValueError(
            "the model's parameters are not those of its config; a pruned model cannot be saved, save the full one"
        )

    def read(path: str) -> np.ndarray:
        array = np.asarray(arrays[path]).astype(stored[path].dtype, copy=False)
        check_finite(array, array, path)
        return array

    config = dataclasses.replace(model.config, kv_copies=1, expert_parallel=False)
    write(folder, config, precision, read, tokenizer, source="a model in memory")
    return folder


def check_free(folder: str | Path) -> Path:
    """The path of a checkpoint to write; `FileExistsError` if there is something already."""
    folder = Path(os.path.expanduser(folder))
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already; choose another place or delete it first")
    return folder


def write(
    folder: Path,
    config: ModelConfig,
    precision: Precision,
    read: Callable[[str], np.ndarray],
    tokenizer: Tokenizer | None,
    source: str,
    hashes: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write a checkpoint, reading one parameter at a time.

    Args:
        folder: a folder that does not exist yet.
        config: the architecture.
        precision: how the parameters are stored.
        read: function that gives one of `stored_arrays` as a contiguous array; called once for each, in order.
        tokenizer: tokenizer to save with the model.
        source: where the weights come from, in words.
        hashes: function that gives the sha256 of every file that they come from; called after the weights are written.

    Raises:
        FileExistsError: the folder exists.
        ValueError: the dtype or the tokenizer does not fit, or `read` fails.
        OSError: the disk is full, or the folder cannot be written.
    """
    if precision.dtype.name not in DTYPES:
        raise ValueError(f"dtype is {precision.dtype.name}; the native format has {', '.join(DTYPES)}")
    arrays = stored_arrays(config, precision)
    if tokenizer is not None:
        check_fits(tokenizer, config)
    check_free(folder)
    # Before the room is looked at, since they take some.
    sweep(folder)
    _check_space(folder, sum(map(bytes_of, arrays.values())))
    with _appearing(folder) as partial:
        _write_parameters(partial / PARAMETERS, arrays, read)
        if tokenizer is not None:
            tokenizer.save(partial / TOKENIZER)
        manifest = {
            "format": FORMAT,
            "version": INTEGER_VERSION if precision.weights.quantised else VERSION,
            "dtype": precision.dtype.name,
            **({"weights": str(precision.weights)} if has_own_format(precision) else {}),
            "source": {"name": source, "sha256": dict(hashes()) if hashes else {}},
            "files": _fingerprints(partial, _files_in(partial)),
            "config": config.to_json(),
        }
        (partial / MANIFEST).write_text(json.dumps(sealed(manifest), indent=2) + "\n")


def _check_space(folder: Path, size: int) -> None:
    """Raise `OSError` if the disk has no room for `size` bytes."""
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", str(folder))


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _fingerprints(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The size of each file and, unless it is a large one of the parameters, its sha256; "missing" if there is none.

    The small files of the parameters say where everything is. The large ones hold pieces that have checksums.
    """
    found = {}
    for name in names:
        try:
            with (folder / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                found[name] = f"{size} bytes"
                if size <= HASHED_BYTES or not name.startswith(f"{PARAMETERS}/"):
                    found[name] += f", sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            found[name] = "missing"
    return found


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with a sha256 of everything else that it holds."""
    rest = {name: value for name, value in manifest.items() if name != SEAL}
    return {**rest, SEAL: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def _is_inside(folder: Path, name: object) -> bool:
    """Whether a name in a manifest is that of a file in the folder, wherever links lead."""
    if not isinstance(name, str) or re.search(r"[\\:\x00-\x1f]", name) or name.startswith("/"):
        return False
    if ".." in name.split("/"):
        return False
    return (folder / name).resolve().is_relative_to(folder.resolve())


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A hidden folder that is renamed to `folder` at the end of the block, and removed if that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hidden_folder(folder) as partial:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        check_free(folder)
        partial.rename(folder)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Make sure that a file or the names in a folder survive a power failure."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- Orbax ----


@dataclasses.dataclass(frozen=True)
class _Unread:
    """A leaf of the tree that Orbax writes: a parameter that is read when its turn comes."""

    path: str
    nbytes: int
    read: Callable[[str], np.ndarray]


class _Batches(ocp.type_handlers.NumpyHandler):
    """Writes `_Unread` leaves as arrays, and reads the next few only when the last few have been written."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._failures: list[Exception] = []

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        for batch in _batches([value.nbytes for value in values], BATCH_BYTES):
            arrays = [value.read(value.path) for value in values[batch]]
            for written in await super().serialize(arrays, infos[batch], args[batch]):
                _finish(written)
            if self._failures:
                raise _as_os_error(self._failures[0])
            del arrays
            # TensorStore's threads encode pieces in heaps of their own, half a gigabyte of them after some layers.
            memory.give_back()
        return []

    async def _open_and_write(self, value: np.ndarray, tspec: dict[str, Any], ts_context: Any) -> None:
        # Orbax abandons the other writes of a batch when one fails, and they print tracebacks when they end.
        tspec["metadata"]["codecs"] = list(CODECS)
        try:
            store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
            chunk = [size or 1 for size in store.chunk_layout.write_chunk.shape or value.shape]
            for part in _parts(value.shape, chunk, value.itemsize):
                await store[part].write(value[part], can_reference_source_data_indefinitely=True)
        except Exception as error:
            self._failures.append(error)


class _ToTheEnd(ocp.type_handlers.ArrayHandler):
    """Reads arrays, and when one cannot be read waits for the others.

    Orbax abandons them, and TensorStore prints a traceback for each that ends after the event loop is closed.
    """

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        except Exception:
            await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
            raise


def _parts(shape: Sequence[int], chunk: Sequence[int], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Slices of whole chunks to write one after the other, because what is being written is in memory twice."""
    axis = max(range(len(shape)), key=lambda axis: -(-shape[axis] // chunk[axis]), default=None)
    if axis is None:
        yield ()
        return
    row_of_chunks = math.prod(shape) // shape[axis] * chunk[axis] * itemsize
    step = max(1, BATCH_BYTES // row_of_chunks) * chunk[axis]
    for start in range(0, shape[axis], step):
        yield (slice(None),) * axis + (slice(start, min(start + step, shape[axis])),)


def _finish(written: Any) -> None:
    """Wait for a write, even if the user interrupts, so that no file appears after the folder is removed.

    It waits in a thread of its own, because a join that is interrupted treats its thread as ended.
    """
    with ThreadPoolExecutor(max_workers=1) as waiting:
        waiting.submit(written.result).result()


def _as_os_error(error: Exception) -> Exception:
    """The operating system's error in TensorStore's long message, or else the error itself."""
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return error


def _batches(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Slices of consecutive items of at most `most` bytes together, or of a single item that is larger."""
    start, total = 0, 0
    for item, size in enumerate(sizes):
        if item > start and total + size > most:
            yield slice(start, item)
            start, total = item, 0
        total += size
    yield slice(start, len(sizes))


def has_own_format(precision: Precision) -> bool:
    """Whether matrices are stored in another way than everything else."""
    return precision.weights != WeightFormat(precision.dtype.name)


def packed(array: np.ndarray) -> np.ndarray:
    """Numbers of 4 bits as bytes, of two neighbours in a row each, the first in the low bits; others as they are."""
    if array.dtype != jnp.int4:
        return array
    numbers = array.astype(np.int8).view(np.uint8)
    return (numbers[..., ::2] & 15) | (numbers[..., 1::2] << 4)


def packed_form(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what `packed` makes of an array."""
    if array.dtype != jnp.int4:
        return array
    return jax.ShapeDtypeStruct((*array.shape[:-1], array.shape[-1] // 2), np.uint8)


@jax.jit
def unpacked(array: jax.Array) -> jax.Array:
    """The numbers of 4 bits in the bytes that `packed` gives."""
    pairs = jnp.stack([array << 4, array], axis=-1)
    numbers = jax.lax.shift_right_arithmetic(jax.lax.bitcast_convert_type(pairs, jnp.int8), jnp.int8(4))
    return numbers.reshape(*array.shape[:-1], -1).astype(jnp.int4)


def _write_parameters(
    folder: Path, arrays: Mapping[str, jax.ShapeDtypeStruct], read: Callable[[str], np.ndarray]
) -> None:
    def read_packed(path: str) -> np.ndarray:
        return packed(read(path))

    sizes = {path: bytes_of(array) for path, array in arrays.items()}
    tree = _nested({path: _Unread(path, size, read_packed) for path, size in sizes.items()})
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Unread, _Batches()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    # Weights hardly compress, and unpacking them would be most of the time of loading.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False, use_zarr3=True)
    try:
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree, save_args=save_args))
    except Exception as error:
        raise _as_os_error(error) from error


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"layers.3.ff.gate": x}` -> `{"layers": {"3": {"ff": {"gate": x}}}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _leaf(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from logging its inner workings; what matters is raised as exceptions."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class NativeCheckpoint(Source):
    """A folder that `save` or a conversion wrote.

    Attributes:
        converted_from: what it was converted from, in words.
        hashes: sha256 of each file of the source; empty in folders that were written before hashes were kept.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is incomplete, malformed or of a newer version.

    Warns:
        UncheckedWarning: it is of the version without checksums of the weights.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self.name = str(folder)
        manifest = self._read_manifest()
        self.dtype = np.dtype(jnp.dtype(manifest["dtype"]))
        self.precision = Precision.of(self.dtype, manifest["weights"])
        try:
            self.config = ModelConfig.from_json(manifest["config"])
        except ValueError as error:
            raise ValueError(f"{self._folder / MANIFEST}: {error}") from error
        source = manifest.get("source")
        source = source if isinstance(source, dict) else {"name": source}
        self.converted_from = str(source.get("name"))
        hashes = source.get("sha256") or {}
        if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
            raise ValueError(f"{self._folder / MANIFEST}: the sha256 of the source's files must be texts by name")
        self.hashes: dict[str, str] = hashes
        self.files = [self._folder / MANIFEST, *(self._folder / name for name in manifest["files"])]
        self.ignored = []
        stored = self._stored_shapes()
        check_plausible(self.name, self.config, list(stored.values()))
        self.shapes = parameter_shapes(self.config)
        try:
            self._arrays = stored_arrays(self.config, self.precision)
        except ValueError as error:
            raise ValueError(f"{self._folder / MANIFEST}: {error}") from error
        expected = {path: packed_form(array).shape for path, array in self._arrays.items()}
        if wrong := sorted(stored.items() ^ expected.items()):
            listed = ", ".join(dict.fromkeys(f"{path} {shape}" for path, shape in wrong[:8]))
            raise ValueError(f"{self._folder}: the parameters are not those of its config; they differ in {listed}")

    def origin(self, path: str) -> Origin:
        stored = self._arrays[path].dtype
        name = next((name for name, dtype in FLOATS.items() if dtype == stored), stored.name)
        return Origin(path, "", self.shapes[path], name)

    @property
    def weights(self) -> WeightFormat | None:
        return self.precision.weights if self.precision.weights.quantised else None

    def read(self, path: str, dtype: np.dtype) -> np.ndarray:
        kind = self._arrays[path]
        scale_path = self._scale_of(path)
        wanted = {path: kind} | ({} if scale_path is None else {scale_path: self._arrays[scale_path]})
        tree = self._restore(wanted)
        stored = _leaf(tree, path)
        if scale_path is not None:
            stored = dequantise(stored, _leaf(tree, scale_path))
        stored = np.asarray(stored)
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(stored, dtype)
        check_finite(array, stored, f"{self.name}: {path}")
        return array

    def _scale_of(self, path: str) -> str | None:
        """The path of the scales of a parameter, if it is stored as integers."""
        if not jnp.issubdtype(self._arrays[path].dtype, jnp.integer):
            return None
        return scale_of(path, self.precision.weights)

    def parameters(
        self, precision: Precision, shardings: Mapping[str, jax.sharding.Sharding] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Path and weights of all parameters, read some at a time, because Orbax reads many files at once.

        How many is `batch_bytes`. With shardings, every device reads only its part of each array from the disk.
        Integers come as they are stored, with their scales, if the model is to have them so; else as floating numbers.
        """
        as_stored = precision.weights == self.precision.weights
        dtype = precision.dtype if as_stored else precision.read_as
        wider = wider_parameters(self.config, precision, dtype)
        # Values of wider weights may be too large for float16, which has to be checked.
        read_as = None if dtype == np.float16 else dtype
        arrays = {
            path: array
            if read_as is None or path in wider or path.endswith("_scale") or jnp.issubdtype(array.dtype, jnp.integer)
            else jax.ShapeDtypeStruct(array.shape, read_as)
            for path, array in self._arrays.items()
        }
        # A matrix of integers and its scales are read together.
        groups = [[path, *([scale] if (scale := self._scale_of(path)) else [])] for path in self.shapes]
        sizes = [sum(bytes_of(arrays[path]) for path in group) for group in groups]
        for batch in _batches(sizes, batch_bytes(sizes)):
            found = {path: arrays[path] for group in groups[batch] for path in group}
            tree = self._restore(found, self._with_scales(shardings, found))
            read = {path: _leaf(tree, path) for path in found}
            del tree
            # TensorStore's threads have freed as much again as was read, in heaps of their own.
            memory.give_back()
            for path, *scales in groups[batch]:
                # What it is assembled into is to be all that keeps it.
                yield from self._as_wanted(path, read, scales, wider.get(path, dtype), as_stored)

    def _as_wanted(
        self, path: str, read: dict[str, jax.Array], scales: Sequence[str], dtype: np.dtype, as_stored: bool
    ) -> Iterator[tuple[str, jax.Array]]:
        if not scales:
            yield path, self._checked(path, read.pop(path), dtype)
            return
        (name,) = scales
        numbers, scale = read.pop(path), read.pop(name)
        self._checked(name, scale, scale.dtype)
        if as_stored:
            yield path, numbers
            yield name, scale
            return
        floating = dequantise(numbers, scale, dtype)
        yield (
            path,
            floating if not isinstance(numbers.sharding, NamedSharding) else jax.device_put(floating, numbers.sharding),
        )

    def _with_scales(
        self, shardings: Mapping[str, jax.sharding.Sharding] | None, arrays: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.sharding.Sharding] | None:
        """The shardings of parameters and of their scales, which are whole where a sharding is not by our rules."""
        if shardings is None:
            return None
        found = {}
        for path, array in arrays.items():
            if path in shardings:
                found[path] = shardings[path]
                continue
            sharding = shardings[matrix_of(path)]
            if isinstance(sharding, NamedSharding):
                names = set(sharding.mesh.axis_names) <= {DATA_AXIS, MODEL_AXIS}
                spec = parameter_spec(path, array.shape, self.config, sharding.mesh) if names else PartitionSpec()
                sharding = NamedSharding(sharding.mesh, spec)
            found[path] = sharding
        return found

    def _checked(self, path: str, stored: jax.Array, dtype: np.dtype) -> jax.Array:
        array = stored if stored.dtype == dtype else stored.astype(dtype)
        if not is_finite_on_devices(array):
            self._refuse(path, stored, dtype)
        return array

    def _refuse(self, path: str, stored: jax.Array, dtype: np.dtype) -> NoReturn:
        if is_finite_on_devices(stored):
            largest = float(jnp.abs(stored).max())
            raise ValueError(f"{self.name}: {path}: values up to {largest:.3g} do not fit into {dtype}")
        raise ValueError(f"{self.name}: {path}: holds NaN or infinite values; convert the model again")

    def tokenizer(self) -> Tokenizer | None:
        folder = self._folder / TOKENIZER
        return Tokenizer.from_folder(folder) if folder.is_dir() else None

    def _read_manifest(self) -> dict[str, Any]:
        path = self._folder / MANIFEST
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{self._folder} is not a folder")
        if not path.is_file():
            raise ValueError(
                f"{self._folder}: has no {MANIFEST}, which a conversion writes last; convert the model again"
            )
        manifest = read_json(path)
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{path}: format is {manifest.get('format')!r}, not {FORMAT!r}")
        version = manifest.get("version")
        if isinstance(version, bool) or version not in (UNCHECKED_VERSION, VERSION, INTEGER_VERSION):
            raise ValueError(
                f"{path}: version {version!r} of the format; this griffin_jax reads versions {UNCHECKED_VERSION} to "
                f"{INTEGER_VERSION}. Update griffin_jax, or convert the model again"
            )
        if version == UNCHECKED_VERSION:
            warnings.warn(
                f"{self._folder}: written by griffin_jax 0.2.0 or earlier, without checksums of the weights: of files "
                "over 1 MiB only the sizes are compared, and values must be finite; convert the model again to have "
                "all bits checked",
                UncheckedWarning,
                stacklevel=2,
            )
        if version != UNCHECKED_VERSION and sealed(manifest) != manifest:
            raise ValueError(f"{path}: damaged or edited, {SEAL} is that of other contents; convert the model again")
        if manifest.get("dtype") not in DTYPES:
            raise ValueError(f"{path}: dtype is {manifest.get('dtype')!r}; possible are {', '.join(DTYPES)}")
        try:
            manifest["weights"] = WeightFormat.parse(manifest.get("weights", manifest["dtype"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if manifest["weights"].quantised != (version == INTEGER_VERSION):
            raise ValueError(f"{path}: weights of {manifest['weights']} in a folder of version {version}")
        if not isinstance(manifest.get("config"), dict):
            raise ValueError(f"{path}: has no config")
        if not isinstance(manifest.get("files"), dict):
            raise ValueError(f"{path}: has no files")
        if strange := [name for name in manifest["files"] if not _is_inside(self._folder, name)]:
            raise ValueError(f"{path}: {strange[0]!r:.200} is not the name of a file in the folder")
        found = _fingerprints(self._folder, manifest["files"])
        if version == UNCHECKED_VERSION:
            # It has no sha256 of any large file.
            for name, known in manifest["files"].items():
                if isinstance(known, str) and "sha256" not in known:
                    found[name] = found[name].partition(",")[0]
        if wrong := [name for name in found if found[name] != manifest["files"][name]]:
            listed = "; ".join(f"{name}: {found[name]}, not {manifest['files'][name]}" for name in wrong[:3])
            raise ValueError(f"{self._folder}: damaged files: {listed}; convert the model again")
        return manifest

    def _stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter in the folder, by path."""
        with self._opened() as (checkpointer, folder):
            metadata = checkpointer.metadata(folder).item_metadata
        tree = {} if metadata is None else nnx.traversals.flatten_mapping(metadata.tree)
        return {dotted(path): tuple(leaf.shape) for path, leaf in tree.items()}

    @contextlib.contextmanager
    def _opened(self, **options: Any) -> Iterator[tuple[ocp.Checkpointer, Path]]:
        try:
            with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
                yield checkpointer, (self._folder / PARAMETERS).absolute()
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"{self._folder}: damaged, the parameters cannot be read ({brief(error)}); convert the model again"
            ) from error

    def _restore(
        self,
        arrays: Mapping[str, jax.ShapeDtypeStruct],
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    ) -> Any:
        """The tree of these arrays of the checkpoint, without shardings as arrays on the default device."""
        if shardings is None:
            (device,) = jnp.zeros(()).devices()
            shardings = dict.fromkeys(arrays, jax.sharding.SingleDeviceSharding(device))
        forms = {path: packed_form(array) for path, array in arrays.items()}
        tree = _nested(forms)
        restore_args = _nested(
            {
                path: ocp.ArrayRestoreArgs(
                    restore_type=jax.Array, dtype=form.dtype, sharding=shardings[path], global_shape=form.shape
                )
                for path, form in forms.items()
            }
        )
        arguments = ocp.args.PyTreeRestore(tree, restore_args=restore_args, partial_restore=True)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _ToTheEnd()))
        with self._opened(type_handler_registry=registry) as (checkpointer, folder):
            found = checkpointer.restore(folder, args=arguments)
        for path, array in arrays.items():
            if array.dtype == jnp.int4:
                *parents, name = path.split(".")
                node = _leaf(found, ".".join(parents)) if parents else found
                node[name] = unpacked(node[name])
        return found


def load(folder: str | Path, dtype: jnp.dtype | None = None) -> Transformer:
    """The model in a native checkpoint.

    Args:
        folder: a folder that `save` or a conversion wrote.
        dtype: dtype of the computation, and of weights that are no integers; as stored if None.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is incomplete, malformed or of a newer version.
    """
    source = NativeCheckpoint(folder)
    precision = source.precision if dtype is None else Precision.of(dtype, source.weights)
    return assemble(source.config, source.parameters(precision), precision.dtype, precision.weights)
