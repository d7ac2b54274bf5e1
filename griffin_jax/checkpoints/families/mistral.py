"""Mistral: Llama with a window on every layer."""

from __future__ import annotations

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, windows_of
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "mistral"` describes."""
    fields = read_fields(attributes, "mistral", num_key_value_heads=8, bos_token_id=1, eos_token_id=2)
    # Mistral 7B v0.2 and later switch the window off with a null; left out, it is that of v0.1.
    window = attributes.take("sliding_window", int, default=None if attributes.is_null("sliding_window") else 4096)
    return ModelConfig(
        **fields,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        windows=windows_of(window, [True] * fields["num_layers"]),
    )


FAMILY = Family(
    model_type="mistral",
    title="Mistral 7B, Mistral Nemo",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    also_gguf=("llama",),
)
