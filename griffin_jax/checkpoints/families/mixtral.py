"""Mixtral: Mistral with eight experts, of which each token chooses two."""

from __future__ import annotations

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, windows_of
from griffin_jax.checkpoints.schema.experts import expert_rules, read_routing, stacked_rules
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "mixtral"` describes."""
    fields = read_fields(attributes, "mixtral", norm_eps=1e-5, num_key_value_heads=8, bos_token_id=1, eos_token_id=2)
    window = attributes.take("sliding_window", int)
    return ModelConfig(
        **fields,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"], theta=1e6),
        windows=windows_of(window, [True] * fields["num_layers"]),
        routing=read_routing(attributes, width=fields["ff_width"], experts=8, active=2, normalised=True),
    )


FAMILY = Family(
    model_type="mixtral",
    title="Mixtral 8x7B, 8x22B",
    read_config=read_config,
    rules=RULES + expert_rules("block_sparse_moe", "gate", "w1", "w3", "w2"),
    alternatives=(RULES + stacked_rules("mlp", "gate"),),
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    also_gguf=("llama",),
)
