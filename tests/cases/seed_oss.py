"""Seed-OSS."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 16},
    variants={
        "biases": {},
        "other biases": {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    },
)
