"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini."""

from __future__ import annotations

from typing import Any

from griffin_jax.checkpoints.families.llama import COPIES, IGNORED
from griffin_jax.checkpoints.families.llama import RULES as LLAMA_RULES
from griffin_jax.checkpoints.schema.attributes import (
    Attributes,
    read_activation,
    read_gguf_sizes,
    read_sizes,
    windows_of,
)
from griffin_jax.checkpoints.schema.family import Family, GgufFamily, StoredTensors
from griffin_jax.checkpoints.schema.layouts import FUSED_GGUF_RULES, layer_rules
from griffin_jax.checkpoints.schema.rotary import read_rotary
from griffin_jax.model.config import ModelConfig

# The first models were published with the names of LongRoPE's drafts.
ROTARY_KINDS = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def read_config(attributes: Attributes) -> ModelConfig:
    """The architecture that a config.json with `"model_type": "phi3"` describes."""
    sizes = read_sizes(attributes, max_position_embeddings=4096, bos_token_id=1, eos_token_id=32000)
    # Phi-4-mini states what it shares with all others.
    attributes.expect(attention_bias=False, mlp_bias=False, lm_head_bias=False, full_attn_mod=1, interpolate_factor=1)
    window = attributes.take("sliding_window", int)
    if window is not None and window < 1:
        raise ValueError(f"{attributes.where}: sliding_window must be at least 1 or null, got {window}")
    return ModelConfig(
        family="phi3",
        **sizes,
        activation=read_activation(attributes),
        norm_eps=attributes.take("rms_norm_eps", float, default=1e-5),
        rotary=read_rotary(
            attributes, sizes["max_positions"], sizes["head_dim"], share=1.0, original=4096, kinds=ROTARY_KINDS
        ),
        windows=windows_of(window, [True] * sizes["num_layers"]),
        tied_head=attributes.take("tie_word_embeddings", bool, default=False),
    )


RULES = (
    *LLAMA_RULES,
    *layer_rules(
        "model.layers.{layer}.",
        ("self_attn.qkv_proj.weight", "attention.query", "([N]+G+G H) D -> N H D"),
        ("self_attn.qkv_proj.weight", "attention.key", "(N+[G]+G H) D -> G H D"),
        ("self_attn.qkv_proj.weight", "attention.value", "(N+G+[G] H) D -> G H D"),
        ("mlp.gate_up_proj.weight", "ff.gate", "([F]+F) D -> F D"),
        ("mlp.gate_up_proj.weight", "ff.up", "(F+[F]) D -> F D"),
    ),
)


def read_gguf_fields(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any]:
    """llama.cpp's metadata in the terms of config.json.

    llama.cpp does not apply the window that it stores. It was there in training, so it is applied here.
    """
    return read_gguf_sizes(attributes) | {
        "rms_norm_eps": attributes.take("attention.layer_norm_rms_epsilon", float),
        "rope_theta": attributes.take("rope.freq_base", float, default=10_000.0),
        "rope_scaling": _gguf_longrope(attributes, tensors),
        "original_max_position_embeddings": attributes.take("rope.scaling.original_context_length", int),
        "sliding_window": attributes.take("attention.sliding_window", int) or None,
    }


def _gguf_longrope(attributes: Attributes, tensors: StoredTensors) -> dict[str, Any] | None:
    """No field says that a model uses LongRoPE; the tensors with its factors do."""
    factors = {f"{length}_factor": f"rope_factors_{length}.weight" for length in ("long", "short")}
    if not any(name in tensors.shapes for name in factors.values()):
        return None
    if absent := sorted(set(factors.values()) - tensors.shapes.keys()):
        raise ValueError(f"{attributes.where}: LongRoPE without {', '.join(absent)}")
    attributes.require("rope.scaling.original_context_length")
    return {
        "rope_type": "longrope",
        "attention_factor": attributes.take("rope.scaling.attn_factor", float),
        **{field: tensors.read(name).astype(float).tolist() for field, name in factors.items()},
    }


ROTARY_FACTORS = (r"rope_factors_(long|short)\.weight",)
GGUF_RULES = (
    *FUSED_GGUF_RULES,
    # Gate and up together, though the name tells only of the latter.
    *layer_rules(
        "blk.{layer}.",
        ("ffn_up.weight", "ff.gate", "([F]+F) D -> F D"),
        ("ffn_up.weight", "ff.up", "(F+[F]) D -> F D"),
    ),
)

FAMILY = Family(
    model_type="phi3",
    title="Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
    read_config=read_config,
    rules=RULES,
    prefix="model.",
    ignored=IGNORED,
    copies=COPIES,
    gguf=GgufFamily(("phi3",), read_gguf_fields, GGUF_RULES, ignored=ROTARY_FACTORS),
)
