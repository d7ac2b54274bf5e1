"""Code World Model: Llama with windows on three of four layers."""

from __future__ import annotations

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.rotary import read_rotary, rotary_of
from griffin_jax.model.config import ModelConfig

DEFAULT_ROTARY = {
    "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "cwm"` describes."""
    attributes.expect(attention_bias=False, mlp_bias=False)
    attributes.fill("eos_token_id")
    fields = read_fields(
        attributes, "cwm", norm_eps=1e-5, num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072,
        bos_token_id=128_000, eos_token_id=[128_001, 128_008, 128_009],
    )  # fmt: skip
    sizes = fields["max_positions"], fields["head_dim"]
    if attributes.take("rope_parameters", dict) or attributes.take("rope_scaling", dict):
        rotary = read_rotary(attributes, *sizes, theta=1e6)
    else:
        attributes.expect(rope_theta=DEFAULT_ROTARY["rope_theta"])
        rotary = rotary_of(DEFAULT_ROTARY, attributes.where, *sizes, theta=1e6)
    window = attributes.take("sliding_window", int, default=8192)
    windowed = read_layer_types(attributes, [layer % 4 != 0 for layer in range(fields["num_layers"])])
    return ModelConfig(**fields, rotary=rotary, windows=windows_of(window, windowed))


FAMILY = Family(
    model_type="cwm",
    title="Code World Model",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
)
