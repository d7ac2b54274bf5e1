"""Beyond GRIFFIN: several densities are tried on the last tokens of prompts, in one pass.

    prefilled = prefill(model, tokens, lengths, max_new_tokens=N, last=T)     also records what comes before the last T
    divergences = try_pruners(model, prefilled, last_tokens, pruners)         KL(dense || pruned) of each of these

The full model has read the whole prompts, and so what it expects after each of their last tokens is known. The pruned
models read these tokens again, with the neurons that the tokens before choose, and as if the cache ended there. Each is
the full model with a mask, so that no weight is copied, and all of them are rows of one batch: whatever is pruned, the
weights are read once, and the program is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation.prefill import LastTokens, Prefilled
from griffin_jax.generation.scoring import divergences
from griffin_jax.griffin.masked import masks_of
from griffin_jax.model.cache import EMPTY, KVCache
from griffin_jax.model.feed_forward import LowRank, Mask
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import to_host
from griffin_jax.utils import programs


def try_pruners(
    model: Transformer,
    prefilled: Prefilled,
    tokens: Int[Array | np.ndarray, "b t"],
    pruners: Sequence[Pruner],
    seed: int | Int[Array, "*b"] = 0,
) -> Float[np.ndarray, "b c t"]:
    """KL(dense || pruned) of the predictions after each of the last tokens, for each pruner, in nats, float32.

    Args:
        model: the full model.
        prefilled: prompts that it has read, with `last`.
        tokens: the last T tokens of every prompt.
        pruners: how the model is pruned; only densities may differ.
        seed: for the methods that draw.

    Raises:
        ValueError: nothing was recorded of so many last tokens.
    """
    last = _recorded(prefilled, tokens)
    chosen = [pruner.select(model, last.statistics, seed) for pruner in pruners]
    refits = [pruner.refit(last.rows) for pruner in pruners]
    masks = [masks_of(model, experts, refit=refit) for experts, refit in zip(chosen, refits, strict=True)]
    return to_host(_divergences(model, prefilled.cache, last, tokens, masks))


def try_models(
    model: Transformer,
    prefilled: Prefilled,
    tokens: Int[Array | np.ndarray, "b t"],
    pruned: Callable[[Prefilled], Iterable[Transformer]],
) -> Float[np.ndarray, "b c t"]:
    """As `try_pruners`, of models that are no masks of the full one: each reads the tokens, and its weights, by itself.

    Args:
        model: the full model.
        prefilled: prompts that it has read, with `last`.
        tokens: the last T tokens of every prompt.
        pruned: gives models, masked or pruned, from the statistics and rows of what comes before these tokens. One is
            used up when the next is asked for.

    Raises:
        ValueError: nothing was recorded of so many last tokens.
    """
    last = _recorded(prefilled, tokens)
    before = dataclasses.replace(prefilled, statistics=last.statistics, rows=last.rows)
    found = [to_host(_divergences_of(model, one, prefilled.cache, last, tokens)) for one in pruned(before)]
    return np.stack(found, axis=1)


def _recorded(prefilled: Prefilled, tokens: Int[Array | np.ndarray, "b t"]) -> LastTokens:
    """What was recorded of the last tokens.

    Raises:
        ValueError: nothing of so many was.
    """
    last = prefilled.last
    if last is None or last.hidden.shape[1] != tokens.shape[1]:
        raise ValueError(f"nothing was recorded of the last {tokens.shape[1]} tokens: prefill with last=...")
    return last


@programs.jit
def _divergences_of(
    model: Transformer, pruned: Transformer, cache: KVCache, last: LastTokens, tokens: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """As `try_models`, of one model."""
    length, before = tokens.shape[1], last.statistics.tokens
    positions = before[:, None] + jnp.arange(length, dtype=jnp.int32)
    hidden, _, _ = pruned(tokens, positions, _cut(cache, before, length))
    return divergences(model, last.hidden, hidden[:, None])[:, 0]


@programs.jit
def _divergences(
    model: Transformer,
    cache: KVCache,
    last: LastTokens,
    tokens: Int[Array, "b t"],
    masks: list[list[Mask]],
) -> Float[Array, "b c t"]:
    """As `try_pruners`, with a mask for each pruner and layer."""
    batch, length = tokens.shape
    count, before = len(masks), last.statistics.tokens
    positions = before[:, None] + jnp.arange(length, dtype=jnp.int32)
    model = _for_each(model, count)
    for layer, of_layer in zip(model.layers, zip(*masks, strict=True), strict=True):
        layer.ff.mask = nnx.data(_together(of_layer, batch))
    hidden, _, _ = model(_each(tokens, count), _each(positions, count), _copies(_cut(cache, before, length), count))
    return divergences(model, last.hidden, hidden.reshape(batch, count, length, -1))


def _cut(cache: KVCache, before: Int[Array, "b"], length: int) -> KVCache:
    """The cache without the last tokens of each row, and room for them at its end.

    A slot's number is at least the position of the token in it, so the last slots hold nothing else but padding.
    """
    shorter = cache.without_last(length)
    kept = shorter.positions < before[:, None]
    return dataclasses.replace(shorter, positions=jnp.where(kept, shorter.positions, EMPTY))


def _copies(cache: KVCache, count: int) -> KVCache:
    """The cache with each row `count` times."""
    rows = cache.keys, cache.values, cache.positions, cache.context
    keys, values, positions, context = jax.tree.map(lambda array: _each(array, count), rows)
    return KVCache(keys, values, positions, cache.cursor, context)


def _each(array: Array, count: int, axis: int = 0) -> Array:
    return array if count == 1 else jnp.repeat(array, count, axis=axis)


def _together(masks: Sequence[Mask], batch: int) -> Mask:
    """The masks of one layer as one, for batches that have each sequence once for each of them."""

    def rows(arrays: Sequence[Array], axes: int) -> Array:
        each = [jnp.broadcast_to(array, (batch, *array.shape[-axes:])) for array in arrays]
        return jnp.stack(each, axis=1).reshape(-1, *each[0].shape[1:])

    def joined(changes: tuple[LowRank, ...]) -> LowRank:
        # The rows that all of them are fitted to.
        left = changes[0].left
        left = left if left.ndim == 2 else _each(left, len(masks))
        return LowRank(left, rows([change.right for change in changes], 2))

    changes = zip(*(mask.changes for mask in masks), strict=True)
    return Mask(rows([mask.kept for mask in masks], 1), tuple(map(joined, changes)))


def _for_each(model: Transformer, count: int) -> Transformer:
    """A copy of the model, without copies of arrays; what it has for each sequence of a batch, it has `count` times.

    These are additions of low rank, see `griffin_jax.model.low_rank`.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    for owner in (owner for layer in model.layers for owner in (layer.attention, *layer.ff.parts())):
        for name, right in list(vars(owner).items()):
            if name.endswith("_right") and right is not None and right[...].ndim == 3:
                left = getattr(owner, name.replace("_right", "_left"))
                setattr(owner, name, nnx.data(nnx.Param(_each(right[...], count))))
                setattr(owner, name.replace("_right", "_left"), nnx.data(nnx.Param(_each(left[...], count, axis=-3))))
    return model
