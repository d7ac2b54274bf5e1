"""ERNIE 4.5 (dense): Llama with rotary embedding of neighbouring dimensions, and one switch for all biases."""

from __future__ import annotations

import dataclasses
from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "ernie4_5"` describes."""
    fields = read_fields(
        attributes, "ernie4_5", norm_eps=1e-5, tied_head=True, num_key_value_heads=2, head_dim=128,
        max_position_embeddings=131_072, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    rotary = read_rotary(attributes, fields["max_positions"], fields["head_dim"], theta=500_000.0)
    bias = attributes.take("use_bias", bool, default=False)
    return ModelConfig(
        **{**fields, "attention_bias": bias, "attention_out_bias": bias},
        rotary=dataclasses.replace(rotary, interleaved=True),
        ff_bias=bias,
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    return read_gguf_fields(attributes, tensors) | {"use_bias": "blk.0.attn_q.bias" in tensors.shapes}


FAMILY = Family(
    model_type="ernie4_5",
    title="ERNIE 4.5 (dense)",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("ernie4_5",), read_gguf_config, GGUF_RULES),
)
