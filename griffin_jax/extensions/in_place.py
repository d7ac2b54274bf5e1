"""Every neuron held once: pruning by putting the kept rows in front, instead of copying them beside the model.

`griffin_jax.prune` leaves the full model as it is, so that the kept rows are in memory twice. Here each
feed-forward layer is two groups of rows, the kept ones and the others. The dense model uses both, the
pruned one the first; for the next prompt the rows are regrouped, one matrix after the other, each of which
is given up for its successor. Beside the model that takes memory for one matrix.
"""

from __future__ import annotations

import functools
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


class InPlace:
    """A model whose pruned form shares all its memory.

    Args:
        model: a full one, which is used up: its feed-forward arrays are given to this object, and
            nobody else may use them.

    Attributes:
        model: the dense model; another object after every `prune`. It computes what it always did, but
            its neurons, and so its statistics, are in another order: see `in_order`.
    """

    def __init__(self, model: Transformer):
        self.model = model
        self._order = [jnp.arange(neurons, dtype=jnp.int32) for neurons in model.neurons]

    def in_order(self, statistics: Statistics) -> Statistics:
        """Statistics of `model`, in the order that the neurons of the checkpoint have."""
        squares = tuple(_inverse_take(s, order) for s, order in zip(statistics.squares, self._order, strict=True))
        return Statistics(squares, statistics.tokens)

    def prune(self, experts: ExpertNeurons) -> Transformer:
        """The pruned model, valid until the next call; `model` is regrouped.

        Args:
            experts: one set for the whole batch, by the order of the checkpoint.

        Raises:
            ValueError: the experts are of another model, or one set for each of several sequences.
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
                # Given up now and not when the last reference goes, or all layers would be there twice. (Rows that
                # change places cannot be moved within the memory that they are read from.)
                for array in jax.tree.leaves(groups):
                    array.delete()
            _put(layer.ff, kept, rest)
            _put(small.ff, kept, None)
        self.model = dense
        return pruned


def _rows(ff: FeedForward) -> dict[str, list[Array]]:
    """A layer's parameters with rows for neurons, each in its one or two groups."""
    groups = [ff] if ff.rest is None else [ff, ff.rest]
    return {
        name: [getattr(group, name)[...] for group in groups] for name in NEURON_AXES if getattr(ff, name) is not None
    }


def _put(ff: FeedForward, kept: dict[str, Array], rest: dict[str, Array] | None) -> None:
    ff.rest = nnx.data(None)
    if rest is not None and rest["down"].shape[0]:
        others: FeedForward = jax.tree.map(lambda leaf: leaf, ff)
        others.down_bias = None
        for name, array in rest.items():
            setattr(others, name, nnx.Param(array))
        ff.rest = nnx.data(others)
    for name, array in kept.items():
        setattr(ff, name, nnx.Param(array))


@jax.jit
def _places(
    order: Int[Array, "f"], indices: Int[Array, "k"]
) -> tuple[Int[Array, "k"], Int[Array, "rest"], Int[Array, "f"]]:
    """Where the rows of the neurons `indices` and of the others are, and which neuron each row will belong to."""
    chosen = _inverse(order)[indices]
    is_kept = jnp.zeros(order.shape, bool).at[chosen].set(True)
    (others,) = jnp.nonzero(~is_kept, size=order.shape[0] - indices.shape[0])
    return chosen, others, jnp.concatenate([order[chosen], order[others]])


@functools.partial(jax.jit, static_argnames="name")
def _regroup(
    name: str, groups: Sequence[Array], chosen: Int[Array, "k"], others: Int[Array, "rest"]
) -> tuple[Array, Array]:
    """The rows at these places, and the others."""
    axis = NEURON_AXES[name]

    def take(places: Int[Array, "n"]) -> Array:
        found = take_rows(groups[0], places, axis)
        if len(groups) == 1:
            return found
        # Of both groups joined, without joining them.
        size = groups[0].shape[axis]
        second = take_rows(groups[1], jnp.maximum(places - size, 0), axis)
        return jnp.where(jnp.expand_dims(places < size, range(1, found.ndim - axis)), found, second)

    return take(chosen), take(others)


def _inverse(order: Int[Array, "f"]) -> Int[Array, "f"]:
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))


@jax.jit
def _inverse_take(squares: Array, order: Int[Array, "f"]) -> Array:
    return squares[:, _inverse(order)]
