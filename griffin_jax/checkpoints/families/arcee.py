"""Arcee AFM: Llama with a feed-forward layer of squared ReLUs without gate."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import (
    COPIES,
    IGNORED,
    PAIRED_GGUF_RULES,
    RULES,
    read_fields,
    read_gguf_fields,
)
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "arcee"` describes."""
    fields = read_fields(
        attributes, "arcee", norm_eps=1e-5, activation="relu2", max_position_embeddings=4096, bos_token_id=128_000,
        eos_token_id=128_001,
    )  # fmt: skip
    return ModelConfig(
        **fields,
        gated=False,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        ff_bias=attributes.take("mlp_bias", bool, default=False),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    return read_gguf_fields(attributes, tensors) | {
        "attention_bias": "blk.0.attn_q.bias" in tensors.shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors.shapes,
    }


FAMILY = Family(
    model_type="arcee",
    title="Arcee AFM 4.5B",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("arcee",), read_gguf_config, PAIRED_GGUF_RULES, ignored=(r"rope_freqs\.weight",)),
)
