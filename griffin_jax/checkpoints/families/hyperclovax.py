"""HyperCLOVA X SEED: Granite with norms after attention and feed-forward, too, and logits that are multiplied."""

from __future__ import annotations

from griffin_jax.checkpoints.families.gemma2 import norm_rules
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "hyperclovax"` describes."""
    fields = read_fields(attributes, "hyperclovax", max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)
    return ModelConfig(
        **fields,
        norm_placement="sandwich" if attributes.take("use_post_norm", bool, default=True) else "pre",
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        ff_bias=attributes.take("mlp_bias", bool, default=False),
        embedding_scale=attributes.take("embedding_multiplier", float, default=1.0),
        residual_scale=attributes.take("residual_multiplier", float, default=1.0),
        attention_scale=attributes.take("attention_multiplier", float, default=fields["head_dim"] ** -0.5),
        logit_scale=attributes.take("logits_scaling", float, default=1.0),
    )


NORMS = norm_rules("model.layers", "input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2")

FAMILY = Family(
    model_type="hyperclovax",
    title="HyperCLOVA X SEED",
    read_config=read_config,
    rules=RULES + NORMS,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
)
