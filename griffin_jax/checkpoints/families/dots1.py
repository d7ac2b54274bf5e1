"""dots.llm1: norms on each head's query and key, and experts chosen in the way of DeepSeek V3."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.families.qwen3 import GGUF_HEAD_NORMS, HEAD_NORMS
from griffin_jax.checkpoints.families.qwen3_moe import EXPERT_RULES, STACKED_RULES
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.experts import (
    CHOICE_BIAS,
    read_deepseek_routing,
    read_gguf_deepseek,
    shared_rules,
)
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "dots1"` describes."""
    fields = read_fields(attributes, "dots1", num_key_value_heads=32, max_position_embeddings=2048)
    layers = fields["num_layers"]
    window = attributes.take("sliding_window", int, default=None if attributes.is_null("sliding_window") else 4096)
    first = attributes.take("max_window_layers", int, default=62)
    windowed = read_layer_types(attributes, [layer >= first for layer in range(layers)])
    return ModelConfig(
        **fields,
        head_norm="shared",
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        windows=windows_of(window, windowed),
        routing=read_deepseek_routing(attributes, layers, width=1408, normalised=False, dense=0),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json. It has no windows."""
    return (
        read_gguf_fields(attributes, tensors)
        | read_gguf_deepseek(attributes)
        | {"attention_bias": "blk.0.attn_q.bias" in tensors.shapes, "sliding_window": None}
    )


OTHERS = HEAD_NORMS + CHOICE_BIAS + shared_rules("mlp.shared_experts")

FAMILY = Family(
    model_type="dots1",
    title="dots.llm1",
    read_config=read_config,
    rules=RULES + EXPERT_RULES + OTHERS,
    alternatives=(RULES + STACKED_RULES + OTHERS,),
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("dots1",), read_gguf_config, GGUF_RULES + GGUF_HEAD_NORMS),
)
