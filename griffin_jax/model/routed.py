"""The feed-forward layer with routed experts, from which a router chooses some for each token (arXiv 1701.06538).

Each expert is a feed-forward layer. The neurons of the layer are those of all its experts, one expert after the other,
followed by those of the shared experts, which every token reads.

Letters in shapes, besides those of `griffin_jax.model`: e experts, k choices of a token, f neurons of an expert, s
neurons of the shared experts, n neurons of the whole layer, m devices that hold whole experts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from griffin_jax.model.config import ModelConfig, RouterScores, Routing
from griffin_jax.model.feed_forward import NEURON_AXES, FeedForward, Mask, NeuronModule
from griffin_jax.model.grouped import linear_of_experts, matmul_of_experts
from griffin_jax.model.ops import float32_product
from griffin_jax.model.parameters import array_of, bias_vector, floating, matrix
from griffin_jax.model.weights import Outputs, WeightFormat, floating_rows

LEAST_SUM = 1e-20
"""The least sum of weights that they are divided by, as in DeepSeek V3."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RoutedActivations:
    """The intermediates z of a layer with routed experts, for the experts that each token chose: the input of their
    down projections.

    Attributes:
        experts: numbers of the experts that each token chose, int32; the best one first.
        weights: the factor of each choice, float32; `z` is already multiplied by it.
        z: the intermediates of each choice. If devices hold whole experts, the axis of the choices is followed by an
            axis m for these devices, with zeros except for the device that has the expert.
        shared: the intermediates of the shared experts, already multiplied by their gate; None if there are none.
        count: E, the number of experts.
    """

    experts: Int[Array, "b t k"]
    weights: Float[Array, "b t k"]
    z: Float[Array, "b t k *m f"]
    shared: Float[Array, "b t s"] | None
    count: int = dataclasses.field(metadata={"static": True})

    def everywhere(self) -> Float[Array, "b t n"]:
        """z of all neurons of the layer, with zeros for experts that a token did not choose.

        A dense layer with these intermediates gives the same output. The array takes E / k times the memory.
        """
        z = self.z if self.z.ndim == 4 else jnp.sum(self.z, axis=3)
        b, t, _, f = z.shape
        batch, token = jnp.arange(b)[:, None, None], jnp.arange(t)[None, :, None]
        spread = jnp.zeros((b, t, self.count, f), self.z.dtype).at[batch, token, self.experts].set(z)
        spread = spread.reshape(b, t, -1)
        return spread if self.shared is None else jnp.concatenate([spread, self.shared], axis=-1)


Activations = Float[Array, "b t f"] | RoutedActivations
"""The intermediates z of a feed-forward layer, with or without routed experts."""


def everywhere(z: Activations) -> Float[Array, "b t n"]:
    """z with a value for each neuron of the layer; see `RoutedActivations.everywhere`."""
    return z.everywhere() if isinstance(z, RoutedActivations) else z


_SCORES: dict[RouterScores, Callable[[Array], Array]] = {
    "softmax": functools.partial(jax.nn.softmax, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "equal": lambda logits: logits,
}


def choose(
    logits: Float[Array, "b t e"], routing: Routing, choice_bias: Float[Array, "e"] | None = None
) -> tuple[Int[Array, "b t k"], Float[Array, "b t k"]]:
    """The experts that each token chooses, the best one first, and their weights.

    Args:
        logits: the router's logits, float32.
        routing: how experts are chosen.
        choice_bias: what is added to the scores of the experts when these are chosen, but not to their weights.
    """
    if routing.scores == "sparsemixer":
        return _sparsemixer(logits, routing)
    scores = _SCORES[routing.scores](logits)
    ranked = scores if choice_bias is None else scores + choice_bias.astype(jnp.float32)
    if routing.groups > 1:
        ranked = _of_best_groups(ranked, routing)
    experts = jax.lax.top_k(ranked, routing.active)[1]
    if routing.scores == "equal":
        return experts, jnp.full(experts.shape, routing.scale, jnp.float32)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if routing.normalised:
        weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), LEAST_SUM)
    return experts, weights * routing.scale


def _of_best_groups(scores: Float[Array, "b t e"], routing: Routing) -> Float[Array, "b t e"]:
    """The scores, with minus infinity for all experts outside of a token's best groups, so that none of them is chosen
    (DeepSeek)."""
    grouped = scores.reshape(*scores.shape[:-1], routing.groups, -1)
    ranks = jnp.sum(jax.lax.top_k(grouped, routing.group_best)[0], axis=-1)
    best = jax.lax.top_k(ranks, routing.active_groups)[1]
    taken = jnp.any(best[..., None] == jnp.arange(routing.groups), axis=-2)
    return jnp.where(taken[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _sparsemixer(logits: Float[Array, "b t e"], routing: Routing) -> tuple[Array, Array]:
    """Choose one expert after the other; the weight of each comes from a softmax over the remaining experts that are
    nearly as good."""
    left, experts, weights = logits, [], []
    for _ in range(routing.active):
        best = jnp.max(left, axis=-1, keepdims=True)
        far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > routing.tolerance
        expert = jnp.argmax(left, axis=-1, keepdims=True).astype(jnp.int32)
        gates = jax.nn.softmax(jnp.where(far, -jnp.inf, left), axis=-1)
        experts.append(expert)
        weights.append(jnp.take_along_axis(gates, expert, axis=-1))
        left = jnp.where(jnp.arange(logits.shape[-1]) == expert, -jnp.inf, left)
    return jnp.concatenate(experts, axis=-1), jnp.concatenate(weights, axis=-1) * routing.scale


class Experts(NeuronModule):
    """The experts of a layer, neuron-major: `gate_up` is (E, A, F_e, D), with A = 2, or 1 if not gated, and `down` is
    (E, F_e, D).

    After pruning each expert has K rows instead of F_e, and the rows may lie in two groups, as in `FeedForward`.
    Integers have scales, as in `FeedForward`: `gate_up_scale` (E, A, F_e, n); and for `down` either `down_scale`, (E,
    D), for each output of an expert, or `down_row_scale`, (E, F_e, n).
    """

    neuron_axes: ClassVar[Mapping[str, int]] = {name: axis + 1 for name, axis in NEURON_AXES.items()}
    down_outputs: ClassVar[Outputs] = "last_of_each"

    def __init__(self, config: ModelConfig, dtype: DTypeLike, weights: WeightFormat, rngs: nnx.Rngs | None):
        super().__init__(config, dtype, weights)
        assert config.routing is not None
        self.by_expert = config.expert_parallel
        e, a, f, d = config.routing.experts, 2 if config.gated else 1, config.routing.width, config.width
        gate_up = matrix(rngs, (e, a, f, d), fan_in=d, weights=weights)
        self.gate_up, self.gate_up_scale = gate_up.values, gate_up.scale
        down = matrix(rngs, (e, f, d), fan_in=f, weights=weights, outputs=self.down_outputs)
        self.down, self.down_scale, self.down_row_scale = down.values, down.scale, down.row_scale
        self.gate_up_bias = bias_vector((e, a, f), dtype) if config.ff_bias else None
        has_bias = config.ff_bias or config.routing.centred
        self.down_bias = bias_vector((e, d), dtype) if has_bias else None

    def intermediate(
        self, x: Float[Array, "b t d"], experts: Int[Array, "b t k"], weights: Float[Array, "b t k"]
    ) -> Float[Array, "b t k *m f"]:
        """z of each choice, multiplied by its weight; the values of an expert's own rows are followed by those of
        `rest`."""
        parameters = self.gate_up[...], array_of(self.gate_up_scale), array_of(self.gate_up_bias)
        y = linear_of_experts(x, experts, *parameters, by_expert=self.by_expert)
        # On devices that do not have the expert, products are zero, and so are the activations of them.
        z = self.activated(y.astype(x.dtype), axis=y.ndim - 2)
        z = (z * weights.reshape(*weights.shape, *[1] * (z.ndim - 3))).astype(x.dtype)
        return z if self.rest is None else jnp.concatenate([z, self.rest.intermediate(x, experts, weights)], axis=-1)

    def project(
        self, z: Float[Array, "b t k *m f"], experts: Int[Array, "b t k"], weights: Float[Array, "b t k"]
    ) -> Float[Array, "b t d"]:
        """The weighted sum of the outputs of the chosen experts, float32."""
        own = self.down.shape[1]
        scales = array_of(self.down_scale), array_of(self.down_row_scale)
        y = matmul_of_experts(z[..., :own], experts, self.down[...], *scales)
        if self.rest is not None:
            y = y + self.rest.project(z[..., own:], experts, weights)
        if self.down_bias is not None:
            bias = jnp.take(self.down_bias[...], experts, axis=0, mode="clip")
            y = y + float32_product("btk,btkd->btd", weights, bias)
        return y

    def down_matrix(self) -> Float[Array, "n d"]:
        """The down projections of all neurons as floating-point numbers, one expert after the other."""
        weight = floating_rows(self.down[...], array_of(self.down_scale), array_of(self.down_row_scale))
        return weight.reshape(-1, weight.shape[-1])

    def gate_up_matrix(self) -> Float[Array, "a n d"]:
        """The matrices that multiply x as floating-point numbers, one expert after the other."""
        weight = floating_rows(self.gate_up[...], None, array_of(self.gate_up_scale))
        return weight.swapaxes(0, 1).reshape(weight.shape[1], -1, weight.shape[-1])


class RoutedFeedForward(nnx.Module):
    """y = sum of w_e E_e(x) over the experts e that a router chooses for a token, plus the shared experts' output.

    The weights w_e are multiplied onto z, so that here, too, z is the input of the down projections. A `mask` says
    which of all neurons take part; see `griffin_jax.griffin.masked`.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, weights: WeightFormat, rngs: nnx.Rngs | None):
        assert config.routing is not None
        self.routing = routing = config.routing
        e, d = routing.experts, config.width
        self.router = floating(rngs, (e, d), fan_in=d, dtype=dtype)
        self.router_bias = bias_vector((e,), dtype) if routing.router_bias else None
        self.choice_bias = bias_vector((e,), jnp.float32) if routing.choice_bias else None
        self.experts = Experts(config, dtype, weights, rngs)
        width = routing.shared_width
        self.shared = FeedForward(config, dtype, weights, rngs, neurons=width) if width else None
        self.shared_gate = floating(rngs, (d,), fan_in=d, dtype=dtype) if routing.shared_gate else None
        self.down_bias = bias_vector((d,), dtype) if routing.centred else None
        self.mask: Mask | None = nnx.data(None)

    @property
    def neurons(self) -> int:
        """Number of neurons of all experts, including the shared ones."""
        return sum(part.neurons for part in self.parts())

    def parts(self) -> tuple[NeuronModule, ...]:
        """The modules that hold the layer's neurons, in the order in which neurons are numbered."""
        return (self.experts,) if self.shared is None else (self.experts, self.shared)

    @property
    def per_sequence(self) -> bool:
        """Whether each sequence has its own rows. None ever has, since copies of all experts would be too large."""
        return False

    @property
    def rest(self) -> NeuronModule | None:
        """The second group of rows of the first part that has one; None if no part has."""
        return next((part.rest for part in self.parts() if part.rest is not None), None)

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
        """The router's logits of all experts, float32."""
        logits = float32_product("btd,ed->bte", x, self.router[...])
        return logits if self.router_bias is None else logits + self.router_bias[...].astype(jnp.float32)

    def choose(self, x: Float[Array, "b t d"]) -> tuple[Int[Array, "b t k"], Float[Array, "b t k"]]:
        """The experts that each token chooses, and their weights; see the function `choose`."""
        return choose(self.logits(x), self.routing, array_of(self.choice_bias))

    def down_matrix(self) -> Float[Array, "n d"]:
        """The down projections of all neurons as floating-point numbers."""
        own = self.experts.down_matrix()
        if self.shared is None:
            return own
        shared = self.shared.down_matrix()
        dtype = jnp.promote_types(own.dtype, shared.dtype)
        return jnp.concatenate([own.astype(dtype), shared.astype(dtype)])

    def gate_up_matrix(self) -> Float[Array, "a n d"]:
        """The matrices that multiply x as floating-point numbers."""
        own = self.experts.gate_up_matrix()
        return own if self.shared is None else jnp.concatenate([own, self.shared.gate_up_matrix()], axis=1)

    def intermediate(self, x: Float[Array, "b t d"]) -> RoutedActivations:
        """The choices of each token, and the intermediates z of the chosen experts."""
        experts, weights = self.choose(x)
        z, shared = self.experts.intermediate(x, experts, weights), None
        if self.shared is not None:
            shared = self.shared.intermediate(x)
            if self.shared_gate is not None:
                gate = jax.nn.sigmoid(float32_product("btd,d->bt", x, self.shared_gate[...]))
                shared = (shared * gate[..., None]).astype(x.dtype)
        found = RoutedActivations(experts, weights, z, shared, self.routing.experts)
        return found if self.mask is None else _masked(found, self.mask)

    def project(self, z: RoutedActivations) -> Float[Array, "b t d"]:
        """The layer's output for given intermediates."""
        y = self.experts.project(z.z, z.experts, z.weights)
        if self.shared is not None and z.shared is not None:
            y = y + self.shared.project(z.shared).astype(jnp.float32)
        if self.down_bias is not None:
            y = y + self.down_bias[...].astype(jnp.float32)
        y = y.astype(z.z.dtype)
        return y if self.mask is None or not self.mask.changes else self.mask.changed(z.everywhere(), y)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.project(self.intermediate(x))


def _masked(z: RoutedActivations, mask: Mask) -> RoutedActivations:
    """z, with zeros for the neurons that the mask does not keep."""
    (b, t, k), f = z.experts.shape, z.z.shape[-1]
    of_experts = mask.kept[..., : z.count * f].reshape(*mask.kept.shape[:-1], z.count, f)
    if of_experts.ndim == 2:
        kept = jnp.take(of_experts, z.experts, axis=0, mode="clip")
    else:
        kept = jnp.take_along_axis(of_experts, z.experts.reshape(b, t * k)[..., None], axis=1).reshape(b, t, k, f)
    shared = None if z.shared is None else Mask(mask.kept[..., z.count * f :]).apply(z.shared)
    kept = kept if z.z.ndim == 4 else kept[:, :, :, None]
    return dataclasses.replace(z, z=jnp.where(kept, z.z, 0), shared=shared)
