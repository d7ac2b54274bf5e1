"""BLOOM: attention with linear biases, and a norm after the embedding."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.gpt2 import read_gguf_config as read_gpt2_gguf_config
from griffin_jax.checkpoints.families.gpt_neox import block_rules
from griffin_jax.checkpoints.schema.attributes import Attributes, read_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import FUSED_GGUF_RULES, TensorRule
from griffin_jax.model.config import Alibi, ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "bloom"` describes."""
    attributes.rename(
        n_embed="hidden_size",
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        seq_length="max_position_embeddings",
    )
    attributes.require("hidden_size")
    ff_width = 4 * attributes.take("hidden_size", int)
    attributes.expect(n_inner=ff_width, intermediate_size=ff_width, apply_residual_connection_post_layernorm=False)
    # ALiBi has no last position. The default is the length of the training texts, which configurations rarely give.
    sizes = read_sizes(
        attributes, intermediate_size=ff_width, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2
    )
    # How Megatron divided and fused the computation, and in which precision.
    attributes.ignore(
        "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi",
        "pretraining_pp", "skip_bias_add", "skip_bias_add_qkv",
    )  # fmt: skip
    # Sums over parts, as several devices computed them. If there are parts, transformers leaves the biases out.
    if attributes.take("pretraining_tp", int, default=1) > 1:
        attributes.expect(slow_but_exact=False)
    attributes.ignore("slow_but_exact")
    return ModelConfig(
        family="bloom",
        **sizes,
        activation="gelu_tanh",
        gated=False,
        norm="layer",
        norm_eps=attributes.take("layer_norm_epsilon", float, default=1e-5),
        norm_bias=True,
        rotary=None,
        alibi=Alibi(),
        embedding_norm=True,
        tied_head=attributes.take("tie_word_embeddings", bool, default=True),
        attention_bias=True,
        attention_out_bias=True,
        ff_bias=True,
    )


RULES = (
    TensorRule("transformer.word_embeddings.weight", "embedding", "V D"),
    TensorRule("transformer.word_embeddings_layernorm.weight", "embedding_norm.scale", "D"),
    TensorRule("transformer.word_embeddings_layernorm.bias", "embedding_norm.bias", "D"),
    TensorRule("transformer.ln_f.weight", "norm.scale", "D"),
    TensorRule("transformer.ln_f.bias", "norm.bias", "D"),
    TensorRule("lm_head.weight", "head", "V D"),
    *block_rules("transformer.h.{layer}.", "self_attention"),
)


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    values = read_gpt2_gguf_config(attributes, tensors)
    if values["max_position_embeddings"] == values["hidden_size"]:
        # What llama.cpp writes where config.json does not say.
        del values["max_position_embeddings"]
    return values


FAMILY = Family(
    model_type="bloom",
    title="BLOOM, BLOOMZ",
    read_config=read_config,
    rules=RULES,
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
    gguf=GgufFamily(("bloom",), read_gguf_config, FUSED_GGUF_RULES),
)
