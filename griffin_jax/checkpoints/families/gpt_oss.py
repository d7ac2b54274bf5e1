"""gpt-oss: sinks in attention, windows on every other layer, experts with biases and a limited activation."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.experts import read_gguf_experts, read_routing
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary, rotary_of
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.feed_forward import QUICK

DEFAULT_ROTARY = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
THETA = 150_000.0


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "gpt_oss"` describes."""
    attributes.rename(num_experts="num_local_experts")
    # The activation is one of its own whatever `hidden_act` says, and two sizes are there twice.
    attributes.ignore("hidden_act", "experts_per_token", "initial_context_length")
    attributes.expect(swiglu_alpha=QUICK)
    fields = read_fields(
        attributes, "gpt_oss", norm_eps=1e-5, num_key_value_heads=8, head_dim=64, max_position_embeddings=131_072
    )
    has_bias = attributes.take("attention_bias", bool, default=True)
    sizes = fields["max_positions"], fields["head_dim"]
    if attributes.take("rope_parameters", dict) or attributes.take("rope_scaling", dict):
        rotary = read_rotary(attributes, *sizes, theta=THETA)
    else:
        theta = attributes.take("rope_theta", float, default=THETA)
        rotary = rotary_of(DEFAULT_ROTARY, attributes.where, *sizes, theta=theta)
    window = attributes.take("sliding_window", int, default=None if attributes.is_null("sliding_window") else 128)
    windowed = read_layer_types(attributes, [layer % 2 == 0 for layer in range(fields["num_layers"])])
    return ModelConfig(
        **fields | {"activation": "gelu_quick", "attention_bias": has_bias, "attention_out_bias": has_bias},
        attention_sinks=True,
        ff_bias=True,
        ff_clip=attributes.take("swiglu_limit", float, default=7.0),
        up_plus_one=True,
        rotary=rotary,
        windows=windows_of(window, windowed),
        # A softmax over the chosen experts is what is left of one over all, divided by its sum.
        routing=read_routing(
            attributes, width=fields["ff_width"], experts=128, active=4, normalised=True, router_bias=True
        ),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json. It does not say that YaRN's limits are not rounded."""
    values = read_gguf_fields(attributes, tensors)
    attributes.expect(expert_feed_forward_length=values["intermediate_size"])
    scaling = values.pop("rope_scaling")
    return (
        values
        | read_gguf_experts(attributes)
        | {
            "rope_scaling": None if scaling is None else scaling | {"truncate": False},
            "sliding_window": attributes.take("attention.sliding_window", int),
        }
    )


OTHERS = layer_rules(
    "model.layers.{layer}.",
    ("self_attn.sinks", "attention.sinks", "N"),
    ("mlp.router.weight", "ff.router", "X D"),
    ("mlp.router.bias", "ff.router_bias", "X"),
    ("mlp.experts.gate_up_proj_bias", "ff.experts.gate_bias", "X (M [1]+1) -> X M"),
    ("mlp.experts.gate_up_proj_bias", "ff.experts.up_bias", "X (M 1+[1]) -> X M"),
    ("mlp.experts.down_proj_bias", "ff.experts.down_bias", "X D"),
)
FLOATING = layer_rules(
    "model.layers.{layer}.mlp.experts.",
    ("gate_up_proj", "ff.experts.gate", "X D (M [1]+1) -> X M D"),
    ("gate_up_proj", "ff.experts.up", "X D (M 1+[1]) -> X M D"),
    ("down_proj", "ff.experts.down", "X M D"),
)
# The published tensors of four bits lie the other way, as their numbers share scales along what is summed over.
FOUR_BITS = layer_rules(
    "model.layers.{layer}.mlp.experts.",
    ("gate_up_proj_blocks", "ff.experts.gate", "X (M [1]+1) D -> X M D"),
    ("gate_up_proj_blocks", "ff.experts.up", "X (M 1+[1]) D -> X M D"),
    ("down_proj_blocks", "ff.experts.down", "X D M -> X M D"),
)
GGUF_OTHERS = layer_rules(
    "blk.{layer}.",
    ("attn_sinks.weight", "attention.sinks", "N"),
    ("post_attention_norm.weight", "ff_norm.scale", "D"),
)

FAMILY = Family(
    model_type="gpt_oss",
    title="gpt-oss (20B, 120B)",
    read_config=read_config,
    rules=RULES + OTHERS + FLOATING,
    alternatives=(RULES + OTHERS + FOUR_BITS,),
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("gpt-oss",), read_gguf_config, GGUF_RULES + GGUF_OTHERS),
    quantisations=("mxfp4",),
)
