"""OLMoE: norms over all queries and keys, and 64 experts in each layer."""

from __future__ import annotations

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.families.olmo2 import HEAD_NORMS
from griffin_jax.checkpoints.families.qwen3_moe import EXPERT_RULES, STACKED_RULES
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.experts import read_routing
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "olmoe"` describes."""
    fields = read_fields(attributes, "olmoe", norm_eps=1e-5, eos_token_id=50_279)
    # OLMo 1 clips before its norms, which it does not have here; OLMoE would clip after them.
    attributes.expect(clip_qkv=None)
    routing = read_routing(
        attributes,
        count="num_experts",
        width=fields["ff_width"],
        experts=64,
        active=8,
        normalised=attributes.take("norm_topk_prob", bool, default=False),
    )
    return ModelConfig(
        **fields,
        head_norm="joint",
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        routing=routing,
    )


FAMILY = Family(
    model_type="olmoe",
    title="OLMoE",
    read_config=read_config,
    rules=RULES + HEAD_NORMS + EXPERT_RULES,
    alternatives=(RULES + HEAD_NORMS + STACKED_RULES,),
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
)
