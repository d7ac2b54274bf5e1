"""SmolLM3: Llama in which some layers have no rotary embedding."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import (
    COPIES,
    IGNORED,
    PAIRED_GGUF_RULES,
    RULES,
    read_fields,
    read_gguf_fields,
)
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "smollm3"` describes."""
    fields = read_fields(
        attributes, "smollm3", num_key_value_heads=4, tied_head=True, bos_token_id=128_000, eos_token_id=128_001
    )
    layers = range(fields["num_layers"])
    interval = attributes.take("no_rope_layer_interval", int, default=4)
    # Despite its name, 1 is for the layers that have rotary embedding.
    rotated = attributes.take("no_rope_layers", list, default=[int((layer + 1) % interval != 0) for layer in layers])
    if len(rotated) != len(layers) or not set(rotated) <= {0, 1}:
        raise ValueError(f"{attributes.where}: no_rope_layers must be {len(layers)} times 0 or 1, got {rotated!r}")
    window = attributes.take("sliding_window", int)
    if not attributes.take("use_sliding_window", bool, default=False):
        window = None
    return ModelConfig(
        **fields,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"], theta=2_000_000.0),
        unrotated_layers=tuple(layer for layer in layers if not rotated[layer]),
        windows=windows_of(window, read_layer_types(attributes, [not has for has in rotated])),
        ff_bias=attributes.take("mlp_bias", bool, default=False),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json. There, every fourth layer has no rotary embedding."""
    return read_gguf_fields(attributes, tensors) | {"attention_bias": "blk.0.attn_output.bias" in tensors.shapes}


FAMILY = Family(
    model_type="smollm3",
    title="SmolLM3",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("smollm3",), read_gguf_config, PAIRED_GGUF_RULES),
)
