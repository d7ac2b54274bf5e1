"""Granite 3 with routed experts: Granite's multipliers, and the tensors of all experts of a layer in one."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.granite import read_gguf_granite, read_multipliers
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, PAIRED_GGUF_RULES, RULES, read_fields
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.experts import read_gguf_experts, read_routing, stacked_rules
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "granitemoe"` describes."""
    fields = read_fields(attributes, "granitemoe", bos_token_id=1, eos_token_id=2)
    return ModelConfig(
        **fields,
        **read_multipliers(attributes),
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
        # A softmax over the chosen experts is what is left of one over all, divided by its sum.
        routing=read_routing(attributes, width=fields["ff_width"], experts=8, active=2, normalised=True),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json. With a shared expert, the family is another."""
    values = read_gguf_granite(attributes, tensors) | read_gguf_experts(attributes)
    del values["mlp_bias"]
    if shared := attributes.take("expert_shared_feed_forward_length", int):
        return values | {"model_type": "granitemoeshared", "shared_intermediate_size": shared}
    return values


EXPERT_RULES = layer_rules(
    "model.layers.{layer}.block_sparse_moe.",
    ("router.layer.weight", "ff.router", "X D"),
    ("input_linear.weight", "ff.experts.gate", "X ([M]+M) D -> X M D"),
    ("input_linear.weight", "ff.experts.up", "X (M+[M]) D -> X M D"),
    ("output_linear.weight", "ff.experts.down", "X D M -> X M D"),
)

STACKED_RULES = stacked_rules("block_sparse_moe", "router")

FAMILY = Family(
    model_type="granitemoe",
    title="Granite 3 with experts (1B-A400M, 3B-A800M)",
    read_config=read_config,
    rules=RULES + EXPERT_RULES,
    alternatives=(RULES + STACKED_RULES,),
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("granitemoe",), read_gguf_config, PAIRED_GGUF_RULES),
)
