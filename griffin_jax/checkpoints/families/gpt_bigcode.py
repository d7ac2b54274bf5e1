"""StarCoder and SantaCoder: GPT-2 with one key and one value for all heads."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.gpt2 import IGNORED, read_gpt_fields, read_gpt_sizes
from griffin_jax.checkpoints.families.gpt2 import RULES as GPT2_RULES
from griffin_jax.checkpoints.schema.attributes import Attributes, read_gguf_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import FUSED_GGUF_RULES, TensorRule, layer_rules
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "gpt_bigcode"` describes."""
    # The number of key/value heads follows from multi_query. Softmax is always computed in float32 here.
    attributes.ignore("num_key_value_heads", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    sizes = read_gpt_sizes(attributes, n_positions=1024)
    sizes["num_kv_heads"] = 1 if attributes.take("multi_query", bool, default=True) else sizes["num_heads"]
    scaled = attributes.take("scale_attn_weights", bool, default=True)
    return ModelConfig(
        family="gpt_bigcode",
        **sizes,
        **read_gpt_fields(attributes, "gelu_pytorch_tanh"),
        attention_scale=None if scaled else 1.0,
        attention_bias=True,
    )


def rules(config: ModelConfig) -> tuple[TensorRule, ...]:
    """The rules: one key and value come after all queries, several after the query of each head."""
    if config.num_kv_heads == 1:
        query, key, value = "([N]+G+G H)", "(N+[G]+G H)", "(N+G+[G] H)"
    else:
        query, key, value = "(G [R]+1+1 H)", "(G R+[1]+1 H)", "(G R+1+[1] H)"
    queries = "N" if config.num_kv_heads == 1 else "(G R)"
    return (
        *GPT2_RULES,
        *layer_rules(
            "transformer.h.{layer}.",
            ("attn.c_attn.weight", "attention.query", f"{query} D -> {queries} H D"),
            ("attn.c_attn.weight", "attention.key", f"{key} D -> G H D"),
            ("attn.c_attn.weight", "attention.value", f"{value} D -> G H D"),
            ("attn.c_attn.bias", "attention.query_bias", f"{query} -> {queries} H"),
            ("attn.c_attn.bias", "attention.key_bias", f"{key} -> G H"),
            ("attn.c_attn.bias", "attention.value_bias", f"{value} -> G H"),
            # Not stored as those of GPT-2.
            ("attn.c_proj.weight", "attention.out", "D (N H) -> N H D"),
            ("mlp.c_fc.weight", "ff.up", "F D"),
            ("mlp.c_proj.weight", "ff.down", "D F -> F D"),
        ),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    values = read_gguf_sizes(attributes)
    if values.pop("num_key_value_heads") != 1:
        raise ValueError(f"{attributes.where}: attention.head_count_kv must be 1 for StarCoder")
    return values | {"layer_norm_epsilon": attributes.take("attention.layer_norm_epsilon", float)}


FAMILY = Family(
    model_type="gpt_bigcode",
    title="StarCoder, StarCoderBase, SantaCoder",
    read_config=read_config,
    rules=rules,
    prefix="transformer.",
    ignored=IGNORED,
    copies={"lm_head.weight": "transformer.wte.weight"},
    gguf=GgufFamily(("starcoder",), read_gguf_config, FUSED_GGUF_RULES),
)
