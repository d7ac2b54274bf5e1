"""Beyond GRIFFIN: several pruned models are tried on the last tokens of prompts, in one pass.

    prefilled = prefill(model, tokens, lengths, max_new_tokens=N, last=T)     also records what comes before the last T
    divergences = try_pruners(model, prefilled, last_tokens, pruners)         KL(dense || pruned) at each of these

The full model has read the whole prompts, so its predictions after each of their last tokens are known. The pruned
models read these tokens again, with the neurons that the tokens before them choose and with the cache cut before them.
Each pruned model is the full model with a mask, so no weight is copied, and all of them are rows of one batch: whatever
the densities are, the weights are read once, and the program is the same.
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
    """KL(dense || pruned) of the predictions after each of the last tokens, for each pruner.

    Args:
        model: the full model.
        prefilled: the prompts, prefilled with `last` = T.
        tokens: ids of the last T tokens of every prompt, (B, T).
        pruners: C pruners, which may differ in their densities only.
        seed: seed for the methods that draw neurons; one, or one for each sequence, (B,).

    Returns:
        The divergences, (B, C, T), in nats, float32.

    Raises:
        ValueError: the last T tokens were not recorded in `prefilled`.
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
    """`try_pruners` for models that are not masks of the full one: they read the tokens one after the other.

    Each model reads its own weights.

    Args:
        model: the full model.
        prefilled: the prompts, prefilled with `last` = T.
        tokens: ids of the last T tokens of every prompt, (B, T).
        pruned: a function that yields C models, masked or pruned, when it is called with the prompts as they were
            before the last tokens: `statistics` and `rows` are those of the tokens before. A model is not used any more
            when the next one is requested.

    Returns:
        The divergences, (B, C, T), in nats, float32.

    Raises:
        ValueError: the last T tokens were not recorded in `prefilled`.
    """
    last = _recorded(prefilled, tokens)
    before = dataclasses.replace(prefilled, statistics=last.statistics, rows=last.rows)
    found = [to_host(_divergences_of(model, one, prefilled.cache, last, tokens)) for one in pruned(before)]
    return np.stack(found, axis=1)


def _recorded(prefilled: Prefilled, tokens: Int[Array | np.ndarray, "b t"]) -> LastTokens:
    """The record of the last tokens.

    Raises:
        ValueError: as many last tokens were not recorded.
    """
    last = prefilled.last
    if last is None or last.hidden.shape[1] != tokens.shape[1]:
        raise ValueError(f"nothing was recorded of the last {tokens.shape[1]} tokens: prefill with last=...")
    return last


@programs.jit
def _divergences_of(
    model: Transformer, pruned: Transformer, cache: KVCache, last: LastTokens, tokens: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """The divergences of `try_models` for one model."""
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
    """The divergences of `try_pruners`, with a mask for each pruner and layer."""
    batch, length = tokens.shape
    count, before = len(masks), last.statistics.tokens
    positions = before[:, None] + jnp.arange(length, dtype=jnp.int32)
    model = _for_each(model, count)
    for layer, of_layer in zip(model.layers, zip(*masks, strict=True), strict=True):
        layer.ff.mask = nnx.data(_together(of_layer, batch))
    hidden, _, _ = model(_each(tokens, count), _each(positions, count), _copies(_cut(cache, before, length), count))
    return divergences(model, last.hidden, hidden.reshape(batch, count, length, -1))


def _cut(cache: KVCache, before: Int[Array, "b"], length: int) -> KVCache:
    """The cache without the last tokens of each row, with room for them at its end.

    The tokens of a row lie in the slots in the order of their positions. The slots that are freed at the end therefore
    hold only some of the last tokens, and padding.
    """
    shorter = cache.without_last(length)
    kept = shorter.positions < before[:, None]
    return dataclasses.replace(shorter, positions=jnp.where(kept, shorter.positions, EMPTY))


def _copies(cache: KVCache, count: int) -> KVCache:
    """The cache with each row repeated `count` times."""
    rows = cache.keys, cache.values, cache.positions, cache.context
    keys, values, positions, context = jax.tree.map(lambda array: _each(array, count), rows)
    return KVCache(keys, values, positions, cache.cursor, context)


def _each(array: Array, count: int, axis: int = 0) -> Array:
    return array if count == 1 else jnp.repeat(array, count, axis=axis)


def _together(masks: Sequence[Mask], batch: int) -> Mask:
    """Joins the masks of one layer, for a batch that has each sequence once for each mask."""

    def rows(arrays: Sequence[Array], axes: int) -> Array:
        each = [jnp.broadcast_to(array, (batch, *array.shape[-axes:])) for array in arrays]
        return jnp.stack(each, axis=1).reshape(-1, *each[0].shape[1:])

    def joined(changes: tuple[LowRank, ...]) -> LowRank:
        # All masks are fitted to the same rows.
        left = changes[0].left
        left = left if left.ndim == 2 else _each(left, len(masks))
        return LowRank(left, rows([change.right for change in changes], 2))

    changes = zip(*(mask.changes for mask in masks), strict=True)
    return Mask(rows([mask.kept for mask in masks], 1), tuple(map(joined, changes)))


def _for_each(model: Transformer, count: int) -> Transformer:
    """The model with its arrays for single sequences repeated `count` times; other arrays are shared.

    Such arrays are additions of low rank, see `griffin_jax.model.low_rank`.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    for owner in (owner for layer in model.layers for owner in (layer.attention, *layer.ff.parts())):
        for name, right in list(vars(owner).items()):
            if name.endswith("_right") and right is not None and right[...].ndim == 3:
                left = getattr(owner, name.replace("_right", "_left"))
                setattr(owner, name, nnx.data(nnx.Param(_each(right[...], count))))
                setattr(owner, name.replace("_right", "_left"), nnx.data(nnx.Param(_each(left[...], count, axis=-3))))
    return model
