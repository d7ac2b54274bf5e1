"""D5, D6 and D7: every expert answers every token, including those that the router sent elsewhere.

In a layer without a router, sets of neurons take the place of experts. A set's output is that of the layer with all
other neurons at zero. Its score, in place of a router's logits, is the part of ||z||^2 that is in the set. The set that
counts as chosen is the text's own.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.analysis.experts.watching import Seen
from griffin_jax.model.feed_forward import FeedForward
from griffin_jax.model.ops import float32_product
from griffin_jax.model.parameters import array_of
from griffin_jax.model.routed import Experts, RoutedActivations, RoutedFeedForward


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What all experts of a layer answer to some tokens.

    Attributes:
        outputs: output of each expert, without its weight.
        scores: scores by which experts are chosen, on any scale: only their order counts.
        chosen: the experts that each token chose; the same number for each token.
        active: share of an expert's neurons that are active for a token; see `active_share`.
    """

    outputs: Float[Array, "e b t d"]
    scores: Float[Array, "b t e"]
    chosen: Bool[Array, "b t e"]
    active: Float[Array, "b t e"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Experts' answers compared, summed over the real tokens of each text.

    Attributes:
        tokens: number of tokens.
        similarity: 1 - arccos(cosine) / pi of the outputs of each pair of experts.
        chosen: mean of this similarity over pairs whose experts were both chosen; zero if a token chooses one expert.
        others: mean of this similarity over all other pairs.
        ranks: number of tokens whose expert of each rank by norm has each rank by score; the largest comes first.
        largest_chosen: number of tokens that chose the expert whose output is the largest.
        chosen_norm: mean norm of the outputs of chosen experts.
        other_norm: mean norm of the outputs of all other experts.
        chosen_active: mean share of active neurons of chosen experts.
        other_active: mean share of active neurons of all other experts.
        token_cosines: mean cosine over pairs of experts for each token; not summed.
    """

    tokens: Int[Array, "b"]
    similarity: Float[Array, "b e e"]
    chosen: Float[Array, "b"]
    others: Float[Array, "b"]
    ranks: Int[Array, "b e e"]
    largest_chosen: Int[Array, "b"]
    chosen_norm: Float[Array, "b"]
    other_norm: Float[Array, "b"]
    chosen_active: Float[Array, "b"]
    other_active: Float[Array, "b"]
    token_cosines: Float[Array, "b t"]


def active_share(a: Float[Array, "*b f"]) -> Float[Array, "*b"]:
    """The share of neurons that are active: (sum a^2)^2 / (F sum a^4), 1 if all are equal and 1 / F if only one is."""
    # Divided by the largest, so that powers cannot overflow.
    size = jnp.abs(a.astype(jnp.float32))
    squares = jnp.square(size / jnp.maximum(jnp.max(size, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny))
    fourth = jnp.sum(jnp.square(squares), axis=-1)
    return jnp.where(fourth > 0, jnp.square(jnp.sum(squares, axis=-1)) / (jnp.maximum(fourth, 1) * a.shape[-1]), 0)


def router_logits(ff: RoutedFeedForward, x: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
    """The router's logits for all experts, float32; gate scores have the same order."""
    logits = float32_product("btd,ed->bte", x, ff.router[...])
    return logits if ff.router_bias is None else logits + ff.router_bias[...].astype(jnp.float32)


def gates_only(experts: Experts) -> Experts:
    """Experts whose intermediates are act(Wg x), without the factor Wu x."""
    copy = nnx.merge(*nnx.split(experts))
    for name in ("gate_up", "gate_up_scale", "gate_up_bias"):
        if (rows := array_of(getattr(experts, name))) is not None:
            setattr(copy, name, nnx.Param(rows[:, :1]))
    return copy


def of_each_expert(
    x: Float[Array, "b t d"], number: Int[Array, ""]
) -> tuple[Int[Array, "b t 1"], Float[Array, "b t 1"]]:
    """Choices in which every token chooses the same expert, with the weight 1."""
    shape = (*x.shape[:2], 1)
    return jnp.full(shape, number, jnp.int32), jnp.ones(shape, jnp.float32)


def answers_of_experts(ff: RoutedFeedForward, seen: Seen) -> Answers:
    """The answers of all routed experts, one expert after the other; shared experts are left out."""
    assert isinstance(seen.z, RoutedActivations)
    gates = gates_only(ff.experts)

    def answer(number: Array) -> tuple[Array, Array]:
        experts, weights = of_each_expert(seen.x, number)
        z = ff.experts.intermediate(seen.x, experts, weights)
        active = active_share(gates.intermediate(seen.x, experts, weights)[..., 0, :])
        return ff.experts.project(z, experts, weights).astype(jnp.float32), active

    outputs, active = jax.lax.map(answer, jnp.arange(seen.z.count))
    chosen = jnp.any(seen.z.experts[..., None] == jnp.arange(seen.z.count), axis=-2)
    return Answers(outputs, router_logits(ff, seen.x), chosen, jnp.moveaxis(active, 0, -1))


def answers_of_sets(ff: FeedForward, seen: Seen, sets: Bool[Array, "e f"], own: Int[Array, "b"]) -> Answers:
    """The answers of sets of neurons.

    Args:
        ff: a layer without a router.
        seen: the layer at work.
        sets: masks of the neurons that each set has.
        own: number of each text's own set.
    """
    assert isinstance(seen.z, jax.Array)
    z = seen.z
    nothing = ff.project(jnp.zeros_like(z[:, :1])).astype(jnp.float32)

    def answer(kept: Array) -> tuple[Array, Array, Array]:
        own = jnp.where(kept, z, 0)
        # A bias belongs to the layer, not to a set.
        output = ff.project(own).astype(jnp.float32) - nothing
        return output, jnp.sum(jnp.square(own.astype(jnp.float32)), axis=-1), active_share(own)

    outputs, scores, share = jax.lax.map(answer, sets)
    scores, share = jnp.moveaxis(scores, 0, -1), jnp.moveaxis(share, 0, -1)
    chosen = jnp.broadcast_to((own[:, None] == jnp.arange(len(sets)))[:, None], scores.shape)
    return Answers(outputs, scores, chosen, share)


def compare(answers: Answers, real: Bool[Array, "b t"]) -> Comparison:
    """Similarities, norms and ranks, summed over real tokens."""
    norms = jnp.linalg.norm(answers.outputs, axis=-1)
    unit = answers.outputs / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)[..., None]
    cosine = jnp.einsum("ebtd,fbtd->btef", unit, unit, precision=jax.lax.Precision.HIGHEST)
    angular = 1 - jnp.arccos(jnp.clip(cosine, -1, 1)) / jnp.pi
    count = len(answers.outputs)
    pair = jnp.tri(count, k=-1, dtype=bool)
    both = answers.chosen[..., :, None] & answers.chosen[..., None, :] & pair
    norms = jnp.moveaxis(norms, 0, -1)
    by_norm = jnp.argsort(-norms, axis=-1, stable=True)
    score_ranks = jnp.take_along_axis(_ranks(answers.scores), by_norm, axis=-1)
    ranks = jax.nn.one_hot(score_ranks, count, dtype=jnp.int32)

    def total(values: Array) -> Array:
        return jnp.sum(jnp.where(real, values, 0), axis=1)

    mean_of_chosen = functools.partial(_mean_where, where=answers.chosen, axes=(-1,))
    mean_of_others = functools.partial(_mean_where, where=~answers.chosen, axes=(-1,))
    return Comparison(
        tokens=jnp.sum(real, axis=1),
        similarity=jnp.sum(jnp.where(real[..., None, None], angular, 0), axis=1),
        chosen=total(_mean_where(angular, both, (-2, -1))),
        others=total(_mean_where(angular, pair & ~both, (-2, -1))),
        ranks=jnp.sum(jnp.where(real[..., None, None], ranks, 0), axis=1),
        largest_chosen=total(jnp.take_along_axis(answers.chosen, by_norm[..., :1], axis=-1)[..., 0]),
        chosen_norm=total(mean_of_chosen(norms)),
        other_norm=total(mean_of_others(norms)),
        chosen_active=total(mean_of_chosen(answers.active)),
        other_active=total(mean_of_others(answers.active)),
        token_cosines=_mean_where(cosine, pair, (-2, -1)),
    )


def _mean_where(values: Array, where: Array, axes: tuple[int, ...]) -> Array:
    where = jnp.broadcast_to(where, values.shape)
    return jnp.sum(jnp.where(where, values, 0), axis=axes) / jnp.maximum(jnp.sum(where, axis=axes), 1)


def _ranks(values: Float[Array, "b t e"]) -> Int[Array, "b t e"]:
    """The rank of each expert, 0 for the largest; among equals the first comes first."""
    return jnp.argsort(jnp.argsort(-values, axis=-1, stable=True), axis=-1)
