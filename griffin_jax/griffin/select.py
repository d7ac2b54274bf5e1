"""GRIFFIN (Dong, Chen, Chi, arXiv 2404.01365) as pure functions: statistic, select, prune.

    token_statistic   how strongly each neuron takes part in a prompt, inside the feed-forward layer
    select            statistics -> experts: the indices of the kept neurons
    prune             model, experts -> a smaller model

All of them can be called under `jax.jit`. The letters of shapes are those of `griffin_jax.model.transformer`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key
from numpy.typing import ArrayLike

from griffin_jax.extensions.prior import DEFAULT_WEIGHT, Prior, check_fusion, fuse
from griffin_jax.model.config import GriffinConfig, Method, ModelConfig, check_shards
from griffin_jax.model.sharding import check_mesh, parameter_spec
from griffin_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS, axis_size, dividing, mesh_of, to_host
from griffin_jax.utils.arrayfile import load_arrays, save_arrays

if TYPE_CHECKING:
    from griffin_jax.extensions.reconstruction import Reconstruction
    from griffin_jax.model.transformer import Transformer

EXPERTS_FORMAT = "griffin_jax experts 1"
NEURON_AXES = {"inner": 1, "down": 0, "inner_bias": 1}
"""The parameters of a feed-forward layer that have a row for each neuron, and the axis that counts neurons."""


def relative_activations(z: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """zbar = z / ||z||, each token by itself (arXiv 2404.01365, section 3).

    Args:
        z: the input of the down projection, any float dtype; finite.

    Returns:
        Float32; zero where z is zero (||z||^2 must be a normal float32: tokens with ||z|| below about 1e-19 count as
        zero).
    """
    z = z.astype(jnp.float32)
    square_norm = jnp.sum(jnp.square(z), axis=-1, keepdims=True)
    alive = square_norm > 0
    return z * jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, square_norm, 1.0)), 0.0)


def token_statistic(z: Float[Array, "b t f"], real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
    """s_j^2 = sum_t z_tj^2 / ||z_t||^2 over the real tokens (arXiv 2404.01365, section 4.2).

    The square is what is returned and kept: it is additive over tokens, so that chunks of a prompt
    are plain sums. A token with z = 0 contributes nothing.

    Args:
        z: the input of the down projection, any float dtype; finite also where it is padding.
        real: false for padding.

    Returns:
        s^2 in float32. Its sum over neurons is the number of real tokens with z != 0.
    """
    share = jnp.square(relative_activations(z))
    # As a product, because XLA's CPU code sums over tokens many times slower than it multiplies matrices.
    return jnp.einsum("bt,btf->bf", real.astype(jnp.float32), share, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What a prompt's prefill recorded. Additive: chunks of one prompt may be summed.

    Attributes:
        squares: s^2 of every layer, float32.
        tokens: real tokens of each sequence.
    """

    squares: tuple[Float[Array, "b _f"], ...]
    tokens: Int[Array, "b"]

    def __add__(self, other: Statistics) -> Statistics:
        return jax.tree.map(jnp.add, self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """The neurons that a pruned model keeps: a sequence with one array of indices per layer.

    Attributes:
        indices: per layer, ascending, int32: (K,) for the whole batch or (B, K), one row for every
            sequence. K may differ between layers.
        neurons: F of every layer of the model they were selected for.
        shards: into so many equal ranges the neurons fall, each with as many of the kept ones, see `GriffinConfig`.
    """

    indices: tuple[Int[Array, "*b _k"], ...]
    neurons: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    shards: int = dataclasses.field(default=1, metadata={"static": True})

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, layer: int) -> Int[Array, "*b _k"]:
        return self.indices[layer]

    def __iter__(self) -> Iterator[Int[Array, "*b _k"]]:
        return iter(self.indices)

    @property
    def kept(self) -> tuple[int, ...]:
        """K of every layer."""
        return tuple(indices.shape[-1] for indices in self.indices)

    @property
    def shared(self) -> bool:
        """Whether one set serves the whole batch."""
        return self.indices[0].ndim == 1

    def masks(self) -> tuple[Bool[Array, "*b _f"], ...]:
        """The same experts as masks over all neurons."""

        def mask(indices: Array, neurons: int) -> Array:
            nothing = jnp.zeros((*indices.shape[:-1], neurons), bool)
            return jnp.put_along_axis(nothing, indices, True, axis=-1, inplace=False)

        return tuple(map(mask, self.indices, self.neurons))

    @classmethod
    def from_masks(cls, masks: Sequence[ArrayLike]) -> Experts:
        """Experts from a user's own masks, one per layer: (F,), or (B, F) for every sequence its own.

        Raises:
            ValueError: a mask is not boolean, keeps nothing, or keeps more neurons in one sequence
                than in another; or layers mix shared and per-sequence masks.
        """
        indices = []
        for layer, mask in enumerate(np.asarray(m) for m in masks):
            if mask.dtype != np.bool_ or mask.ndim not in (1, 2):
                raise ValueError(
                    f"mask of layer {layer} must be boolean of shape (F,) or (B, F), got {mask.dtype} {mask.shape}"
                )
            kept = np.unique(mask.sum(axis=-1))
            if kept.size != 1:
                raise ValueError(
                    f"mask of layer {layer} keeps {kept.tolist()} neurons; every sequence must keep as many"
                )
            indices.append(np.nonzero(mask)[-1].reshape(*mask.shape[:-1], -1))
        return cls.from_indices(indices, [np.shape(mask)[-1] for mask in masks])

    @classmethod
    def from_indices(cls, indices: Sequence[ArrayLike], neurons: Sequence[int], shards: int = 1) -> Experts:
        """Experts from indices that come from outside, in any order.

        Raises:
            ValueError: there is no layer, the number of layers differs, an index is repeated or outside
                [0, F), a layer keeps nothing, layers differ in their batch, or the shards do not keep equally many.
        """
        if not indices or len(indices) != len(neurons):
            raise ValueError(
                f"experts of {len(indices)} layers for a model of {len(neurons)}; give one array per layer"
            )
        checked = []
        for layer, (array, width) in enumerate(zip(map(np.asarray, indices), neurons, strict=True)):
            if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2) or array.size == 0:
                raise ValueError(
                    f"experts of layer {layer} must be whole numbers of shape (K,) or (B, K) with K >= 1,"
                    f" got {array.dtype} {array.shape}"
                )
            if array.shape[:-1] != np.shape(indices[0])[:-1]:
                raise ValueError(f"experts of layer {layer} have shape {array.shape}, layer 0 {np.shape(indices[0])}")
            if array.min() < 0 or array.max() >= width:
                raise ValueError(
                    f"experts of layer {layer} lie in [{array.min()}, {array.max()}]; its neurons are [0, {width - 1}]"
                )
            array = np.sort(array, axis=-1)
            if (np.diff(array, axis=-1) == 0).any():
                raise ValueError(f"experts of layer {layer} name a neuron twice")
            check_shards(shards, width, array.shape[-1])
            owners = array.reshape(*array.shape[:-1], shards, -1) // (width // shards)
            if (owners != np.arange(shards)[:, None]).any():
                raise ValueError(f"of experts of layer {layer}, some of {shards} shards keep more than others")
            checked.append(jnp.asarray(array, jnp.int32))
        return cls(tuple(checked), tuple(neurons), shards)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all; an existing one is replaced. Of several processes all must
        call this, and the first writes.

        Raises:
            OSError: it cannot be written.
        """
        arrays = {f"layers.{layer}": indices for layer, indices in enumerate(to_host(self.indices))}
        metadata = {"neurons": " ".join(map(str, self.neurons)), "shards": str(self.shards)}
        if jax.process_index() == 0:
            save_arrays(path, EXPERTS_FORMAT, arrays, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Experts:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or of another kind or version.
        """
        arrays, metadata = load_arrays(path, EXPERTS_FORMAT)
        try:
            neurons = [int(width) for width in metadata["neurons"].split()]
            indices = [arrays[f"layers.{layer}"] for layer in range(len(neurons))]
            shards = int(metadata.get("shards", 1))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        try:
            return cls.from_indices(indices, neurons, shards)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def magnitude(model: Transformer) -> tuple[Float[Array, "_f"], ...]:
    """The static score of every neuron: ||Wg_j|| * ||Wu_j|| if gated, else ||W1_j||. Float32."""

    def score(inner: Array) -> Array:
        return jnp.prod(jnp.linalg.norm(inner.astype(jnp.float32), axis=-1), axis=0)

    return tuple(score(layer.ff.inner[...]) for layer in model.layers)


def select(
    statistics: Statistics,
    config: GriffinConfig,
    *,
    model: Transformer | None = None,
    seed: int | Int[Array, ""] = 0,
    prior: Prior | None = None,
    prior_weight: float | Float[Array, ""] = DEFAULT_WEIGHT,
) -> Experts:
    """Chooses the neurons to keep, each layer for itself.

    Args:
        statistics: of the prompts, from `prefill`.
        config: density, method, shards, and whether the batch shares its experts. With `shared` a neuron's
            score is sum_i s_i / sqrt(S_i), S_i the tokens of sequence i, which gives every sequence
            equal weight.
        model: the full model; only `method="magnitude"` needs it.
        seed: for the methods that draw.
        prior: beyond GRIFFIN, for `method="topk"`: fuse the prompt's statistic with that of general text; see
            `griffin_jax.extensions.prior`.
        prior_weight: of the prior, in [0, 1]; 0 selects as without it.

    Returns:
        Experts of shape (K,) if shared, else (B, K), K static.

    Raises:
        ValueError: the statistics were not collected, a density does not fit the layers, `magnitude` is asked for
            without a model, or a prior with another method than `topk`, of another model's layers or with a weight
            outside its range.
    """
    if not statistics.squares:
        raise ValueError("there are no statistics to select by: prefill with collect=True")
    batch = statistics.tokens.shape[0]
    neurons = tuple(squares.shape[-1] for squares in statistics.squares)
    if config.method == "magnitude":
        if model is None:
            raise ValueError('method "magnitude" scores the weights: pass the model to select')
        scores = tuple(s if config.shared else jnp.broadcast_to(s, (batch, s.shape[-1])) for s in magnitude(model))
    else:
        scores = tuple(jnp.sqrt(squares) for squares in statistics.squares)
        if config.shared:
            weight = jax.lax.rsqrt(jnp.maximum(statistics.tokens, 1).astype(jnp.float32))
            scores = tuple(jnp.einsum("b,bf->f", weight, s, precision=jax.lax.Precision.HIGHEST) for s in scores)
    if prior is not None:
        check_fusion(config.method, prior_weight)
        scores = fuse(scores, prior, prior_weight)

    key = jax.random.key(seed)
    indices = []
    for layer, (score, k) in enumerate(zip(scores, config.kept(neurons), strict=True)):
        ranges = score.reshape(*score.shape[:-1], config.shards, -1)
        rank = _rank(ranges, k // config.shards, config.method, jax.random.fold_in(key, layer))
        kept = jnp.sort(_top_k(rank, k // config.shards)[1], axis=-1).astype(jnp.int32)
        starts = ranges.shape[-1] * jnp.arange(config.shards, dtype=jnp.int32)[:, None]
        indices.append((kept + starts).reshape(*score.shape[:-1], k))
    return Experts(tuple(indices), neurons, config.shards)


def _top_k(values: Float[Array, "*b s f"], k: int) -> tuple[Float[Array, "*b s {k}"], Int[Array, "*b s {k}"]]:
    """`jax.lax.top_k` of each range. On a mesh devices choose among what they have, which XLA would put together."""
    mesh = mesh_of(values)

    def largest(values: Array) -> tuple[Array, Array]:
        found, at = jax.lax.top_k(values, k)
        return found, at

    if mesh is None:
        return largest(values)
    *batch, shards, _ = values.shape
    spec = PartitionSpec(*(dividing(mesh, DATA_AXIS, b) for b in batch), dividing(mesh, MODEL_AXIS, shards))
    return jax.shard_map(largest, mesh=mesh, in_specs=spec, out_specs=spec)(values)


def _rank(score: Float[Array, "*b f"], k: int, method: Method, key: Key[Array, ""]) -> Float[Array, "*b f"]:
    """Values whose k largest are the choice.

    Drawing without replacement in proportion to weights is taking the largest of log weight plus
    Gumbel noise (Gumbel-top-k, arXiv 1903.06059).
    """
    if method in ("topk", "magnitude"):
        return score
    noise = jax.random.gumbel(key, score.shape)
    if method == "random":
        return noise
    draw = jnp.log(score) + noise
    if method == "sample":
        return draw
    half = k // 2
    if half == 0:
        return draw
    smallest_sure = _top_k(score, half)[0][..., -1:]
    # Ties at the threshold could make more than half of the neurons sure; the cumulative count stops that.
    above, tied = score > smallest_sure, score == smallest_sure
    room = half - jnp.sum(above, axis=-1, keepdims=True)
    sure = above | (tied & (jnp.cumsum(tied, axis=-1) <= room))
    return jnp.where(sure, jnp.inf, draw)


def check_kept(model: Transformer, kept: Sequence[int]) -> None:
    """Raise `ValueError` unless the devices that share a model can share so many neurons of each layer evenly."""
    check_mesh(model.config, axis_size(mesh_of(model.embedding[...]), MODEL_AXIS), kept)


def prune(
    model: Transformer,
    experts: Experts,
    *,
    reuse: Transformer | None = None,
    reconstruction: Reconstruction | None = None,
) -> Transformer:
    """The same model with only the experts' rows in its feed-forward layers.

    Attention, norms, embedding, head and the bias of the down projection are the given model's own
    arrays; the first projections' biases follow their neurons. Experts of shape (B, K) give matrices
    with a set for every sequence, unless B is 1. The gather is jitted; the rest is
    bookkeeping, so there is no need to jit `prune` (jit copies what it passes through).

    On a mesh the kept rows are divided as `griffin_jax.model.sharding` says. Rows go from device to device for that,
    unless the experts have as many shards as the model, or a multiple.

    Args:
        model: the full model; it stays as it is.
        experts: that `select` chose.
        reuse: an earlier result of `prune` that is needed no more. If its kept rows are as large as the new ones,
            these get their memory, and it cannot be used again. Memory that a CPU process gets from the operating
            system is slow to write to for the first time: it takes longer than the copying.
        reconstruction: beyond GRIFFIN: refit the kept rows of the down projections to what the prompt had from all of
            them; see `griffin_jax.extensions.reconstruction`. Without it they are the model's own.

    Raises:
        ValueError: the experts were selected for a model of other layers or widths, the model holds a set of neurons
            for every sequence already, `reuse` shares feed-forward arrays with the model, a reconstruction does not
            belong to the model or the experts, or the devices of a mesh cannot share the kept rows evenly.
    """
    if any(layer.ff.per_sequence for layer in model.layers):
        raise ValueError("this model is pruned for every sequence of a batch; prune the full model instead")
    if any(layer.ff.rest is not None for layer in model.layers):
        raise ValueError("this model holds its neurons in two groups; it is pruned by the OneCopy that made it")
    check_experts(experts, model)
    if reconstruction is not None:
        reconstruction.check(model.neurons, experts.indices)
    check_kept(model, experts.kept)
    rows = _neuron_rows(model)
    pruned: Transformer = jax.tree.map(lambda leaf: leaf, model)
    gathered = _gather_into(rows, experts, reconstruction, reuse, model.config)
    for layer, kept in zip(pruned.layers, gathered, strict=True):
        for name, weight in kept.items():
            setattr(layer.ff, name, weight)
    return pruned


def _neuron_rows(model: Transformer) -> list[dict[str, nnx.Param]]:
    return [
        {name: getattr(layer.ff, name) for name in NEURON_AXES if getattr(layer.ff, name) is not None}
        for layer in model.layers
    ]


def _gather_into(
    rows: list[dict[str, nnx.Param]],
    experts: Experts,
    reconstruction: Reconstruction | None,
    reuse: Transformer | None,
    config: ModelConfig,
) -> list[dict[str, nnx.Param]]:
    if reuse is None or any(isinstance(index, Tracer) for index in experts):
        return _gather(rows, experts, reconstruction, config)
    gather = functools.partial(_gather, config=config)
    old, new = _neuron_rows(reuse), jax.eval_shape(gather, rows, experts, reconstruction)
    if {id(array) for array in jax.tree.leaves(old)} & {id(array) for array in jax.tree.leaves(rows)}:
        raise ValueError("reuse is the model itself, or shares its weights; give an earlier result of prune")
    if [(a.shape, a.dtype) for a in jax.tree.leaves(old)] != [(a.shape, a.dtype) for a in jax.tree.leaves(new)]:
        return gather(rows, experts, reconstruction)
    return _overwrite(rows, experts, reconstruction, config, old)


@functools.partial(jax.jit, static_argnames="config")
def _gather(
    rows: list[dict[str, nnx.Param]], experts: Experts, reconstruction: Reconstruction | None, config: ModelConfig
) -> list[dict[str, nnx.Param]]:
    def keep(name: str, weight: nnx.Param, indices: Array) -> nnx.Param:
        return jax.tree.map(lambda w: _take_on_mesh(name, w, indices, experts.shards), weight)

    def place(name: str, weight: nnx.Param) -> nnx.Param:
        return jax.tree.map(lambda w: _placed(f"ff.{name}", w, config, mesh), weight)

    mesh = mesh_of(rows[0]["down"][...])
    indices = tuple(index[0] if index.ndim == 2 and index.shape[0] == 1 else index for index in experts)
    kept = [{name: keep(name, w, i) for name, w in layer.items()} for layer, i in zip(rows, indices, strict=True)]
    if reconstruction is not None:
        changes = reconstruction.changes([layer["down"][...] for layer in rows], indices)
        for layer, change in zip(kept, changes, strict=True):
            changed = (layer["down"][...].astype(jnp.float32) + change).astype(layer["down"].dtype)
            layer["down"] = nnx.Param(changed)
    return [{name: place(name, weight) for name, weight in layer.items()} for layer in kept]


def _placed(path: str, weight: Array, config: ModelConfig, mesh: Mesh | AbstractMesh | None) -> Array:
    if mesh is None:
        return weight
    spec = parameter_spec(path, weight.shape, config, mesh)
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, spec))


def _take_on_mesh(name: str, weight: Array, indices: Int[Array, "*b k"], shards: int) -> Array:
    """`take_neurons`: each device takes of its own rows, and all of them exchange these if they have to."""
    mesh, axis = mesh_of(weight), NEURON_AXES[name]
    devices = axis_size(mesh, MODEL_AXIS)
    if mesh is None or devices == 1:
        return take_neurons(name, weight, indices)
    stays = shards % devices == 0
    batch = [dividing(mesh, DATA_AXIS, b) for b in indices.shape[:-1]]
    axis_after = axis + len(batch)

    def take_own(weight: Array, indices: Array) -> Array:
        neurons = weight.shape[axis]
        at = indices - jax.lax.axis_index(MODEL_AXIS) * neurons
        taken = take_neurons(name, weight, at)
        if stays:
            return taken
        own = jnp.expand_dims((at >= 0) & (at < neurons), [*range(axis), *range(axis_after + 1, taken.ndim)])
        return jax.lax.psum_scatter(jnp.where(own, taken, 0), MODEL_AXIS, scatter_dimension=axis_after, tiled=True)

    before = [None] * axis
    return jax.shard_map(
        take_own,
        mesh=mesh,
        in_specs=(PartitionSpec(*before, MODEL_AXIS), PartitionSpec(*batch, MODEL_AXIS if stays else None)),
        out_specs=PartitionSpec(*before, *batch, MODEL_AXIS),
    )(weight, indices)


def take_neurons(name: str, weight: Array, indices: Int[Array, "*b k"]) -> Array:
    """Rows of one of `NEURON_AXES`; an index beyond them takes the nearest."""

    def take(weight: Array, indices: Array) -> Array:
        return jnp.take(weight, indices, axis=NEURON_AXES[name], mode="clip")

    def part_by_part(weight: Array, indices: Array) -> Array:
        return jnp.stack([jnp.take(part, indices, axis=0, mode="clip") for part in weight])

    if NEURON_AXES[name] == 0:
        return take(weight, indices)
    # XLA's CPU code gathers from a first axis twice as fast as from a second one; on a mesh of GPUs parts take memory.
    return jax.lax.platform_dependent(weight, indices, cpu=part_by_part, default=take)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="old", keep_unused=True)
def _overwrite(
    rows: list[dict[str, nnx.Param]],
    experts: Experts,
    reconstruction: Reconstruction | None,
    config: ModelConfig,
    old: list[dict[str, nnx.Param]],
) -> list[dict[str, nnx.Param]]:
    """`_gather` into the memory of `old`."""
    del old
    return _gather(rows, experts, reconstruction, config)


def check_experts(experts: Experts, model: Transformer) -> None:
    """Raise `ValueError` if experts were selected for a model of other layers or widths."""
    if experts.neurons != model.neurons:
        raise ValueError(
            f"these experts are for a model of {_widths(experts.neurons)}, this one has {_widths(model.neurons)}"
        )


def _widths(neurons: Sequence[int]) -> str:
    widths = sorted(set(neurons))
    described = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
    return f"{len(neurons)} layers with {described} neurons"
