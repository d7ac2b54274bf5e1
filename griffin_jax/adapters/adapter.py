"""Adapters as pytrees, and models that have them.

An adapter is kept as PEFT keeps it: for each linear layer, under its name there, A of shape (rank, inputs) and B of
shape (outputs, rank), which stand for scale * B A. The matrices of this package have other axes, so `attach` converts
A and B to what `griffin_jax.model.low_rank` adds to them. Gradients reach A and B themselves, so training is that of
PEFT.
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
"""The matrices of a layer in this package, each with the matrices of checkpoints that it is made of."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """A and B of one linear layer. If several adapters are stacked, the first axis counts the adapters.

    Attributes:
        a: the matrix A, which reads the layer's inputs.
        b: the matrix B, which writes the layer's outputs.
    """

    a: Float[Array, "*n r i"]
    b: Float[Array, "*n o r"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, or a stack of several adapters with the same shapes.

    Attributes:
        factors: A and B of each linear layer that the adapter changes, by the layer's name in Hugging Face's models.
        scale: factor of B A.
    """

    factors: dict[str, Factors]
    scale: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(cls, config: ModelConfig, options: AdapterConfig, key: Key[Array, ""]) -> Adapter:
        """An adapter that changes nothing yet, float32. As in PEFT, B is zero, and A uniform in +-1 / sqrt(inputs).

        Args:
            config: configuration of the model.
            options: options of the adapter.
            key: key of the random numbers.

        Raises:
            ValueError: the model does not have the linear layers that the options name.
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
        """The largest rank among the layers."""
        return max((factors.a.shape[-2] for factors in self.factors.values()), default=0)

    @property
    def stacked(self) -> int | None:
        """The number of adapters in a stack; None for a single adapter."""
        first = next(iter(self.factors.values()), None)
        return None if first is None or first.a.ndim == 2 else first.a.shape[0]

    @property
    def parameters(self) -> int:
        """The number of parameters: the numbers in all factors."""
        return sum(leaf.size for leaf in jax.tree.leaves(self))

    def check(self, config: ModelConfig) -> None:
        """Raise `ValueError` unless this adapter is for a model of these shapes."""
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
    """The number of parameters that an adapter of a model would have.

    Raises:
        ValueError: the model does not have the linear layers that the options name.
    """
    return options.rank * sum(module.inputs + module.outputs for module in chosen_modules(config, options.names))


def step_bytes(adapter: Adapter, config: ModelConfig, kept: Sequence[int], *, merged: bool) -> int:
    """Bytes of an adapter that a decode step of a pruned model reads in addition to the model's own weights.

    Args:
        adapter: a single adapter.
        config: configuration of the full model.
        kept: number of neurons that each layer keeps.
        merged: whether the adapter's additions to neurons are merged into their rows (`merge_neurons`), so that they
            are not read separately.
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
    """Stack several adapters into one pytree, padding each with zeros to the largest rank.

    Args:
        adapters: adapters, which need not be for the same linear layers; None stands for one that changes nothing.

    Raises:
        ValueError: all entries are None, or the sequence is empty.
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
        # A stack has a single scale, so the factors make up for the difference.
        return Factors(
            jnp.pad(own.a, ((0, more), (0, 0))), jnp.pad(own.b, ((0, 0), (0, more))) * (adapter.scale / scale)
        )

    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[Adapter({n: one(a, n) for n in shapes}, scale) for a in adapters]
    )


def unstack(adapters: Adapter) -> list[Adapter]:
    """The adapters of a stack, one by one."""
    return [jax.tree.map(lambda leaf, number=number: leaf[number], adapters) for number in range(adapters.stacked or 0)]


def attach(
    model: Transformer,
    adapter: Adapter,
    index: Int[Array | np.ndarray, "b"] | Sequence[int] | None = None,
    *,
    experts: ExpertNeurons | None = None,
) -> Transformer:
    """Attach an adapter to a model, or a separate one for each sequence of a batch.

    The result shares the arrays of all the model's weights, in whatever format these are. Converting the adapter is
    jitted, and the rest is bookkeeping. Inside your own jit or grad, the result is differentiable in the adapter.

    Args:
        model: a full or pruned model; it is not changed.
        adapter: a single adapter, or a stack.
        index: for a stack, the number of the adapter that each sequence has. This is an array, so other choices do not
            compile anything.
        experts: for a model that is already pruned, the neurons that it keeps.

    Raises:
        ValueError: the adapter is for another model; the model already has an adapter; `index` is missing for a stack,
            or given for a single adapter; or the model is pruned, and `experts` is missing.
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
    """Return the same model without its adapter."""
    bare: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for owner, matrix in _matrices(bare):
        _drop(owner, matrix)
    return bare


def merge(model: Transformer) -> Transformer:
    """Merge a model's adapter into its weights: W becomes W + scale * B A. The result computes the same.

    Args:
        model: a model from `attach`; it is not changed. Matrices that the adapter does not change are shared.

    Raises:
        ValueError: the model's matrices are integers, which would be rounded again, or each sequence has a separate
            adapter.
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
    """Like `merge`, but only for the matrices of neurons, whose memory is reused.

    Args:
        model: a model from `attach` with floating weights, whose rows of neurons nothing else needs, as those of a
            pruned model. It is used up.

    Raises:
        ValueError: each sequence has a separate adapter.
    """
    merged: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for owner, matrix in (found for layer in merged.layers for found in _matrices_of_neurons(layer)):
        left, right = getattr(owner, f"{matrix}_left"), getattr(owner, f"{matrix}_right")
        if left is not None:
            setattr(owner, matrix, nnx.Param(_sum_into(getattr(owner, matrix)[...], left, right)))
            _drop(owner, matrix)
    return merged


def unmerge(model: Transformer, adapter: Adapter) -> Transformer:
    """Undo `merge`: return the model without the adapter, up to rounding.

    Args:
        model: a model with the adapter merged into it.
        adapter: the single adapter that was merged.

    Raises:
        ValueError: as for `attach` and `merge`.
    """
    return merge(attach(model, dataclasses.replace(adapter, scale=-adapter.scale)))


_sum = programs.jit(plus_matrix)
_sum_into = programs.jit(plus_matrix, donate_argnames="matrix")


def _matrices(model: Transformer) -> list[tuple[Any, str]]:
    """All matrices that may have additions, as pairs of the module and the name of the matrix."""
    return [(owner, matrix) for layer in model.layers for owner, matrix in _matrices_of(layer)]


def _matrices_of(layer: Layer) -> list[tuple[Any, str]]:
    return [(layer.attention, "qkv"), (layer.attention, "out"), *_matrices_of_neurons(layer)]


def _matrices_of_neurons(layer: Layer) -> list[tuple[Any, str]]:
    return [(part, matrix) for part in layer.ff.parts() for matrix in ("gate_up", "down")]


def _drop(owner: Any, matrix: str) -> None:
    """Remove the addition from a matrix."""
    setattr(owner, f"{matrix}_left", nnx.data(None))
    setattr(owner, f"{matrix}_right", nnx.data(None))


def _check_rows(path: str, matrix: Array, left: Array, right: Array) -> None:
    """Raise `ValueError` unless an addition has one row for each row of its matrix."""
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
    """For each layer, `left` and `right` of every matrix that is changed."""
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
"""Position of the axis of sequences in `left`: before its last axis of rows."""


def _axes_of_sequences(adapter: Adapter, config: ModelConfig) -> list[dict[str, tuple[int, int]]]:
    return [{name: (SEQUENCE_AXES[name], 0) for name in layer} for layer in _by_matrix(adapter, config)]


def _by_matrix(adapter: Adapter, config: ModelConfig) -> list[dict[str, dict[str, tuple[Module, Part]]]]:
    """For each layer, and each of its matrices that is changed, the linear layers that its parts belong to."""
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
    """`left` and `right` of a matrix, from the factors of all linear layers that it is made of.

    Each linear layer has separate columns of `left` and rows of `right`, one after the other.
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
    """Zeros for the rows of a matrix that the adapter does not change."""
    heads = {"query": config.num_heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
    rows = (heads[name], config.head_dim) if name in heads else (config.ff_width,)
    return jnp.zeros((*rows, rank), jnp.float32)
