"""Adapters as pytrees, and models that have them.

An adapter is kept as PEFT keeps it: for each linear layer, by its name there, A of (rank, inputs) and B of (outputs,
rank), which stand for scale * B A. `attach` makes of them what `griffin_jax.model.low_rank` adds to the matrices of
this package, which have other axes; so gradients reach A and B themselves, and training is that of PEFT.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key

from griffin_jax.adapters.config import AdapterConfig
from griffin_jax.adapters.modules import Module, Part, chosen_modules, modules_of, padded
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.griffin.prune import take_neurons
from griffin_jax.model.assembly import join
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.low_rank import plus_matrix
from griffin_jax.model.sharding import parameter_spec
from griffin_jax.model.transformer import Layer, Transformer
from griffin_jax.parallel.mesh import mesh_of
from griffin_jax.utils import programs

JOINED = {
    "attention.qkv": ("query", "key", "value"),
    "attention.out": ("out",),
    "ff.gate_up": ("gate", "up"),
    "ff.down": ("down",),
}
"""The matrices of a layer here, and those of checkpoints that each of them is."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """A and B of one linear layer; of several adapters with an axis that counts these first.

    Attributes:
        a: reads the layer's inputs.
        b: writes its outputs.
    """

    a: Float[Array, "*n r i"]
    b: Float[Array, "*n o r"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, or several of one rank, stacked.

    Attributes:
        factors: of the linear layers that it changes, by their names in Hugging Face's models.
        scale: what B A is multiplied by.
    """

    factors: dict[str, Factors]
    scale: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(cls, config: ModelConfig, options: AdapterConfig, key: Key[Array, ""]) -> Adapter:
        """An adapter that changes nothing yet, as PEFT begins: B is zero, and A uniform in +-1 / sqrt(inputs). Float32.

        Args:
            config: of the model.
            options: what the adapter is like.
            key: of the random numbers.

        Raises:
            ValueError: the model has no such linear layers.
        """
        factors = {}
        for number, module in enumerate(chosen_modules(config, options.names)):
            bound = 1 / math.sqrt(module.inputs)
            shape = options.rank, module.inputs
            a = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
            factors[module.name] = Factors(a, jnp.zeros((module.outputs, options.rank), jnp.float32))
        return cls(factors, options.scale)

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max((factors.a.shape[-2] for factors in self.factors.values()), default=0)

    @property
    def stacked(self) -> int | None:
        """How many adapters these are; None for one that is not stacked."""
        first = next(iter(self.factors.values()), None)
        return None if first is None or first.a.ndim == 2 else first.a.shape[0]

    @property
    def parameters(self) -> int:
        """Numbers in all factors."""
        return sum(leaf.size for leaf in jax.tree.leaves(self))

    def check(self, config: ModelConfig) -> None:
        """Raise `ValueError` unless this belongs to a model of these shapes."""
        modules = modules_of(config)
        for name, factors in self.factors.items():
            module = modules.get(name)
            if module is None:
                raise ValueError(f"this adapter changes {name}, and the model has no such linear layer")
            found = factors.b.shape[-2], factors.a.shape[-1]
            if found != (module.outputs, module.inputs):
                raise ValueError(
                    f"this adapter is of another model: {name} is {module.outputs} x {module.inputs}, the adapter's"
                    f" {found[0]} x {found[1]}"
                )


def parameters_of(config: ModelConfig, options: AdapterConfig) -> int:
    """Numbers that an adapter of a model would have.

    Raises:
        ValueError: the model has no such linear layers.
    """
    return options.rank * sum(module.inputs + module.outputs for module in chosen_modules(config, options.names))


def step_bytes(adapter: Adapter, config: ModelConfig, kept: Sequence[int], *, merged: bool) -> int:
    """Bytes of an adapter that a decode step of a pruned model reads beside the model's own weights.

    Args:
        adapter: one alone.
        config: of the full model.
        kept: neurons that each layer keeps.
        merged: whether its products for neurons are added to their rows (`merge_neurons`), and so are not read.
    """
    total = 0
    made = jax.eval_shape(lambda adapter: _made(adapter, config), adapter)
    for additions, neurons, count in zip(made, config.neurons, kept, strict=True):
        for name, (left, right) in additions.items():
            rows, of_neurons = left.size * left.dtype.itemsize, name.startswith("ff.")
            if not (of_neurons and merged):
                total += (rows * count // neurons if of_neurons else rows) + right.size * right.dtype.itemsize
    return total


def stack(adapters: Sequence[Adapter | None]) -> Adapter:
    """Several adapters as one pytree, each padded with zeros to the largest rank; None changes nothing.

    Args:
        adapters: at least one, which need not be for the same linear layers.

    Raises:
        ValueError: there is none.
    """
    given = [adapter for adapter in adapters if adapter is not None]
    if not given:
        raise ValueError("stack needs at least one adapter")
    scale = given[0].scale
    shapes = {name: factors for adapter in given for name, factors in adapter.factors.items()}
    ranks = {
        name: max(adapter.factors[name].a.shape[0] for adapter in given if name in adapter.factors) for name in shapes
    }

    def one(adapter: Adapter | None, name: str) -> Factors:
        if adapter is None or name not in adapter.factors:
            like, rank = shapes[name], ranks[name]
            return Factors(jnp.zeros((rank, like.a.shape[1])), jnp.zeros((like.b.shape[0], rank)))
        own = adapter.factors[name]
        more = ranks[name] - own.a.shape[0]
        # All have one scale, which the factors make good for.
        return Factors(
            jnp.pad(own.a, ((0, more), (0, 0))), jnp.pad(own.b, ((0, 0), (0, more))) * (adapter.scale / scale)
        )

    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[Adapter({n: one(a, n) for n in shapes}, scale) for a in adapters]
    )


def unstack(adapters: Adapter) -> list[Adapter]:
    """The adapters of a stack one by one."""
    return [jax.tree.map(lambda leaf, number=number: leaf[number], adapters) for number in range(adapters.stacked or 0)]


def attach(
    model: Transformer,
    adapter: Adapter,
    index: Int[Array | np.ndarray, "b"] | Sequence[int] | None = None,
    *,
    experts: ExpertNeurons | None = None,
) -> Transformer:
    """The same model with an adapter, or with one for each sequence of a batch.

    All weights are the given model's own arrays, of whatever format. What is made of the adapter is jitted, and the
    rest is bookkeeping; inside of a user's own jit or grad it is differentiable in the adapter.

    Args:
        model: full or pruned; it stays as it is.
        adapter: one, or a stack.
        index: of a stack, which adapter each sequence has. An array, so that other choices compile nothing.
        experts: for a model that is pruned already, the neurons that it keeps.

    Raises:
        ValueError: the adapter is of another model, the model has one already, an index is missing or for nothing, or
            the model is pruned and nobody says how.
    """
    adapter.check(model.config)
    if model.adapted:
        raise ValueError(
            "this model has an adapter already; attach the other one to what `detach` returns, or merge it"
        )
    if (adapter.stacked is None) != (index is None):
        raise ValueError("an index chooses among the adapters of a stack: give both or neither")
    numbers = None if index is None else jnp.asarray(index, jnp.int32)
    made = _additions(adapter, numbers, experts, model.config, mesh_of(model.embedding[...]))
    attached: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for number, (layer, additions) in enumerate(zip(attached.layers, made, strict=True)):
        for name, (left, right) in additions.items():
            part, _, matrix = name.partition(".")
            owner = getattr(layer, part)
            _check_rows(f"layers.{number}.{name}", getattr(owner, matrix)[...], left, right)
            setattr(owner, f"{matrix}_left", nnx.data(nnx.Param(left)))
            setattr(owner, f"{matrix}_right", nnx.data(nnx.Param(right)))
    return attached


def detach(model: Transformer) -> Transformer:
    """The same model without its adapter."""
    bare: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for owner, matrix in _matrices(bare):
        _drop(owner, matrix)
    return bare


def merge(model: Transformer) -> Transformer:
    """A model without an adapter that computes what this one does with its own: W becomes W + scale * B A.

    Args:
        model: from `attach`; it stays as it is. Matrices that the adapter does not change are shared.

    Raises:
        ValueError: its matrices are integers, which would be rounded anew, or each sequence has an adapter of its own.
    """
    if model.weights.quantised:
        raise ValueError(
            f"weights of {model.weights} would be rounded anew: leave the adapter unmerged, or merge it into floating"
            " weights and store these in fewer bits"
        )
    merged = detach(model)
    for (owner, matrix), (bare, _) in zip(_matrices(model), _matrices(merged), strict=True):
        left, right = getattr(owner, f"{matrix}_left"), getattr(owner, f"{matrix}_right")
        if left is not None:
            setattr(bare, matrix, nnx.Param(_sum(getattr(owner, matrix)[...], left, right)))
    return merged


def merge_neurons(model: Transformer) -> Transformer:
    """`merge` of the matrices of neurons alone, into their own memory.

    Args:
        model: from `attach`, with floating weights and with rows of neurons that nothing else needs, such as a pruned
            model has. It is used up.

    Raises:
        ValueError: its sequences have adapters of their own.
    """
    merged: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for owner, matrix in (found for layer in merged.layers for found in _matrices_of_neurons(layer)):
        left, right = getattr(owner, f"{matrix}_left"), getattr(owner, f"{matrix}_right")
        if left is not None:
            setattr(owner, matrix, nnx.Param(_sum_into(getattr(owner, matrix)[...], left, right)))
            _drop(owner, matrix)
    return merged


def unmerge(model: Transformer, adapter: Adapter) -> Transformer:
    """The model that `merge` was given, up to rounding, without its adapter.

    Args:
        model: merged with the adapter.
        adapter: that was merged, one alone.

    Raises:
        ValueError: as `attach` and `merge`.
    """
    return merge(attach(model, dataclasses.replace(adapter, scale=-adapter.scale)))


_sum = programs.jit(plus_matrix)
_sum_into = programs.jit(plus_matrix, donate_argnames="matrix")


def _matrices(model: Transformer) -> list[tuple[Any, str]]:
    """The modules that may have additions, each with the name of a matrix."""
    return [(owner, matrix) for layer in model.layers for owner, matrix in _matrices_of(layer)]


def _matrices_of(layer: Layer) -> list[tuple[Any, str]]:
    return [(layer.attention, "qkv"), (layer.attention, "out"), *_matrices_of_neurons(layer)]


def _matrices_of_neurons(layer: Layer) -> list[tuple[Any, str]]:
    return [(part, matrix) for part in layer.ff.parts() for matrix in ("gate_up", "down")]


def _drop(owner: Any, matrix: str) -> None:
    """Leaves a matrix without an addition."""
    setattr(owner, f"{matrix}_left", nnx.data(None))
    setattr(owner, f"{matrix}_right", nnx.data(None))


def _check_rows(path: str, matrix: Array, left: Array, right: Array) -> None:
    """Raise `ValueError` unless an addition has a row for each row of a matrix."""
    rows = (*left.shape[:-3], left.shape[-2]) if right.ndim == 3 else left.shape[:-1]
    if rows != matrix.shape[:-1] and left.shape[:-1] != matrix.shape[:-1]:
        raise ValueError(
            f"{path} has the shape {matrix.shape}, and the adapter is for rows of the shape {rows}: of a pruned model"
            " say which neurons it keeps (experts=...); other shapes have no adapters"
        )


@programs.jit(static_argnames=("config", "mesh"))
def _additions(
    adapter: Adapter,
    index: Int[Array, "b"] | None,
    experts: ExpertNeurons | None,
    config: ModelConfig,
    mesh: Mesh | AbstractMesh | None,
) -> list[dict[str, tuple[Array, Array]]]:
    """Left and right of every matrix that is changed, for each layer."""
    if index is not None:
        chosen = jax.tree.map(lambda leaf: leaf[index], adapter)
        made = jax.vmap(lambda one: _made(one, config), out_axes=_axes_of_sequences(adapter, config))(chosen)
    else:
        made = _made(adapter, config)
    if experts is not None:
        for additions, indices in zip(made, experts, strict=True):
            for name in additions.keys() & {"ff.gate_up", "ff.down"}:
                left, right = additions[name]
                additions[name] = take_neurons(f"{name[3:]}_left", left, indices, experts.groups), right
    if mesh is None:
        return made

    def placed(path: str, array: Array) -> Array:
        return jax.lax.with_sharding_constraint(
            array, NamedSharding(mesh, parameter_spec(path, array.shape, config, mesh))
        )

    return [
        {name: (placed(f"{name}_left", pair[0]), placed(f"{name}_right", pair[1])) for name, pair in layer.items()}
        for layer in made
    ]


SEQUENCE_AXES = {"attention.qkv": 2, "attention.out": 1, "ff.gate_up": 1, "ff.down": 0}
"""Where `left` has the axis of sequences: before its last axis of rows."""


def _axes_of_sequences(adapter: Adapter, config: ModelConfig) -> list[dict[str, tuple[int, int]]]:
    return [{name: (SEQUENCE_AXES[name], 0) for name in layer} for layer in _by_matrix(adapter, config)]


def _by_matrix(adapter: Adapter, config: ModelConfig) -> list[dict[str, dict[str, tuple[Module, Part]]]]:
    """For each layer and each matrix of the model that is changed, the linear layers that its parts belong to."""
    modules = modules_of(config)
    parts = {part.path: (modules[name], part) for name in adapter.factors for part in modules[name].parts}

    def of_layer(layer: int) -> dict[str, dict[str, tuple[Module, Part]]]:
        found = {}
        for joined, names in JOINED.items():
            paths = {name: f"layers.{layer}.{joined.partition('.')[0]}.{name}" for name in names}
            found[joined] = {name: parts[path] for name, path in paths.items() if path in parts}
        return {joined: of_parts for joined, of_parts in found.items() if of_parts}

    return [of_layer(layer) for layer in range(config.num_layers)]


def _made(adapter: Adapter, config: ModelConfig) -> list[dict[str, tuple[Array, Array]]]:
    return [
        {joined: _joined(joined, parts, adapter, config) for joined, parts in layer.items()}
        for layer in _by_matrix(adapter, config)
    ]


def _joined(
    joined: str, parts: Mapping[str, tuple[Module, Part]], adapter: Adapter, config: ModelConfig
) -> tuple[Float[Array, "*rows s"], Float[Array, "s d"]]:
    """Left and right of a matrix from the factors of all linear layers that it is made of.

    Linear layers have columns of `left` and rows of `right` of their own, one after the other.
    """
    modules = list(dict.fromkeys(module.name for module, _ in parts.values()))
    factors = [adapter.factors[name] for name in modules]
    ranks = [each.a.shape[0] for each in factors]
    starts = dict(zip(modules, [sum(ranks[:number]) for number in range(len(ranks))], strict=True))
    rows = {}
    for name, (module, part) in parts.items():
        own = adapter.factors[module.name]
        left = part.rows(own.b * adapter.scale if module.inward else own.a.T, config)
        rows[name] = padded(left, starts[module.name], sum(ranks))
    basis = [each.a if next(iter(parts.values()))[0].inward else each.b.T * adapter.scale for each in factors]
    names = [name for name in JOINED[joined] if name != "gate" or config.gated]
    lefts = [rows[name] if name in rows else _nothing(name, config, sum(ranks)) for name in names]
    return join(f"layers.0.{joined}", lefts, config.kv_copies), jnp.concatenate(basis)


def _nothing(name: str, config: ModelConfig, rank: int) -> Float[Array, "*rows s"]:
    """Zeros for the rows of a matrix that no linear layer of the adapter is for."""
    heads = {"query": config.num_heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
    rows = (heads[name], config.head_dim) if name in heads else (config.ff_width,)
    return jnp.zeros((*rows, rank), jnp.float32)
