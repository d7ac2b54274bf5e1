"""Gemma 3, text models."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6, "query_pre_attn_scalar": 16},
    variants={
        "five to one": {},
        "other bases, linear": {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
        "every other, scale, cap": {
            "sliding_window_pattern": 2, "num_hidden_layers": 3, "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 3.0,
        },
        "no windows, mqa": {
            "layer_types": ["full_attention"] * 3, "num_hidden_layers": 3, "num_key_value_heads": 1,
        },
    },
    not_in_gguf={
        "every other, scale, cap": "which layers have windows is not in the file",
        "no windows, mqa": "which layers have windows is not in the file",
    },
)  # fmt: skip
