"""StableLM 3B-4E1T, StableLM 2, StableLM Zephyr, Stable Code."""

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
    """The architecture that a config.json with `"model_type": "stablelm"` describes."""
    sizes = read_sizes(attributes, num_key_value_heads=32, max_position_embeddings=4096, bos_token_id=0, eos_token_id=0)
    # StableLM 2 states what it shares with all others.
    attributes.expect(norm_bias=True, rotary_scaling_factor=1.0)
    parallel = attributes.take("use_parallel_residual", bool, default=False)
    return ModelConfig(
        family="stablelm",
        **sizes,
        activation=read_activation(attributes),
        norm="layer",
        norm_eps=attributes.take("layer_norm_eps", float, default=1e-5),
        norm_bias=True,
        head_norm="own" if attributes.take("qk_layernorm", bool, default=False) else "none",
        parallel=parallel,
        shared_norm=parallel,
        rotary=read_rotary(attributes, sizes["max_positions"], sizes["head_dim"], share=0.25),
        tied_head=attributes.take("tie_word_embeddings", bool, default=False),
        attention_bias=attributes.take("use_qkv_bias", bool, default=False),
    )


RULES = (
    *LLAMA_RULES,
    TensorRule("model.norm.bias", "norm.bias", "D"),
    *layer_rules(
        "model.layers.{layer}.",
        ("input_layernorm.bias", "attention_norm.bias", "D"),
        ("post_attention_layernorm.bias", "ff_norm.bias", "D"),
        ("self_attn.q_layernorm.norms.{head}.weight", "attention.query_norm.scale", "N H -> N 1 H"),
        ("self_attn.k_layernorm.norms.{head}.weight", "attention.key_norm.scale", "G H -> G 1 H"),
    ),
)


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    values = read_gguf_sizes(attributes)
    theta = attributes.take("rope.freq_base", float)
    if theta is None and values["max_position_embeddings"] > 4096:
        raise ValueError(
            f"{attributes.where}: GGUF files of Stable Code, whose context is longer than that of StableLM, do not "
            "hold the base of its rotary embedding; use the Hugging Face checkpoint instead"
        )
    # It contradicts the tensors in files of other writers, and llama.cpp goes by the tensors.
    attributes.ignore("use_parallel_residual")
    return values | {
        "layer_norm_eps": attributes.take("attention.layer_norm_epsilon", float),
        "rope_theta": 10_000.0 if theta is None else theta,
        # `read_gguf_sizes` leaves it out where whole heads turn.
        "partial_rotary_factor": values.get("partial_rotary_factor", 1.0),
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors.shapes,
        "use_qkv_bias": "blk.0.attn_q.bias" in tensors.shapes,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors.shapes,
    }


HEAD_NORMS = layer_rules(
    "blk.{layer}.",
    ("attn_q_norm.weight", "attention.query_norm.scale", "N H -> N 1 H"),
    ("attn_k_norm.weight", "attention.key_norm.scale", "G H -> G 1 H"),
)

FAMILY = Family(
    model_type="stablelm",
    title="StableLM 3B-4E1T, StableLM 2, StableLM Zephyr, Stable Code",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("stablelm",), read_gguf_config, GGUF_RULES + HEAD_NORMS),
)
