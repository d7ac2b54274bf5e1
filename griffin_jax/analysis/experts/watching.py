"""Shows what goes into feed-forward layers while a model reads; an observer sees only what comes out of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.model.cache import EMPTY, empty_cache
from griffin_jax.model.routed import Activations
from griffin_jax.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """A feed-forward layer at work.

    Attributes:
        x: input of the layer.
        z: intermediates of the layer, as observers see them.
        real: mask of the tokens that are not padding.
    """

    x: Float[Array, "b t d"]
    z: Activations
    real: Bool[Array, "b t"]


class _Watched(nnx.Module):
    """A feed-forward layer that passes on its input together with its intermediates."""

    def __init__(self, ff: Any):
        self.ff = ff

    def intermediate(self, x: Array) -> tuple[Array, Activations]:
        return x, self.ff.intermediate(x)

    def project(self, seen: tuple[Array, Activations]) -> Array:
        return self.ff.project(seen[1])


Look = Callable[[int, Any, Seen], Any]
"""A function of the number of a layer, its feed-forward module, and what the module has just computed."""


def watch(model: Transformer, tokens: Int[Array, "b t"], lengths: Int[Array, "b"], look: Look) -> tuple[Any, ...]:
    """Read texts, and show every feed-forward layer together with its input; meant to be called inside `jax.jit`.

    With `griffin_jax.model.routed.RoutedFeedForward.choose` and `experts`, `look` can compute what any expert would
    have answered. Only what `look` returns is kept, so the intermediates of one layer are in memory at a time.

    Args:
        model: the full model, which is not changed.
        tokens: token ids of the texts, padded on the right with any token.
        lengths: number of real tokens of each text.
        look: function that returns arrays in any pytree, or None.

    Returns:
        What `look` returned for each layer.
    """
    watched = nnx.merge(*nnx.split(model))
    layers = [layer.ff for layer in watched.layers]
    for layer in watched.layers:
        layer.ff = _Watched(layer.ff)

    def observe(number: int, seen: Any, real: Array) -> Any:
        x, z = seen
        return look(number, layers[number], Seen(x, z, real))

    batch, length = tokens.shape
    positions = jnp.arange(length, dtype=jnp.int32)
    positions = jnp.where(positions < lengths[:, None], positions, EMPTY)
    cache = empty_cache(model.config, batch, length, model.dtype, context=jnp.asarray(lengths, jnp.int32))
    return watched(tokens, positions, cache, read_slots=0, observe=observe)[2]
