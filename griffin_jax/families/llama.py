"""Llama 1 to 3 and everything of the same shape: SmolLM2, TinyLlama, ReLULLaMA, ..."""

from __future__ import annotations

from typing import Any

import numpy as np

from griffin_jax.config import ModelConfig, Rotary
from griffin_jax.families.base import (
    Attributes,
    Family,
    GgufFamily,
    StoredTensors,
    TensorRule,
    read_activation,
    read_gguf_sizes,
    read_rotary,
    read_sizes,
)
from griffin_jax.model import rotary_frequencies


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "llama"` describes."""
    attributes.require("rms_norm_eps")
    sizes = read_sizes(attributes, bos_token_id=1, eos_token_id=2)
    # One switch in transformers for query, key, value and output.
    attention_bias = attributes.take("attention_bias", bool, default=False)
    return ModelConfig(
        family="llama",
        **sizes,
        activation=read_activation(attributes),
        norm_eps=attributes.take("rms_norm_eps", float),
        rotary=read_rotary(attributes, sizes["max_positions"], sizes["head_dim"]),
        tied_head=attributes.take("tie_word_embeddings", bool, default=False),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        ff_bias=attributes.take("mlp_bias", bool, default=False),
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


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    values = read_gguf_sizes(attributes)
    theta = attributes.take("rope.freq_base", float, default=10_000.0)
    scaling = _gguf_scaling(attributes)
    if "rope_freqs.weight" in tensors.shapes:
        factors = tensors.read("rope_freqs.weight")
        if scaling is not None and not np.all(factors == 1):
            raise ValueError(f"{attributes.where}: both rope.scaling and rope_freqs.weight are given")
        if not np.all(factors == 1):
            scaling = _llama3_scaling(factors, theta, values["head_dim"], attributes.where)
    return values | {
        "rms_norm_eps": attributes.take("attention.layer_norm_rms_epsilon", float),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_bias": "blk.0.attn_q.bias" in tensors.shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors.shapes,
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


# llama.cpp turns neighbouring dimensions of a head, transformers those half a head apart, so it stores the rows
# of queries and keys pair by pair.
GGUF_RULES = (
    TensorRule("token_embd.weight", "embedding", "V D"),
    TensorRule("output_norm.weight", "norm.scale", "D"),
    TensorRule("output.weight", "head", "V D"),
    TensorRule("blk.{layer}.attn_norm.weight", "layers.{layer}.attention_norm.scale", "D"),
    TensorRule("blk.{layer}.attn_q.weight", "layers.{layer}.attention.query", "(N P 2) D -> N (2 P) D"),
    TensorRule("blk.{layer}.attn_k.weight", "layers.{layer}.attention.key", "(G P 2) D -> G (2 P) D"),
    TensorRule("blk.{layer}.attn_v.weight", "layers.{layer}.attention.value", "(G H) D -> G H D"),
    TensorRule("blk.{layer}.attn_output.weight", "layers.{layer}.attention.out", "D (N H) -> N H D"),
    TensorRule("blk.{layer}.attn_q.bias", "layers.{layer}.attention.query_bias", "(N P 2) -> N (2 P)"),
    TensorRule("blk.{layer}.attn_k.bias", "layers.{layer}.attention.key_bias", "(G P 2) -> G (2 P)"),
    TensorRule("blk.{layer}.attn_v.bias", "layers.{layer}.attention.value_bias", "(G H) -> G H"),
    TensorRule("blk.{layer}.attn_output.bias", "layers.{layer}.attention.out_bias", "D"),
    TensorRule("blk.{layer}.ffn_norm.weight", "layers.{layer}.ff_norm.scale", "D"),
    TensorRule("blk.{layer}.ffn_gate.weight", "layers.{layer}.ff.gate", "F D"),
    TensorRule("blk.{layer}.ffn_up.weight", "layers.{layer}.ff.up", "F D"),
    TensorRule("blk.{layer}.ffn_down.weight", "layers.{layer}.ff.down", "D F -> F D"),
    TensorRule("blk.{layer}.ffn_gate.bias", "layers.{layer}.ff.gate_bias", "F"),
    TensorRule("blk.{layer}.ffn_up.bias", "layers.{layer}.ff.up_bias", "F"),
    TensorRule("blk.{layer}.ffn_down.bias", "layers.{layer}.ff.down_bias", "D"),
)

FAMILY = Family(
    model_type="llama",
    title="Llama 1 to 3, SmolLM2, TinyLlama, ReLULLaMA, Vicuna, ...",
    read_config=read_config,
    rules=RULES,
    # Old checkpoints store the wavelengths, which follow from the configuration.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    # Written by some tools into models whose head is tied. If it differed, the configuration would be wrong about
    # the tie, and ignoring it would give a wrong model.
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    gguf=GgufFamily(("llama",), read_gguf_config, GGUF_RULES, ignored=(r"rope_freqs\.weight",)),
)
