"""Gemma 3, the text models: norms on queries and keys, and windows with a rotary embedding of their own."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.gemma import DEFAULTS, scaled_embedding, without_one
from griffin_jax.checkpoints.families.gemma2 import GGUF_NORMS, NORMS, query_scalar
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.families.qwen3 import GGUF_HEAD_NORMS, HEAD_NORMS
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
from griffin_jax.checkpoints.schema.rotary import rotary_of
from griffin_jax.model.config import ModelConfig, Rotary

GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
SIZES = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131_072,
}  # fmt: skip
"""Default sizes, of which Gemma 3 4B to 27B leave out some."""


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "gemma3_text"` describes."""
    fields = read_fields(attributes, "gemma3_text", activation_name="hidden_activation", **SIZES, **DEFAULTS)
    attributes.take("hidden_act", str)  # its modules read hidden_activation only
    window = attributes.take("sliding_window", int, default=None if attributes.is_null("sliding_window") else 4096)
    pattern = attributes.take("sliding_window_pattern", int, default=6)
    pattern = attributes.take("_sliding_window_pattern", int, default=pattern)
    if pattern < 1:
        raise ValueError(f"{attributes.where}: sliding_window_pattern must be at least 1, got {pattern}")
    windowed = read_layer_types(attributes, [(layer + 1) % pattern != 0 for layer in range(fields["num_layers"])])
    local_theta = attributes.take("rope_local_base_freq", float, default=LOCAL_THETA)
    rotary, local = read_rotaries(
        attributes, fields["max_positions"], fields["head_dim"], theta=GLOBAL_THETA, local_theta=local_theta
    )
    windows = windows_of(window, windowed)
    return ModelConfig(
        **fields,
        **scaled_embedding(fields["width"]),
        norm_placement="sandwich",
        head_norm="shared",
        rotary=rotary,
        local_rotary=local if windows else None,
        windows=windows,
        attention_scale=attributes.take("query_pre_attn_scalar", float, default=256.0) ** -0.5,
        logit_softcap=attributes.take("final_logit_softcapping", float),
    )


def read_rotaries(
    attributes: Attributes, max_positions: int, head_dim: int, *, theta: float, local_theta: float
) -> tuple[Rotary, Rotary]:
    """The rotary embeddings of layers without and with a window; only the former are ever scaled by `rope_scaling`.

    Args:
        attributes: attributes of the configuration.
        max_positions: the context, in tokens.
        head_dim: H, the size of a head.
        theta: default base of layers without a window.
        local_theta: default base of layers with a window.

    Raises:
        ValueError: a kind is not supported, or an attribute is missing or not understood.
    """
    theta = attributes.take("rope_theta", float, default=theta)
    scaling = attributes.take("rope_scaling", dict, default={})
    parameters = attributes.take("rope_parameters", dict, default={})
    if unknown := parameters.keys() - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{attributes.where}: rope_parameters must be for full_attention and sliding_attention, got {unknown}"
        )
    where = f"{attributes.where}: rotary embedding"
    whole = {**(parameters.get("full_attention") or {}), **scaling}
    local = parameters.get("sliding_attention") or {}
    return (
        rotary_of(whole, where, max_positions, head_dim, theta=theta),
        rotary_of(local, f"{where} of windowed layers", max_positions, head_dim, theta=local_theta),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json, with the defaults of its loader."""
    values = read_gguf_fields(attributes, tensors)
    return values | {
        # Left out, no layer has a window.
        "sliding_window": attributes.take("attention.sliding_window", int),
        "rope_local_base_freq": attributes.take("rope.freq_base_swa", float, default=LOCAL_THETA),
        "final_logit_softcapping": attributes.take("final_logit_softcapping", float),
        "query_pre_attn_scalar": query_scalar(values, deepest=62),
    }


FAMILY = Family(
    model_type="gemma3_text",
    title="Gemma 3 (text models, such as 1B)",
    read_config=read_config,
    rules=RULES + NORMS + HEAD_NORMS,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("gemma3",), read_gguf_config, without_one(GGUF_RULES + GGUF_NORMS + GGUF_HEAD_NORMS)),
)
