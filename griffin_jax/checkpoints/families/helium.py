"""Helium 1: Llama with rotary embedding of neighbouring dimensions."""

from __future__ import annotations

import dataclasses

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "helium"` describes."""
    fields = read_fields(
        attributes, "helium", norm_eps=1e-8, num_key_value_heads=20, head_dim=128, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    rotary = read_rotary(attributes, fields["max_positions"], fields["head_dim"], theta=100_000.0)
    return ModelConfig(
        **{**fields, "attention_out_bias": False},
        rotary=dataclasses.replace(rotary, interleaved=True),
        ff_bias=attributes.take("mlp_bias", bool, default=False),
    )


FAMILY = Family(
    model_type="helium",
    title="Helium 1",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
)
