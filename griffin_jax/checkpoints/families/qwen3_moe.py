"""Qwen3 with routed experts, such as Qwen3-30B-A3B."""

from __future__ import annotations

import dataclasses
from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.families.qwen3 import GGUF_HEAD_NORMS, HEAD_NORMS
from griffin_jax.checkpoints.schema.attributes import Attributes, windows_of
from griffin_jax.checkpoints.schema.experts import (
    expert_rules,
    read_dense_layers,
    read_gguf_experts,
    read_routing,
    stacked_rules,
)
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig

EXPERT_RULES = expert_rules("mlp", "gate", "gate_proj", "up_proj", "down_proj")
STACKED_RULES = stacked_rules("mlp", "gate")


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "qwen3_moe"` describes."""
    fields = read_fields(attributes, "qwen3_moe", num_key_value_heads=4)
    window = attributes.take("sliding_window", int, default=4096)
    used = attributes.take("use_sliding_window", bool, default=False)
    # Written into every configuration, and read by no code.
    attributes.ignore("max_window_layers")
    attributes.rename(num_experts="num_local_experts")
    routing = read_routing(
        attributes,
        width=attributes.count("moe_intermediate_size", 768),
        experts=128,
        active=8,
        normalised=attributes.take("norm_topk_prob", bool, default=False),
    )
    return ModelConfig(
        **fields,
        head_norm="shared",
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        windows=windows_of(window if used else None, [True] * fields["num_layers"]),
        routing=dataclasses.replace(routing, dense_layers=read_dense_layers(attributes, fields["num_layers"])),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json. It divides the weights by their sum without being told."""
    attributes.require("expert_feed_forward_length")
    return (
        read_gguf_fields(attributes, tensors)
        | read_gguf_experts(attributes)
        | {
            "attention_bias": "blk.0.attn_q.bias" in tensors.shapes,
            "moe_intermediate_size": attributes.count("expert_feed_forward_length"),
            "norm_topk_prob": attributes.take("expert_weights_norm", bool, default=True),
        }
    )


FAMILY = Family(
    model_type="qwen3_moe",
    title="Qwen3 with experts (30B-A3B, 235B-A22B)",
    read_config=read_config,
    rules=RULES + HEAD_NORMS + EXPERT_RULES,
    alternatives=(RULES + HEAD_NORMS + STACKED_RULES,),
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("qwen3moe",), read_gguf_config, GGUF_RULES + GGUF_HEAD_NORMS),
)
