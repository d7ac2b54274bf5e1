"""mask: model, expert neurons -> a model that computes what the pruned one does, with the full model's weights.

`prune` copies the rows of the kept neurons, once for each sequence that has its own set. The copy pays off in decoding,
where tokens are written one after the other and each step reads the weights. Scoring given tokens is different: the
weights are read once for all of them, and no copy is needed. It is enough to set z to zero at the neurons that are not
kept,

    W_down[E]^T z[E] = W_down^T (z * m)        m = 1 for the neurons E, else 0

A masked model needs memory only for the masks, and as much time as the full model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.griffin.neurons import ExpertNeurons, check_experts
from griffin_jax.griffin.prune import check_whole
from griffin_jax.model.feed_forward import LowRank, Mask
from griffin_jax.model.sharding import dotted, parameter_spec
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import mesh_of
from griffin_jax.utils import programs


@runtime_checkable
class LowRankRefit(Protocol):
    """Beyond GRIFFIN: a refit of the kept rows of the down projections that is given as products of low rank.

    It makes the same changes as a `griffin_jax.griffin.prune.Refit`, but never forms the matrix of the changes. An
    implementation is `griffin_jax.extensions.reconstruction.Reconstruction`.
    """

    def check(self, neurons: Sequence[int], indices: Sequence[Int[Array, "*b _k"]]) -> None:
        """Raise `ValueError` unless this refit fits a model's layers and the kept neurons.

        Args:
            neurons: F of each layer of the full model.
            indices: the kept neurons of each layer, (K,) or (B, K).
        """
        ...

    def low_rank(
        self, down: Sequence[Float[Array, "_f d"]], kept: Sequence[Bool[Array, "*b _f"]]
    ) -> Sequence[tuple[LowRank, ...]]:
        """What to add to the kept rows of each layer's down projection, as a sum of products of low rank.

        The products may have any values at the rows of neurons that are not kept.

        Args:
            down: W_down of each layer of the full model, (F, D).
            kept: which neurons of each layer are kept, (F,) or (B, F).
        """
        ...


def mask(model: Transformer, experts: ExpertNeurons, *, refit: LowRankRefit | None = None) -> Transformer:
    """Mask a model, so that only the expert neurons take part; it computes what `prune` with these arguments gives.

    The masked model shares every weight array with the given one. With indices of shape (B, K), each sequence of a
    batch has its own mask, unless B is 1. An observer sees the intermediates z of all F neurons, with zeros for those
    that are not kept.

    On a mesh, the masks are divided along the neurons and the batch. Devices need not keep equally many neurons.

    Args:
        model: the full model; it stays as it is.
        experts: the neurons to keep, from `select`.
        refit: beyond GRIFFIN: changes the kept rows of the down projections; for example a `Reconstruction`.

    Raises:
        ValueError: the expert neurons were selected for a model with other layers or widths, the model is pruned for
            every sequence of a batch, masked or held in two groups of rows already, or `refit` does not fit the model
            or the expert neurons.
    """
    masks = masks_of(model, experts, refit=refit)
    masked: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for layer, one in zip(masked.layers, masks, strict=True):
        layer.ff.mask = nnx.data(one)
    return masked


def masks_of(model: Transformer, experts: ExpertNeurons, *, refit: LowRankRefit | None = None) -> list[Mask]:
    """The mask of each layer in the model that `mask` returns.

    Args:
        model: as for `mask`.
        experts: as for `mask`.
        refit: as for `mask`.

    Raises:
        ValueError: as for `mask`.
    """
    check_whole(model)
    check_experts(experts, model)
    if refit is not None:
        refit.check(model.neurons, experts.indices)
    kept = _masks(experts)
    masks = [Mask(layer) for layer in kept]
    if refit is not None:
        changes = refit.low_rank([layer.ff.down_matrix() for layer in model.layers], kept)
        masks = [Mask(layer, change) for layer, change in zip(kept, changes, strict=True)]
    return _placed(masks, model)


@programs.jit
def _masks(experts: ExpertNeurons) -> tuple[Bool[Array, "*b _f"], ...]:
    return tuple(m[0] if m.ndim == 2 and m.shape[0] == 1 else m for m in experts.masks())


def _placed(masks: list[Mask], model: Transformer) -> list[Mask]:
    """The masks, divided among the devices as the model's neurons are."""
    mesh = mesh_of(model.embedding[...])
    if mesh is None:
        return masks

    def place(path: jax.tree_util.KeyPath, array: Array) -> Array:
        spec = parameter_spec(f"mask.{dotted(path)}", array.shape, model.config, mesh)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    return [jax.tree.map_with_path(place, one) for one in masks]
