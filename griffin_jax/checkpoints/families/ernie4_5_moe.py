"""ERNIE 4.5 with experts: chosen by their probabilities plus a number of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.families.qwen3_moe import EXPERT_RULES, STACKED_RULES
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.experts import read_gguf_experts, read_routing, shared_rules
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "ernie4_5_moe"` describes."""
    fields = read_fields(
        attributes, "ernie4_5_moe", norm_eps=1e-5, tied_head=True, num_key_value_heads=4,
        max_position_embeddings=131_072, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    rotary = read_rotary(attributes, fields["max_positions"], fields["head_dim"], theta=500_000.0)
    # A sum of probabilities is not less, and dense layers have no biases where those of experts cannot.
    attributes.expect(moe_norm_min=1e-12, use_bias=False)
    attributes.rename(num_experts="moe_num_experts", moe_k="num_experts_per_tok")
    width = attributes.count("moe_intermediate_size", 1536)
    routing = read_routing(
        attributes,
        count="moe_num_experts",
        width=width,
        experts=64,
        active=6,
        normalised=True,
        choice_bias=True,
        shared_width=width * attributes.take("moe_num_shared_experts", int, default=2),
    )
    dense = _dense_layers(attributes, fields["num_layers"])
    return ModelConfig(
        **fields,
        rotary=dataclasses.replace(rotary, interleaved=True),
        routing=dataclasses.replace(routing, dense_layers=dense),
    )


def _dense_layers(attributes: Attributes, layers: int) -> tuple[int, ...]:
    first = attributes.take("moe_layer_start_index", int, default=1)
    last = attributes.take("moe_layer_end_index", int, default=-1)
    last = layers - 1 if last == -1 else last
    step = attributes.count("moe_layer_interval", 1)
    return tuple(layer for layer in range(layers) if (layer + 1) % step or not first <= layer <= last)


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json. All layers from the first one with experts may have them."""
    # The converter divides numbers that have nothing to do with it; shared experts are as wide as the others.
    attributes.ignore("expert_shared_feed_forward_length")
    attributes.require("interleave_moe_layer_step", "leading_dense_block_count")
    return (
        read_gguf_fields(attributes, tensors)
        | read_gguf_experts(attributes, "moe_num_experts")
        | {
            "moe_intermediate_size": attributes.count("expert_feed_forward_length"),
            "moe_num_shared_experts": attributes.take("expert_shared_count", int, default=0),
            "moe_layer_interval": attributes.count("interleave_moe_layer_step"),
            "moe_layer_start_index": attributes.take("leading_dense_block_count", int),
        }
    )


OTHERS = shared_rules("mlp.shared_experts")
PUBLISHED_BIAS = layer_rules(
    "model.layers.{layer}.", ("mlp.moe_statics.e_score_correction_bias", "ff.choice_bias", "1 X -> X")
)
STACKED_BIAS = layer_rules(
    "model.layers.{layer}.", ("mlp.gate.moe_statics.e_score_correction_bias", "ff.choice_bias", "1 X -> X")
)

FAMILY = Family(
    model_type="ernie4_5_moe",
    title="ERNIE 4.5 with experts (21B-A3B, 300B-A47B)",
    read_config=read_config,
    rules=RULES + EXPERT_RULES + OTHERS + PUBLISHED_BIAS,
    alternatives=(RULES + STACKED_RULES + OTHERS + STACKED_BIAS,),
    prefix="model.",
    # What drafts the token after the next one, which transformers does not read either.
    ignored=(*IGNORED, r"model\.mtp_.*"),
    copies=COPIES,
    gguf=GgufFamily(("ernie4_5-moe",), read_gguf_config, GGUF_RULES),
)
