"""InternLM3: Llama with other names for its biases."""

from __future__ import annotations

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "internlm3"` describes."""
    attributes.rename(qkv_bias="attention_bias", bias="mlp_bias")
    fields = read_fields(
        attributes, "internlm3", norm_eps=1e-5, num_key_value_heads=2, head_dim=128, max_position_embeddings=32_768,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    ff_bias = attributes.take("mlp_bias", bool, default=False)
    if fields["attention_bias"] != ff_bias:
        raise ValueError(
            f"{attributes.where}: qkv_bias is {fields['attention_bias']} and bias is {ff_bias}; only equal ones are "
            "supported, here and by transformers"
        )
    return ModelConfig(
        **fields, rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]), ff_bias=ff_bias
    )


FAMILY = Family(
    model_type="internlm3",
    title="InternLM3",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    also_gguf=("llama",),
)
