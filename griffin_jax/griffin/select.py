"""select: statistics -> expert neurons, the indices of the neurons that a pruned model keeps.

In each layer, the k neurons with the largest statistic s_j are kept, with k = floor(F * density) (arXiv 2404.01365).
The other methods of `GriffinConfig` draw neurons at random, in proportion to s_j or uniformly, or rank them by their
weights alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from griffin_jax.griffin.config import GriffinConfig, Method
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.config import MOST_LAYERS
from griffin_jax.model.feed_forward import NeuronModule
from griffin_jax.model.low_rank import plus_matrix
from griffin_jax.model.ops import places_of_largest, top_k
from griffin_jax.model.parameters import array_of
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import floating_rows
from griffin_jax.utils.deprecation import warn_renamed

DRAWING: tuple[Method, ...] = ("sample", "topk_sample", "random")
"""The methods that draw neurons at random."""

Fuse = Callable[[tuple[Float[Array, "*b _f"], ...]], tuple[Float[Array, "*b _f"], ...]]
"""A function that changes the scores of all layers, (F,) or (B, F) each, into new ones of the same shapes. The neurons
with the largest scores are kept."""


def check_fusible(method: Method) -> None:
    """Raise `ValueError` unless the method allows its scores to be changed, as by a prior; only `topk` does."""
    if method != "topk":
        raise ValueError(f'a prior is for method "topk", which keeps the best neurons; method is {method!r}')


Select = TypeVar("Select", bound=Callable[..., Any])


def _taking_prior(select: Select) -> Select:
    """Let `select` accept the deprecated arguments `prior` and `prior_weight` for one more version."""

    @functools.wraps(select)
    def call(*arguments: Any, **keywords: Any) -> Any:
        weight = (keywords.pop("prior_weight"),) if "prior_weight" in keywords else ()
        if (prior := keywords.pop("prior", None)) is not None:
            warn_renamed("select(prior=...)", "fuse=prior.fusion(weight)")
            keywords["fuse"] = prior.fusion(*weight)
        return select(*arguments, **keywords)

    return call  # pyright: ignore[reportReturnType]


def magnitude(model: Transformer) -> tuple[Float[Array, "_f"], ...]:
    """The score of every neuron by its weights alone: ||Wg_j|| * ||Wu_j|| if gated, else ||Wu_j||.

    Returns:
        The scores of each layer, (F,), float32.
    """
    return tuple(jnp.concatenate([_magnitude(part).reshape(-1) for part in layer.ff.parts()]) for layer in model.layers)


def _magnitude(part: NeuronModule) -> Float[Array, "*e f"]:
    matrix = floating_rows(part.gate_up[...], None, array_of(part.gate_up_scale))
    matrix = plus_matrix(matrix, part.gate_up_left, part.gate_up_right)
    norms = jnp.linalg.norm(matrix.astype(jnp.float32), axis=-1)
    own = jnp.prod(norms, axis=part.neuron_axes["gate_up"] - 1)
    return own if part.rest is None else jnp.concatenate([own, _magnitude(part.rest)], axis=-1)


@_taking_prior
def select(
    statistics: Statistics,
    config: GriffinConfig,
    *,
    model: Transformer | None = None,
    seed: int | Int[Array, "*b"] = 0,
    fuse: Fuse | None = None,
    magnitudes: tuple[Float[Array, "_f"], ...] | None = None,
) -> ExpertNeurons:
    """Choose the neurons to keep, in each layer independently.

    By default (`method="topk"`), a layer keeps the k neurons with the largest s_j in the prompt: k = floor(F * density)
    (see `griffin_jax.griffin.config.kept_neurons`). Each sequence of a batch has its own set, unless `config.shared`
    asks for one set for all of them. The score of a neuron is then sum_i s_i / sqrt(S_i), where sequence i has S_i
    tokens, so that all sequences have equal weight (arXiv 2404.01365).

    Args:
        statistics: the statistics of the prompts, from `prefill`.
        config: density, method, groups, and whether the batch shares its neurons.
        model: the full model. Required by `method="magnitude"`. For a model with routed experts, it also serves to
            compute `magnitudes` if these are not given.
        seed: for the methods that draw: one seed for the whole batch, or one for each sequence, (B,). In the latter
            case the draws for a sequence do not depend on its batch.
        fuse: beyond GRIFFIN, for `method="topk"`: a function that changes the scores of all layers into new ones of the
            same shapes. For example, `Prior.fusion` combines them with what neurons do in general text. It should be a
            pytree, so that `select` can be jitted with it.
        magnitudes: for a model with routed experts, the result of `magnitude`, which needs to be computed only once. If
            all neurons of an expert have the same score, because no token of the prompts chose it and `fuse` does not
            tell them apart either, the expert keeps the neurons with the largest weights. It keeps its first neurons if
            neither `magnitudes` nor `model` is given.

    Returns:
        Expert neurons, with indices of shape (K,) in each layer if shared, else (B, K). K is static.

    Raises:
        ValueError: the statistics were not collected, the densities or groups do not fit the layers, `magnitude` is
            asked for without a model, `fuse` is given with a method other than `topk` or is for other layers, or each
            sequence has a seed although the sequences share neurons that are drawn.
    """
    if not statistics.squares:
        raise ValueError("there are no statistics to select by: prefill with collect=True")
    batch = statistics.tokens.shape[0]
    neurons = tuple(squares.shape[-1] for squares in statistics.squares)
    if config.method == "magnitude":
        if model is None:
            raise ValueError('method "magnitude" scores the weights: pass the model to select')
        scores = tuple(s if config.shared else jnp.broadcast_to(s, (batch, s.shape[-1])) for s in magnitude(model))
    else:
        scores = tuple(jnp.sqrt(squares) for squares in statistics.squares)
        if config.shared:
            weight = jax.lax.rsqrt(jnp.maximum(statistics.tokens, 1).astype(jnp.float32))
            scores = tuple(jnp.einsum("b,bf->f", weight, s, precision=jax.lax.Precision.HIGHEST) for s in scores)
    if fuse is not None:
        check_fusible(config.method)
        scores = fuse(scores)

    seed = jnp.asarray(seed, jnp.int32)
    keys = jax.vmap(jax.random.key)(seed) if seed.ndim else jax.random.key(seed)
    check_seeds(config, keys)
    ranges = statistics.ranges or tuple((width,) for width in neurons)
    shares = config.kept_of_ranges(ranges)
    if statistics.ranges and config.method not in ("random", "magnitude"):
        magnitudes = magnitude(model) if magnitudes is None and model is not None else magnitudes
        if magnitudes is not None:
            layers = zip(scores, magnitudes, ranges, strict=True)
            scores = tuple(_largest_where_alike(*layer, config.group_count) for layer in layers)
    ranked = [
        _ranked(score, sizes, kept, config, keys, layer)
        for layer, (score, sizes, kept) in enumerate(zip(scores, ranges, shares, strict=True))
    ]
    best = iter(places_of_largest(*zip(*itertools.chain(*ranked), strict=True)))
    indices = tuple(_joined([(rank.shape, next(best)) for rank, _ in layer]) for layer in ranked)
    of_ranges = (ranges, shares) if statistics.ranges else ()
    return ExpertNeurons(indices, neurons, config.group_count, None, *of_ranges)


def check_seeds(config: GriffinConfig, seeds: object) -> None:
    """Raise `ValueError` if each sequence has a seed although the sequences share neurons that are drawn."""
    if np.ndim(seeds) and config.shared and config.method in DRAWING:  # pyright: ignore[reportArgumentType]
        raise ValueError("a seed for each sequence is for neurons of its own; give shared=False, or one seed")


def _largest_where_alike(
    score: Float[Array, "*b f"], magnitude: Float[Array, "f"], sizes: tuple[int, ...], groups: int
) -> Float[Array, "*b f"]:
    """Replaces the scores of a layer by magnitudes in each group of a range whose neurons all have the same score."""
    found, start = [], 0
    for size, alike in itertools.groupby(sizes):
        stop = start + len(list(alike)) * size
        own = score[..., start:stop].reshape(*score.shape[:-1], -1, size // groups)
        by_size = magnitude[start:stop].reshape(own.shape[-2:])
        says_nothing = jnp.max(own, axis=-1, keepdims=True) == jnp.min(own, axis=-1, keepdims=True)
        found.append(jnp.where(says_nothing, by_size, own).reshape(*score.shape[:-1], -1))
        start = stop
    return jnp.concatenate(found, axis=-1)


def _ranked(
    score: Float[Array, "*b f"],
    sizes: tuple[int, ...],
    kept: tuple[int, ...],
    config: GriffinConfig,
    keys: Key[Array, "*keys"],
    layer: int,
) -> list[tuple[Float[Array, "*b _s _f"], int]]:
    """Arranges the ranking values of a layer by range and by group within each range, with the number of kept neurons.

    Returns:
        An entry for each run of ranges of the same size. It has the values, with an axis for the groups of these ranges
        and one for the neurons of a group, and the number of neurons that each group keeps.
    """
    found, start, groups = [], 0, config.group_count
    for number, ((size, k), alike) in enumerate(itertools.groupby(zip(sizes, kept, strict=True))):
        count = len(list(alike))
        own = score[..., start : start + count * size].reshape(*score.shape[:-1], count * groups, -1)
        # Each further size of ranges draws different random numbers.
        drawn = layer if number == 0 else layer + number * MOST_LAYERS
        found.append((_rank(own, k // groups, config.method, keys, drawn), k // groups))
        start += count * size
    return found


def _joined(chosen: list[tuple[tuple[int, ...], Int[Array, "*b _s _k"]]]) -> Int[Array, "*b k"]:
    """The kept neurons of one layer, as indices among all neurons of the layer.

    Args:
        chosen: for each entry that `_ranked` returned, the shape of its values, and the places of the kept neurons
            within each group.
    """
    found, start = [], 0
    for (*_, count, size), best in chosen:
        starts = start + size * jnp.arange(count, dtype=jnp.int32)[:, None]
        found.append((best + starts).reshape(*best.shape[:-2], -1))
        start += count * size
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)


def _rank(
    score: Float[Array, "*b s f"], k: int, method: Method, key: Key[Array, "*keys"], layer: int
) -> Float[Array, "*b s f"]:
    """Values whose k largest are at the chosen neurons.

    To draw k neurons without replacement, with probabilities in proportion to their scores, is the same as to take the
    k largest values of log score plus Gumbel noise (Gumbel-top-k, arXiv 1903.06059).
    """
    if method not in DRAWING:
        return score
    if key.ndim:
        noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, layer), score.shape[1:], jnp.float32))(
            key
        )
    else:
        noise = jax.random.gumbel(jax.random.fold_in(key, layer), score.shape, jnp.float32)
    if method == "random":
        return noise
    draw = jnp.log(score) + noise
    if method == "sample":
        return draw
    half = k // 2
    if half == 0:
        return draw
    smallest_sure = top_k(score, half)[0][..., -1:]
    # Ties at the threshold could make more than half of the k neurons certain; the cumulative count prevents that.
    above, tied = score > smallest_sure, score == smallest_sure
    room = half - jnp.sum(above, axis=-1, keepdims=True)
    sure = above | (tied & (jnp.cumsum(tied, axis=-1) <= room))
    return jnp.where(sure, jnp.inf, draw)
