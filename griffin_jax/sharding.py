"""How a model is divided among the devices of a mesh: tensor parallelism, as in Megatron-LM (arXiv 1909.08053).

Every device has its share of each layer's heads and of each feed-forward layer's neurons, and of the rows of the
embedding and the head; all the rest is on every device. The outputs of attention and of the feed-forward layer are
then sums over the devices, and these two sums are all that a layer has to communicate. The model itself knows of no
mesh: XLA divides the computation as the weights are divided.

Everything here is a plain function of shapes, and takes a `Mesh` or an `AbstractMesh`:

    mesh = jax.sharding.Mesh(jax.devices(), (MODEL_AXIS,))
    model = jax.device_put(model, model_shardings(model, mesh))
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from griffin_jax.assembly import abstract_model
from griffin_jax.cache import KVCache
from griffin_jax.config import ModelConfig
from griffin_jax.model import Transformer
from griffin_jax.targets import GPU_TILE

MODEL_AXIS = "model"
"""The axis of the mesh that heads, neurons and vocabulary are divided along. Other axes are left alone."""

HEADS, NEURONS, VOCABULARY = "heads", "neurons", "vocabulary"

RULES: Mapping[str, tuple[str, int]] = MappingProxyType({
    "embedding": (VOCABULARY, -2),  # (V, E)
    "head": (VOCABULARY, -2),  # (V, E)
    "head_bias": (VOCABULARY, -1),  # (V,)
    "attention.qkv": (HEADS, -4),  # (G, R + 2, H, D)
    "attention.qkv_bias": (HEADS, -3),  # (G, R + 2, H)
    "attention.query_norm.scale": (HEADS, -3),  # (N, 1, H); (H,) if all heads share it
    "attention.key_norm.scale": (HEADS, -3),  # (G, 1, H); (H,) likewise
    "attention.out": (HEADS, -3),  # (N, H, D)
    "ff.inner": (NEURONS, -2),  # (A, F, D), or (A, B, K, D)
    "ff.inner_bias": (NEURONS, -1),  # (A, F), or (A, B, K)
    "ff.down": (NEURONS, -2),  # (F, D), or (B, K, D)
})  # fmt: skip
"""What is divided, by the end of a parameter's path in the module, and along which axis, counted from the last.

Parameters that are not here are on every device: norms, the biases of outputs, tables of positions.
"""


def check_mesh(config: ModelConfig, devices: int, kept: Sequence[int] = ()) -> None:
    """Raise `ValueError` if this many devices cannot share the neurons, all of them or those that are kept.

    Args:
        config: the model.
        devices: along `MODEL_AXIS`.
        kept: neurons of each layer after pruning; none if it is not pruned.
    """
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"devices must be a whole number of at least 1, got {devices!r}")
    if config.ff_width % devices:
        possible = ", ".join(str(count) for count in range(1, 2 * devices + 1) if config.ff_width % count == 0)
        raise ValueError(
            f"{devices} devices cannot share the {config.ff_width} neurons of a feed-forward layer evenly; these can:"
            f" {possible}"
        )
    if uneven := sorted({k for k in kept if k % devices}):
        raise ValueError(
            f"{devices} devices cannot share {uneven[0]} kept neurons evenly: round them up to a multiple of {devices}"
            f" (--multiple {devices}; for whole tiles on each GPU --multiple {GPU_TILE * devices})"
        )


def divided(config: ModelConfig, devices: int) -> dict[str, bool]:
    """Which of heads, neurons and vocabulary this many devices share; the others are on every device.

    Heads are shared by their groups, each with its key and value: where the number of groups is no multiple of
    the devices, every device has all of attention and of the cache.
    """
    sizes = {HEADS: config.num_kv_heads, NEURONS: config.ff_width, VOCABULARY: config.vocab_size}
    return {name: size % devices == 0 for name, size in sizes.items()}


def parameter_spec(path: str, ndim: int, config: ModelConfig, devices: int) -> PartitionSpec:
    """How a parameter is divided.

    Args:
        path: of the parameter in the module, such as `layers.3.ff.down`.
        ndim: its number of axes.
        config: the model.
        devices: along `MODEL_AXIS`.
    """
    for end, (what, axis) in RULES.items():
        if f".{path}".endswith(f".{end}") and ndim >= -axis and divided(config, devices)[what]:
            return _spec(ndim, axis)
    return PartitionSpec()


def _spec(ndim: int, axis: int) -> PartitionSpec:
    return PartitionSpec(*(MODEL_AXIS if number == ndim + axis else None for number in range(ndim)))


def _devices(mesh: Mesh | AbstractMesh) -> int:
    if MODEL_AXIS not in mesh.shape:
        raise ValueError(f"the mesh has no axis {MODEL_AXIS!r}; its axes are {', '.join(map(repr, mesh.axis_names))}")
    return mesh.shape[MODEL_AXIS]


def model_shardings(model: Transformer, mesh: Mesh | AbstractMesh) -> Transformer:
    """The module tree with a `NamedSharding` in place of every array: for `jax.device_put` or `in_shardings`.

    Args:
        model: full or pruned; with arrays or `jax.ShapeDtypeStruct`s.
        mesh: with an axis `MODEL_AXIS`.

    Raises:
        ValueError: the mesh has no such axis or cannot share the model's neurons evenly, or these lie in
            two groups.
    """
    devices = _devices(mesh)
    if any(layer.ff.rest is not None for layer in model.layers):
        raise ValueError("this model holds its neurons in two groups; divide the full model instead")
    check_mesh(model.config, devices, model.neurons)

    def sharding(path: jax.tree_util.KeyPath, leaf: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(dotted(path), leaf.ndim, model.config, devices))

    return jax.tree.map_with_path(sharding, model)


def cache_shardings(cache: KVCache, config: ModelConfig, mesh: Mesh | AbstractMesh) -> KVCache:
    """The cache with a `NamedSharding` in place of every array: keys and values lie where their heads do.

    Args:
        cache: with arrays or `jax.ShapeDtypeStruct`s; keys (B, G, H, S), values (B, G, S, H).
        config: of the model.
        mesh: with an axis `MODEL_AXIS`.

    Raises:
        ValueError: the mesh has no such axis.
    """
    spec = cache_spec(config, _devices(mesh))

    def sharding(path: jax.tree_util.KeyPath, leaf: jax.Array) -> NamedSharding:
        is_head = dotted(path).startswith(("keys.", "values."))
        return NamedSharding(mesh, spec if is_head else PartitionSpec())

    return jax.tree.map_with_path(sharding, cache)


def cache_spec(config: ModelConfig, devices: int) -> PartitionSpec:
    """How the keys and the values of a layer are divided, (B, G, H, S) and (B, G, S, H)."""
    return _spec(4, -3) if divided(config, devices)[HEADS] else PartitionSpec()


@functools.lru_cache(maxsize=16)
def local_shapes(config: ModelConfig, devices: int) -> Mapping[str, tuple[int, ...]]:
    """The shape of what each device has of every parameter of the full model, by path in the module.

    Raises:
        ValueError: this many devices cannot share the neurons evenly.
    """
    model = abstract_model(config)
    shardings = jax.tree.leaves(model_shardings(model, AbstractMesh((devices,), (MODEL_AXIS,))))
    leaves = jax.tree.leaves_with_path(model)
    shapes = {dotted(path): s.shard_shape(leaf.shape) for (path, leaf), s in zip(leaves, shardings, strict=True)}
    return MappingProxyType(shapes)


def dotted(path: jax.tree_util.KeyPath) -> str:
    """A pytree's path as the module's: `.layers[3].ff.down.value` is `layers.3.ff.down`."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
