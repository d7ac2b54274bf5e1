"""Falcon: RefinedWeb 1B, 7B, 40B, 180B and Falcon2 11B."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.gpt_neox import block_rules
from griffin_jax.checkpoints.schema.attributes import Attributes, read_activation, read_gguf_sizes, read_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import FUSED_GGUF_RULES, TensorRule, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import Alibi, ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "falcon"` describes."""
    attributes.expect(apply_residual_connection_post_layernorm=False)
    attributes.require("hidden_size")
    attributes.rename(ffn_hidden_size="intermediate_size", num_kv_heads="num_key_value_heads")
    sizes = read_sizes(
        attributes,
        intermediate_size=4 * attributes.take("hidden_size", int),
        max_position_embeddings=2048,
        bos_token_id=11,
        eos_token_id=11,
    )
    grouped = attributes.take("new_decoder_architecture", bool, default=False)
    if not grouped:
        sizes["num_kv_heads"] = _ungrouped_kv_heads(attributes, sizes)
    attributes.ignore("multi_query")
    rotary = read_rotary(attributes, sizes["max_positions"], sizes["head_dim"])
    alibi = attributes.take("alibi", bool, default=False)
    bias = attributes.take("bias", bool, default=False)
    parallel, shared_norm = _read_layer_form(attributes, grouped)
    return ModelConfig(
        family="falcon",
        **sizes,
        activation=read_activation(attributes, "activation", default="gelu"),
        gated=False,
        norm="layer",
        norm_eps=attributes.take("layer_norm_epsilon", float, default=1e-5),
        norm_bias=True,
        parallel=parallel,
        shared_norm=shared_norm,
        rotary=None if alibi else rotary,
        alibi=Alibi(scaled=True, rounded=True) if alibi else None,
        tied_head=attributes.take("tie_word_embeddings", bool, default=True),
        attention_bias=bias,
        attention_out_bias=bias,
        ff_bias=bias,
    )


def _ungrouped_kv_heads(attributes: Attributes, sizes: dict[str, Any]) -> int:
    """1 or all key/value heads: before the new decoder architecture there was nothing in between."""
    if attributes.take("multi_query", bool, default=True):
        return 1
    if sizes["num_kv_heads"] != sizes["num_heads"]:
        raise ValueError(
            f"{attributes.where}: num_kv_heads is {sizes['num_kv_heads']}, which needs new_decoder_architecture or "
            f"multi_query unless it is that of all {sizes['num_heads']} heads"
        )
    return sizes["num_heads"]


def _read_layer_form(attributes: Attributes, grouped: bool) -> tuple[bool, bool]:
    """Whether attention and feed-forward are parallel, and whether they share a norm."""
    parallel = attributes.take("parallel_attn", bool, default=True)
    norms = attributes.take("num_ln_in_parallel_attn", int, default=2 if grouped else 1)
    if parallel and norms in ((1, 2) if grouped else (1,)):
        return True, norms == 1
    if not parallel and not grouped:
        return False, False
    raise ValueError(
        f"{attributes.where}: new_decoder_architecture {grouped}, parallel_attn {parallel} and "
        f"num_ln_in_parallel_attn {norms} do not go together"
    )


def rules(config: ModelConfig) -> tuple[TensorRule, ...]:
    """The rules; the new decoder architecture names its two norms after the layers that they precede."""
    return (
        TensorRule("transformer.word_embeddings.weight", "embedding", "V D"),
        TensorRule("transformer.ln_f.weight", "norm.scale", "D"),
        TensorRule("transformer.ln_f.bias", "norm.bias", "D"),
        TensorRule("lm_head.weight", "head", "V D"),
        *block_rules("transformer.h.{layer}.", "self_attention"),
        *_norm_rules(config, "transformer.h.{layer}.", "ln_attn", "ln_mlp"),
    )


def gguf_rules(config: ModelConfig) -> tuple[TensorRule, ...]:
    """The rules of GGUF files, in which attn_norm is the norm of the feed-forward layer if there are two."""
    return FUSED_GGUF_RULES + _norm_rules(config, "blk.{layer}.", "attn_norm_2", "attn_norm")


def _norm_rules(config: ModelConfig, prefix: str, attention_norm: str, ff_norm: str) -> tuple[TensorRule, ...]:
    """The norms of parallel layers that do not share one."""
    if not config.parallel or config.shared_norm:
        return ()
    return layer_rules(
        prefix,
        (f"{attention_norm}.weight", "attention_norm.scale", "D"),
        (f"{attention_norm}.bias", "attention_norm.bias", "D"),
        (f"{ff_norm}.weight", "ff_norm.scale", "D"),
        (f"{ff_norm}.bias", "ff_norm.bias", "D"),
    )


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json: 7B, 40B and 180B, since it has no sequential layers.

    It computes the tanh approximation of GELU; the models were trained with the exact function.
    """
    values = read_gguf_sizes(attributes)
    attributes.expect(tensor_data_layout="jploski")
    theta = attributes.take("rope.freq_base", float)
    kv_heads = values.pop("num_key_value_heads")
    two_norms = "blk.0.attn_norm_2.weight" in tensors.shapes
    if not two_norms and kv_heads > 1 and theta is None:
        raise ValueError(
            f"{attributes.where}: GGUF files of Falcon2 do not hold the base of its rotary embedding; use the Hugging "
            "Face checkpoint instead"
        )
    grouped = two_norms or kv_heads > 1
    return values | {
        "layer_norm_epsilon": attributes.take("attention.layer_norm_epsilon", float),
        "rope_theta": 10_000.0 if theta is None else theta,
        "new_decoder_architecture": grouped,
        "num_kv_heads": kv_heads if grouped else None,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
    }


FAMILY = Family(
    model_type="falcon",
    title="Falcon 7B, 40B and 180B, Falcon2 11B, Falcon-RW",
    read_config=read_config,
    rules=rules,
    prefix="transformer.",
    ignored=(r"transformer\.h\.\d+\.self_attention\.\w+\.inv_freq",),
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
    gguf=GgufFamily(("falcon",), read_gguf_config, gguf_rules),
)
