"""Phi-1.5 and Phi-2."""

from __future__ import annotations

from cases import LLAMA_LIKE, WIDTH, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "num_key_value_heads": 4},
    variants={
        "four times the width": {"intermediate_size": 4 * WIDTH},
        "gqa, relu": {"num_key_value_heads": 2, "hidden_act": "relu"},
    },
    down="mlp.fc2",
    not_in_gguf={"gqa, relu": "neither is in the file"},
)
