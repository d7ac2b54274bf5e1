"""Apertus: Llama with norms for each head, and a feed-forward layer of xIELUs without gate."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED, RULES, read_gguf_fields
from griffin_jax.checkpoints.families.qwen3 import GGUF_HEAD_NORMS, HEAD_NORMS
from griffin_jax.checkpoints.schema.attributes import Attributes, read_activation, read_sizes
from griffin_jax.checkpoints.schema.family import Family, GgufFamily
from griffin_jax.checkpoints.schema.layouts import GGUF_RULES, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary, rotary_of
from griffin_jax.model.config import ModelConfig, Rotary
from griffin_jax.model.feed_forward import XIELU_SLOPE

THETA = 12_000_000.0
DEFAULT_ROTARY: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "apertus"` describes."""
    sizes = read_sizes(attributes, max_position_embeddings=65_536, bos_token_id=1, eos_token_id=2)
    # Published configurations state what it shares with all others.
    attributes.expect(mlp_bias=False, qk_norm=True, post_norm=False)
    is_xielu = attributes.take("hidden_act", str, default="xielu") == "xielu"
    # One switch for query, key, value and output.
    bias = attributes.take("attention_bias", bool, default=False)
    return ModelConfig(
        family="apertus",
        **sizes,
        activation="xielu" if is_xielu else read_activation(attributes),
        gated=False,
        norm_eps=attributes.take("rms_norm_eps", float, default=1e-5),
        head_norm="shared",
        rotary=_read_rotary(attributes, sizes["max_positions"], sizes["head_dim"]),
        tied_head=attributes.take("tie_word_embeddings", bool, default=False),
        attention_bias=bias,
        attention_out_bias=bias,
    )


def _read_rotary(attributes: Attributes, max_positions: int, head_dim: int) -> Rotary:
    """Rotary embedding; without scaling, that of the published models."""
    if attributes.take("rope_parameters", dict) or attributes.take("rope_scaling", dict):
        return read_rotary(attributes, max_positions, head_dim, theta=THETA)
    attributes.expect(rope_theta=THETA)
    return rotary_of(DEFAULT_ROTARY, attributes.where, max_positions, head_dim, theta=THETA)


# Which llama.cpp keeps as numbers in the metadata.
GGUF_CURVES = layer_rules(
    "blk.{layer}.",
    ("xielu.alpha_p", "ff.positive_curve", "1"),
    ("xielu.alpha_n", "ff.negative_curve", "1"),
)
# A module's own numbers, by their names in checkpoints and in GGUF files.
ACTIVATION = r"(model\.layers\.\d+\.mlp\.act_fn|blk\.\d+\.xielu)\."

FAMILY = Family(
    model_type="apertus",
    title="Apertus",
    read_config=read_config,
    rules=(
        *RULES,
        *HEAD_NORMS,
        *layer_rules(
            "model.layers.{layer}.",
            ("attention_layernorm.weight", "attention_norm.scale", "D"),
            ("feedforward_layernorm.weight", "ff_norm.scale", "D"),
            ("mlp.act_fn.alpha_p", "ff.positive_curve", "1"),
            ("mlp.act_fn.alpha_n", "ff.negative_curve", "1"),
        ),
    ),
    prefix="model.",
    # `eps` is so near to 0 that float32 does not tell.
    ignored=(*IGNORED, ACTIVATION + "(beta|eps)"),
    copies=COPIES,
    constants={ACTIVATION + "beta": XIELU_SLOPE, ACTIVATION + "eps": -1e-6},
    # llama.cpp knows no other activation than xIELU for it.
    gguf=GgufFamily(
        ("apertus",),
        read_gguf_fields,
        GGUF_RULES + GGUF_HEAD_NORMS + GGUF_CURVES,
        ignored=(r"rope_freqs\.weight", ACTIVATION + "(beta|eps)"),
        numbers=("xielu.alpha_p", "xielu.alpha_n", "xielu.beta", "xielu.eps"),
    ),
)
