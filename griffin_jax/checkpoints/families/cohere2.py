"""Command R7B and Command A: Command R with windows, and rotary embedding on the layers that have one."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families import cohere
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES
from griffin_jax.checkpoints.schema.attributes import Attributes, read_layer_types, windows_of
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
from griffin_jax.model.config import ModelConfig

PATTERN = 4


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "cohere2"` describes."""
    fields = cohere.read_cohere_fields(attributes, "cohere2", theta=10_000.0)
    window = attributes.take("sliding_window", int, default=None if attributes.is_null("sliding_window") else 4096)
    pattern = attributes.take("sliding_window_pattern", int, default=PATTERN)
    if pattern < 1:
        raise ValueError(f"{attributes.where}: sliding_window_pattern must be at least 1, got {pattern}")
    layers = range(fields["num_layers"])
    windowed = read_layer_types(attributes, [(layer + 1) % pattern != 0 for layer in layers])
    windows = windows_of(window, windowed)
    return ModelConfig(
        **fields,
        unrotated_layers=tuple(layer for layer in layers if not (windows and windowed[layer])),
        windows=windows,
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    values = cohere.read_gguf_config(attributes, tensors)
    del values["use_qk_norm"]
    return values | {"sliding_window": attributes.take("attention.sliding_window", int)}


FAMILY = Family(
    model_type="cohere2",
    title="Command R7B, Command A, Tiny Aya",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("cohere2",), read_gguf_config, GGUF_RULES),
)
