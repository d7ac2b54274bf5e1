"""CodeGen: GPT-J with queries, values and keys in one tensor."""

from __future__ import annotations

import dataclasses

from griffin_jax.checkpoints.families import gptj
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.layouts import layer_rules
from griffin_jax.model.config import ModelConfig

SHARDS = 4
"""Devices that the models were trained on: the shares of all of them follow each other in the fused tensor."""


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "codegen"` describes."""
    config = gptj.read_config(attributes)
    if config.num_heads % SHARDS:
        raise ValueError(f"{attributes.where}: n_head must be a multiple of {SHARDS}, got {config.num_heads}")
    return dataclasses.replace(config, family="codegen")


RULES = (
    *gptj.RULES,
    *layer_rules(
        "transformer.h.{layer}.",
        ("attn.qkv_proj.weight", "attention.query", "(4 [1]+1+1 Q H) D -> (4 Q) H D"),
        ("attn.qkv_proj.weight", "attention.value", "(4 1+[1]+1 Q H) D -> (4 Q) H D"),
        ("attn.qkv_proj.weight", "attention.key", "(4 1+1+[1] Q H) D -> (4 Q) H D"),
    ),
)

FAMILY = Family(
    model_type="codegen",
    title="CodeGen",
    read_config=read_config,
    rules=RULES,
    prefix="transformer.",
    # Causal masks, which old checkpoints hold.
    ignored=(*gptj.FAMILY.ignored, r"transformer\.h\.\d+\.attn\.causal_mask"),
    copies=gptj.FAMILY.copies,
)
