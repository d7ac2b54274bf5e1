"""prune: model, expert neurons -> a smaller model.

All feed-forward matrices are stored neuron-major, (F, D), so a neuron is one row of each matrix. To prune a layer is to
gather the rows of its expert neurons E, and the pruned layer computes

    z = act(Wg[E] x) * (Wu[E] x)        y = W_down[E]^T z

with K rows where the full one has F.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.neurons import ExpertNeurons, check_experts
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.feed_forward import NEURON_AXES, FeedForward, NeuronModule
from griffin_jax.model.low_rank import plus_matrix
from griffin_jax.model.ops import take_rows
from griffin_jax.model.parameters import array_of
from griffin_jax.model.routed import Experts
from griffin_jax.model.sharding import check_mesh, parameter_spec
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import WeightFormat, floating_rows, quantise
from griffin_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS, axis_size, dividing, mesh_of
from griffin_jax.utils import programs
from griffin_jax.utils.deprecation import renamed_arguments


@runtime_checkable
class Refit(Protocol):
    """Beyond GRIFFIN: a refit, which changes the kept rows of the down projections.

    It must be a pytree, so that the gather can be jitted with it. An implementation is
    `griffin_jax.extensions.reconstruction.Reconstruction`.
    """

    def check(self, neurons: Sequence[int], indices: Sequence[Int[Array, "*b _k"]]) -> None:
        """Raise `ValueError` unless this refit fits a model's layers and the kept neurons.

        Args:
            neurons: F of each layer of the full model.
            indices: the kept neurons of each layer, (K,) or (B, K).
        """
        ...

    def changes(
        self, down: Sequence[Float[Array, "_f d"]], indices: Sequence[Int[Array, "*b _k"]]
    ) -> Sequence[Float[Array, "*b _k d"]]:
        """What to add to the kept rows of each layer's down projection, (K, D) or (B, K, D), float32.

        Args:
            down: W_down of each layer of the full model, (F, D).
            indices: the kept neurons of each layer, (K,) or (B, K).
        """
        ...


def check_kept(model: Transformer, kept: GriffinConfig | ExpertNeurons | Sequence[Sequence[int]]) -> None:
    """Raise `ValueError` unless the devices that share a model can evenly divide the kept neurons.

    Args:
        model: the full model.
        kept: the neurons to keep, the config by which they will be selected, or how many each range of each layer
            keeps.
    """
    if isinstance(kept, GriffinConfig):
        kept = kept.kept_of_ranges(model.config.neuron_ranges)
    counts = (kept.shares or kept.kept) if isinstance(kept, ExpertNeurons) else kept
    check_mesh(model.config, axis_size(mesh_of(model.embedding[...]), MODEL_AXIS), counts)


def check_whole(model: Transformer) -> None:
    """Raise `ValueError` if a model is pruned for every sequence, held in two groups of rows, or masked."""
    if any(layer.ff.per_sequence for layer in model.layers):
        raise ValueError("this model is pruned for every sequence of a batch; prune the full model instead")
    if any(layer.ff.rest is not None for layer in model.layers):
        raise ValueError("this model holds its neurons in two groups; it is pruned by the InPlace object that made it")
    if any(layer.ff.mask is not None for layer in model.layers):
        raise ValueError("this model is masked; prune or mask the full model instead")


def check_own(model: Transformer, experts: ExpertNeurons) -> None:
    """Raise `ValueError` if a model with routed experts would be pruned differently for several sequences."""
    if model.config.routing is not None and not experts.shared and experts[0].shape[0] > 1:
        raise ValueError(
            f"{experts[0].shape[0]} sequences would each need a copy of all routed experts: mask the model instead"
            " (griffin_jax.griffin.masked.mask), or select with shared=True"
        )


@renamed_arguments(reconstruction="refit")
def prune(
    model: Transformer,
    experts: ExpertNeurons,
    *,
    reuse: Transformer | None = None,
    refit: Refit | None = None,
) -> Transformer:
    """Prune a model: keep only the rows of the expert neurons in its feed-forward layers.

    Attention, norms, embedding, head and the biases of the down projections are shared with the given model; the biases
    of the gate and up projections are gathered with their neurons. Indices of shape (B, K) give matrices with a set of
    rows for each sequence, unless B is 1. The gather is jitted and the rest is bookkeeping, so there is no need to jit
    `prune` (under jit, arrays that are only passed through would be copied).

    On a mesh, the kept rows are divided as `griffin_jax.model.sharding` says. Rows then move between devices, unless
    the number of groups of the expert neurons is the number of devices that share the model, or a multiple of it.

    Args:
        model: the full model; it stays as it is.
        experts: the neurons to keep, from `select`.
        reuse: an earlier result of `prune` that is no longer needed. If its kept rows have the shapes of the new ones,
            the new ones are written into their memory, and the earlier result cannot be used again. This is faster on
            CPUs, where the first write to memory from the operating system takes longer than the copying.
        refit: beyond GRIFFIN: changes the kept rows of the down projections. For example, a `Reconstruction` fits them
            to the output that all neurons had for the prompt. Without a refit, the rows are the model's own.

    Returns:
        A model of the same structure, with K rows where the given one has F.

    Raises:
        ValueError: the expert neurons were selected for a model with other layers or widths; the model is masked, held
            in two groups of rows, or has a set of neurons for every sequence already; several sequences would have
            different neurons in a model with routed experts; `reuse` shares feed-forward arrays with the model; `refit`
            does not fit the model or the expert neurons; or the devices of a mesh cannot divide the kept rows evenly.
    """
    check_whole(model)
    check_experts(experts, model)
    if refit is not None:
        refit.check(model.neurons, experts.indices)
    check_own(model, experts)
    check_kept(model, experts)
    rows = _neuron_rows(model)
    outputs = [(part.down_scale, part.down_right) for part in neuron_modules(model)] if refit is not None else []
    gathered = _gather_into(rows, outputs, experts, refit, reuse, model)
    # The gather runs asynchronously while the modules are copied; with many layers, both take equally long.
    pruned: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for part, kept in zip(neuron_modules(pruned), gathered, strict=True):
        for name, weight in kept.items():
            setattr(part, name, weight)
    return pruned


def neuron_modules(model: Transformer) -> list[NeuronModule]:
    """The modules that have neurons, layer by layer: feed-forward layers, routed experts and shared experts."""
    return [part for layer in model.layers for part in layer.ff.parts()]


def _neuron_rows(model: Transformer) -> list[dict[str, nnx.Param]]:
    return [part.rows() for part in neuron_modules(model)]


_Outputs = tuple[nnx.Param | None, nnx.Param | None]
"""The parts of a down projection that belong to all its rows: the scales of its outputs (`down_scale`), and the right
factor of an addition of low rank (`down_right`)."""


def _gather_into(
    rows: list[dict[str, nnx.Param]],
    outputs: list[_Outputs],
    experts: ExpertNeurons,
    refit: Refit | None,
    reuse: Transformer | None,
    model: Transformer,
) -> list[dict[str, nnx.Param]]:
    """The kept rows, in the memory of `reuse` if possible; with new scales of the outputs if they are refitted."""
    given = rows, outputs, experts, refit, model.config, tuple(part.weights for part in neuron_modules(model))
    if reuse is None or any(isinstance(index, Tracer) for index in experts):
        return _gather(*given)
    old = _neuron_rows(reuse)
    if {id(array) for array in jax.tree.leaves(old)} & {id(array) for array in jax.tree.leaves(rows)}:
        raise ValueError("reuse is the model itself, or shares its weights; give an earlier result of prune")
    if [(a.shape, a.dtype) for a in jax.tree.leaves(old)] != _kept_shapes(rows, experts, model.config):
        return _gather(*given)
    return _overwrite(*given, old)


@dataclasses.dataclass(frozen=True)
class NeuronPart:
    """Where the neurons of a module lie among those of its layer.

    Attributes:
        layer: number of the layer.
        experts: number of routed experts whose neurons the module has; 0 for a feed-forward layer.
        start: index of the module's first neuron among all neurons of the layer.
        size: number of the module's neurons; for routed experts, of each expert.
        first: place of the module's first kept neuron among all kept neurons of the layer.
        kept: number of the module's kept neurons; for routed experts, of each expert.
    """

    layer: int
    experts: int
    start: int
    size: int
    first: int
    kept: int

    @property
    def path(self) -> str:
        return "experts" if self.experts else "ff"

    @property
    def kind(self) -> type[NeuronModule]:
        return Experts if self.experts else FeedForward

    def indices(self, of_layer: Int[Array, "*b k"]) -> Int[Array, "... own"]:
        """The module's kept neurons, counted from its own first one: (K,), (B, K), or (E, K) for routed experts.

        Args:
            of_layer: the kept neurons of the layer, (K,) or (B, K).
        """
        count = max(self.experts, 1)
        own = of_layer[..., self.first : self.first + count * self.kept] - self.start
        if not self.experts:
            return own
        return own.reshape(-1, count, self.kept)[0] - self.size * jnp.arange(count, dtype=own.dtype)[:, None]


def parts_of_neurons(config: ModelConfig, experts: ExpertNeurons) -> list[NeuronPart]:
    """Where the neurons of each module lie, in the order of `neuron_modules`."""
    found = []
    for layer, (neurons, kept) in enumerate(zip(experts.neurons, experts.kept, strict=True)):
        if not config.routed(layer):
            found.append(NeuronPart(layer, 0, 0, neurons, 0, kept))
            continue
        sizes, shares = experts.ranges[layer], experts.shares[layer]
        assert config.routing is not None
        count = config.routing.experts
        found.append(NeuronPart(layer, count, 0, sizes[0], 0, shares[0]))
        if len(sizes) > count:
            found.append(NeuronPart(layer, 0, count * sizes[0], sizes[count], count * shares[0], shares[count]))
    return found


def _kept_shapes(
    rows: list[dict[str, nnx.Param]], experts: ExpertNeurons, config: ModelConfig
) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype that each array of kept rows will have, in the order of the pytree's leaves."""

    def kept(part: NeuronPart, name: str, array: Array) -> tuple[tuple[int, ...], np.dtype]:
        axis, sets = part.kind.neuron_axes[name], experts[part.layer].shape[:-1]
        own = (part.kept,) if part.experts or sets in ((), (1,)) else (*sets, part.kept)
        return (*array.shape[:axis], *own, *array.shape[axis + 1 :]), array.dtype

    parts = zip(rows, parts_of_neurons(config, experts), strict=True)
    # A pytree orders the entries of a dictionary by their names.
    named = [(part, name) for layer, part in parts for name in sorted(layer)]
    return [kept(part, name, array) for (part, name), array in zip(named, jax.tree.leaves(rows), strict=True)]


def _gathered(
    rows: list[dict[str, nnx.Param]],
    outputs: list[_Outputs],
    experts: ExpertNeurons,
    refit: Refit | None,
    config: ModelConfig,
    weights: tuple[WeightFormat, ...],
) -> list[dict[str, nnx.Param]]:
    def keep(part: NeuronPart, name: str, weight: nnx.Param) -> nnx.Param:
        index = part.indices(indices[part.layer])
        if part.experts:
            take = functools.partial(_take_of_experts, axis=part.kind.neuron_axes[name], groups=experts.groups)
            return jax.tree.map(lambda w: take(w, index, by_expert=config.expert_parallel), weight)
        # A low-rank addition for each sequence has one more axis; `take_neurons` handles both.
        return jax.tree.map(lambda w: take_neurons(name, w, index, experts.groups), weight)

    def place(part: NeuronPart, name: str, weight: nnx.Param) -> nnx.Param:
        return jax.tree.map(lambda w: _placed(f"{part.path}.{name}", w, config, mesh), weight)

    mesh = mesh_of(rows[0]["down"][...])
    indices = tuple(index[0] if index.ndim == 2 and index.shape[0] == 1 else index for index in experts)
    parts = parts_of_neurons(config, experts)
    kept = [
        {name: keep(part, name, weight) for name, weight in own.items()} for own, part in zip(rows, parts, strict=True)
    ]
    if refit is not None:
        _refit(refit, parts, rows, outputs, indices, kept, weights)
    return [
        {name: place(part, name, weight) for name, weight in own.items()} for own, part in zip(kept, parts, strict=True)
    ]


def _refit(
    refit: Refit,
    parts: list[NeuronPart],
    rows: list[dict[str, nnx.Param]],
    outputs: list[_Outputs],
    indices: tuple[Int[Array, "*b _k"], ...],
    kept: list[dict[str, nnx.Param]],
    weights: tuple[WeightFormat, ...],
) -> None:
    """Refit the kept rows of the down projections in place in `kept`; all experts of a layer are refitted together."""
    whole: list[list[Array]] = [[] for _ in indices]
    for part, own, (scale, right) in zip(parts, rows, outputs, strict=True):
        matrix = plus_matrix(_down(own, scale), own.get("down_left"), right)
        whole[part.layer].append(matrix.reshape(-1, matrix.shape[-1]))
    changes = refit.changes([m[0] if len(m) == 1 else jnp.concatenate(m) for m in whole], indices)
    for part, own, (scale, _), stored_as in zip(parts, kept, outputs, weights, strict=True):
        matrix = _down(own, scale).astype(jnp.float32)
        change = changes[part.layer][..., part.first : part.first + max(part.experts, 1) * part.kept, :]
        own |= _stored_down(part, matrix + change.reshape(matrix.shape), stored_as, own["down"].dtype)


def _down(rows: dict[str, nnx.Param], scale: nnx.Param | None) -> Float[Array, "... d"]:
    return floating_rows(rows["down"][...], array_of(scale), array_of(rows.get("down_row_scale")))


def _stored_down(
    part: NeuronPart, matrix: Float[Array, "*b k d"], weights: WeightFormat, dtype: DTypeLike
) -> dict[str, nnx.Param]:
    """Refitted rows of a down projection in the model's format; integers are rounded again, with new scales."""
    if not weights.quantised:
        return {"down": nnx.Param(matrix.astype(dtype))}
    own = functools.partial(quantise, format=weights, outputs=part.kind.down_outputs)
    numbers, scale = jax.vmap(own)(matrix) if matrix.ndim == 3 and not part.experts else own(matrix)
    name = "down_scale" if weights.group is None else "down_row_scale"
    return {"down": nnx.Param(numbers.astype(dtype)), name: nnx.Param(scale)}


def _placed(path: str, weight: Array, config: ModelConfig, mesh: Mesh | AbstractMesh | None) -> Array:
    if mesh is None:
        return weight
    spec = parameter_spec(path, weight.shape, config, mesh)
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, spec))


_SHARED_AXES = {"gate_up_left": 3, "down_left": 2}
"""Number of axes of the left factors of low-rank additions that all sequences share."""


def take_neurons(name: str, weight: Array, indices: Int[Array, "*b k"], groups: int = 1) -> Array:
    """Takes the rows of the given neurons from a parameter.

    Args:
        name: the parameter's name, one of `NEURON_AXES`.
        weight: the parameter, with rows for all neurons.
        indices: the neurons to take, (K,) for all sequences or (B, K).
        groups: number of groups of the neurons, see `ExpertNeurons`.
    """
    indices = indices[0] if indices.ndim == 2 and indices.shape[0] == 1 else indices
    axis = NEURON_AXES[name]
    if weight.ndim == _SHARED_AXES.get(name, weight.ndim):
        return _take_on_mesh(weight, indices, axis=axis, groups=groups)
    # Each sequence has a different addition.
    each = jnp.broadcast_to(indices, (weight.shape[axis], indices.shape[-1]))
    return jax.vmap(lambda own, index: jnp.take(own, index, axis=axis), in_axes=(axis, 0), out_axes=axis)(weight, each)


def _take_of_experts(weight: Array, indices: Int[Array, "e k"], *, axis: int, groups: int, by_expert: bool) -> Array:
    """Takes the rows of the given neurons, (E, K), from the parameter of E routed experts."""
    mesh = mesh_of(weight)
    if not by_expert or axis_size(mesh, MODEL_AXIS) == 1:
        return _take_on_mesh(weight, indices, axis=axis, groups=groups, of_experts=True)
    # Each device has whole experts, so no rows move.
    own = PartitionSpec(MODEL_AXIS)
    take = jax.vmap(functools.partial(take_rows, axis=axis - 1))
    return jax.shard_map(take, mesh=mesh, in_specs=(own, own), out_specs=own)(weight, indices)


def _take_on_mesh(
    weight: Array, indices: Int[Array, "*b k"], *, axis: int, groups: int, of_experts: bool = False
) -> Array:
    """Takes the rows of the given neurons; each device takes its own, and devices exchange rows only if they must."""
    mesh = mesh_of(weight)
    devices = axis_size(mesh, MODEL_AXIS)

    def take(weight: Array, indices: Array) -> Array:
        if not of_experts:
            return take_rows(weight, indices, axis)
        return jax.vmap(functools.partial(take_rows, axis=axis - 1))(weight, indices)

    if mesh is None or devices == 1:
        return take(weight, indices)
    stays = groups % devices == 0
    # The axis of the routed experts is not divided among devices.
    batch = [None] if of_experts else [dividing(mesh, DATA_AXIS, b) for b in indices.shape[:-1]]
    axis_after = axis if of_experts else axis + len(batch)

    def take_own(weight: Array, indices: Array) -> Array:
        neurons = weight.shape[axis]
        at = indices - jax.lax.axis_index(MODEL_AXIS) * neurons
        taken = take(weight, at)
        if stays:
            return taken
        # Devices cannot exchange 4-bit integers.
        taken = taken.astype(jnp.int8) if weight.dtype == jnp.int4 else taken
        before = [*range(1, axis)] if of_experts else [*range(axis)]
        own = jnp.expand_dims((at >= 0) & (at < neurons), [*before, *range(axis_after + 1, taken.ndim)])
        sent = jnp.where(own, taken, 0)
        summed = jax.lax.psum_scatter(sent, MODEL_AXIS, scatter_dimension=axis_after, tiled=True)
        return summed.astype(weight.dtype)

    before = [None] * axis
    return jax.shard_map(
        take_own,
        mesh=mesh,
        in_specs=(PartitionSpec(*before, MODEL_AXIS), PartitionSpec(*batch, MODEL_AXIS if stays else None)),
        out_specs=PartitionSpec(*before, *([] if of_experts else batch), MODEL_AXIS),
    )(weight, indices)


_gather = programs.jit(_gathered, static_argnames=("config", "weights"))


@programs.jit(static_argnames=("config", "weights"), donate_argnames="old", keep_unused=True)
def _overwrite(
    rows: list[dict[str, nnx.Param]],
    outputs: list[_Outputs],
    experts: ExpertNeurons,
    refit: Refit | None,
    config: ModelConfig,
    weights: tuple[WeightFormat, ...],
    old: list[dict[str, nnx.Param]],
) -> list[dict[str, nnx.Param]]:
    """`_gathered`, with the result written into the memory of `old`."""
    del old
    return _gathered(rows, outputs, experts, refit, config, weights)
