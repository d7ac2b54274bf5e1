"""MPT-7B and MPT-30B of MosaicML."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.schema.attributes import Attributes, check_attributes, read_gguf_sizes, read_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import FUSED_GGUF_RULES, TensorRule, layer_rules
from griffin_jax.model.config import Alibi, ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "mpt"` describes.

    MosaicML's own code knows more variants than transformers. Those that no published MPT model uses
    are refused.
    """
    attributes.rename(
        d_model="hidden_size", n_heads="num_attention_heads", n_layers="num_hidden_layers",
        max_seq_len="max_position_embeddings",
    )  # fmt: skip
    attributes.require("hidden_size")
    sizes = read_sizes(
        attributes,
        intermediate_size=4 * attributes.take("hidden_size", int),
        num_attention_heads=16,
        num_hidden_layers=24,
        max_position_embeddings=2048,
    )
    attributes.expect(expansion_ratio=4, no_bias=True)
    if (norm := attributes.take("norm_type", str, default="layernorm")) not in ("layernorm", "low_precision_layernorm"):
        raise ValueError(f"{attributes.where}: norm_type is {norm!r}; supported are layernorm, low_precision_layernorm")
    if (scale := attributes.take("logit_scale", float, int, str)) is not None:
        raise ValueError(f"{attributes.where}: logit_scale is {scale!r}; only null is supported")
    # A model with ALiBi has no position embedding whatever learned_pos_emb says; the rest is about training.
    attributes.ignore(
        "learned_pos_emb", "embedding_fraction", "emb_pdrop", "init_config", "init_device", "tokenizer_name", "verbose"
    )
    return ModelConfig(
        family="mpt",
        **sizes,
        activation="gelu",
        gated=False,
        norm="layer",
        norm_eps=attributes.take("layer_norm_epsilon", float, default=1e-5),
        rotary=None,
        **_read_attention(attributes),
        tied_head=attributes.take("tie_word_embeddings", bool, default=True),
    )


def _read_attention(attributes: Attributes) -> dict[str, Any]:
    where = f"{attributes.where}: attn_config"
    attention = Attributes(attributes.take("attn_config", dict, default={}), where)
    attention.expect(
        alibi=True, attn_type="multihead_attention", attn_uses_sequence_id=False, prefix_lm=False, qk_ln=False
    )
    attention.ignore("attn_impl", "model_type")
    fields = {
        # MPT-7B-StoryWriter has 16. transformers computes with 8 whatever is given; MosaicML's code does not.
        "alibi": Alibi(max_bias=attention.take("alibi_bias_max", float, default=8.0)),
        "qkv_clip": attention.take("clip_qkv", float) or None,
        "attention_scale": attention.take("softmax_scale", float),
    }
    check_attributes(attention, "mpt")
    return fields


RULES = (
    TensorRule("transformer.wte.weight", "embedding", "V D"),
    TensorRule("transformer.norm_f.weight", "norm.scale", "D"),
    TensorRule("lm_head.weight", "head", "V D"),
    *layer_rules(
        "transformer.blocks.{layer}.",
        ("norm_1.weight", "attention_norm.scale", "D"),
        ("attn.Wqkv.weight", "attention.query", "([1]+1+1 N H) D -> N H D"),
        ("attn.Wqkv.weight", "attention.key", "(1+[1]+1 N H) D -> N H D"),
        ("attn.Wqkv.weight", "attention.value", "(1+1+[1] N H) D -> N H D"),
        ("attn.out_proj.weight", "attention.out", "D (N H) -> N H D"),
        ("norm_2.weight", "ff_norm.scale", "D"),
        ("ffn.up_proj.weight", "ff.up", "F D"),
        ("ffn.down_proj.weight", "ff.down", "D F -> F D"),
    ),
)


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json.

    It computes the tanh approximation of GELU; the models were trained with the exact function. It
    has only the usual scale of the scores.
    """
    sizes = read_gguf_sizes(attributes)
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    fixed = (sizes["intermediate_size"], sizes["num_key_value_heads"], sizes["head_dim"] * heads)
    if fixed != (4 * width, heads, width):
        raise ValueError(f"{attributes.where}: these are not the sizes of an MPT model: {sizes}")
    bias = attributes.take("attention.max_alibi_bias", float, default=0.0)
    return {
        "d_model": width,
        "n_heads": heads,
        "n_layers": sizes["num_hidden_layers"],
        "max_seq_len": sizes["max_position_embeddings"],
        "layer_norm_epsilon": attributes.take("attention.layer_norm_epsilon", float),
        "attn_config": {
            "alibi": bias > 0,
            "alibi_bias_max": bias,
            "clip_qkv": attributes.take("attention.clamp_kqv", float),
        },
    }


FAMILY = Family(
    model_type="mpt",
    title="MPT-7B, MPT-30B",
    read_config=read_config,
    rules=RULES,
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.wte.weight"},
    gguf=GgufFamily(("mpt",), read_gguf_config, FUSED_GGUF_RULES),
)
