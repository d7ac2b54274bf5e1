"""Pruning in place: the kept rows are regrouped within the model instead of copied next to it.

`griffin_jax.prune` leaves the full model as it is, so the kept rows are in memory twice. Here, each feed-forward layer
has two groups of rows, the kept ones and the others. The dense model uses both groups, the pruned one only the first.
For the next prompt, the rows are regrouped one matrix after the other, and each old matrix is freed once the new one is
complete. This takes additional memory for a single matrix.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from griffin_jax.generation import jitted
from griffin_jax.griffin.neurons import ExpertNeurons, check_experts
from griffin_jax.griffin.prune import neuron_modules, parts_of_neurons
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.feed_forward import NEURON_AXES, NeuronModule
from griffin_jax.model.ops import take_rows
from griffin_jax.model.transformer import Transformer
from griffin_jax.utils import programs


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """A parameter with a row for each neuron, in groups of rows.

    Attributes:
        groups: the kept rows, and the other rows if there are any.
        order: the neuron of each row, (F,), or (E, F) for E routed experts. Parameters of a module whose rows are in
            the same order have the same object.
    """

    groups: tuple[Array, ...]
    order: Int[Array, "*e f"]


class InPlace:
    """A model that shares all its memory with its pruned form.

    If `prune` ends early, because memory runs out or because it is interrupted, some parameters of a layer may be
    regrouped and others not. Each parameter is recorded together with the order of its rows, and the next use of
    `model` completes the regrouping.

    Args:
        model: the full model. It cannot be used afterwards: this object takes over its feed-forward arrays.

    Attributes:
        magnitudes: for a model with routed experts, the `magnitudes` that `griffin_jax.select` takes, in the order of
            the checkpoint; None for other models.
    """

    def __init__(self, model: Transformer):
        # Everything but the neurons' rows is taken from this model.
        self._template = model
        self._model: Transformer | None = model
        self.magnitudes = jitted.magnitudes_of(model)
        self._parts: list[dict[str, _Rows]] = []
        for part in neuron_modules(model):
            shape = part.down.shape[:-1]
            order = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
            self._parts.append({name: _Rows((rows[...],), order) for name, rows in part.rows().items()})

    @property
    def model(self) -> Transformer:
        """The dense model; a new object after every `prune`.

        It always computes the same, but the order of its neurons, and thus of its statistics, changes; see `in_order`.

        Raises:
            RuntimeError: an earlier `prune` ended early, and there is no memory to complete it.
        """
        if self._model is None:
            try:
                self._finish()
                self._template = self._model = self._built(dense=True)
            except (MemoryError, RuntimeError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise RuntimeError(
                    f"an earlier prune of this in_place model ended early, and cannot be finished now ({reason}); free"
                    " memory and ask again, or load the model again"
                ) from error
        return self._model

    def in_order(self, statistics: Statistics) -> Statistics:
        """Puts statistics that `model` recorded into the order that neurons have in the checkpoint."""
        left, ordered = iter(self._parts), []
        for layer, squares in zip(self._template.layers, statistics.squares, strict=True):
            orders = [_order(next(left)) for _ in layer.ff.parts()]
            ordered.append(_inverse_take(squares, orders))
        return dataclasses.replace(statistics, squares=tuple(ordered))

    def prune(self, experts: ExpertNeurons) -> Transformer:
        """Regroup the rows of `model`, and return the pruned model, which is valid until the next call.

        Args:
            experts: the neurons to keep, one set for the whole batch, counted in the order of the checkpoint.

        Returns:
            A model with only the kept rows in its feed-forward layers. It shares them with `model`.

        Raises:
            RuntimeError: as for `model`.
            ValueError: the expert neurons do not fit the model, or each of several sequences has its own set.
        """
        check_experts(experts, self.model)
        if not experts.shared and experts[0].shape[0] > 1:
            raise ValueError(
                f"these are experts for each of {experts[0].shape[0]} sequences; with one copy of the weights there is"
                " one set for the batch: select with shared=True"
            )
        self._model = None
        places = parts_of_neurons(self._template.config, experts)
        for part, at in zip(self._parts, places, strict=True):
            chosen, others, order = _places(_order(part), at.indices(experts[at.layer].reshape(-1)))
            for name in part:
                _move(part, name, chosen, others, order)
        self._template = self._model = self._built(dense=True)
        return self._built(dense=False)

    def _finish(self) -> None:
        """Give all parameters of each module the row order of its first parameter, which is always moved first."""
        for part in self._parts:
            order, kept = _order(part), _size(*next(iter(part.items())))
            for name, rows in part.items():
                if rows.order is not order:
                    places = jnp.take_along_axis(_inverse(rows.order), order, axis=-1)
                    _move(part, name, places[..., :kept], places[..., kept:], order)

    def _built(self, *, dense: bool) -> Transformer:
        model: Transformer = jax.tree.map(lambda leaf: leaf, self._template)
        for part, rows in zip(neuron_modules(model), self._parts, strict=True):
            rest = {name: one.groups[1] for name, one in rows.items() if dense and len(one.groups) == 2}
            _put(part, {name: one.groups[0] for name, one in rows.items()}, rest)
        return model


def _order(part: dict[str, _Rows]) -> Int[Array, "*e f"]:
    """The neuron of each row of a module, (F,) or (E, F)."""
    return next(iter(part.values())).order


def _size(name: str, rows: _Rows) -> int:
    """The number of rows in the first group of a parameter."""
    return rows.groups[0].shape[NEURON_AXES[name] + rows.order.ndim - 1]


def _move(
    part: dict[str, _Rows],
    name: str,
    chosen: Int[Array, "*e k"],
    others: Int[Array, "*e rest"],
    order: Int[Array, "*e f"],
) -> None:
    """Regroup the rows of one parameter. If this ends early, the parameter is still recorded with its actual order."""
    old = part[name].groups
    kept, rest = jax.block_until_ready(_regroup(name, old, chosen, others))
    part[name] = _Rows((kept, rest) if others.size else (kept,), order)
    # Freed now rather than with the last reference; otherwise all layers would be in memory twice. (Rows cannot be
    # moved within the memory that they are read from.)
    for array in old:
        array.delete()


def _put(part: NeuronModule, kept: dict[str, Array], rest: dict[str, Array]) -> None:
    """Store rows in a module, in one group, or in two groups if `rest` is not empty."""
    part.rest = nnx.data(None)
    if rest:
        others: NeuronModule = jax.tree.map(lambda leaf: leaf, part)
        others.down_bias = None
        for name, array in rest.items():
            setattr(others, name, nnx.Param(array))
        part.rest = nnx.data(others)
    for name, array in kept.items():
        setattr(part, name, nnx.Param(array))


@programs.jit
def _places(
    order: Int[Array, "*e f"], indices: Int[Array, "*e k"]
) -> tuple[Int[Array, "*e k"], Int[Array, "*e rest"], Int[Array, "*e f"]]:
    """Where the rows of the neurons `indices` and of all other neurons are, and the neuron of each row afterwards."""
    if order.ndim == 2:
        return jax.vmap(_places_of_one)(order, indices)
    return _places_of_one(order, indices)


def _places_of_one(order: Array, indices: Array) -> tuple[Array, Array, Array]:
    chosen = _inverse(order)[indices]
    is_kept = jnp.zeros(order.shape, bool).at[chosen].set(True)
    (others,) = jnp.nonzero(~is_kept, size=order.shape[0] - indices.shape[0])
    return chosen, others, jnp.concatenate([order[chosen], order[others]])


@programs.jit(static_argnames="name")
def _regroup(
    name: str, groups: Sequence[Array], chosen: Int[Array, "*e k"], others: Int[Array, "*e rest"]
) -> tuple[Array, Array]:
    """The rows of a parameter at the places `chosen`, and those at `others`; for routed experts, of each expert."""
    if chosen.ndim == 2:
        return jax.vmap(functools.partial(_regroup_one, name))(groups, chosen, others)
    return _regroup_one(name, groups, chosen, others)


def _regroup_one(name: str, groups: Sequence[Array], chosen: Array, others: Array) -> tuple[Array, Array]:
    axis = NEURON_AXES[name]

    def take(places: Int[Array, "n"]) -> Array:
        found = take_rows(groups[0], places, axis)
        if len(groups) == 1:
            return found
        # Takes from both groups without concatenating them.
        size = groups[0].shape[axis]
        second = take_rows(groups[1], jnp.maximum(places - size, 0), axis)
        return jnp.where(jnp.expand_dims(places < size, range(1, found.ndim - axis)), found, second)

    return take(chosen), take(others)


def _inverse(order: Int[Array, "*e f"]) -> Int[Array, "*e f"]:
    if order.ndim == 2:
        return jax.vmap(_inverse)(order)
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))


@programs.jit
def _inverse_take(squares: Array, orders: list[Array]) -> Array:
    """The statistics of a layer, (B, F), in the order of the checkpoint.

    Args:
        squares: the statistics in the current order.
        orders: the neuron of each row, for each module of the layer.
    """
    found, start = [], 0
    for order in orders:
        own = squares[:, start : start + order.size].reshape(-1, *order.shape)
        found.append(jnp.take_along_axis(own, _inverse(order)[None], axis=-1).reshape(len(squares), -1))
        start += order.size
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)
