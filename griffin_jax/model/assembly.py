"""Modules built from arrays, so that no weight is drawn at random only to be overwritten.

Checkpoints have the parameters that the field has names for: `attention.query`, `ff.gate`, ... The module joins some of
them into one, because one product reads weights faster than several do. Only this file knows both forms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from griffin_jax.model.config import ModelConfig
from griffin_jax.model.sharding import check_mesh, parameter_spec, with_kv_copies
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import VOCABULARY_MATRICES, Outputs, Precision, WeightFormat, held, quantise
from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size

NEURON_MAJOR = ("gate", "up", "down", "gate_bias", "up_bias")
"""The parameters of a feed-forward layer that have a row for each neuron, as checkpoints name them."""


def abstract_model(
    config: ModelConfig, dtype: DTypeLike = jnp.float32, weights: WeightFormat | None = None
) -> Transformer:
    """The module tree of a model, with a `jax.ShapeDtypeStruct` in place of every weight."""
    return nnx.eval_shape(lambda: Transformer(config, dtype, weights=weights))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model by its path, such as `layers.3.ff.gate`."""
    return {path: array.shape for path, array in stored_arrays(config, Precision.of(jnp.float32)).items()}


def stored_arrays(config: ModelConfig, precision: Precision) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array that a checkpoint has, by its path: parameters, and the scales of integers."""
    return dict(_stored_arrays(config, precision))


def wider_parameters(config: ModelConfig, precision: Precision, dtype: np.dtype) -> dict[str, np.dtype]:
    """The arrays that a model of this precision has in a wider floating dtype than this one, with theirs: the float32
    in which routers correct their choice of experts, and scales of integers."""
    arrays = _stored_arrays(config, precision)
    floating = {path: array.dtype for path, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    return {path: np.dtype(own) for path, own in floating.items() if own.itemsize > dtype.itemsize}


@functools.lru_cache(maxsize=16)
def _stored_arrays(config: ModelConfig, precision: Precision) -> dict[str, jax.ShapeDtypeStruct]:
    state = nnx.state(abstract_model(config, precision.dtype, precision.weights))
    arrays: dict[str, jax.ShapeDtypeStruct] = {}
    for path, variable in nnx.to_flat_state(state):
        arrays |= jax.eval_shape(functools.partial(split, dotted(path), config=config), variable.get_value())
    return arrays


PIECE_BYTES = 64 << 20
"""Size of float32 numbers that are rounded to integers together."""

OUTPUTS_LAST = ("down", "out")
"""The matrices whose last axis counts the outputs of their product."""


def outputs_of(path: str) -> Outputs:
    """Which axes of a matrix count the outputs of its product."""
    if path.rpartition(".")[-1] not in OUTPUTS_LAST:
        return "first"
    return "last_of_each" if ".experts." in path else "last"


def scale_of(path: str, weights: WeightFormat) -> str:
    """The path of the scales of a matrix of integers in this format."""
    by_rows = path.rpartition(".")[-1] in OUTPUTS_LAST and weights.group is not None
    return f"{path}{'_row' if by_rows else ''}_scale"


def matrix_of(path: str) -> str:
    """The path of the matrix that scales belong to, from theirs; a matrix belongs to itself."""
    return path.removesuffix("_scale").removesuffix("_row")


def in_format(
    arrays: Iterable[tuple[str, ArrayLike]], config: ModelConfig, precision: Precision
) -> Iterator[tuple[str, ArrayLike]]:
    """The parameters as they are to be stored: where that is as integers, these and their scales.

    Args:
        arrays: path and floating numbers of parameters, or integers and scales as they are stored already.
        config: the architecture.
        precision: how they are to be stored.
    """
    stored = stored_arrays(config, precision)
    for path, array in arrays:
        wanted = stored.get(path)
        kind = jnp.result_type(array)
        if wanted is None or not jnp.issubdtype(wanted.dtype, jnp.integer) or jnp.issubdtype(kind, jnp.integer):
            yield path, array
            continue
        weights = _format_of(path, precision)
        if jnp.shape(array) != wanted.shape:
            raise ValueError(f"parameter {path!r} has the shape {jnp.shape(array)}, not {wanted.shape}")
        numbers, scale = _rounded(array, weights, outputs_of(path))
        scale_path, sharding = scale_of(path, weights), getattr(array, "sharding", None)
        # Nothing wide is to be in memory any longer.
        del array
        if isinstance(sharding, NamedSharding):
            spec = parameter_spec(scale_path, scale.shape, config, sharding.mesh)
            numbers = jax.device_put(numbers, sharding)
            scale = jax.device_put(scale, NamedSharding(sharding.mesh, spec))
        yield path, numbers
        yield scale_path, scale


def _format_of(path: str, precision: Precision) -> WeightFormat:
    """How a matrix is stored."""
    is_vocabulary = path.rpartition(".")[-1] in VOCABULARY_MATRICES
    return precision.weights.of_vocabulary() if is_vocabulary else precision.weights


def divides(path: str, precision: Precision) -> bool:
    """Whether entries of a matrix's first axis become integers each for themselves."""
    return outputs_of(path) != "last" or _format_of(path, precision).group is not None


def in_format_by_pieces(
    path: str, pieces: Iterable[np.ndarray], config: ModelConfig, precision: Precision
) -> dict[str, np.ndarray]:
    """A matrix as integers and their scales, for which only these are whole in memory.

    Args:
        path: path of the matrix, of which `divides` is true.
        pieces: its entries along the first axis as floating numbers, some after the other.
        config: the architecture.
        precision: how it is to be stored.
    """
    weights, stored, stop = _format_of(path, precision), stored_arrays(config, precision), 0
    paths = path, scale_of(path, weights)
    found = {each: np.empty(stored[each].shape, stored[each].dtype) for each in paths}
    for piece in pieces:
        start, stop = stop, stop + len(piece)
        for each, part in zip(paths, _rounded(piece, weights, outputs_of(path)), strict=True):
            found[each][start:stop] = np.asarray(part)
    return found


def dotted(path: tuple[object, ...]) -> str:
    """`("layers", 3, "ff", "gate")` -> `"layers.3.ff.gate"`."""
    return ".".join(map(str, path))


def parts_of(path: str, config: ModelConfig) -> list[str]:
    """The paths that a module's parameter has in a checkpoint: mostly only its own."""
    layer, matrix, suffix = _named(path)
    if matrix == "qkv":
        return [f"{layer}.{part}{suffix}" for part in ("query", "key", "value")]
    if matrix == "gate_up":
        return [f"{layer}.{part}{suffix}" for part in (("gate", "up") if config.gated else ("up",))]
    return [path]


def _named(path: str) -> tuple[str, str, str]:
    """The path of a parameter in parts: its module, its matrix, and `_bias` or `_scale` if it belongs to the matrix."""
    module, _, name = path.rpartition(".")
    suffix = next((suffix for suffix in ("_bias", "_scale") if name.endswith(suffix)), "")
    return module, name.removesuffix(suffix), suffix


def join(path: str, parts: list[Any], kv_copies: int = 1) -> Any:
    """A module's parameter from its parts, in the order of `parts_of`; NumPy arrays stay NumPy arrays."""
    np_or_jnp: ModuleType = np if all(isinstance(part, np.ndarray) for part in parts) else jnp
    _, matrix, _ = _named(path)
    if kv_copies > 1:
        held = parts if _of_each_kv_head(path, parts[0].ndim) else parts[1:] if matrix == "qkv" else []
        parts = [*parts[: len(parts) - len(held)], *(np_or_jnp.repeat(part, kv_copies, axis=0) for part in held)]
    if matrix == "qkv":
        query, key, value = parts
        groups = key.shape[0]
        query = query.reshape(groups, query.shape[0] // groups, *query.shape[1:])
        return np_or_jnp.concatenate([query, key[:, None], value[:, None]], axis=1)
    return np_or_jnp.stack(parts, _axis_of_parts(path)) if matrix == "gate_up" else parts[0]


def _axis_of_parts(path: str) -> int:
    """The axis of a module's parameter that counts gate and up: after that of the experts, where there are any."""
    return 1 if ".experts." in path else 0


def _of_each_kv_head(path: str, axes: int) -> bool:
    """Whether a parameter is the scale of a norm with a row for each key head, (G, 1, H)."""
    return path.endswith("key_norm.scale") and axes == 3


def _placed(path: str, whole: Any, part: Any) -> Any:
    """A joined parameter on the devices of its parts, divided as `part` is."""
    sharding, (_, matrix, _) = getattr(part, "sharding", None), _named(path)
    if not isinstance(sharding, NamedSharding) or matrix not in ("qkv", "gate_up"):
        return whole
    axes = [*sharding.spec, *[None] * (part.ndim - len(sharding.spec))]
    # (G, R + 2, H, D) from (G, H, D) or (N, H, D), (2, F, D) from (F, D), and (E, 2, F, D) from (E, F, D).
    axes.insert(1 if matrix == "qkv" else _axis_of_parts(path), None)
    return jax.device_put(whole, NamedSharding(sharding.mesh, PartitionSpec(*axes)))


def split(path: str, array: Any, config: ModelConfig) -> dict[str, Any]:
    """The parts of a module's parameter by their paths: the inverse of `join`."""
    parts, copies, (_, matrix, _) = parts_of(path, config), config.kv_copies, _named(path)
    if _of_each_kv_head(path, array.ndim):
        return {path: array[::copies]}
    if matrix == "qkv":
        query = array[:, :-2].reshape(-1, *array.shape[2:])
        return dict(zip(parts, (query, array[::copies, -2], array[::copies, -1]), strict=True))
    if matrix == "gate_up":
        axis = _axis_of_parts(path)
        return {name: array[(slice(None),) * axis + (number,)] for number, name in enumerate(parts)}
    return {path: array}


def without_copies(path: str, array: Any, config: ModelConfig) -> Any:
    """A module's parameter as in a model that holds each key/value head once."""
    if config.kv_copies == 1:
        return array
    # The rows of an addition of low rank lie as those of its matrix.
    path = path.removesuffix("_left") if path.endswith(".qkv_left") else path
    return join(path, list(split(path, array, config).values()))


def disassemble(model: Transformer) -> Iterator[tuple[str, jax.Array]]:
    """Path and weights of every parameter that a checkpoint of the model has."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        yield from split(dotted(path), variable.get_value(), model.config).items()


def _rounded(array: ArrayLike, weights: WeightFormat, outputs: Outputs) -> tuple[Any, Any]:
    """Integers and scales; of a large array of NumPy whose rows have their own scales, some rows at a time."""
    size = math.prod(jnp.shape(array)[1:]) * 4
    rows = max(1, PIECE_BYTES // size)
    if not isinstance(array, np.ndarray) or (outputs == "last" and weights.group is None) or len(array) <= rows:
        return quantise(jnp.asarray(array), weights, outputs)
    starts = range(0, len(array), rows)
    pieces = [quantise(jnp.asarray(array[start : start + rows]), weights, outputs) for start in starts]
    numbers, scales = ([np.asarray(piece[part]) for piece in pieces] for part in range(2))
    return np.concatenate(numbers), np.concatenate(scales)


def assemble(
    config: ModelConfig,
    arrays: Iterable[tuple[str, ArrayLike]],
    dtype: DTypeLike,
    weights: WeightFormat | None = None,
) -> Transformer:
    """The model with these weights.

    Args:
        config: the architecture.
        arrays: path and weights of everything in `parameter_shapes`, in any order; consumed one by one, so that a
            generator needs memory for the model and one more parameter. Or integers and their scales, for all in
            `stored_arrays`.
        dtype: dtype of the computation, and of what `weights` is not about.
        weights: how the matrices are stored; in `dtype` if None.

    Raises:
        ValueError: a parameter is missing, unknown, given twice or of another shape, or the format does not fit.
    """
    precision = Precision.of(dtype, weights)
    graph, state = nnx.split(abstract_model(config, dtype, weights))
    shapes = {path: array.shape for path, array in stored_arrays(config, precision).items()}
    variables = {dotted(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    parameter_of = {part: path for path in variables for part in parts_of(path, config)}
    waiting: dict[str, dict[str, ArrayLike]] = {path: {} for path in variables}
    filled, seen = [], set()
    for name, array in in_format(arrays, config, precision):
        if name not in shapes or name in seen:
            raise ValueError(f"parameter {name!r} is {'given twice' if name in seen else 'not part of this model'}")
        if jnp.shape(array) != shapes[name]:
            raise ValueError(f"parameter {name!r} has the shape {jnp.shape(array)}, not {shapes[name]}")
        seen.add(name)
        path = parameter_of[name]
        waiting[path][name] = array
        parts = parts_of(path, config)
        if len(waiting[path]) == len(parts):
            have = waiting.pop(path)
            pieces = [have.pop(part) for part in parts]
            # Devices that hold copies of key/value heads share the queries.
            like = pieces[0 if config.kv_copies > 1 else -1]
            whole = _placed(path, join(path, pieces, config.kv_copies), like)
            key, variable = variables[path]
            filled.append((key, variable.replace(held(jnp.asarray(whole, variable.get_value().dtype)))))
    if missing := shapes.keys() - seen:
        raise ValueError(f"missing parameters: {', '.join(sorted(missing))}")
    return nnx.merge(graph, nnx.from_flat_state(filled))


def random_model(
    config: ModelConfig,
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
    mesh: Mesh | None = None,
    weights: WeightFormat | None = None,
) -> Transformer:
    """A model with random matrices of variance 1 / fan-in: as fast and as large as a trained one, and as finite.

    Norms and biases have their values before training. The matrices are made on their devices one after the other, in
    the dtype that they keep, with memory for the model and one more matrix.

    Args:
        config: the architecture.
        dtype: dtype of the weights.
        seed: seed of the weights.
        mesh: divide the parameters as `griffin_jax.model.sharding` says; their values stay the same.
        weights: how the matrices are stored; in `dtype` if None.

    Raises:
        ValueError: the mesh cannot share the neurons evenly.
    """
    devices = axis_size(mesh, MODEL_AXIS)
    check_mesh(config, devices)
    config = with_kv_copies(config, devices)

    def drawn() -> Iterator[tuple[str, Array]]:
        for number, (path, shape) in enumerate(parameter_shapes(config).items()):
            name = path.rpartition(".")[-1]
            sharding = None if mesh is None else NamedSharding(mesh, parameter_spec(path, shape, config, mesh))
            if name == "scale" or name.endswith("bias"):
                fill = 1 if name == "scale" and not config.norm_plus_one else 0
                yield path, jnp.full(shape, fill, dtype, device=sharding)
                continue
            # Matrices that write to the residual stream sum over their leading axes, the others over their last one.
            ends = name in ("down", "out", "project_in", "project_out")
            fan_in = shape[-1] if not ends else shape[-2] if ".experts." in path else math.prod(shape[:-1])
            start = np.uint32(seed * 100_003 + number)
            yield path, _uniform(start, fan_in**-0.5, shape, jnp.dtype(dtype), sharding)

    return assemble(config, drawn(), dtype, weights)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _uniform(
    seed: Array, deviation: Array, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None
) -> Array:
    """Uniform numbers of mean 0 and this standard deviation: a counter, scrambled by the last steps of MurmurHash3.

    `jax.random` takes minutes for some billions of normal numbers on a CPU, and nothing here needs their quality.
    """
    x = jax.lax.iota(jnp.uint32, math.prod(shape)) + seed * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    x = jax.lax.bitcast_convert_type(x ^ (x >> 16), jnp.int32).astype(jnp.float32)
    x = (x * (deviation * (3**0.5 / 2**31))).astype(dtype).reshape(shape)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
