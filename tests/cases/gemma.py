"""Gemma 1."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 16},
    variants={
        "mqa": {"num_key_value_heads": 1},
        "mha, narrow heads": {"num_key_value_heads": 4, "head_dim": 8},
        "legacy gelu, theta": {
            "hidden_act": "gelu", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        "biases": {"attention_bias": True},
    },
    not_in_gguf={
        "legacy gelu, theta": "the base is not in the file",
        "biases": "biases are not supported by llama.cpp",
    },
)  # fmt: skip
