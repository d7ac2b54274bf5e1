"""HunYuan (dense): Llama with a norm on each head's query and key after they turned."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_fields, read_gguf_fields
from griffin_jax.checkpoints.families.qwen3 import GGUF_HEAD_NORMS
from griffin_jax.checkpoints.schema.attributes import Attributes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary, rotary_of
from griffin_jax.model.config import ModelConfig, Rotary

# Of YaRN, in published configurations of another kind.
UNREAD = frozenset({"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "factor"})


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "hunyuan_v1_dense"` describes."""
    fields = read_fields(
        attributes, "hunyuan_v1_dense", norm_eps=1e-5, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2
    )
    attributes.ignore("eod_token_id")
    return ModelConfig(
        **fields,
        head_norm="shared",
        head_norm_after_rotary=True,
        rotary=_read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
    )


def _read_rotary(attributes: Attributes, max_positions: int, head_dim: int) -> Rotary:
    """Rotary embedding; with `alpha`, dynamic scaling is a larger base for texts of any length."""
    scaling = attributes.take("rope_scaling", dict, default={})
    parameters = scaling or attributes.take("rope_parameters", dict, default={})
    alpha = parameters.get("alpha")
    if not alpha or parameters.get("rope_type", parameters.get("type")) != "dynamic":
        return read_rotary(attributes, max_positions, head_dim)
    attributes.ignore("rope_scaling", "rope_parameters")
    theta = attributes.take("rope_theta", float, default=10_000.0)
    theta = parameters.get("rope_theta") or theta
    plain = {name: value for name, value in parameters.items() if name not in UNREAD | {"alpha", "rope_theta"}}
    stretched = theta * alpha ** (head_dim / (head_dim - 2))
    return rotary_of(plain, f"{attributes.where}: rotary embedding", max_positions, head_dim, theta=stretched)


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json; of a dynamically scaled base it holds the result."""
    return read_gguf_fields(attributes, tensors) | {"attention_bias": "blk.0.attn_q.bias" in tensors.shapes}


HEAD_NORMS = layer_rules(
    "model.layers.{layer}.",
    ("self_attn.query_layernorm.weight", "attention.query_norm.scale", "H"),
    ("self_attn.key_layernorm.weight", "attention.key_norm.scale", "H"),
)

FAMILY = Family(
    model_type="hunyuan_v1_dense",
    title="HunYuan 0.5B to 7B (dense)",
    read_config=read_config,
    rules=RULES + HEAD_NORMS,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("hunyuan-dense",), read_gguf_config, GGUF_RULES + GGUF_HEAD_NORMS),
)
