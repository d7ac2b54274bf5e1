"""GPT-2 and DistilGPT2."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.schema.attributes import Attributes, read_activation, read_gguf_sizes, read_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import FUSED_GGUF_RULES, TensorRule, layer_rules
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "gpt2"` describes."""
    sizes = read_gpt_sizes(attributes, n_positions=1024)
    scaled = attributes.take("scale_attn_weights", bool, default=True)
    attributes.expect(scale_attn_by_inverse_layer_idx=False)
    # Scores are always computed in float32 here.
    attributes.ignore("reorder_and_upcast_attn")
    return ModelConfig(
        family="gpt2",
        **sizes,
        **read_gpt_fields(attributes, "gelu_new"),
        attention_scale=None if scaled else 1.0,
        attention_bias=True,
    )


def read_gpt_fields(attributes: Attributes, activation: str) -> dict[str, Any]:
    """What GPT-2, StarCoder and GPT-Neo have in common, as fields of `ModelConfig`.

    Args:
        attributes: attributes of the configuration.
        activation: default of the activation, by its name there.
    """
    return {
        "activation": read_activation(attributes, "activation_function", activation),
        "gated": False,
        "norm": "layer",
        "norm_eps": attributes.take("layer_norm_epsilon", float, default=1e-5),
        "norm_bias": True,
        "rotary": None,
        "learned_positions": True,
        "tied_head": attributes.take("tie_word_embeddings", bool, default=True),
        "attention_out_bias": True,
        "ff_bias": True,
    }


def read_gpt_sizes(attributes: Attributes, n_positions: int) -> dict[str, Any]:
    """The sizes of GPT-2 and GPT-J, as fields of `ModelConfig`.

    Args:
        attributes: attributes of the configuration.
        n_positions: default of the context, in tokens.
    """
    attributes.rename(
        n_embd="hidden_size",
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        n_positions="max_position_embeddings",
        n_inner="intermediate_size",
    )
    attributes.require("hidden_size")
    # `n_ctx` is n_positions under an older name, and the head that summarises a text is not part of a language model.
    attributes.ignore(
        "n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
        "summary_first_dropout",
    )  # fmt: skip
    return read_sizes(
        attributes,
        intermediate_size=4 * attributes.take("hidden_size", int),
        max_position_embeddings=n_positions,
        bos_token_id=50256,
        eos_token_id=50256,
    )


# Matrices are stored inputs first, as those of a convolution of width 1.
RULES = (
    TensorRule("transformer.wte.weight", "embedding", "V D"),
    TensorRule("transformer.wpe.weight", "position_embedding", "C D"),
    TensorRule("transformer.ln_f.weight", "norm.scale", "D"),
    TensorRule("transformer.ln_f.bias", "norm.bias", "D"),
    TensorRule("lm_head.weight", "head", "V D"),
    *layer_rules(
        "transformer.h.{layer}.",
        ("ln_1.weight", "attention_norm.scale", "D"),
        ("ln_1.bias", "attention_norm.bias", "D"),
        ("attn.c_attn.weight", "attention.query", "D ([1]+1+1 N H) -> N H D"),
        ("attn.c_attn.weight", "attention.key", "D (1+[1]+1 N H) -> N H D"),
        ("attn.c_attn.weight", "attention.value", "D (1+1+[1] N H) -> N H D"),
        ("attn.c_attn.bias", "attention.query_bias", "([1]+1+1 N H) -> N H"),
        ("attn.c_attn.bias", "attention.key_bias", "(1+[1]+1 N H) -> N H"),
        ("attn.c_attn.bias", "attention.value_bias", "(1+1+[1] N H) -> N H"),
        ("attn.c_proj.weight", "attention.out", "(N H) D -> N H D"),
        ("attn.c_proj.bias", "attention.out_bias", "D"),
        ("ln_2.weight", "ff_norm.scale", "D"),
        ("ln_2.bias", "ff_norm.bias", "D"),
        ("mlp.c_fc.weight", "ff.up", "D F -> F D"),
        ("mlp.c_fc.bias", "ff.up_bias", "F"),
        ("mlp.c_proj.weight", "ff.down", "F D"),
        ("mlp.c_proj.bias", "ff.down_bias", "D"),
    ),
)

# Causal masks, which old checkpoints hold.
IGNORED = (r"transformer\.h\.\d+\.attn\.(masked_)?bias",)


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json."""
    return read_gguf_sizes(attributes) | {"layer_norm_epsilon": attributes.take("attention.layer_norm_epsilon", float)}


FAMILY = Family(
    model_type="gpt2",
    # Its matrices are (inputs, outputs), those of its quantised checkpoints are not.
    quantisations=(),
    title="GPT-2, DistilGPT2",
    read_config=read_config,
    rules=RULES,
    prefix="transformer.",
    ignored=IGNORED,
    copies={"lm_head.weight": "transformer.wte.weight"},
    gguf=GgufFamily(("gpt2",), read_gguf_config, FUSED_GGUF_RULES),
)
