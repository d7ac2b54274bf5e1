"""OPT and Galactica: ReLU or GELU models with learned positions."""

from __future__ import annotations

from griffin_jax.checkpoints.schema.attributes import Attributes, read_activation, read_sizes
from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.layouts import TensorRule, layer_rules
from griffin_jax.model.config import ModelConfig


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "opt"` describes."""
    attributes.rename(ffn_dim="intermediate_size")
    sizes = read_sizes(attributes, max_position_embeddings=2048, bos_token_id=2, eos_token_id=2)
    # How Galactica was trained. The embeddings that transformers loads are learned and not scaled.
    attributes.ignore("learned_embeddings", "scale_embeddings")
    attributes.expect(layer_norm_elementwise_affine=True)
    before = attributes.take("do_layer_norm_before", bool, default=True)
    # Models fine-tuned before transformers 4.20.1 lack the norm before the head.
    without_final_norm = attributes.take("_remove_final_layer_norm", bool, default=False)
    embedding_width = attributes.take("word_embed_proj_dim", int, default=sizes["width"])
    # One switch for all projections.
    bias = attributes.take("enable_bias", bool, default=True)
    return ModelConfig(
        family="opt",
        **sizes,
        activation=read_activation(attributes, "activation_function", "relu"),
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        norm_bias=True,
        norm_placement="pre" if before else "post",
        final_norm=before and not without_final_norm,
        rotary=None,
        learned_positions=True,
        embedding_width=None if embedding_width == sizes["width"] else embedding_width,
        tied_head=attributes.take("tie_word_embeddings", bool, default=True),
        attention_bias=bias,
        attention_out_bias=bias,
        ff_bias=bias,
    )


def rules(config: ModelConfig) -> tuple[TensorRule, ...]:
    """The rules; norms have the same names whether they come before or after a sublayer."""
    pre = config.norm_placement == "pre"
    attention_norm, ff_norm = ("attention_norm", "ff_norm") if pre else ("attention_sum_norm", "ff_sum_norm")
    return (
        TensorRule("model.decoder.embed_tokens.weight", "embedding", "V E"),
        TensorRule("model.decoder.project_in.weight", "project_in", "D E -> E D"),
        # The first two rows stood for padding in fairseq.
        TensorRule("model.decoder.embed_positions.weight", "position_embedding", "(2+[C]) D -> C D"),
        TensorRule("model.decoder.final_layer_norm.weight", "norm.scale", "D"),
        TensorRule("model.decoder.final_layer_norm.bias", "norm.bias", "D"),
        TensorRule("model.decoder.project_out.weight", "project_out", "E D -> D E"),
        TensorRule("lm_head.weight", "head", "V E"),
        *layer_rules(
            "model.decoder.layers.{layer}.",
            ("self_attn.q_proj.weight", "attention.query", "(N H) D -> N H D"),
            ("self_attn.q_proj.bias", "attention.query_bias", "(N H) -> N H"),
            ("self_attn.k_proj.weight", "attention.key", "(N H) D -> N H D"),
            ("self_attn.k_proj.bias", "attention.key_bias", "(N H) -> N H"),
            ("self_attn.v_proj.weight", "attention.value", "(N H) D -> N H D"),
            ("self_attn.v_proj.bias", "attention.value_bias", "(N H) -> N H"),
            ("self_attn.out_proj.weight", "attention.out", "D (N H) -> N H D"),
            ("self_attn.out_proj.bias", "attention.out_bias", "D"),
            ("self_attn_layer_norm.weight", f"{attention_norm}.scale", "D"),
            ("self_attn_layer_norm.bias", f"{attention_norm}.bias", "D"),
            ("fc1.weight", "ff.up", "F D"),
            ("fc1.bias", "ff.up_bias", "F"),
            ("fc2.weight", "ff.down", "D F -> F D"),
            ("fc2.bias", "ff.down_bias", "D"),
            ("final_layer_norm.weight", f"{ff_norm}.scale", "D"),
            ("final_layer_norm.bias", f"{ff_norm}.bias", "D"),
        ),
    )


FAMILY = Family(
    model_type="opt",
    title="OPT, OPT-IML, Galactica",
    read_config=read_config,
    rules=rules,
    prefix="model.",
    copies={"lm_head.weight": "model.decoder.embed_tokens.weight"},
)
