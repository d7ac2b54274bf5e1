"""How a model is divided among the devices of a mesh: tensor parallelism, as in Megatron-LM (arXiv 1909.08053).

Every device has its share of each layer's heads, of each feed-forward layer's neurons, and of the rows of the embedding
and the head; everything else is on every device. The outputs of attention and of the feed-forward layer are then sums
over the devices, and these two sums are all that a layer has to communicate. Sequences are divided along another axis
of the mesh, together with their cache and the neurons that each of them keeps for itself. XLA divides the computation
as its inputs are divided.

Everything here is a plain function of shapes, and takes a `Mesh` or an `AbstractMesh`:

    mesh = make_mesh(data=2, model=4)
    model = jax.device_put(model, model_shardings(model, mesh))
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from griffin_jax.model.cache import KVCache
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import WeightFormat
from griffin_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS, axis_size, dividing

HEADS, NEURONS, VOCABULARY, SEQUENCES, EXPERTS = "heads", "neurons", "vocabulary", "sequences", "experts"

NORMS = (
    "norm", "embedding_norm", "attention_norm", "attention_out_norm", "attention_sum_norm", "ff_norm", "ff_out_norm",
    "ff_sum_norm",
)  # fmt: skip
"""Norms of the residual stream and of what is added to it."""

FEED_FORWARD: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("gate_up", (None, NEURONS, None)),  # (A, F, D)
    ("gate_up_scale", (None, NEURONS, None)),  # (A, F, n), of rows or groups of integers
    ("gate_up_bias", (None, NEURONS)),  # (A, F)
    ("down", (NEURONS, None)),  # (F, D)
    ("down_row_scale", (NEURONS, None)),  # (F, n), of groups of integers
    ("down_scale", (None,)),  # (D,), multiplied onto a sum over devices
    ("down_bias", (None,)),  # (D,), added to a sum over devices
    # What checkpoints have for `gate_up`.
    ("gate", (NEURONS, None)),  # (F, D)
    ("up", (NEURONS, None)),  # (F, D)
    ("gate_bias", (NEURONS,)),  # (F,)
    ("up_bias", (NEURONS,)),  # (F,)
    ("gate_scale", (NEURONS, None)),  # (F, n)
    ("up_scale", (NEURONS, None)),  # (F, n)
)
"""How the arrays of a feed-forward layer are divided."""


def _of_experts(name: str, axes: tuple[str | None, ...]) -> tuple[str, tuple[str | None, ...]]:
    """The rule for the same array of each of several experts. Devices have neurons of all of them, or whole ones; what
    is added to a sum over devices they all have."""
    return f"experts.{name}", (None if name == "down_bias" else EXPERTS, *axes)


ADDED_TO = ("attention.qkv", "attention.out", "ff.gate_up", "ff.down")
"""The matrices that may have additions of low rank."""

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("embedding", (VOCABULARY, None)),  # (V, E)
    ("head", (VOCABULARY, None)),  # (V, E)
    ("head_bias", (VOCABULARY,)),  # (V,)
    ("embedding_scale", (VOCABULARY, None)),  # (V, n), of rows or groups of integers
    ("head_scale", (VOCABULARY, None)),  # (V, n), likewise
    ("attention.qkv_scale", (HEADS, None, None, None)),  # (G, R + 2, H, n), likewise
    ("attention.out_row_scale", (HEADS, None, None)),  # (N, H, n), likewise
    ("attention.qkv", (HEADS, None, None, None)),  # (G, R + 2, H, D)
    ("attention.qkv_bias", (HEADS, None, None)),  # (G, R + 2, H)
    ("attention.sinks", (HEADS,)),  # (N,)
    ("attention.query_norm.scale", (HEADS, None, None)),  # (N, 1, H)
    ("attention.key_norm.scale", (HEADS, None, None)),  # (G, 1, H)
    ("attention.out", (HEADS, None, None)),  # (N, H, D)
    *((f"{part}.{name}", axes) for part in ("ff", "shared") for name, axes in FEED_FORWARD),
    *(_of_experts(name, axes) for name, axes in FEED_FORWARD),
    # The same where each sequence keeps neurons of its own.
    ("ff.gate_up", (None, SEQUENCES, NEURONS, None)),  # (A, B, K, D)
    ("ff.gate_up_bias", (None, SEQUENCES, NEURONS)),  # (A, B, K)
    ("ff.down", (SEQUENCES, NEURONS, None)),  # (B, K, D)
    ("ff.gate_up_scale", (None, SEQUENCES, NEURONS, None)),  # (A, B, K, n)
    ("ff.down_row_scale", (SEQUENCES, NEURONS, None)),  # (B, K, n)
    ("ff.down_scale", (SEQUENCES, None)),  # (B, D), where rows are refitted
    # Additions of low rank: a row for each row of the matrix, and what they are combined of.
    ("attention.qkv_left", (HEADS, None, None, None)),  # (G, R + 2, H, S)
    ("attention.out_left", (HEADS, None, None)),  # (N, H, S)
    ("ff.gate_up_left", (None, NEURONS, None)),  # (A, F, S)
    ("ff.down_left", (NEURONS, None)),  # (F, S)
    *((f"{matrix}_right", (None, None)) for matrix in ADDED_TO),  # (S, D)
    ("attention.qkv_left", (HEADS, None, SEQUENCES, None, None)),  # (G, R + 2, B, H, S)
    ("attention.out_left", (HEADS, SEQUENCES, None, None)),  # (N, B, H, S)
    ("ff.gate_up_left", (None, SEQUENCES, NEURONS, None)),  # (A, B, F, S)
    ("ff.down_left", (SEQUENCES, NEURONS, None)),  # (B, F, S)
    *((f"{matrix}_right", (SEQUENCES, None, None)) for matrix in ADDED_TO),  # (B, S, D)
    # Of masked models: which neurons are kept, and what changes their rows, each for all sequences or for itself.
    ("mask.kept", (NEURONS,)),  # (F,)
    ("mask.kept", (SEQUENCES, NEURONS)),  # (B, F)
    ("left", (None, NEURONS)),  # (S, F)
    ("left", (SEQUENCES, None, NEURONS)),  # (B, S, F)
    ("right", (None, None)),  # (S, D)
    ("right", (SEQUENCES, None, None)),  # (B, S, D)
    # What every device has whole.
    ("project_in", (None, None)),  # (E, D)
    ("project_out", (None, None)),  # (D, E)
    ("position_embedding", (None, None)),  # (positions, D)
    ("attention.query_norm.scale", (None,)),  # (H,), the same for all heads
    ("attention.key_norm.scale", (None,)),  # (H,), likewise
    ("attention.out_bias", (None,)),  # (D,), added to a sum over devices
    ("attention.out_scale", (None,)),  # (D,), multiplied onto a sum over devices
    ("positive_curve", (None,)),  # (1,), of the activation
    ("negative_curve", (None,)),  # (1,), likewise
    ("router", (None, None)),  # (E, D), read by every device for all tokens
    ("router_bias", (None,)),  # (E,)
    ("choice_bias", (None,)),  # (E,)
    ("shared_gate", (None,)),  # (D,)
    *((f"{norm}.{part}", (None,)) for norm in NORMS for part in ("scale", "bias")),  # (D,)
    # What checkpoints have for `qkv` and `gate_up`.
    ("attention.query", (HEADS, None, None)),  # (N, H, D)
    ("attention.key", (HEADS, None, None)),  # (G, H, D)
    ("attention.value", (HEADS, None, None)),  # (G, H, D)
    ("attention.query_bias", (HEADS, None)),  # (N, H)
    ("attention.key_bias", (HEADS, None)),  # (G, H)
    ("attention.value_bias", (HEADS, None)),  # (G, H)
    ("attention.query_scale", (HEADS, None, None)),  # (N, H, n)
    ("attention.key_scale", (HEADS, None, None)),  # (G, H, n)
    ("attention.value_scale", (HEADS, None, None)),  # (G, H, n)
    # The cache.
    ("keys", (SEQUENCES, HEADS, None, None)),  # (B, G, H, S)
    ("values", (SEQUENCES, HEADS, None, None)),  # (B, G, S, H)
    ("positions", (SEQUENCES, None)),  # (B, S)
    ("context", (SEQUENCES,)),  # (B,)
    ("cursor", ()),
)  # fmt: skip
"""How every array is divided: the end of its path in the module, in a checkpoint or in the cache, and for each axis
what is divided along it, or None. An array without a rule is an error, so that none is whole by oversight."""

GPU_TILE = 64
"""Rows of a tile of XLA's matrix products on GPUs: feed-forward matrices of whole tiles are read without padding."""

INTEGER_TILE = 128
"""The same of integers with a scale for each output. Of an odd multiple of 64 rows XLA (jax 0.10.2, not autotuned) pads
the down projection, for which all of it is converted in memory. Seen in programs compiled for H100."""


def tile_of(format: WeightFormat) -> int:
    """Rows of a tile of XLA's products on GPUs with matrices of this format."""
    return INTEGER_TILE if format.quantised and format.group is None else GPU_TILE


def tile_missed(counts: Iterable[tuple[WeightFormat, Iterable[int]]], devices: int = 1) -> int:
    """The rows of a tile if a GPU's kept neurons are no multiple of them; 0 if they are.

    Args:
        counts: for each format of the kept neurons, how many there are in each layer.
        devices: number of devices that share them.
    """
    missed = (tile_of(format) for format, kept in counts if any(k % (tile_of(format) * devices) for k in kept))
    return max(missed, default=0)


def check_mesh(config: ModelConfig, devices: int, kept: Sequence[int | Sequence[int]] = ()) -> None:
    """Raise `ValueError` if this many devices cannot share the neurons evenly, all of them or those that are kept.

    Args:
        config: the architecture of the model.
        devices: number of devices along `MODEL_AXIS`.
        kept: neurons of each layer after pruning; of layers with experts those of each range, each of which is shared
            (`GriffinConfig.kept_of_ranges`); empty if the model is not pruned.
    """
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"devices must be a whole number of at least 1, got {devices!r}")
    if config.expert_parallel and config.routing is not None and config.routing.experts % devices:
        count = config.routing.experts
        possible = ", ".join(str(divisor) for divisor in range(1, count + 1) if count % divisor == 0)
        raise ValueError(f"{devices} devices cannot share {count} experts evenly; these can: {possible}")
    together = _smallest_share(config)
    if together % devices:
        possible = ", ".join(str(count) for count in range(1, 2 * devices + 1) if together % count == 0)
        of = f"the {config.ff_width} neurons of a feed-forward layer"
        if config.routing is not None:
            of = f"the {' or '.join(map(str, sorted({*sum(config.neuron_ranges, ())})))} neurons of each expert"
        raise ValueError(f"{devices} devices cannot share {of} evenly; these can: {possible}")
    shares = [_divided(config, layer, own) if isinstance(own, Sequence) else (own,) for layer, own in enumerate(kept)]
    if uneven := sorted({k for own in shares for k in own if k % devices}):
        raise ValueError(
            f"{devices} devices cannot share {uneven[0]} kept neurons evenly: round them up to a multiple of {devices}"
            f" (--round-to {devices}; for whole tiles on each GPU --round-to {GPU_TILE * devices})"
        )


def _smallest_share(config: ModelConfig) -> int:
    """Neurons that are divided together: the greatest common divisor of the layers' and of the experts' numbers.

    Where devices have whole experts, that of the shared experts' and dense layers'; 0 if there are none.
    """
    layers = enumerate(config.neuron_ranges)
    return math.gcd(*(size for layer, ranges in layers for size in _divided(config, layer, ranges)))


def _divided(config: ModelConfig, layer: int, ranges: Sequence[int]) -> Sequence[int]:
    """Of a layer's ranges of neurons, or numbers that belong to them, those that devices have a part of each."""
    whole = config.routing.experts if config.expert_parallel and config.routing and config.routed(layer) else 0
    return ranges[whole:]


def neuron_groups(config: ModelConfig, devices: int) -> int:
    """In how many groups neurons are selected (`GriffinConfig.groups`) so that pruning moves no row between devices."""
    return devices if _smallest_share(config) else 1


def with_whole_experts(config: ModelConfig, mesh: Mesh | AbstractMesh | None) -> ModelConfig:
    """The config of the same model whose devices have whole experts each, instead of a part of each one's neurons.

    Raises:
        ValueError: the model has no routed experts, or is on one device.
    """
    if mesh is None:
        raise ValueError("expert_parallel says how a mesh divides the experts: give a mesh (--mesh)")
    return dataclasses.replace(config, expert_parallel=True)


def divided(config: ModelConfig, devices: int) -> dict[str, bool]:
    """Which of heads, neurons and vocabulary this many devices share; the others are on every device.

    Heads are shared in groups, each with its key and value: where the number of groups is not a multiple of the
    devices, and copies do not make it one, every device has all of attention and of the cache.
    """
    sizes = {HEADS: config.kv_heads, NEURONS: _smallest_share(config), VOCABULARY: config.vocab_size}
    return {name: size % devices == 0 for name, size in sizes.items()}


def with_kv_copies(config: ModelConfig, devices: int) -> ModelConfig:
    """The config of the same model with its key/value heads repeated, so that this many devices share attention.

    Each copy has an equal share of the query heads of its group. The cache grows on all devices together, but each of
    them has less of it than if it had all heads. The config has no copies where the heads can be shared as they are, or
    where copies could not have equally many query heads.

    Args:
        config: the architecture.
        devices: number of devices along `MODEL_AXIS`.
    """
    copies = devices // math.gcd(config.num_kv_heads, devices)
    possible = config.num_heads % (config.num_kv_heads * copies) == 0
    return dataclasses.replace(config, kv_copies=copies if possible else 1)


def parameter_spec(
    path: str, shape: Sequence[int], config: ModelConfig, mesh: Mesh | AbstractMesh | None
) -> PartitionSpec:
    """How an array is divided.

    Args:
        path: path of a parameter in the module or in a checkpoint, such as `layers.3.ff.down` or `layers.3.ff.gate`; or
            name of an array of the cache: `keys`, `values`, `positions`, `context` or `cursor`.
        shape: shape of the whole array.
        config: the architecture of the model.
        mesh: the mesh; an axis that it lacks divides nothing.

    Raises:
        ValueError: no rule is for such an array.
    """
    whats = axes_of(path, shape)
    whole_experts = config.expert_parallel and EXPERTS in whats
    shared = divided(config, axis_size(mesh, MODEL_AXIS)) | {EXPERTS: whole_experts}
    if whole_experts:
        shared[NEURONS] = False

    def axis(what: str | None, size: int) -> str | None:
        if what == SEQUENCES:
            return dividing(mesh, DATA_AXIS, size)
        return dividing(mesh, MODEL_AXIS, size) if what is not None and shared[what] else None

    axes = [axis(what, size) for what, size in zip(whats, shape, strict=True)]
    return PartitionSpec(*axes) if any(axes) else PartitionSpec()


def axes_of(path: str, shape: Sequence[int]) -> tuple[str | None, ...]:
    """What is divided along each axis of an array, by the rule in `RULES` for its path and number of axes.

    Args:
        path: as for `parameter_spec`.
        shape: shape of the array.

    Raises:
        ValueError: there is no rule for it.
    """
    for end, axes in RULES:
        if f".{path}".endswith(f".{end}") and len(shape) == len(axes):
            return axes
    raise ValueError(
        f"no rule says how {path!r} of shape {tuple(shape)} is divided among devices: add one to"
        " griffin_jax.model.sharding.RULES, with None for each axis that stays whole"
    )


def _check_axis(mesh: Mesh | AbstractMesh) -> None:
    if MODEL_AXIS not in mesh.shape:
        raise ValueError(f"the mesh has no axis {MODEL_AXIS!r}; its axes are {', '.join(map(repr, mesh.axis_names))}")


def model_shardings(model: Transformer, mesh: Mesh | AbstractMesh) -> Transformer:
    """The module tree with a `NamedSharding` in place of every array: for `jax.device_put` or `in_shardings`.

    Args:
        model: a full or pruned model, with arrays or `jax.ShapeDtypeStruct`s.
        mesh: a mesh with an axis `MODEL_AXIS`.

    Raises:
        ValueError: the mesh has no such axis or cannot share the model's neurons evenly, or the model holds them in
            two groups.
    """
    _check_axis(mesh)
    if any(layer.ff.rest is not None for layer in model.layers):
        raise ValueError("this model holds its neurons in two groups; divide the full model instead")
    check_mesh(model.config, axis_size(mesh, MODEL_AXIS), model.neurons)

    def sharding(path: jax.tree_util.KeyPath, leaf: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, parameter_spec(dotted(path), leaf.shape, model.config, mesh))

    return jax.tree.map_with_path(sharding, model)


def cache_shardings(cache: KVCache, config: ModelConfig, mesh: Mesh | AbstractMesh) -> KVCache:
    """The cache with a `NamedSharding` in place of every array: keys and values are on the devices of their heads.

    Args:
        cache: a cache with arrays or `jax.ShapeDtypeStruct`s.
        config: the architecture of the model.
        mesh: a mesh with an axis `MODEL_AXIS`.

    Raises:
        ValueError: the mesh has no such axis.
    """
    _check_axis(mesh)

    def sharding(path: jax.tree_util.KeyPath, leaf: jax.Array) -> NamedSharding:
        # The path is `keys.3` or `cursor`; the layer does not matter.
        name = dotted(path).split(".")[0]
        return NamedSharding(mesh, parameter_spec(name, leaf.shape, config, mesh))

    return jax.tree.map_with_path(sharding, cache)


def dotted(path: jax.tree_util.KeyPath) -> str:
    """A path in a pytree as a path in the module: `.layers[3].ff.down.value` is `layers.3.ff.down`."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
