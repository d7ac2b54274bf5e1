"""Jais 2: Llama with LayerNorms and a feed-forward layer of squared ReLUs without gate."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.families.starcoder2 import NORM_BIASES
from griffin_jax.checkpoints.schema.attributes import Attributes, read_gguf_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "jais2"` describes."""
    fields = read_fields(
        attributes, "jais2", activation="relu2", max_position_embeddings=8192, bos_token_id=0, eos_token_id=150_024
    )
    bias = attributes.take("attention_bias", bool, default=True)
    eps = attributes.take("layer_norm_eps", float, default=1e-5)
    return ModelConfig(
        **{**fields, "norm_eps": eps, "attention_bias": bias, "attention_out_bias": bias},
        gated=False,
        norm="layer",
        norm_bias=True,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        ff_bias=attributes.take("mlp_bias", bool, default=True),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    return read_gguf_sizes(attributes) | {
        "layer_norm_eps": attributes.take("attention.layer_norm_epsilon", float),
        "rope_theta": attributes.take("rope.freq_base", float, default=10_000.0),
        "attention_bias": "blk.0.attn_q.bias" in tensors.shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors.shapes,
    }


FAMILY = Family(
    model_type="jais2",
    title="Jais 2",
    read_config=read_config,
    rules=RULES + NORM_BIASES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("jais2",), read_gguf_config, GGUF_RULES),
)
