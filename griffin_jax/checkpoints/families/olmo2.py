"""OLMo 2: Llama with norms after attention and feed-forward instead of before, and over queries and keys."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.gemma2 import GGUF_NORMS, NORMS
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, TensorRule
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "olmo2"` describes."""
    fields = read_fields(attributes, "olmo2", norm_eps=1e-5, eos_token_id=50_279)
    return ModelConfig(
        **fields,
        norm_placement="output",
        head_norm="joint",
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json. With windows, it is OLMo 3."""
    values: dict[str, Any] = read_gguf_fields(attributes, tensors)
    values["attention_bias"] = "blk.0.attn_q.bias" in tensors.shapes
    window = attributes.take("attention.sliding_window", int)
    if not window:
        return values
    theta, scaling = values.pop("rope_theta"), values.pop("rope_scaling")
    local_theta = attributes.take("rope.freq_base_swa", float, default=theta)
    windowed = attributes.take("attention.sliding_window_pattern", list)
    if windowed is None:
        windowed = [(layer + 1) % 4 != 0 for layer in range(values["num_hidden_layers"])]
    return values | {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": ["sliding_attention" if has else "full_attention" for has in windowed],
        "rope_parameters": {
            "full_attention": {**(scaling or {}), "rope_theta": theta},
            "sliding_attention": {"rope_theta": local_theta},
        },
    }


def _head_norms(query: str, key: str) -> tuple[TensorRule, ...]:
    return (
        TensorRule(query, "layers.{layer}.attention.query_norm.scale", "(N H) -> N 1 H"),
        TensorRule(key, "layers.{layer}.attention.key_norm.scale", "(G H) -> G 1 H"),
    )


HEAD_NORMS = _head_norms("model.layers.{layer}.self_attn.q_norm.weight", "model.layers.{layer}.self_attn.k_norm.weight")
GGUF_HEAD_NORMS = _head_norms("blk.{layer}.attn_q_norm.weight", "blk.{layer}.attn_k_norm.weight")

FAMILY = Family(
    model_type="olmo2",
    title="OLMo 2",
    read_config=read_config,
    rules=RULES + NORMS + HEAD_NORMS,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("olmo2",), read_gguf_config, GGUF_RULES + GGUF_NORMS + GGUF_HEAD_NORMS),
)
