"""StableLM 3B-4E1T, StableLM 2, StableLM Zephyr, Stable Code."""

from __future__ import annotations

from typing import Any

from griffin_jax.config import ModelConfig
from griffin_jax.families.base import (
    Attributes,
    Family,
    GgufFamily,
    StoredTensors,
    TensorRule,
    layer_rules,
    read_activation,
    read_gguf_sizes,
    read_rotary,
    read_sizes,
)


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
    TensorRule("model.embed_tokens.weight", "embedding", "V D"),
    TensorRule("model.norm.weight", "norm.scale", "D"),
    TensorRule("model.norm.bias", "norm.bias", "D"),
    TensorRule("lm_head.weight", "head", "V D"),
    *layer_rules(
        "model.layers.{layer}.",
        ("input_layernorm.weight", "attention_norm.scale", "D"),
        ("input_layernorm.bias", "attention_norm.bias", "D"),
        ("self_attn.q_proj.weight", "attention.query", "(N H) D -> N H D"),
        ("self_attn.k_proj.weight", "attention.key", "(G H) D -> G H D"),
        ("self_attn.v_proj.weight", "attention.value", "(G H) D -> G H D"),
        ("self_attn.o_proj.weight", "attention.out", "D (N H) -> N H D"),
        ("self_attn.q_proj.bias", "attention.query_bias", "(N H) -> N H"),
        ("self_attn.k_proj.bias", "attention.key_bias", "(G H) -> G H"),
        ("self_attn.v_proj.bias", "attention.value_bias", "(G H) -> G H"),
        ("self_attn.q_layernorm.norms.{head}.weight", "attention.query_norm.scale", "N H -> N 1 H"),
        ("self_attn.k_layernorm.norms.{head}.weight", "attention.key_norm.scale", "G H -> G 1 H"),
        ("post_attention_layernorm.weight", "ff_norm.scale", "D"),
        ("post_attention_layernorm.bias", "ff_norm.bias", "D"),
        ("mlp.gate_proj.weight", "ff.gate", "F D"),
        ("mlp.up_proj.weight", "ff.up", "F D"),
        ("mlp.down_proj.weight", "ff.down", "D F -> F D"),
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


GGUF_RULES = (
    TensorRule("token_embd.weight", "embedding", "V D"),
    TensorRule("output_norm.weight", "norm.scale", "D"),
    TensorRule("output_norm.bias", "norm.bias", "D"),
    TensorRule("output.weight", "head", "V D"),
    *layer_rules(
        "blk.{layer}.",
        ("attn_norm.weight", "attention_norm.scale", "D"),
        ("attn_norm.bias", "attention_norm.bias", "D"),
        ("attn_q.weight", "attention.query", "(N H) D -> N H D"),
        ("attn_k.weight", "attention.key", "(G H) D -> G H D"),
        ("attn_v.weight", "attention.value", "(G H) D -> G H D"),
        ("attn_output.weight", "attention.out", "D (N H) -> N H D"),
        ("attn_q.bias", "attention.query_bias", "(N H) -> N H"),
        ("attn_k.bias", "attention.key_bias", "(G H) -> G H"),
        ("attn_v.bias", "attention.value_bias", "(G H) -> G H"),
        ("attn_q_norm.weight", "attention.query_norm.scale", "N H -> N 1 H"),
        ("attn_k_norm.weight", "attention.key_norm.scale", "G H -> G 1 H"),
        ("ffn_norm.weight", "ff_norm.scale", "D"),
        ("ffn_norm.bias", "ff_norm.bias", "D"),
        ("ffn_gate.weight", "ff.gate", "F D"),
        ("ffn_up.weight", "ff.up", "F D"),
        ("ffn_down.weight", "ff.down", "D F -> F D"),
    ),
)

FAMILY = Family(
    model_type="stablelm",
    title="StableLM 3B-4E1T, StableLM 2, StableLM Zephyr, Stable Code",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    gguf=GgufFamily(("stablelm",), read_gguf_config, GGUF_RULES),
)
