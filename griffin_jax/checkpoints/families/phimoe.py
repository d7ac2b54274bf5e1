"""Phi-3.5-MoE: LayerNorm, biases, LongRoPE, and experts that SparseMixer chooses one after the other."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields
from griffin_jax.checkpoints.families.phi3 import ROTARY_FACTORS, read_gguf_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, windows_of
from griffin_jax.checkpoints.schema.experts import expert_rules, read_gguf_experts, read_routing, stacked_rules
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, TensorRule
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig

ROTARY_KINDS = {"default": "default", "longrope": "longrope"}


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "phimoe"` describes."""
    fields = read_fields(
        attributes, "phimoe", norm_eps=1e-5, num_key_value_heads=8, max_position_embeddings=131_072, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    # SparseMixer chooses two.
    attributes.expect(num_experts_per_tok=2)
    routing = read_routing(
        attributes,
        width=fields["ff_width"],
        experts=16,
        active=2,
        scores="sparsemixer",
        # In training logits are disturbed by this part; logits count as near if they can change places.
        tolerance=2 * attributes.take("router_jitter_noise", float, default=0.01),
    )
    return ModelConfig(
        **fields,
        norm="layer",
        norm_bias=True,
        head_bias=attributes.take("lm_head_bias", bool, default=False),
        rotary=read_rotary(
            attributes, fields["max_positions"], fields["head_dim"], theta=1e6, kinds=ROTARY_KINDS, magnitudes=True
        ),
        windows=windows_of(attributes.take("sliding_window", int), [True] * fields["num_layers"]),
        routing=routing,
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    values = read_gguf_fields(attributes, tensors) | read_gguf_experts(attributes)
    if scaling := values["rope_scaling"]:
        magnitude = scaling.pop("attention_factor")
        scaling |= {"short_mscale": magnitude, "long_mscale": magnitude}
    return values | {
        "attention_bias": "blk.0.attn_q.bias" in tensors.shapes,
        "lm_head_bias": "output.bias" in tensors.shapes,
    }


BIASES = (
    TensorRule("lm_head.bias", "head_bias", "V"),
    TensorRule("model.norm.bias", "norm.bias", "D"),
    TensorRule("model.layers.{layer}.input_layernorm.bias", "layers.{layer}.attention_norm.bias", "D"),
    TensorRule("model.layers.{layer}.post_attention_layernorm.bias", "layers.{layer}.ff_norm.bias", "D"),
)

FAMILY = Family(
    model_type="phimoe",
    title="Phi-3.5-MoE",
    read_config=read_config,
    rules=RULES + BIASES + expert_rules("block_sparse_moe", "gate", "w1", "w3", "w2"),
    alternatives=(RULES + BIASES + stacked_rules("mlp", "router"),),
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(
        ("phimoe",),
        read_gguf_config,
        (*GGUF_RULES, TensorRule("output.bias", "head_bias", "V")),
        ignored=ROTARY_FACTORS,
    ),
)
