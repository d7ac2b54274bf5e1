"""Pruning in place: the kept rows are moved to the front, instead of copied next to the model.

`griffin_jax.prune` leaves the full model as it is, so that the kept rows are in memory twice. Here each feed-forward
layer has two groups of rows, the kept ones and the others: the dense model uses both, the pruned one only the first.
For the next prompt the rows are regrouped, one matrix after the other, and each old matrix is given up for its
successor. That takes memory for one more matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from griffin_jax.griffin.neurons import ExpertNeurons, check_experts
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.feed_forward import NEURON_AXES, FeedForward
from griffin_jax.model.ops import take_rows
from griffin_jax.model.transformer import Transformer
from griffin_jax.utils import programs


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """A parameter with a row for each neuron.

    Attributes:
        groups: the kept rows, and the others if there are any.
        order: the neuron of each row; one object for all parameters of a layer whose rows correspond.
    """

    groups: tuple[Array, ...]
    order: Int[Array, "f"]


class InPlace:
    """A model that shares all its memory with its pruned form.

    If a prune ends early, for want of memory or because it was interrupted, some parameters of a layer may be regrouped
    and others not. Each is recorded together with the order of its rows, and the next use of `model` finishes that.

    Args:
        model: the full model, which is used up: its feed-forward arrays belong to this object from now on.

    Raises:
        ValueError: the model has routed experts.
    """

    def __init__(self, model: Transformer):
        if model.config.routing is not None:
            raise ValueError("in_place is for models without routed experts; prune them next to the full model")
        # Of this one everything but the neurons' rows is used.
        self._template = model
        self._model: Transformer | None = model
        self._layers: list[dict[str, _Rows]] = []
        for layer, neurons in zip(model.layers, model.neurons, strict=True):
            order = jnp.arange(neurons, dtype=jnp.int32)
            self._layers.append(
                {
                    name: _Rows((getattr(layer.ff, name)[...],), order)
                    for name in NEURON_AXES
                    if getattr(layer.ff, name) is not None
                }
            )

    @property
    def model(self) -> Transformer:
        """The dense model; another object after every `prune`.

        It computes what it always did, but its neurons, and so its statistics, are in another order: see `in_order`.

        Raises:
            RuntimeError: a prune ended early, and there is no memory to finish it.
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
        """Statistics of `model`, with the neurons in the order of the checkpoint."""
        squares = zip(statistics.squares, self._layers, strict=True)
        ordered = tuple(_inverse_take(s, _order(layer)) for s, layer in squares)
        return dataclasses.replace(statistics, squares=ordered)

    def prune(self, experts: ExpertNeurons) -> Transformer:
        """Regroup `model`, and return the pruned model, which is valid until the next call.

        Args:
            experts: the neurons to keep, one set for the whole batch, in the order of the checkpoint.

        Raises:
            RuntimeError: as for `model`.
            ValueError: the neurons are of another model, or there is a set for each of several sequences.
        """
        check_experts(experts, self.model)
        if not experts.shared and experts[0].shape[0] > 1:
            raise ValueError(
                f"these are experts for each of {experts[0].shape[0]} sequences; with one copy of the weights there is"
                " one set for the batch: select with shared=True"
            )
        self._model = None
        for layer, indices in zip(self._layers, experts, strict=True):
            chosen, others, order = _places(_order(layer), indices.reshape(-1))
            for name in layer:
                _move(layer, name, chosen, others, order)
        self._template = self._model = self._built(dense=True)
        return self._built(dense=False)

    def _finish(self) -> None:
        """Give all parameters of a layer the order of its first one, whose rows are moved before the others'."""
        for layer in self._layers:
            order, kept = _order(layer), _size(*next(iter(layer.items())))
            for name, rows in layer.items():
                if rows.order is not order:
                    places = _inverse(rows.order)[order]
                    _move(layer, name, places[:kept], places[kept:], order)

    def _built(self, *, dense: bool) -> Transformer:
        model: Transformer = jax.tree.map(lambda leaf: leaf, self._template)
        for layer, rows in zip(model.layers, self._layers, strict=True):
            rest = {name: one.groups[1] for name, one in rows.items() if dense and len(one.groups) == 2}
            _put(layer.ff, {name: one.groups[0] for name, one in rows.items()}, rest)
        return model


def _order(layer: dict[str, _Rows]) -> Int[Array, "f"]:
    """The neuron of each row of a layer."""
    return next(iter(layer.values())).order


def _size(name: str, rows: _Rows) -> int:
    """The number of rows of the first group."""
    return rows.groups[0].shape[NEURON_AXES[name]]


def _move(
    layer: dict[str, _Rows], name: str, chosen: Int[Array, "k"], others: Int[Array, "rest"], order: Int[Array, "f"]
) -> None:
    """Regroup the rows of one parameter; whatever happens, it is recorded with the order that it has."""
    old = layer[name].groups
    kept, rest = jax.block_until_ready(_regroup(name, old, chosen, others))
    layer[name] = _Rows((kept, rest) if others.size else (kept,), order)
    # Deleted now and not when the last reference goes, or all layers would be in memory twice. (Rows cannot change
    # places within the memory that they are read from.)
    for array in old:
        array.delete()


def _put(ff: FeedForward, kept: dict[str, Array], rest: dict[str, Array]) -> None:
    """Give a layer these rows, in one group, or in two if there is a rest."""
    ff.rest = nnx.data(None)
    if rest:
        others: FeedForward = jax.tree.map(lambda leaf: leaf, ff)
        others.down_bias = None
        for name, array in rest.items():
            setattr(others, name, nnx.Param(array))
        ff.rest = nnx.data(others)
    for name, array in kept.items():
        setattr(ff, name, nnx.Param(array))


@programs.jit
def _places(
    order: Int[Array, "f"], indices: Int[Array, "k"]
) -> tuple[Int[Array, "k"], Int[Array, "rest"], Int[Array, "f"]]:
    """The places of the rows of the neurons `indices` and of the others, and the neuron of each row afterwards."""
    chosen = _inverse(order)[indices]
    is_kept = jnp.zeros(order.shape, bool).at[chosen].set(True)
    (others,) = jnp.nonzero(~is_kept, size=order.shape[0] - indices.shape[0])
    return chosen, others, jnp.concatenate([order[chosen], order[others]])


@programs.jit(static_argnames="name")
def _regroup(
    name: str, groups: Sequence[Array], chosen: Int[Array, "k"], others: Int[Array, "rest"]
) -> tuple[Array, Array]:
    """The rows at the places `chosen`, and those at `others`."""
    axis = NEURON_AXES[name]

    def take(places: Int[Array, "n"]) -> Array:
        found = take_rows(groups[0], places, axis)
        if len(groups) == 1:
            return found
        # The rows of both groups together, without joining them.
        size = groups[0].shape[axis]
        second = take_rows(groups[1], jnp.maximum(places - size, 0), axis)
        return jnp.where(jnp.expand_dims(places < size, range(1, found.ndim - axis)), found, second)

    return take(chosen), take(others)


def _inverse(order: Int[Array, "f"]) -> Int[Array, "f"]:
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))


@programs.jit
def _inverse_take(squares: Array, order: Int[Array, "f"]) -> Array:
    return squares[:, _inverse(order)]
