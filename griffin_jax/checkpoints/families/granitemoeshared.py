"""Granite 3 with routed experts, and one that every token reads."""

from __future__ import annotations

import dataclasses

from griffin_jax.checkpoints.families import granitemoe
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.layouts import layer_rules
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "granitemoeshared"` describes."""
    config = granitemoe.read_config(attributes)
    assert config.routing is not None
    shared = attributes.take("shared_intermediate_size", int, default=0)
    routing = dataclasses.replace(config.routing, shared_width=shared)
    return dataclasses.replace(config, family="granitemoeshared", routing=routing)


SHARED = layer_rules(
    "model.layers.{layer}.shared_mlp.",
    ("input_linear.weight", "ff.shared.gate", "([S]+S) D -> S D"),
    ("input_linear.weight", "ff.shared.up", "(S+[S]) D -> S D"),
    ("output_linear.weight", "ff.shared.down", "D S -> S D"),
)

FAMILY = Family(
    model_type="granitemoeshared",
    title="Granite 3 with routed experts and a shared one",
    read_config=read_config,
    rules=granitemoe.RULES + granitemoe.EXPERT_RULES + SHARED,
    alternatives=(granitemoe.RULES + granitemoe.STACKED_RULES + SHARED,),
    prefix="model.",
    ignored=granitemoe.IGNORED,
    copies=granitemoe.COPIES,
    also_gguf=("granitemoe",),
)
