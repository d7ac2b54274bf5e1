"""GLM-4-9B and GLM-Edge: Llama with rotary embedding of neighbouring dimensions in half of each head."""

from __future__ import annotations

import dataclasses
from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import FUSED_GGUF_RULES, GGUF_RULES, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig

GATE_UP = layer_rules(
    "model.layers.{layer}.",
    ("mlp.gate_up_proj.weight", "ff.gate", "([F]+F) D -> F D"),
    ("mlp.gate_up_proj.weight", "ff.up", "(F+[F]) D -> F D"),
)


def read_glm_fields(attributes: Attributes, family: str) -> dict[str, Any]:
    """The fields that GLM and GLM-4-0414 read in the same way, as fields of `ModelConfig`."""
    attributes.fill("eos_token_id")
    fields = read_fields(
        attributes, family, norm_eps=1.5625e-07, num_key_value_heads=2, head_dim=128, max_position_embeddings=131_072,
        eos_token_id=[151_329, 151_336, 151_338],
    )  # fmt: skip
    rotary = read_rotary(attributes, fields["max_positions"], fields["head_dim"], share=0.5)
    return fields | {
        "attention_bias": attributes.take("attention_bias", bool, default=True),
        "attention_out_bias": False,
        "rotary": dataclasses.replace(rotary, interleaved=True),
    }


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "glm"` describes."""
    return ModelConfig(**read_glm_fields(attributes, "glm"))


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    values = read_gguf_fields(attributes, tensors)
    return values | {
        # `read_gguf_sizes` leaves it out where whole heads turn.
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0),
        "attention_bias": not tensors.shapes.keys().isdisjoint({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}),
    }


# Gate and up together, though the name tells only of the latter.
GGUF_GATE_UP = layer_rules(
    "blk.{layer}.",
    ("ffn_up.weight", "ff.gate", "([F]+F) D -> F D"),
    ("ffn_up.weight", "ff.up", "(F+[F]) D -> F D"),
)

FAMILY = Family(
    model_type="glm",
    title="GLM-4-9B, GLM-Edge",
    read_config=read_config,
    rules=RULES + GATE_UP,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    # Queries, keys and values are one tensor in files of models published as ChatGLM, in the same form but for names.
    gguf=GgufFamily(
        ("chatglm",), read_gguf_config, GGUF_RULES + GGUF_GATE_UP, alternatives=(FUSED_GGUF_RULES + GGUF_GATE_UP,)
    ),
)
