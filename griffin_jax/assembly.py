"""Modules from arrays: no weight is ever drawn at random only to be overwritten.

Checkpoints have what the field has names for: `attention.query`, `ff.gate`, ... Some of these are one
parameter of the module, because one product reads weights faster than several do. This is the only
place that knows both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from griffin_jax.config import ModelConfig
from griffin_jax.model import Transformer

NEURON_MAJOR = ("gate", "up", "down", "gate_bias", "up_bias")
"""What a checkpoint has of a feed-forward layer with a row for each neuron."""


def abstract_model(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Transformer:
    """The module tree of a model, with `jax.ShapeDtypeStruct`s for weights."""
    return nnx.eval_shape(lambda: Transformer(config, dtype))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of everything that a checkpoint has by its path, such as `layers.3.ff.gate`."""
    return dict(_parameter_shapes(config))


@functools.lru_cache(maxsize=16)
def _parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    state = nnx.state(abstract_model(config))
    shapes = {}
    for path, variable in nnx.to_flat_state(state):
        parts = jax.eval_shape(functools.partial(split, dotted(path), config=config), variable.get_value())
        shapes |= {name: part.shape for name, part in parts.items()}
    return shapes


def dotted(path: tuple[object, ...]) -> str:
    """`("layers", 3, "ff", "gate")` -> `"layers.3.ff.gate"`."""
    return ".".join(map(str, path))


def parts_of(path: str, config: ModelConfig) -> list[str]:
    """What a module's parameter consists of in a checkpoint; mostly itself."""
    layer, _, name = path.rpartition(".")
    suffix = "_bias" if name.endswith("_bias") else ""
    if name.removesuffix(suffix) == "qkv":
        return [f"{layer}.{part}{suffix}" for part in ("query", "key", "value")]
    if name.removesuffix(suffix) == "inner":
        return [f"{layer}.{part}{suffix}" for part in (("gate", "up") if config.gated else ("up",))]
    return [path]


def join(path: str, parts: list[Any]) -> Any:
    """A module's parameter from its parts, in the order of `parts_of`; NumPy's arrays stay NumPy's."""
    np_or_jnp: ModuleType = np if all(isinstance(part, np.ndarray) for part in parts) else jnp
    if ".qkv" in path:
        query, key, value = parts
        groups = key.shape[0]
        query = query.reshape(groups, query.shape[0] // groups, *query.shape[1:])
        return np_or_jnp.concatenate([query, key[:, None], value[:, None]], axis=1)
    return np_or_jnp.stack(parts) if ".inner" in path else parts[0]


def split(path: str, array: Any, config: ModelConfig) -> dict[str, Any]:
    """The parts of a module's parameter by their paths: what `join` joined."""
    parts = parts_of(path, config)
    if ".qkv" in path:
        query = array[:, :-2].reshape(-1, *array.shape[2:])
        return dict(zip(parts, (query, array[:, -2], array[:, -1]), strict=True))
    return {name: array[number] for number, name in enumerate(parts)} if ".inner" in path else {path: array}


def disassemble(model: Transformer) -> Iterator[tuple[str, jax.Array]]:
    """Path and weights of everything that a checkpoint of the model has."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        yield from split(dotted(path), variable.get_value(), model.config).items()


def assemble(config: ModelConfig, arrays: Iterable[tuple[str, ArrayLike]], dtype: DTypeLike) -> Transformer:
    """The model with these weights.

    Args:
        config: the architecture.
        arrays: path and weights of everything in `parameter_shapes`, in any order; consumed one by one, so
            a generator needs memory for no more than one parameter beside the model.
        dtype: that the weights get.

    Raises:
        ValueError: something is missing, unknown, given twice or of another shape.
    """
    graph, state = nnx.split(abstract_model(config, dtype))
    shapes = parameter_shapes(config)
    variables = {dotted(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    parameter_of = {part: path for path in variables for part in parts_of(path, config)}
    waiting: dict[str, dict[str, ArrayLike]] = {path: {} for path in variables}
    filled, seen = [], set()
    for name, array in arrays:
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
            whole = join(path, [have.pop(part) for part in parts])
            key, variable = variables[path]
            filled.append((key, variable.replace(jnp.asarray(whole, dtype))))
    if missing := shapes.keys() - seen:
        raise ValueError(f"missing parameters: {', '.join(sorted(missing))}")
    return nnx.merge(graph, nnx.from_flat_state(filled))


def random_model(config: ModelConfig, dtype: DTypeLike = jnp.float32, seed: int = 0) -> Transformer:
    """A model with random matrices of variance 1 / fan-in: as fast and as large as a trained one, and as finite.

    They are drawn on the default device, one after the other, in the dtype that they keep, so that the memory
    needed beside the model is that of its largest matrix.

    Args:
        config: the architecture.
        dtype: of the weights.
        seed: of the weights.
    """
    return Transformer(config, dtype, rngs=nnx.Rngs(params=seed))
