"""Seed-OSS: Llama with a switch of its own for the bias of the attention's output."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, TensorRule
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "seed_oss"` describes."""
    fields = read_fields(
        attributes, "seed_oss", num_key_value_heads=8, head_dim=128, max_position_embeddings=524_288, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    attributes.ignore("residual_dropout")
    return ModelConfig(
        **fields
        | {
            "attention_bias": attributes.take("attention_bias", bool, default=True),
            "attention_out_bias": attributes.take("attention_out_bias", bool, default=False),
        },
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        ff_bias=attributes.take("mlp_bias", bool, default=False),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    return read_gguf_fields(attributes, tensors) | {
        "attention_bias": "blk.0.attn_q.bias" in tensors.shapes,
        "attention_out_bias": "blk.0.attn_output.bias" in tensors.shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors.shapes,
    }


# The norm before the feed-forward layer has the name that it has in the checkpoint.
GGUF_NORM = TensorRule("blk.{layer}.post_attention_norm.weight", "layers.{layer}.ff_norm.scale", "D")

FAMILY = Family(
    model_type="seed_oss",
    title="Seed-OSS",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("seed_oss",), read_gguf_config, (*GGUF_RULES, GGUF_NORM)),
)
