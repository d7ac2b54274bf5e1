"""Ministral 3: Mistral with YaRN and queries that grow with their position."""

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
from griffin_jax.checkpoints.schema.attributes import Attributes, windows_of
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.rotary import read_rotary, rotary_of
from griffin_jax.model.config import ModelConfig

GROWTH = "llama_4_scaling_beta"
DEFAULT_ROTARY = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, GROWTH: 0.1,
}  # fmt: skip


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "ministral3"` describes."""
    attributes.expect(attention_bias=False)
    fields = read_fields(
        attributes, "ministral3", norm_eps=1e-5, num_key_value_heads=8, max_position_embeddings=262_144,
        head_dim=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    sizes = fields["max_positions"], fields["head_dim"]
    said = attributes.take("rope_parameters", dict) or attributes.take("rope_scaling", dict)
    if said:
        rotary = read_rotary(attributes, *sizes, theta=1e6, query_growth=GROWTH)
    else:
        attributes.expect(rope_theta=DEFAULT_ROTARY["rope_theta"])
        rotary = rotary_of(DEFAULT_ROTARY, attributes.where, *sizes, theta=1e6, query_growth=GROWTH)
    return ModelConfig(
        **fields,
        rotary=rotary,
        windows=windows_of(attributes.take("sliding_window", int), [True] * fields["num_layers"]),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json; of Mistral 3's text model, too, whose queries do not grow."""
    values = read_gguf_fields(attributes, tensors)
    scaling = values["rope_scaling"] or {"rope_type": "default"}
    mscale = attributes.take("rope.scaling.yarn_log_multiplier", float)
    if mscale is not None:
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    growth = attributes.take("attention.temperature_scale", float, default=0.0)
    scaling |= {"rope_theta": values.pop("rope_theta"), GROWTH: growth}
    del values["rope_scaling"]
    return values | {"rope_parameters": scaling}


FAMILY = Family(
    model_type="ministral3",
    title="Ministral 3",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("mistral3",), read_gguf_config, PAIRED_GGUF_RULES),
)
