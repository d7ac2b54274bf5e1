"""Modules from arrays: no weight is ever drawn at random only to be overwritten."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from griffin_jax.config import ModelConfig
from griffin_jax.model import Transformer


def abstract_model(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Transformer:
    """The module tree of a model, with `jax.ShapeDtypeStruct`s for weights."""
    return nnx.eval_shape(lambda: Transformer(config, dtype))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its path, such as `layers.3.ff.gate`."""
    return dict(_parameter_shapes(config))


@functools.lru_cache(maxsize=16)
def _parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    state = nnx.state(abstract_model(config))
    return {dotted(path): tuple(variable.shape) for path, variable in nnx.to_flat_state(state)}


def dotted(path: tuple[object, ...]) -> str:
    """`("layers", 3, "ff", "gate")` -> `"layers.3.ff.gate"`."""
    return ".".join(map(str, path))


def assemble(config: ModelConfig, arrays: Iterable[tuple[str, ArrayLike]], dtype: DTypeLike) -> Transformer:
    """The model with these weights.

    Args:
        config: the architecture.
        arrays: path and weights of every parameter, in any order; consumed one by one, so a
            generator needs memory for no more than one of them beside the model.
        dtype: that the weights get.

    Raises:
        ValueError: a parameter is missing, unknown, given twice or of another shape.
    """
    graph, state = nnx.split(abstract_model(config, dtype))
    variables = {dotted(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    filled = {}
    for name, array in arrays:
        if name not in variables or name in filled:
            raise ValueError(f"parameter {name!r} is {'given twice' if name in filled else 'not part of this model'}")
        path, variable = variables[name]
        if jnp.shape(array) != variable.shape:
            raise ValueError(f"parameter {name!r} has the shape {jnp.shape(array)}, not {variable.shape}")
        filled[name] = (path, variable.replace(jnp.asarray(array, dtype)))
    if missing := variables.keys() - filled.keys():
        raise ValueError(f"missing parameters: {', '.join(sorted(missing))}")
    return nnx.merge(graph, nnx.from_flat_state(list(filled.values())))
