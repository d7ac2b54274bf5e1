"""EXAONE 4: OLMo 2 with a norm for each head, and windows, without which layers have no rotary embedding."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.gemma2 import GGUF_NORMS, NORMS
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.families.qwen3 import GGUF_HEAD_NORMS, HEAD_NORMS
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "exaone4"` describes."""
    attributes.expect(attention_bias=False)
    fields = read_fields(
        attributes, "exaone4", norm_eps=1e-5, num_key_value_heads=32, max_position_embeddings=2048, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    layers = range(fields["num_layers"])
    window = attributes.take("sliding_window", int, default=None if attributes.is_null("sliding_window") else 4096)
    # A pattern of letters needs layer_types next to it, in transformers as well.
    pattern = attributes.take("sliding_window_pattern", int, str, default=4)
    interval = pattern if isinstance(pattern, int) else 0
    windowed = read_layer_types(attributes, [interval > 0 and (layer + 1) % interval != 0 for layer in layers])
    windowed = [has and window is not None for has in windowed]
    return ModelConfig(
        **fields,
        norm_placement="output",
        head_norm="shared",
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        unrotated_layers=() if window is None else tuple(layer for layer in layers if not windowed[layer]),
        windows=windows_of(window, windowed),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    values = read_gguf_fields(attributes, tensors)
    window = attributes.take("attention.sliding_window", int)
    layers = range(values["num_hidden_layers"])
    default = [window is not None and (layer + 1) % 4 != 0 for layer in layers]
    windowed = attributes.take("attention.sliding_window_pattern", list, default=default)
    return values | {
        "sliding_window": window,
        "layer_types": ["sliding_attention" if has else "full_attention" for has in windowed],
    }


FAMILY = Family(
    model_type="exaone4",
    title="EXAONE 4",
    read_config=read_config,
    rules=RULES + NORMS + HEAD_NORMS,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(
        ("exaone4",), read_gguf_config, GGUF_RULES + GGUF_NORMS + GGUF_HEAD_NORMS, ignored=(r"rope_freqs\.weight",)
    ),
)
