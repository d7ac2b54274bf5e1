"""Ministral 8B: Mistral with a window on some layers."""

from __future__ import annotations

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "ministral"` describes."""
    attributes.expect(attention_bias=False)
    fields = read_fields(
        attributes, "ministral", num_key_value_heads=8, max_position_embeddings=131_072, bos_token_id=1, eos_token_id=2
    )
    window = attributes.take("sliding_window", int, default=None if attributes.is_null("sliding_window") else 4096)
    windowed = read_layer_types(attributes, [window is not None] * fields["num_layers"])
    return ModelConfig(
        **fields,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        windows=windows_of(window, windowed),
    )


FAMILY = Family(
    model_type="ministral",
    title="Ministral 8B",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
)
