"""GPT-J: rotary embedding of neighbouring dimensions, attention and feed-forward in parallel after one norm."""

from __future__ import annotations

from griffin_jax.checkpoints.families.gpt2 import IGNORED, read_gpt_sizes
from griffin_jax.checkpoints.schema.attributes import Attributes, read_activation
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.layouts import TensorRule, layer_rules
from griffin_jax.model.config import ModelConfig, Rotary


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "gptj"` describes."""
    sizes = read_gpt_sizes(attributes, n_positions=2048)
    attributes.expect(rotary=True, scale_attn_weights=True)
    if attributes.is_null("rotary_dim"):
        raise ValueError(f"{attributes.where}: rotary_dim is null, with which transformers cannot compute GPT-J")
    return ModelConfig(
        family="gptj",
        **sizes,
        activation=read_activation(attributes, "activation_function", "gelu_new"),
        gated=False,
        norm="layer",
        norm_eps=attributes.take("layer_norm_epsilon", float, default=1e-5),
        norm_bias=True,
        parallel=True,
        shared_norm=True,
        rotary=Rotary(dims=attributes.take("rotary_dim", int, default=64), interleaved=True),
        tied_head=attributes.take("tie_word_embeddings", bool, default=False),
        head_bias=True,
        ff_bias=True,
    )


RULES = (
    TensorRule("transformer.wte.weight", "embedding", "V D"),
    TensorRule("transformer.ln_f.weight", "norm.scale", "D"),
    TensorRule("transformer.ln_f.bias", "norm.bias", "D"),
    TensorRule("lm_head.weight", "head", "V D"),
    TensorRule("lm_head.bias", "head_bias", "V"),
    *layer_rules(
        "transformer.h.{layer}.",
        ("ln_1.weight", "attention_norm.scale", "D"),
        ("ln_1.bias", "attention_norm.bias", "D"),
        ("attn.q_proj.weight", "attention.query", "(N H) D -> N H D"),
        ("attn.k_proj.weight", "attention.key", "(N H) D -> N H D"),
        ("attn.v_proj.weight", "attention.value", "(N H) D -> N H D"),
        ("attn.out_proj.weight", "attention.out", "D (N H) -> N H D"),
        ("mlp.fc_in.weight", "ff.up", "F D"),
        ("mlp.fc_in.bias", "ff.up_bias", "F"),
        ("mlp.fc_out.weight", "ff.down", "D F -> F D"),
        ("mlp.fc_out.bias", "ff.down_bias", "D"),
    ),
)

FAMILY = Family(
    model_type="gptj",
    title="GPT-J",
    read_config=read_config,
    rules=RULES,
    prefix="transformer.",
    ignored=IGNORED,
    copies={"lm_head.weight": "transformer.wte.weight"},
)
