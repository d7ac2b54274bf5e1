"""Gemma 2: Gemma with norms before and after, soft caps, and a window on every other layer."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.gemma import DEFAULTS, scaled_embedding, without_one
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, TensorRule
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "gemma2"` describes."""
    fields = read_fields(attributes, "gemma2", num_key_value_heads=4, activation_name="hidden_activation", **DEFAULTS)
    attributes.take("hidden_act", str)  # its modules read hidden_activation only
    window = attributes.take("sliding_window", int, default=None if attributes.is_null("sliding_window") else 4096)
    windowed = read_layer_types(attributes, [layer % 2 == 0 for layer in range(fields["num_layers"])])
    return ModelConfig(
        **fields,
        **scaled_embedding(fields["width"]),
        norm_placement="sandwich",
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        windows=windows_of(window, windowed),
        attention_scale=attributes.take("query_pre_attn_scalar", float, default=256.0) ** -0.5,
        attention_softcap=_softcap(attributes, "attn_logit_softcapping", 50.0),
        logit_softcap=_softcap(attributes, "final_logit_softcapping", 30.0),
    )


def _softcap(attributes: Attributes, name: str, default: float) -> float | None:
    return attributes.take(name, float, default=None if attributes.is_null(name) else default)


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json, with the defaults of its loader."""
    values = read_gguf_fields(attributes, tensors)
    return values | {
        "sliding_window": attributes.take("attention.sliding_window", int, default=4096),
        "attn_logit_softcapping": attributes.take("attn_logit_softcapping", float, default=50.0),
        "final_logit_softcapping": attributes.take("final_logit_softcapping", float, default=30.0),
        "query_pre_attn_scalar": query_scalar(values, deepest=46),
    }


def query_scalar(values: dict[str, Any], deepest: int) -> int:
    """`query_pre_attn_scalar`, which GGUF files lack: the head size, except in the largest model (`deepest` layers)."""
    if values["num_hidden_layers"] == deepest:
        return values["hidden_size"] // values["num_attention_heads"]
    return values["head_dim"]


def norm_rules(prefix: str, *names: str) -> tuple[TensorRule, ...]:
    """Rules for the norms before and after attention, and before and after the feed-forward layer."""
    paths = ("attention_norm", "attention_out_norm", "ff_norm", "ff_out_norm")
    return tuple(
        TensorRule(prefix + ".{layer}." + name + ".weight", "layers.{layer}." + path + ".scale", "D")
        for name, path in zip(names, paths, strict=True)
    )


# Of several rules for the same parameter the last one counts: post_attention_layernorm is another norm than Llama's.
NORMS = norm_rules(
    "model.layers",
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
GGUF_NORMS = norm_rules("blk", "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")

FAMILY = Family(
    model_type="gemma2",
    title="Gemma 2",
    read_config=read_config,
    rules=RULES + NORMS,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("gemma2",), read_gguf_config, without_one(GGUF_RULES + GGUF_NORMS)),
)
