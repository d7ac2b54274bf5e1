"""GRIFFIN's neuron sets of texts: what they share, and what kept neurons add to the layer's output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from griffin_jax.analysis.experts.watching import Seen
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.select import select
from griffin_jax.griffin.statistic import Statistics, token_statistic
from griffin_jax.model.routed import everywhere


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Halves:
    """The neurons that GRIFFIN keeps for each half of some texts.

    Attributes:
        first: neurons kept for the first half.
        second: neurons kept for the second half.
        first_used: neurons whose statistic is not zero in the first half; in an expert that no token chose there are
            none.
        second_used: neurons whose statistic is not zero in the second half.
        kept_norm: mean of |z_j| ||Wd_j||, the norm of what a neuron adds, over the tokens of the second half and the
            neurons kept for the first half.
        dropped_norm: the same mean over the neurons dropped for the first half.
        kept_weight: mean of ||Wd_j|| over the neurons kept for the first half.
        dropped_weight: the same mean over the neurons dropped for the first half.
    """

    first: Bool[Array, "b n"]
    second: Bool[Array, "b n"]
    first_used: Bool[Array, "b n"]
    second_used: Bool[Array, "b n"]
    kept_norm: Float[Array, "b"]
    dropped_norm: Float[Array, "b"]
    kept_weight: Float[Array, "b"]
    dropped_weight: Float[Array, "b"]


def second_half(real: Bool[Array, "b t"]) -> Bool[Array, "b t"]:
    """Mask of the later half of the real tokens of each text."""
    lengths = jnp.sum(real, axis=1, keepdims=True)
    return real & (jnp.cumsum(real, axis=1) > lengths // 2)


def halves(ff: Any, seen: Seen, ranges: tuple[int, ...], config: GriffinConfig) -> Halves:
    """The neurons of a layer that GRIFFIN keeps for each half of some texts, for any kind of layer.

    Args:
        ff: the layer.
        seen: the layer at work.
        ranges: sizes of the ranges from which neurons are selected, such as experts.
        config: how many neurons are kept.
    """
    late = second_half(seen.real)
    early = seen.real & ~late
    first, second = token_statistic(seen.z, early), token_statistic(seen.z, late)

    def kept(squares: Array) -> Array:
        statistics = Statistics((squares,), jnp.ones(squares.shape[0], jnp.int32), (ranges,))
        return select(statistics, config).masks()[0]

    down = jnp.linalg.norm(ff.down_matrix().astype(jnp.float32), axis=-1)
    size = jnp.abs(everywhere(seen.z).astype(jnp.float32))
    added = jnp.sum(jnp.where(late[..., None], size, 0), axis=1) * down
    added = added / jnp.maximum(jnp.sum(late, axis=1, keepdims=True), 1)
    of_first = kept(first)
    return Halves(
        first=of_first,
        second=kept(second),
        first_used=first > 0,
        second_used=second > 0,
        kept_norm=_mean(added, of_first),
        dropped_norm=_mean(added, ~of_first),
        kept_weight=_mean(jnp.broadcast_to(down, added.shape), of_first),
        dropped_weight=_mean(jnp.broadcast_to(down, added.shape), ~of_first),
    )


def _mean(values: Array, where: Array) -> Array:
    return jnp.sum(jnp.where(where, values, 0), axis=-1) / jnp.maximum(jnp.sum(where, axis=-1), 1)


def overlaps(
    first: Bool[np.ndarray, "n f"],
    first_used: Bool[np.ndarray, "n f"],
    second: Bool[np.ndarray, "n f"],
    second_used: Bool[np.ndarray, "n f"],
    ranges: Sequence[int],
) -> Float[np.ndarray, "n n"]:
    """Jaccard similarity of every first set (row) with every second one (column).

    With several ranges it is the mean over those that both texts used, or NaN if there is none. The neurons that
    GRIFFIN keeps of an expert say nothing about a text that did not choose it.
    """
    starts = np.concatenate([[0], np.cumsum(ranges)[:-1]])
    total = np.zeros((len(first), len(second)))
    count = np.zeros_like(total)
    rows, columns = (np.logical_or.reduceat(used, starts, axis=1) for used in (first_used, second_used))
    for number, (start, size) in enumerate(zip(starts, ranges, strict=True)):
        a, b = (masks[:, start : start + size].astype(np.float32) for masks in (first, second))
        shared = a @ b.T
        every = a.sum(axis=1)[:, None] + b.sum(axis=1) - shared
        both = rows[:, number, None] & columns[:, number]
        total += np.where(both, shared / np.maximum(every, 1), 0)
        count += both
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def own_and_others(overlap: Float[np.ndarray, "n n"]) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """For each text, the overlap of its halves, and the mean overlap of its first half with others' second halves."""
    others = np.where(np.eye(len(overlap), dtype=bool), np.nan, overlap)
    known = np.isfinite(others)
    means = np.where(known, others, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return np.diagonal(overlap).copy(), np.where(known.any(axis=1), means, np.nan)
