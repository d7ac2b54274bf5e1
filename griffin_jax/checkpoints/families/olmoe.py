"""OLMoE: norms over all queries and keys, and 64 experts in each layer."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.families.olmo2 import GGUF_HEAD_NORMS, HEAD_NORMS
from griffin_jax.checkpoints.families.qwen3_moe import EXPERT_RULES, STACKED_RULES
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.experts import read_gguf_experts, read_routing
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
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


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    norm = {"norm_topk_prob": attributes.take("expert_weights_norm", bool, default=False)}
    return read_gguf_fields(attributes, tensors) | read_gguf_experts(attributes, "num_experts") | norm


FAMILY = Family(
    model_type="olmoe",
    title="OLMoE",
    read_config=read_config,
    rules=RULES + HEAD_NORMS + EXPERT_RULES,
    alternatives=(RULES + HEAD_NORMS + STACKED_RULES,),
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("olmoe",), read_gguf_config, GGUF_RULES + GGUF_HEAD_NORMS),
)
