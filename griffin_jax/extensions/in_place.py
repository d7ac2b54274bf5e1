"""Pruning in place: the kept rows are moved to the front, instead of copied next to the model.

`griffin_jax.prune` leaves the full model as it is, so that the kept rows are in memory twice. Here each feed-forward
layer has two groups of rows, the kept ones and the others: the dense model uses both, the pruned one only the first.
For the next prompt the rows are regrouped, one matrix after the other, and each old matrix is given up for its
successor. That takes memory for one more matrix.
"""

from __future__ import annotations

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


class InPlace:
    """A model that shares all its memory with its pruned form.

    Args:
        model: the full model, which is used up: its feed-forward arrays belong to this object from now on.

    Attributes:
        model: the dense model; another object after every `prune`. It computes what it always did, but its neurons,
            and so its statistics, are in another order: see `in_order`.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self._order = [jnp.arange(neurons, dtype=jnp.int32) for neurons in model.neurons]

    def in_order(self, statistics: Statistics) -> Statistics:
        """Statistics of `model`, with the neurons in the order of the checkpoint."""
        squares = tuple(_inverse_take(s, order) for s, order in zip(statistics.squares, self._order, strict=True))
        return Statistics(squares, statistics.tokens)

    def prune(self, experts: ExpertNeurons) -> Transformer:
        """Regroup `model`, and return the pruned model, which is valid until the next call.

        Args:
            experts: the neurons to keep, one set for the whole batch, in the order of the checkpoint.

        Raises:
            ValueError: the neurons are of another model, or there is a set for each of several sequences.
        """
        check_experts(experts, self.model)
        if not experts.shared and experts[0].shape[0] > 1:
            raise ValueError(
                f"these are experts for each of {experts[0].shape[0]} sequences; with one copy of the weights there is"
                " one set for the batch: select with shared=True"
            )
        dense: Transformer = jax.tree.map(lambda leaf: leaf, self.model)
        pruned: Transformer = jax.tree.map(lambda leaf: leaf, self.model)
        for number, (layer, small, indices) in enumerate(zip(dense.layers, pruned.layers, experts, strict=True)):
            chosen, others, self._order[number] = _places(self._order[number], indices.reshape(-1))
            kept, rest = {}, {}
            for name, groups in _rows(layer.ff).items():
                kept[name], rest[name] = jax.block_until_ready(_regroup(name, groups, chosen, others))
                # Deleted now and not when the last reference goes, or all layers would be in memory twice. (Rows cannot
                # change places within the memory that they are read from.)
                for array in jax.tree.leaves(groups):
                    array.delete()
            _put(layer.ff, kept, rest)
            _put(small.ff, kept, None)
        self.model = dense
        return pruned


def _rows(ff: FeedForward) -> dict[str, list[Array]]:
    """A layer's parameters with a row for each neuron: for each of them its one or two groups."""
    groups = [ff] if ff.rest is None else [ff, ff.rest]
    return {
        name: [getattr(group, name)[...] for group in groups] for name in NEURON_AXES if getattr(ff, name) is not None
    }


def _put(ff: FeedForward, kept: dict[str, Array], rest: dict[str, Array] | None) -> None:
    """Give a layer these rows, in one group or in two."""
    ff.rest = nnx.data(None)
    if rest is not None and rest["down"].shape[0]:
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
