"""Granite 3."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={
        **LLAMA_LIKE, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.09,
        "logits_scaling": 8.0,
    },
    variants={
        "gqa": {},
        "tied, other scales": {"tie_word_embeddings": True, "logits_scaling": 3.0, "residual_multiplier": 0.7},
        "biases, mha": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    },
)  # fmt: skip
