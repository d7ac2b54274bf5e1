"""mask: model, experts -> a model that computes what the pruned one does, with the full model's own weights.

Pruning copies the kept rows, once for each sequence that keeps neurons of its own. That pays where many tokens are
written, one after the other, and each of them reads the weights. Where given tokens are scored, all of them read the
weights once, and no copy is needed: setting z to zero for the neurons that are not kept computes the same,

    W_down[E]^T z[E] = W_down^T (z * m)        m = 1 for the neurons E, else 0

with memory for the mask alone. It takes the time of the full model.
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
    """Changes the kept rows of the down projections as `griffin_jax.griffin.prune.Refit` does, by products of low rank,
    beyond GRIFFIN.

    `griffin_jax.extensions.reconstruction.Reconstruction` is one.
    """

    def check(self, neurons: Sequence[int], indices: Sequence[Int[Array, "*b _k"]]) -> None:
        """Raise `ValueError` unless this belongs to a model with so many neurons in its layers, and to these
        experts."""
        ...

    def low_rank(
        self, down: Sequence[Float[Array, "_f d"]], kept: Sequence[Bool[Array, "*b _f"]]
    ) -> Sequence[tuple[LowRank, ...]]:
        """What is added to the kept rows of each layer's down projection, as sums of products. Their other rows may
        be anything."""
        ...


def mask(model: Transformer, experts: ExpertNeurons, *, refit: LowRankRefit | None = None) -> Transformer:
    """The same model in which only the experts take part; it computes what `prune(model, experts, refit=refit)` does.

    Every weight is the given model's own array. Experts of shape (B, K) are for each sequence its own, unless B is 1.
    An observer sees the intermediates of all neurons, with zeros for those that are left out.

    On a mesh the masks are divided as the neurons are, and as batches are. Devices need not keep equally many neurons.

    Args:
        model: the full model; it stays as it is.
        experts: that `select` chose.
        refit: beyond GRIFFIN: changes the kept rows of the down projections, such as a `Reconstruction`.

    Raises:
        ValueError: the experts were selected for a model of other layers or widths, the model is pruned or masked
            already, or `refit` does not belong to the model or the experts.
    """
    masks = masks_of(model, experts, refit=refit)
    masked: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for layer, one in zip(masked.layers, masks, strict=True):
        layer.ff.mask = nnx.data(one)
    return masked


def masks_of(model: Transformer, experts: ExpertNeurons, *, refit: LowRankRefit | None = None) -> list[Mask]:
    """The masks that `mask` gives each layer.

    Args:
        model: as for `mask`.
        experts: as for `mask`.
        refit: as for `mask`.

    Raises:
        ValueError: as `mask`.
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
    """The masks where the model's neurons are."""
    mesh = mesh_of(model.embedding[...])
    if mesh is None:
        return masks

    def place(path: jax.tree_util.KeyPath, array: Array) -> Array:
        spec = parameter_spec(f"mask.{dotted(path)}", array.shape, model.config, mesh)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    return [jax.tree.map_with_path(place, one) for one in masks]
