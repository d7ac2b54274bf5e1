"""Granite 3: Llama with four multipliers."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import (
    COPIES,
    IGNORED,
    PAIRED_GGUF_RULES,
    RULES,
    read_fields,
    read_gguf_config,
)
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "granite"` describes."""
    fields = read_fields(attributes, "granite", bos_token_id=1, eos_token_id=2)
    return ModelConfig(
        **fields,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        ff_bias=attributes.take("mlp_bias", bool, default=False),
        **read_multipliers(attributes),
    )


def read_multipliers(attributes: Attributes) -> dict[str, Any]:
    """The four factors, as fields of `ModelConfig`."""
    return {
        "embedding_scale": attributes.take("embedding_multiplier", float, default=1.0),
        "residual_scale": attributes.take("residual_multiplier", float, default=1.0),
        "attention_scale": attributes.take("attention_multiplier", float, default=1.0),
        "logit_scale": 1.0 / attributes.take("logits_scaling", float, default=1.0),
    }


STATE_SPACE = ("conv_kernel", "group_count", "inner_size", "state_size", "time_step_rank")
"""Sizes of layers without attention, which llama.cpp writes for Granite 4 even if it has none of them."""


def read_gguf_granite(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json; of Granite 4, too, where all layers have attention.

    Raises:
        ValueError: the model has no rotary embedding.
    """
    if not attributes.take("rope.scaling.finetuned", bool, default=True):
        raise ValueError(
            f"{attributes.where}: rope.scaling.finetuned is False, by which llama.cpp means that Granite has no rotary "
            "embedding; only models with one are supported"
        )
    values = read_gguf_config(attributes, tensors)
    if not any(".ssm_" in name for name in tensors.shapes):
        attributes.ignore(*(f"ssm.{name}" for name in STATE_SPACE))
    return values | {
        "embedding_multiplier": attributes.take("embedding_scale", float, default=1.0),
        "residual_multiplier": attributes.take("residual_scale", float, default=1.0),
        "attention_multiplier": attributes.take("attention.scale", float, default=values["head_dim"] ** -0.5),
        "logits_scaling": attributes.take("logit_scale", float),
    }


def read_gguf_dense(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """The same of a model without experts. Of Granite 4, the expert that every token reads is then the only layer."""
    values = read_gguf_granite(attributes, tensors)
    width = attributes.take("expert_shared_feed_forward_length", int, default=values["intermediate_size"])
    return values | {"intermediate_size": width}


FAMILY = Family(
    model_type="granite",
    title="Granite 3 (dense)",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("granite",), read_gguf_dense, PAIRED_GGUF_RULES),
)
