"""Qwen2 and Qwen2.5: Llama with biases on query, key and value, and in some a window on the upper layers."""

from __future__ import annotations

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.family import Family, GgufFamily
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "qwen2"` describes."""
    fields = read_fields(attributes, "qwen2", num_key_value_heads=32)
    # Not an option here: query, key and value always have biases, the output never.
    return ModelConfig(
        **{**fields, "attention_bias": True, "attention_out_bias": False},
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        windows=read_windows(attributes, fields["num_layers"]),
    )


def read_windows(attributes: Attributes, num_layers: int) -> tuple[int, ...]:
    """Windows of the layers from `max_window_layers` up, if they are switched on."""
    first = attributes.take("max_window_layers", int, default=28)
    window = attributes.take("sliding_window", int, default=None if attributes.is_null("sliding_window") else 4096)
    used = attributes.take("use_sliding_window", bool, default=False)
    types = read_layer_types(attributes, [layer >= first for layer in range(num_layers)])
    return windows_of(window if used else None, types)


FAMILY = Family(
    model_type="qwen2",
    title="Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("qwen2",), read_gguf_fields, GGUF_RULES),
)
