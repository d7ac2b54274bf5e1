"""dots.llm1: norms on each head's query and key, and experts chosen in the way of DeepSeek V3."""

from __future__ import annotations

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.families.qwen3 import HEAD_NORMS
from griffin_jax.checkpoints.families.qwen3_moe import EXPERT_RULES, STACKED_RULES
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.experts import CHOICE_BIAS, read_deepseek_routing, shared_rules
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "dots1"` describes."""
    fields = read_fields(attributes, "dots1", num_key_value_heads=32, max_position_embeddings=2048)
    layers = fields["num_layers"]
    window = attributes.take("sliding_window", int, default=None if attributes.is_null("sliding_window") else 4096)
    first = attributes.take("max_window_layers", int, default=62)
    windowed = read_layer_types(attributes, [layer >= first for layer in range(layers)])
    return ModelConfig(
        **fields,
        head_norm="shared",
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        windows=windows_of(window, windowed),
        routing=read_deepseek_routing(attributes, layers, width=1408, normalised=False, dense=0),
    )


OTHERS = HEAD_NORMS + CHOICE_BIAS + shared_rules("mlp.shared_experts")

FAMILY = Family(
    model_type="dots1",
    title="dots.llm1",
    read_config=read_config,
    rules=RULES + EXPERT_RULES + OTHERS,
    alternatives=(RULES + STACKED_RULES + OTHERS,),
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
)
