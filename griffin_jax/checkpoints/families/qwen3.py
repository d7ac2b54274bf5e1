"""Qwen3: Llama with a norm on each head's query and key."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.families.qwen2 import read_windows
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, TensorRule
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "qwen3"` describes."""
    fields = read_fields(attributes, "qwen3", num_key_value_heads=32, head_dim=128)
    return ModelConfig(
        **fields,
        head_norm="shared",
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        windows=read_windows(attributes, fields["num_layers"]),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    return read_gguf_fields(attributes, tensors) | {"attention_bias": "blk.0.attn_q.bias" in tensors.shapes}


HEAD_NORMS = (
    TensorRule("model.layers.{layer}.self_attn.q_norm.weight", "layers.{layer}.attention.query_norm.scale", "H"),
    TensorRule("model.layers.{layer}.self_attn.k_norm.weight", "layers.{layer}.attention.key_norm.scale", "H"),
)
GGUF_HEAD_NORMS = (
    TensorRule("blk.{layer}.attn_q_norm.weight", "layers.{layer}.attention.query_norm.scale", "H"),
    TensorRule("blk.{layer}.attn_k_norm.weight", "layers.{layer}.attention.key_norm.scale", "H"),
)

FAMILY = Family(
    model_type="qwen3",
    title="Qwen3 (dense)",
    read_config=read_config,
    rules=RULES + HEAD_NORMS,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("qwen3",), read_gguf_config, GGUF_RULES + GGUF_HEAD_NORMS),
)
