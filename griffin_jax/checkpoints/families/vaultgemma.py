"""VaultGemma: Gemma 2 without the norms after attention and feed-forward."""

from __future__ import annotations

import dataclasses

from griffin_jax.checkpoints.families import gemma2
from griffin_jax.checkpoints.families.llama import RULES
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.layouts import TensorRule
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "vaultgemma"` describes."""
    return dataclasses.replace(gemma2.read_config(attributes), family="vaultgemma", norm_placement="pre")


FF_NORM = TensorRule("model.layers.{layer}.pre_feedforward_layernorm.weight", "layers.{layer}.ff_norm.scale", "D")

FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    model_type="vaultgemma",
    title="VaultGemma",
    read_config=read_config,
    rules=(*RULES, FF_NORM),
    gguf=None,
)
