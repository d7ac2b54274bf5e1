"""Qwen1.5 and Qwen2 with routed experts, and one that every token reads through a gate of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.families.qwen3_moe import EXPERT_RULES, STACKED_RULES
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.experts import (
    read_dense_layers,
    read_gguf_experts,
    read_routing,
    shared_rules,
)
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "qwen2_moe"` describes."""
    fields = read_fields(attributes, "qwen2_moe", num_key_value_heads=16)
    fields |= {"attention_bias": attributes.take("qkv_bias", bool, default=True), "attention_out_bias": False}
    first = attributes.take("max_window_layers", int, default=28)
    window = attributes.take("sliding_window", int, default=4096)
    used = attributes.take("use_sliding_window", bool, default=False)
    every = range(fields["num_layers"])
    windowed = read_layer_types(attributes, [used and layer < first and layer % 2 == 0 for layer in every])
    routing = read_routing(
        attributes,
        count="num_experts",
        width=attributes.count("moe_intermediate_size", 1408),
        experts=60,
        active=4,
        normalised=attributes.take("norm_topk_prob", bool, default=False),
        shared_width=attributes.count("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    return ModelConfig(
        **fields,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        windows=windows_of(window if used else None, windowed),
        routing=dataclasses.replace(routing, dense_layers=read_dense_layers(attributes, fields["num_layers"])),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    values = read_gguf_fields(attributes, tensors) | read_gguf_experts(attributes, "num_experts")
    # llama.cpp's own defaults, for the first files.
    neurons, active = values["intermediate_size"], values["num_experts_per_tok"]
    return values | {
        "qkv_bias": "blk.0.attn_q.bias" in tensors.shapes,
        "moe_intermediate_size": attributes.take("expert_feed_forward_length", int, default=neurons // active),
        "shared_expert_intermediate_size": attributes.take("expert_shared_feed_forward_length", int, default=neurons),
        "norm_topk_prob": attributes.take("expert_weights_norm", bool, default=False),
    }


SHARED_RULES = shared_rules("mlp.shared_expert") + layer_rules(
    "model.layers.{layer}.", ("mlp.shared_expert_gate.weight", "ff.shared_gate", "1 D -> D")
)

FAMILY = Family(
    model_type="qwen2_moe",
    title="Qwen1.5-MoE, Qwen2-57B-A14B",
    read_config=read_config,
    rules=RULES + EXPERT_RULES + SHARED_RULES,
    alternatives=(RULES + STACKED_RULES + SHARED_RULES,),
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("qwen2moe",), read_gguf_config, GGUF_RULES),
)
