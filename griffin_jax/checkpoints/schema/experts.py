"""Routed experts in configurations and checkpoints, as families have them in common."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.layouts import TensorRule, layer_rules
from griffin_jax.model.config import Routing

TRAINING_ONLY = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "input_jitter_noise")
"""Attributes of routers that matter while a model is trained."""


def read_routing(
    attributes: Attributes,
    *,
    width: int,
    experts: int,
    active: int,
    count: str = "num_local_experts",
    **fields: Any,
) -> Routing:
    """How a model chooses experts, by the names that most configurations have.

    Args:
        attributes: attributes of the configuration.
        width: neurons of each expert.
        experts: default of the number of experts.
        active: default of `num_experts_per_tok`.
        count: name of the attribute with the number of experts.
        fields: further fields of `Routing`.
    """
    attributes.ignore(*TRAINING_ONLY)
    return Routing(attributes.count(count, experts), attributes.count("num_experts_per_tok", active), width, **fields)


SOFTMAX, SIGMOID = 1, 2
"""llama.cpp's numbers of what a router's logits become, `expert_gating_func`."""


def read_gguf_experts(attributes: Attributes, count: str = "num_local_experts") -> dict[str, Any]:
    """llama.cpp's metadata of experts that a softmax chooses, in the terms of config.json.

    Args:
        attributes: attributes of the metadata.
        count: name of the attribute with the number of experts.

    Raises:
        ValueError: a field is missing, or the experts are chosen or weighted in another way.
    """
    attributes.require("expert_count", "expert_used_count")
    attributes.expect(expert_gating_func=SOFTMAX, expert_weights_scale=1.0)
    return {count: attributes.count("expert_count"), "num_experts_per_tok": attributes.count("expert_used_count")}


def read_dense_layers(attributes: Attributes, layers: int) -> tuple[int, ...]:
    """The layers without experts, as Qwen's configurations list them.

    Raises:
        ValueError: the list has something else than numbers.
    """
    listed = attributes.take("mlp_only_layers", list, default=[])
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in listed):
        raise ValueError(f"{attributes.where}: mlp_only_layers must be numbers of layers, got {listed!r:.200}")
    step = attributes.count("decoder_sparse_step", 1)
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)


def expert_rules(module: str, router: str, gate: str, up: str, down: str) -> tuple[TensorRule, ...]:
    """Rules for layers whose experts each have tensors of their own.

    Args:
        module: path of the feed-forward module in a layer, such as `mlp`.
        router: name of the router in it.
        gate: name of the gate projection of an expert.
        up: name of its up projection.
        down: name of its down projection.
    """
    return layer_rules(
        "model.layers.{layer}.",
        (f"{module}.{router}.weight", "ff.router", "X D"),
        (f"{module}.experts.{{expert}}.{gate}.weight", "ff.experts.gate", "X M D"),
        (f"{module}.experts.{{expert}}.{up}.weight", "ff.experts.up", "X M D"),
        (f"{module}.experts.{{expert}}.{down}.weight", "ff.experts.down", "X D M -> X M D"),
    )


def stacked_rules(module: str, router: str) -> tuple[TensorRule, ...]:
    """Rules for layers whose experts' tensors are one of each kind, as transformers holds them since its version 5.

    It writes them like this where it is not asked for the names that a model was published with.

    Args:
        module: path of the feed-forward module in a layer, such as `mlp`.
        router: name of the router in it.
    """
    return layer_rules(
        f"model.layers.{{layer}}.{module}.",
        (f"{router}.weight", "ff.router", "X D"),
        ("experts.gate_up_proj", "ff.experts.gate", "X ([M]+M) D -> X M D"),
        ("experts.gate_up_proj", "ff.experts.up", "X (M+[M]) D -> X M D"),
        ("experts.down_proj", "ff.experts.down", "X D M -> X M D"),
    )
