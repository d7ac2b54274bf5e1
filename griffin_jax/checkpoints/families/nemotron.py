"""Nemotron 3 and 4, Minitron: LayerNorms that multiply by 1 + w, and feed-forward layers of squared ReLUs."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.gemma import without_one
from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_gguf_scaling
from griffin_jax.checkpoints.families.starcoder2 import NORM_BIASES
from griffin_jax.checkpoints.schema.attributes import Attributes, read_activation, read_gguf_sizes, read_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "nemotron"` describes."""
    sizes = read_sizes(attributes, max_position_embeddings=4096, bos_token_id=2, eos_token_id=3)
    # One switch for query, key, value and output.
    bias = attributes.take("attention_bias", bool, default=False)
    return ModelConfig(
        family="nemotron",
        **sizes,
        activation=read_activation(attributes, default="relu2"),
        gated=False,
        norm="layer",
        norm_eps=attributes.take("norm_eps", float, default=1e-5),
        norm_bias=True,
        norm_plus_one=True,
        rotary=read_rotary(attributes, sizes["max_positions"], sizes["head_dim"], share=0.5),
        tied_head=attributes.take("tie_word_embeddings", bool, default=False),
        attention_bias=bias,
        attention_out_bias=bias,
        ff_bias=attributes.take("mlp_bias", bool, default=False),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    # Newer versions of its converter write epsilon as that of RMSNorms, too.
    attributes.rename(**{"attention.layer_norm_rms_epsilon": "attention.layer_norm_epsilon"})
    values = read_gguf_sizes(attributes)
    return values | {
        "norm_eps": attributes.take("attention.layer_norm_epsilon", float),
        "rope_theta": attributes.take("rope.freq_base", float, default=10_000.0),
        "rope_scaling": read_gguf_scaling(attributes),
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0),
        "attention_bias": "blk.0.attn_q.bias" in tensors.shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors.shapes,
    }


FAMILY = Family(
    model_type="nemotron",
    title="Nemotron 3 and 4, Minitron",
    read_config=read_config,
    rules=RULES + NORM_BIASES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("nemotron",), read_gguf_config, without_one(GGUF_RULES)),
)
