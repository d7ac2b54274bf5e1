"""Gemma 1: Llama with gated GELU, a scaled embedding, and norms that multiply by 1 + w."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.schema.attributes import ACTIVATIONS, Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, TensorRule
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig

DEFAULTS: dict[str, Any] = {
    "activation": "gelu_pytorch_tanh", "tied_head": True, "head_dim": 256, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
"""Defaults of all generations."""


def scaled_embedding(width: int) -> dict[str, Any]:
    """What all generations do with embeddings and norms, as fields of `ModelConfig`."""
    return {"embedding_scale": math.sqrt(width), "norm_plus_one": True}


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "gemma"` describes."""
    fields = read_fields(attributes, "gemma", num_key_value_heads=16, **DEFAULTS)
    # "gelu" is a slip of the first releases: the models were trained with the approximation.
    activation = "gelu_tanh" if fields["activation"] == "gelu" else fields["activation"]
    named_again = attributes.take("hidden_activation", str)
    if named_again is not None and ACTIVATIONS.get(named_again) != activation:
        raise ValueError(f"{attributes.where}: hidden_activation {named_again!r} is not that of hidden_act")
    return ModelConfig(
        **{**fields, "activation": activation},
        **scaled_embedding(fields["width"]),
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
    )


def without_one(rules: Iterable[TensorRule]) -> tuple[TensorRule, ...]:
    """The rules of GGUF files, in which llama.cpp stores 1 + w for the w of norms."""
    return tuple(replace(rule, add=-1.0) if rule.path.endswith("norm.scale") else rule for rule in rules)


FAMILY = Family(
    model_type="gemma",
    title="Gemma 1, CodeGemma",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("gemma",), read_gguf_fields, without_one(GGUF_RULES)),
)
