"""OLMo 1: Llama with LayerNorms that have neither scale nor bias."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, PAIRED_GGUF_RULES, RULES, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, read_gguf_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig

EPS = 1e-5


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "olmo"` describes."""
    fields = read_fields(attributes, "olmo", norm_eps=EPS, max_position_embeddings=2048, eos_token_id=50_279)
    return ModelConfig(
        **{**fields, "norm_eps": EPS},
        norm="layer",
        norm_scale=False,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        qkv_clip=attributes.take("clip_qkv", float),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    attributes.expect(**{"attention.layer_norm_epsilon": EPS})
    return read_gguf_sizes(attributes) | {
        "rope_theta": attributes.take("rope.freq_base", float, default=10_000.0),
        "clip_qkv": attributes.take("attention.clamp_kqv", float),
    }


FAMILY = Family(
    model_type="olmo",
    title="OLMo 1",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("olmo",), read_gguf_config, PAIRED_GGUF_RULES),
)
