"""GLM-4-0414: GLM with norms before and after."""

from __future__ import annotations

from griffin_jax.checkpoints.families.gemma2 import GGUF_NORMS, norm_rules
from griffin_jax.checkpoints.families.glm import GATE_UP, GGUF_GATE_UP, read_gguf_config, read_glm_fields
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "glm4"` describes."""
    return ModelConfig(**read_glm_fields(attributes, "glm4"), norm_placement="sandwich")


NORMS = norm_rules(
    "model.layers",
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm",
)  # fmt: skip

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
