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


def read_deepseek_routing(
    attributes: Attributes, layers: int, *, width: int, normalised: bool, dense: int, **defaults: int
) -> Routing:
    """How a model chooses experts in the way of DeepSeek V3, by the names that such configurations have.

    Args:
        attributes: attributes of the configuration.
        layers: number of layers.
        width: default of `moe_intermediate_size`.
        normalised: default of `norm_topk_prob`.
        dense: default of `first_k_dense_replace`.
        defaults: those of other numbers, where there are any.
    """
    attributes.rename(num_local_experts="n_routed_experts")
    attributes.ignore(*TRAINING_ONLY)
    attributes.expect(scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    counts = {
        name: attributes.count(name, defaults.get(name))
        for name in ("n_routed_experts", "num_experts_per_tok", "n_shared_experts")
    }
    width = attributes.count("moe_intermediate_size", width)
    groups = attributes.count("n_group", 1)
    return Routing(
        counts["n_routed_experts"],
        counts["num_experts_per_tok"],
        width,
        scores="sigmoid",
        normalised=attributes.take("norm_topk_prob", bool, default=normalised),
        scale=attributes.take("routed_scaling_factor", float, default=1.0),
        choice_bias=True,
        groups=groups,
        active_groups=attributes.count("topk_group", 1),
        group_best=2 if groups > 1 else 1,
        shared_width=width * counts["n_shared_experts"],
        dense_layers=tuple(range(min(attributes.take("first_k_dense_replace", int, default=dense), layers))),
    )


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


def read_gguf_deepseek(attributes: Attributes) -> dict[str, Any]:
    """llama.cpp's metadata of experts that are chosen in the way of DeepSeek V3, in the terms of config.json.

    Raises:
        ValueError: a field is missing, or the experts are chosen in another way.
    """
    attributes.expect(expert_gating_func=SIGMOID)
    return {
        "n_routed_experts": attributes.count("expert_count"),
        "num_experts_per_tok": attributes.count("expert_used_count"),
        "moe_intermediate_size": attributes.count("expert_feed_forward_length"),
        "n_shared_experts": attributes.count("expert_shared_count"),
        "first_k_dense_replace": attributes.take("leading_dense_block_count", int, default=0),
        "n_group": attributes.count("expert_group_count", 1),
        "topk_group": attributes.count("expert_group_used_count", 1),
        "norm_topk_prob": attributes.take("expert_weights_norm", bool, default=False),
        "routed_scaling_factor": attributes.take("expert_weights_scale", float, default=1.0),
    }


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


def shared_rules(module: str) -> tuple[TensorRule, ...]:
    """Rules for experts that every token reads, which are one feed-forward layer.

    Args:
        module: path of that layer in a layer of the model, such as `mlp.shared_experts`.
    """
    return layer_rules(
        f"model.layers.{{layer}}.{module}.",
        ("gate_proj.weight", "ff.shared.gate", "S D"),
        ("up_proj.weight", "ff.shared.up", "S D"),
        ("down_proj.weight", "ff.shared.down", "D S -> S D"),
    )


CHOICE_BIAS = layer_rules("model.layers.{layer}.", ("mlp.gate.e_score_correction_bias", "ff.choice_bias", "X"))


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
