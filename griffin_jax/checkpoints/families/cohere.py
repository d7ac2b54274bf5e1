"""Command R and Aya: attention and feed-forward in parallel after one LayerNorm without bias, and scaled logits."""

from __future__ import annotations

import dataclasses
from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, read_gguf_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, TensorRule
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig

LAYER = "layers.{layer}.attention."


def read_cohere_fields(attributes: Attributes, family: str, theta: float) -> dict[str, Any]:
    """The fields that both generations read in the same way, as fields of `ModelConfig`."""
    fields = read_fields(
        attributes, family, tied_head=True, max_position_embeddings=8192, bos_token_id=5, eos_token_id=255_001
    )
    rotary = read_rotary(attributes, fields["max_positions"], fields["head_dim"], theta=theta)
    return fields | {
        "norm": "layer",
        "norm_eps": attributes.take("layer_norm_eps", float, default=1e-5),
        "parallel": True,
        "shared_norm": True,
        "rotary": dataclasses.replace(rotary, interleaved=True),
        "logit_scale": attributes.take("logit_scale", float, default=0.0625),
    }


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "cohere"` describes."""
    return ModelConfig(
        **read_cohere_fields(attributes, "cohere", theta=500_000.0),
        head_norm="own" if attributes.take("use_qk_norm", bool, default=False) else "none",
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    attributes.expect(**{"rope.scaling.type": "none"})
    return read_gguf_sizes(attributes) | {
        "layer_norm_eps": attributes.take("attention.layer_norm_epsilon", float),
        "rope_theta": attributes.take("rope.freq_base", float, default=10_000.0),
        "logit_scale": attributes.take("logit_scale", float, default=1.0),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors.shapes,
    }


HEAD_NORMS = (
    TensorRule("model.layers.{layer}.self_attn.q_norm.weight", LAYER + "query_norm.scale", "N H -> N 1 H"),
    TensorRule("model.layers.{layer}.self_attn.k_norm.weight", LAYER + "key_norm.scale", "G H -> G 1 H"),
)
GGUF_HEAD_NORMS = (
    TensorRule("blk.{layer}.attn_q_norm.weight", LAYER + "query_norm.scale", "N H -> N 1 H"),
    TensorRule("blk.{layer}.attn_k_norm.weight", LAYER + "key_norm.scale", "G H -> G 1 H"),
)

FAMILY = Family(
    model_type="cohere",
    title="Command R, Command R+, Aya 23, Aya Expanse",
    read_config=read_config,
    rules=RULES + HEAD_NORMS,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("command-r",), read_gguf_config, GGUF_RULES + GGUF_HEAD_NORMS),
)
