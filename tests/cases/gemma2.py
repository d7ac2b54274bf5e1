"""Gemma 2."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    variants={
        "alternating windows": {},
        "other scale, tight caps": {
            "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        },
        "no caps, mqa": {
            "attn_logit_softcapping": None, "final_logit_softcapping": None, "num_key_value_heads": 1,
        },
        "listed windows, biases": {
            "layer_types": ["full_attention", "sliding_attention"], "attention_bias": True,
        },
    },
    not_in_gguf={
        "other scale, tight caps": "the scale is not in the file",
        "no caps, mqa": "no cap is not in the file, and has a default",
        "listed windows, biases": "which layers have windows is not in the file",
    },
)  # fmt: skip
