"""Apertus."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "xielu": {"dtype": "float32"},
        "squares, biases, tied": {"hidden_act": "relu2", "attention_bias": True, "tie_word_embeddings": True},
    },
    not_in_gguf={"squares, biases, tied": "llama.cpp has neither another activation than xIELU nor biases for it"},
)
