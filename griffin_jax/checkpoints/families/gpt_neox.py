"""GPT-NeoX-20B, Pythia and other models trained with EleutherAI's GPT-NeoX library."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.schema.attributes import Attributes, read_activation, read_gguf_sizes, read_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import FUSED_GGUF_RULES, TensorRule, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "gpt_neox"` describes."""
    attributes.rename(rotary_emb_base="rope_theta", rotary_pct="partial_rotary_factor")
    sizes = read_sizes(attributes, max_position_embeddings=2048, bos_token_id=0, eos_token_id=2)
    # One switch for query, key, value and output.
    attention_bias = attributes.take("attention_bias", bool, default=True)
    return ModelConfig(
        family="gpt_neox",
        **sizes,
        activation=read_activation(attributes, default="gelu"),
        gated=False,
        norm="layer",
        norm_eps=attributes.take("layer_norm_eps", float, default=1e-5),
        norm_bias=True,
        parallel=attributes.take("use_parallel_residual", bool, default=True),
        rotary=read_rotary(attributes, sizes["max_positions"], sizes["head_dim"], share=0.25),
        tied_head=attributes.take("tie_word_embeddings", bool, default=False),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        ff_bias=True,
    )


def block_rules(prefix: str, attention: str) -> tuple[TensorRule, ...]:
    """Rules for a layer whose tensors have Megatron's names, as here, in BLOOM and in Falcon.

    Each group's queries are stored before its key and its value; here and in BLOOM a group is one head.

    Args:
        prefix: prefix of the names of all tensors of the layer.
        attention: name of the attention.
    """
    query, key, value = "(G [R]+1+1 H)", "(G R+[1]+1 H)", "(G R+1+[1] H)"
    return layer_rules(
        prefix,
        ("input_layernorm.weight", "attention_norm.scale", "D"),
        ("input_layernorm.bias", "attention_norm.bias", "D"),
        (f"{attention}.query_key_value.weight", "attention.query", f"{query} D -> (G R) H D"),
        (f"{attention}.query_key_value.weight", "attention.key", f"{key} D -> G H D"),
        (f"{attention}.query_key_value.weight", "attention.value", f"{value} D -> G H D"),
        (f"{attention}.query_key_value.bias", "attention.query_bias", f"{query} -> (G R) H"),
        (f"{attention}.query_key_value.bias", "attention.key_bias", f"{key} -> G H"),
        (f"{attention}.query_key_value.bias", "attention.value_bias", f"{value} -> G H"),
        (f"{attention}.dense.weight", "attention.out", "D (N H) -> N H D"),
        (f"{attention}.dense.bias", "attention.out_bias", "D"),
        ("post_attention_layernorm.weight", "ff_norm.scale", "D"),
        ("post_attention_layernorm.bias", "ff_norm.bias", "D"),
        ("mlp.dense_h_to_4h.weight", "ff.up", "F D"),
        ("mlp.dense_h_to_4h.bias", "ff.up_bias", "F"),
        ("mlp.dense_4h_to_h.weight", "ff.down", "D F -> F D"),
        ("mlp.dense_4h_to_h.bias", "ff.down_bias", "D"),
    )


RULES = (
    TensorRule("gpt_neox.embed_in.weight", "embedding", "V D"),
    TensorRule("gpt_neox.final_layer_norm.weight", "norm.scale", "D"),
    TensorRule("gpt_neox.final_layer_norm.bias", "norm.bias", "D"),
    TensorRule("embed_out.weight", "head", "V D"),
    *block_rules("gpt_neox.layers.{layer}.", "attention"),
)


def read_gguf_config(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json. They do not tell which GELU: it is Pythia's, the exact one."""
    # Without rope.dimension_count, all dimensions turn.
    return (
        {"partial_rotary_factor": 1.0}
        | read_gguf_sizes(attributes)
        | {
            "rope_theta": attributes.take("rope.freq_base", float, default=10_000.0),
            "layer_norm_eps": attributes.take("attention.layer_norm_epsilon", float),
            "use_parallel_residual": attributes.take("use_parallel_residual", bool, default=True),
            "attention_bias": "blk.0.attn_qkv.bias" in tensors.shapes,
        }
    )


FAMILY = Family(
    model_type="gpt_neox",
    title="GPT-NeoX-20B, Pythia, Dolly 2",
    read_config=read_config,
    rules=RULES,
    prefix="gpt_neox.",
    # Causal masks and wavelengths, which old checkpoints hold.
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
    gguf=GgufFamily(("gptneox",), read_gguf_config, FUSED_GGUF_RULES),
)
