"""Nemotron 4 and Minitron."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "half turns": {},
        "biases, head size": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    },
    not_in_gguf={"biases, head size": "which part of such a head turns is not in the file"},
)
