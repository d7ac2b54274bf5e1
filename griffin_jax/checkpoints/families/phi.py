"""Phi-1, Phi-1.5 and Phi-2: attention and feed-forward in parallel after one LayerNorm, and biases everywhere."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED
from griffin_jax.checkpoints.families.llama import RULES as LLAMA_RULES
from griffin_jax.checkpoints.schema.attributes import Attributes, read_activation, read_gguf_sizes, read_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, TensorRule, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "phi"` describes."""
    sizes = read_sizes(attributes, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)
    attributes.expect(qk_layernorm=False)
    return ModelConfig(
        family="phi",
        **sizes,
        activation=read_activation(attributes, default="gelu_new"),
        gated=False,
        norm="layer",
        norm_eps=attributes.take("layer_norm_eps", float, default=1e-5),
        norm_bias=True,
        parallel=True,
        shared_norm=True,
        rotary=read_rotary(attributes, sizes["max_positions"], sizes["head_dim"], share=0.5),
        tied_head=attributes.take("tie_word_embeddings", bool, default=False),
        head_bias=True,
        attention_bias=True,
        attention_out_bias=True,
        ff_bias=True,
    )


RULES = (
    *LLAMA_RULES,
    TensorRule("model.final_layernorm.weight", "norm.scale", "D"),
    TensorRule("model.final_layernorm.bias", "norm.bias", "D"),
    TensorRule("lm_head.bias", "head_bias", "V"),
    *layer_rules(
        "model.layers.{layer}.",
        ("input_layernorm.bias", "attention_norm.bias", "D"),
        ("self_attn.dense.weight", "attention.out", "D (N H) -> N H D"),
        ("self_attn.dense.bias", "attention.out_bias", "D"),
        ("mlp.fc1.weight", "ff.up", "F D"),
        ("mlp.fc1.bias", "ff.up_bias", "F"),
        ("mlp.fc2.weight", "ff.down", "D F -> F D"),
        ("mlp.fc2.bias", "ff.down_bias", "D"),
    ),
)


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    values = read_gguf_sizes(attributes)
    return values | {
        "layer_norm_eps": attributes.take("attention.layer_norm_epsilon", float),
        "rope_theta": attributes.take("rope.freq_base", float, default=10_000.0),
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0),
    }


FAMILY = Family(
    model_type="phi",
    title="Phi-1, Phi-1.5, Phi-2",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("phi2",), read_gguf_config, (*GGUF_RULES, TensorRule("output.bias", "head_bias", "V"))),
)
