"""GLM-4-0414: GLM with norms before and after."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.gemma2 import GGUF_NORMS, norm_rules
from griffin_jax.checkpoints.families.glm import GATE_UP, read_glm_fields
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_gguf_fields
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, layer_rules
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "glm4"` describes."""
    return ModelConfig(**read_glm_fields(attributes, "glm4"), norm_placement="sandwich")


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    values = read_gguf_fields(attributes, tensors)
    return values | {
        # `read_gguf_sizes` leaves it out where whole heads turn.
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0),
        "attention_bias": "blk.0.attn_q.bias" in tensors.shapes,
    }


NORMS = norm_rules(
    "model.layers",
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm",
)  # fmt: skip
# Gate and up together, though the name tells only of the latter.
GGUF_GATE_UP = layer_rules(
    "blk.{layer}.",
    ("ffn_up.weight", "ff.gate", "([F]+F) D -> F D"),
    ("ffn_up.weight", "ff.up", "(F+[F]) D -> F D"),
)

FAMILY = Family(
    model_type="glm4",
    title="GLM-4-0414",
    read_config=read_config,
    rules=RULES + GATE_UP + NORMS,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("glm4",), read_gguf_config, GGUF_RULES + GGUF_GATE_UP + GGUF_NORMS),
)
