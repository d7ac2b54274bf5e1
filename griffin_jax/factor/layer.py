"""Factored layers in training: every expert is computed, and the choice is a product with 0 or 1."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from griffin_jax.factor.losses import Oracle, k_hot, oracle_labels
from griffin_jax.model.routed import Experts, RoutedFeedForward
from griffin_jax.model.transformer import Transformer

Parameters = tuple[Mapping[str, Array], ...]
"""The trained parameters of each layer, by their paths in the layer."""

ROUTER = ("router", "router_bias")
EXPERTS = ("gate_up", "gate_up_bias", "down", "down_bias")

Routes = Literal["all", "router", "oracle"]
"""Which experts are summed for a layer's output: all, which gives the dense layer; those that the router chooses; or
those that the oracle chooses by the dense layer's output."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """What a layer in training computes from its input, and what an observer sees of the layer.

    Attributes:
        inputs: the input x; no gradients flow back through it.
        outputs: E_i(x) of every expert, float32.
        logits: the router's logits, float32.
        chosen: 1 for the experts that the router chooses, 0 for the others.
        labels: 1 for the experts that the oracle chooses by the dense layer's output, 0 for the others.
    """

    inputs: Float[Array, "b t d"]
    outputs: Float[Array, "b t e d"]
    logits: Float[Array, "b t e"]
    chosen: Float[Array, "b t e"]
    labels: Float[Array, "b t e"]


class TrainingLayer(nnx.Module):
    """A factored layer that computes all its experts, with the interface of a feed-forward layer.

    The output is scale * sum_i m_i E_i(x) + bias. In training, m_i = c_i + p_i - stop_gradient(p_i): its value is the
    choice c_i, 0 or 1, as in decoding; its gradient is that of p = softmax(router(x)) (straight-through, arXiv
    1308.3432). Every expert has such a gradient, so the router also learns from those that it did not choose.

    Args:
        layer: the layer whose experts and router are used.
        teacher: the experts whose sum is the dense layer; None for those of `layer`.
        routes: which experts are summed for the output.
        oracle: how the labels are found; see `griffin_jax.factor.losses.oracle_labels`.
    """

    def __init__(
        self,
        layer: RoutedFeedForward,
        teacher: Experts | None = None,
        routes: Routes = "router",
        oracle: Oracle = "joint",
    ):
        self.layer, self.teacher = layer, teacher
        self.routes: Routes = routes
        self.oracle: Oracle = oracle

    @property
    def neurons(self) -> int:
        """The number of neurons of all experts together."""
        return self.layer.neurons

    def intermediate(self, x: Float[Array, "b t d"]) -> Choices:
        """Everything that the layer computes about its experts for this input."""
        routing = self.layer.routing
        outputs = expert_outputs(self.layer.experts, x)
        # Gradients must not reach earlier layers through the labels, or through what routers learn from them.
        fixed = jax.lax.stop_gradient(x)
        own = jax.lax.stop_gradient(outputs)
        target = jnp.sum(own if self.teacher is None else expert_outputs(self.teacher, fixed), axis=-2)
        labels = oracle_labels(own, target, routing.active, routing.scale, self.oracle)
        logits = self.layer.logits(fixed)
        chosen = k_hot(jax.lax.top_k(logits, routing.active)[1], routing.experts)
        return Choices(fixed, outputs, logits, chosen, labels)

    def project(self, z: Choices) -> Float[Array, "b t d"]:
        """The layer's output, from what `intermediate` computed."""
        routing = self.layer.routing
        if self.routes == "all":
            y = jnp.sum(z.outputs, axis=-2)
        else:
            p = jax.nn.softmax(z.logits, axis=-1)
            taken = z.labels if self.routes == "oracle" else z.chosen + p - jax.lax.stop_gradient(p)
            y = routing.scale * jnp.einsum("bte,bted->btd", taken, z.outputs)
        if self.layer.down_bias is not None:
            y = y + self.layer.down_bias[...].astype(jnp.float32)
        return y.astype(self.layer.router.dtype)


def expert_outputs(experts: Experts, x: Float[Array, "b t d"]) -> Float[Array, "b t e d"]:
    """E_i(x) of every expert, float32; differentiable in floating weights."""
    count, _, width, d = experts.gate_up.shape
    gate_up, down = experts.gate_up_matrix().astype(x.dtype), experts.down_matrix().astype(x.dtype)
    y = jnp.einsum("btd,and->btan", x, gate_up, preferred_element_type=jnp.float32)
    if experts.gate_up_bias is not None:
        bias = experts.gate_up_bias[...].astype(jnp.float32)
        y = y + bias.swapaxes(0, 1).reshape(bias.shape[1], -1)
    z = experts.activated(y.astype(x.dtype), axis=2).reshape(*x.shape[:2], count, width)
    # A batched product, with the experts as the batch: XLA's CPU code has none of bfloat16 with a float32 result.
    y = jnp.einsum("btef,efd->bted", z, down.reshape(count, width, d)).astype(jnp.float32)
    return y if experts.down_bias is None else y + experts.down_bias[...].astype(jnp.float32)


def in_training(
    model: Transformer,
    parameters: Parameters = (),
    *,
    routes: Routes = "router",
    oracle: Oracle = "joint",
) -> Transformer:
    """The factored model with layers that compute all their experts; see `TrainingLayer`.

    Args:
        model: an untrained model from `griffin_jax.factor.factorize`: all its experts together are the teacher.
        parameters: parameters, as from `trainable`, that are used instead of the model's own; empty for its own.
        routes: which experts are summed for a layer's output.
        oracle: how the labels are found.
    """
    changed: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for number, layer in enumerate(changed.layers):
        teacher = layer.ff.experts
        own = with_parameters(layer.ff, parameters[number]) if parameters else layer.ff
        replaced = bool(parameters) and any(name.startswith("experts.") for name in parameters[number])
        layer.ff = TrainingLayer(own, teacher if replaced else None, routes, oracle)
    return changed


def trainable(model: Transformer, *, experts: bool) -> Parameters:
    """The parameters of a factored model that are trained, as float32.

    Args:
        model: a factored model.
        experts: whether to include the experts; otherwise only the routers are trained.

    Raises:
        ValueError: `experts` is true, and the model's weights are integers.
    """
    if experts and model.weights.quantised:
        raise ValueError(f"the experts are {model.weights}, and only floating weights are trained; train routers alone")
    names = [*ROUTER, *(f"experts.{name}" for name in EXPERTS if experts)]
    found = []
    for layer in model.layers:
        named = {name: _of_path(layer.ff, name) for name in names}
        # Copies, since a step donates the memory of its state, and the model is still needed as the teacher.
        found.append({name: jnp.array(p[...], jnp.float32) for name, p in named.items() if p is not None})
    return tuple(found)


def with_parameters(layer: RoutedFeedForward, parameters: Mapping[str, Array]) -> RoutedFeedForward:
    """The layer with these values of some parameters, rounded to the dtypes of the layer."""
    changed: RoutedFeedForward = jax.tree.map(lambda leaf: leaf, layer)
    for name, value in parameters.items():
        parameter = _of_path(changed, name)
        assert parameter is not None
        parameter[...] = value.astype(parameter.dtype)
    return changed


def _of_path(layer: RoutedFeedForward, name: str) -> nnx.Param | None:
    return functools.reduce(getattr, name.split("."), layer)  # pyright: ignore[reportReturnType]
