"""Llama 1 to 3 and everything of the same shape: SmolLM2, TinyLlama, ReLULLaMA, ..."""

from __future__ import annotations

from typing import Any

import numpy as np

from griffin_jax.config import ModelConfig, Rotary
from griffin_jax.families.base import (
    Attributes,
    Family,
    GgufFamily,
    GgufRule,
    TensorRule,
    read_activation,
    read_eos,
    read_rotary,
)
from griffin_jax.model import rotary_frequencies


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "llama"` describes."""
    attributes.require(
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "rms_norm_eps",
    )  # fmt: skip
    width = attributes.take("hidden_size", int)
    heads = attributes.take("num_attention_heads", int)
    head_dim = attributes.take("head_dim", int)
    if head_dim is None:
        if heads < 1 or width % heads:
            raise ValueError(
                f"{attributes.where}: hidden_size {width} is not a multiple of num_attention_heads {heads}"
            )
        head_dim = width // heads
    max_positions = attributes.take("max_position_embeddings", int)
    # One switch in transformers for query, key, value and output.
    attention_bias = attributes.take("attention_bias", bool, default=False)
    return ModelConfig(
        family="llama",
        vocab_size=attributes.take("vocab_size", int),
        width=width,
        ff_width=attributes.take("intermediate_size", int),
        num_layers=attributes.take("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=attributes.take("num_key_value_heads", int, default=heads),
        head_dim=head_dim,
        max_positions=max_positions,
        activation=read_activation(attributes),
        norm_eps=attributes.take("rms_norm_eps", float),
        rotary=read_rotary(attributes, max_positions),
        tied_head=attributes.take("tie_word_embeddings", bool, default=False),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        ff_bias=attributes.take("mlp_bias", bool, default=False),
        bos_token_id=attributes.take("bos_token_id", int),
        eos_token_ids=read_eos(attributes),
    )


RULES = (
    TensorRule("model.embed_tokens.weight", "embedding", "V D"),
    TensorRule("model.norm.weight", "norm.scale", "D"),
    TensorRule("lm_head.weight", "head", "V D"),
    TensorRule("model.layers.{layer}.input_layernorm.weight", "layers.{layer}.attention_norm.scale", "D"),
    TensorRule("model.layers.{layer}.self_attn.q_proj.weight", "layers.{layer}.attention.query", "(N H) D -> N H D"),
    TensorRule("model.layers.{layer}.self_attn.k_proj.weight", "layers.{layer}.attention.key", "(G H) D -> G H D"),
    TensorRule("model.layers.{layer}.self_attn.v_proj.weight", "layers.{layer}.attention.value", "(G H) D -> G H D"),
    TensorRule("model.layers.{layer}.self_attn.o_proj.weight", "layers.{layer}.attention.out", "D (N H) -> N H D"),
    TensorRule("model.layers.{layer}.self_attn.q_proj.bias", "layers.{layer}.attention.query_bias", "(N H) -> N H"),
    TensorRule("model.layers.{layer}.self_attn.k_proj.bias", "layers.{layer}.attention.key_bias", "(G H) -> G H"),
    TensorRule("model.layers.{layer}.self_attn.v_proj.bias", "layers.{layer}.attention.value_bias", "(G H) -> G H"),
    TensorRule("model.layers.{layer}.self_attn.o_proj.bias", "layers.{layer}.attention.out_bias", "D"),
    TensorRule("model.layers.{layer}.post_attention_layernorm.weight", "layers.{layer}.ff_norm.scale", "D"),
    TensorRule("model.layers.{layer}.mlp.gate_proj.weight", "layers.{layer}.ff.gate", "F D"),
    TensorRule("model.layers.{layer}.mlp.up_proj.weight", "layers.{layer}.ff.up", "F D"),
    TensorRule("model.layers.{layer}.mlp.down_proj.weight", "layers.{layer}.ff.down", "D F -> F D"),
    TensorRule("model.layers.{layer}.mlp.gate_proj.bias", "layers.{layer}.ff.gate_bias", "F"),
    TensorRule("model.layers.{layer}.mlp.up_proj.bias", "layers.{layer}.ff.up_bias", "F"),
    TensorRule("model.layers.{layer}.mlp.down_proj.bias", "layers.{layer}.ff.down_bias", "D"),
)


def read_gguf_config(
    attributes: Attributes, tensors: frozenset[str], rope_factors: np.ndarray | None
) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    attributes.require(
        "embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length",
        "attention.layer_norm_rms_epsilon",
    )  # fmt: skip
    width = attributes.take("embedding_length", int)
    heads = attributes.take("attention.head_count", int)
    head_dim = attributes.take("attention.key_length", int, default=width // max(heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        size = attributes.take(name, int, default=head_dim)
        if size != head_dim:
            raise ValueError(f"{attributes.where}: {name} is {size}, but heads have {head_dim} dimensions")
    if experts := attributes.take("expert_count", int, default=0):
        raise ValueError(f"{attributes.where}: mixtures of experts are not supported (expert_count is {experts})")
    attributes.take("expert_used_count", int)
    context = attributes.take("context_length", int)
    theta = attributes.take("rope.freq_base", float, default=10_000.0)
    scaling = _gguf_scaling(attributes)
    if rope_factors is not None and not np.all(rope_factors == 1):
        if scaling is not None:
            raise ValueError(f"{attributes.where}: both rope.scaling and rope_freqs.weight are given")
        scaling = _llama3_scaling(rope_factors, theta, head_dim, attributes.where)
    return {
        "hidden_size": width,
        "intermediate_size": attributes.take("feed_forward_length", int),
        "num_hidden_layers": attributes.take("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": attributes.take("attention.head_count_kv", int, default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": attributes.take("attention.layer_norm_rms_epsilon", float),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def _gguf_scaling(attributes: Attributes) -> dict[str, Any] | None:
    kind = attributes.take("rope.scaling.type", str, default="none")
    values = {
        "rope_type": kind,
        "factor": attributes.take("rope.scaling.factor", float),
        "original_max_position_embeddings": attributes.take("rope.scaling.original_context_length", int),
        "beta_fast": attributes.take("rope.scaling.yarn_beta_fast", float),
        "beta_slow": attributes.take("rope.scaling.yarn_beta_slow", float),
    }
    attributes.take("rope.scaling.finetuned", bool)
    if kind == "none":
        return None
    if kind == "linear":
        del values["original_max_position_embeddings"]
    return {name: value for name, value in values.items() if value is not None}


def _llama3_scaling(factors: np.ndarray, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """Llama 3.1's scaling, of which llama.cpp keeps only the factor of each wavelength.

    The published models differ in nothing but `factor`, the largest of them. If that does not
    reproduce the others, the model is not one of those.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rotary = Rotary(theta=theta, kind="llama3", factor=scaling["factor"], original_positions=8192)
    expected = rotary_frequencies(Rotary(theta=theta), head_dim) / rotary_frequencies(rotary, head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"{where}: the factors in rope_freqs.weight are not those of Llama 3.1's scaling, the only ones supported; "
            "use the Hugging Face checkpoint instead"
        )
    return scaling


def _block(gguf: str, hf: str, layout: str | None = None) -> GgufRule:
    return GgufRule("blk.{layer}." + gguf, "model.layers.{layer}." + hf, layout)


# llama.cpp turns neighbouring dimensions of a head, transformers those half a head apart, so it stores the rows
# of queries and keys pair by pair.
GGUF_RULES = (
    GgufRule("token_embd.weight", "model.embed_tokens.weight"),
    GgufRule("output_norm.weight", "model.norm.weight"),
    GgufRule("output.weight", "lm_head.weight"),
    _block("attn_norm.weight", "input_layernorm.weight"),
    _block("attn_q.weight", "self_attn.q_proj.weight", "(N P 2) D -> (N 2 P) D"),
    _block("attn_k.weight", "self_attn.k_proj.weight", "(G P 2) D -> (G 2 P) D"),
    _block("attn_v.weight", "self_attn.v_proj.weight"),
    _block("attn_output.weight", "self_attn.o_proj.weight"),
    _block("attn_q.bias", "self_attn.q_proj.bias", "(N P 2) -> (N 2 P)"),
    _block("attn_k.bias", "self_attn.k_proj.bias", "(G P 2) -> (G 2 P)"),
    _block("attn_v.bias", "self_attn.v_proj.bias"),
    _block("attn_output.bias", "self_attn.o_proj.bias"),
    _block("ffn_norm.weight", "post_attention_layernorm.weight"),
    _block("ffn_gate.weight", "mlp.gate_proj.weight"),
    _block("ffn_up.weight", "mlp.up_proj.weight"),
    _block("ffn_down.weight", "mlp.down_proj.weight"),
    _block("ffn_gate.bias", "mlp.gate_proj.bias"),
    _block("ffn_up.bias", "mlp.up_proj.bias"),
    _block("ffn_down.bias", "mlp.down_proj.bias"),
)

FAMILY = Family(
    model_type="llama",
    read_config=read_config,
    rules=RULES,
    # Old checkpoints store the wavelengths, which follow from the configuration.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    # Written by some tools into models whose head is tied. If it differed, the configuration would be wrong about
    # the tie, and ignoring it would give a wrong model.
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    gguf=GgufFamily("llama", read_gguf_config, GGUF_RULES, ignored=frozenset({"rope_freqs.weight"})),
)
