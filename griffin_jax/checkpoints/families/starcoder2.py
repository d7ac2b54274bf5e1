"""StarCoder2: LayerNorms, biases, a feed-forward layer without gate, and in some a window on every layer."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED
from griffin_jax.checkpoints.families.llama import RULES as LLAMA_RULES
from griffin_jax.checkpoints.schema.attributes import (
    Attributes,
    read_activation,
    read_gguf_sizes,
    read_sizes,
    windows_of,
)
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, TensorRule, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "starcoder2"` describes."""
    sizes = read_sizes(
        attributes, num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=50_256, eos_token_id=50_256
    )
    attributes.ignore("residual_dropout", "embedding_dropout")
    bias = attributes.take("use_bias", bool, default=True)
    return ModelConfig(
        family="starcoder2",
        **sizes,
        activation=read_activation(attributes, default="gelu_pytorch_tanh"),
        gated=False,
        norm="layer",
        norm_eps=attributes.take("norm_epsilon", float, default=1e-5),
        norm_bias=True,
        rotary=read_rotary(attributes, sizes["max_positions"], sizes["head_dim"]),
        windows=windows_of(attributes.take("sliding_window", int), [True] * sizes["num_layers"]),
        tied_head=attributes.take("tie_word_embeddings", bool, default=True),
        attention_bias=bias,
        attention_out_bias=bias,
        ff_bias=bias,
    )


NORM_BIASES = (
    TensorRule("model.norm.bias", "norm.bias", "D"),
    *layer_rules(
        "model.layers.{layer}.",
        ("input_layernorm.bias", "attention_norm.bias", "D"),
        ("post_attention_layernorm.bias", "ff_norm.bias", "D"),
    ),
)
RULES = (
    *LLAMA_RULES,
    *NORM_BIASES,
    *layer_rules(
        "model.layers.{layer}.",
        ("mlp.c_fc.weight", "ff.up", "F D"),
        ("mlp.c_fc.bias", "ff.up_bias", "F"),
        ("mlp.c_proj.weight", "ff.down", "D F -> F D"),
        ("mlp.c_proj.bias", "ff.down_bias", "D"),
    ),
)


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    return read_gguf_sizes(attributes) | {
        "norm_epsilon": attributes.take("attention.layer_norm_epsilon", float),
        "rope_theta": attributes.take("rope.freq_base", float, default=10_000.0),
        "use_bias": "blk.0.attn_q.bias" in tensors.shapes,
    }


FAMILY = Family(
    model_type="starcoder2",
    title="StarCoder2",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("starcoder2",), read_gguf_config, GGUF_RULES),
)
