"""Helium 1."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 8},
    variants={"gqa": {}, "biases": {"attention_bias": True, "mlp_bias": True}},
)
