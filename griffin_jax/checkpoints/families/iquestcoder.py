"""IQuest-Coder: Llama with other defaults."""

from __future__ import annotations

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "iquestcoder"` describes."""
    # Transformers refuses others, too.
    attributes.expect(clip_qkv=None, use_sliding_window=False)
    fields = read_fields(
        attributes, "iquestcoder", norm_eps=1e-5, num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return ModelConfig(
        **fields,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        ff_bias=attributes.take("mlp_bias", bool, default=False),
    )


FAMILY = Family(
    model_type="iquestcoder",
    title="IQuest-Coder",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    also_gguf=("llama",),
)
