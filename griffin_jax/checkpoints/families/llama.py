"""Llama 1 to 3 and everything of the same shape: SmolLM2, TinyLlama, ReLULLaMA, ..."""

from __future__ import annotations

from typing import Any

import numpy as np

from griffin_jax.checkpoints.schema.attributes import SIZES, Attributes, read_activation, read_gguf_sizes, read_sizes
from griffin_jax.checkpoints.schema.experts import read_gguf_experts
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, TensorRule, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_fields(
    attributes: Attributes,
    family: str,
    *,
    norm_eps: float = 1e-6,
    activation_name: str = "hidden_act",
    activation: str = "silu",
    tied_head: bool = False,
    **sizes: Any,
) -> dict[str, Any]:
    """The fields of `ModelConfig` that Llama and similar families read in the same way, except the rotary embedding.

    Args:
        attributes: attributes of the configuration.
        family: name of the module.
        norm_eps: default of `rms_norm_eps`.
        activation_name: name of the attribute with the non-linearity.
        activation: default of the non-linearity.
        tied_head: default of `tie_word_embeddings`.
        sizes: other defaults, see `read_sizes`.
    """
    fields = read_sizes(attributes, **sizes)
    # One switch in transformers for query, key, value and output.
    attention_bias = attributes.take("attention_bias", bool, default=False)
    return fields | {
        "family": family,
        "activation": read_activation(attributes, activation_name, activation),
        "norm_eps": attributes.take("rms_norm_eps", float, default=norm_eps),
        "tied_head": attributes.take("tie_word_embeddings", bool, default=tied_head),
        "attention_bias": attention_bias,
        "attention_out_bias": attention_bias,
    }


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "llama"` describes."""
    attributes.require(*(name for name in SIZES if name != "max_position_embeddings"), "rms_norm_eps")
    # Checkpoints of transformers before 4.28 do not say how long the context is.
    fields = read_fields(attributes, "llama", max_position_embeddings=2048, bos_token_id=1, eos_token_id=2)
    return ModelConfig(
        **fields,
        rotary=read_rotary(attributes, fields["max_positions"], fields["head_dim"]),
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


def read_gguf_fields(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata of Llama and similar families, in the terms of config.json."""
    values = read_gguf_sizes(attributes, "attention.layer_norm_rms_epsilon")
    theta = attributes.take("rope.freq_base", float, default=10_000.0)
    scaling = read_gguf_scaling(attributes)
    if "rope_freqs.weight" in tensors.shapes:
        factors = tensors.read("rope_freqs.weight")
        if scaling is not None and not np.all(factors == 1):
            raise ValueError(f"{attributes.where}: both rope.scaling and rope_freqs.weight are given")
        if not np.all(factors == 1):
            scaling = _factors_as_given(factors)
    return values | {
        "rms_norm_eps": attributes.take("attention.layer_norm_rms_epsilon", float),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """The same, with the biases that Llama may have."""
    return read_gguf_fields(attributes, tensors) | {
        "attention_bias": "blk.0.attn_q.bias" in tensors.shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors.shapes,
    }


def read_gguf_llama(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """The same of a file whose architecture is called llama: with several experts, it is Mixtral."""
    if attributes.take("expert_count", int) is None:
        return read_gguf_config(attributes, tensors)
    return read_gguf_fields(attributes, tensors) | read_gguf_experts(attributes) | {"model_type": "mixtral"}


def read_gguf_scaling(attributes: Attributes) -> dict[str, Any] | None:
    """What llama.cpp's metadata say of a scaled rotary embedding, as `rope_scaling`; None if it is not scaled."""
    # As in llama.cpp: it is linear where only the factor is given, and without a factor there is nothing to scale.
    kind = attributes.take("rope.scaling.type", str, default="linear")
    factor = attributes.take("rope.scaling.factor", float)
    magnitude = attributes.take("rope.scaling.yarn_attn_factor", float)
    values = {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": attributes.take("rope.scaling.original_context_length", int),
        "beta_fast": attributes.take("rope.scaling.yarn_beta_fast", float),
        "beta_slow": attributes.take("rope.scaling.yarn_beta_slow", float),
        # The converter writes config.json's attention_factor or, where there is none, its attn_factor. That is another
        # number: YaRN's own code multiplies its formula by it, transformers does not read it, and it is 1 wherever it
        # is published. llama.cpp itself uses the formula in either case.
        "attention_factor": None if magnitude == 1 else magnitude,
    }
    attributes.take("rope.scaling.finetuned", bool)
    if kind == "none" or (kind in ("linear", "yarn") and not factor):
        attributes.expect(**{"rope.scaling.yarn_attn_factor": 1.0})
        return None
    if kind == "linear":
        del values["original_max_position_embeddings"]
    return {name: value for name, value in values.items() if value is not None}


def _factors_as_given(factors: np.ndarray) -> dict[str, Any]:
    """Llama 3.1's scaling, of which llama.cpp keeps only the divisor of each frequency.

    That is a LongRoPE with the same factors at all lengths.
    """
    listed = factors.tolist()
    return {"rope_type": "longrope", "short_factor": listed, "long_factor": listed, "attention_factor": 1.0}


# For some architectures llama.cpp turns neighbouring dimensions of a head where transformers turns those half a head
# apart, and stores the rows of queries and keys pair by pair.
PAIRED_GGUF_RULES = (
    *GGUF_RULES,
    TensorRule("blk.{layer}.attn_q.weight", "layers.{layer}.attention.query", "(N P 2) D -> N (2 P) D"),
    TensorRule("blk.{layer}.attn_k.weight", "layers.{layer}.attention.key", "(G P 2) D -> G (2 P) D"),
    TensorRule("blk.{layer}.attn_q.bias", "layers.{layer}.attention.query_bias", "(N P 2) -> N (2 P)"),
    TensorRule("blk.{layer}.attn_k.bias", "layers.{layer}.attention.key_bias", "(G P 2) -> G (2 P)"),
)

# The first files of Mixtral have a tensor for each expert.
EACH_EXPERT_GGUF_RULES = layer_rules(
    "blk.{layer}.",
    ("ffn_gate.{expert}.weight", "ff.experts.gate", "X M D"),
    ("ffn_up.{expert}.weight", "ff.experts.up", "X M D"),
    ("ffn_down.{expert}.weight", "ff.experts.down", "X D M -> X M D"),
)

# Old checkpoints store the wavelengths, which follow from the configuration.
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
# Written by some tools into models whose head is tied. If it differed, the configuration would be wrong about the tie,
# and ignoring it would give a wrong model.
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}

FAMILY = Family(
    model_type="llama",
    title="Llama 1 to 3, SmolLM2, TinyLlama, ReLULLaMA, Vicuna",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(
        ("llama",),
        read_gguf_llama,
        PAIRED_GGUF_RULES,
        ignored=(r"rope_freqs\.weight",),
        alternatives=(PAIRED_GGUF_RULES + EACH_EXPERT_GGUF_RULES,),
    ),
)
