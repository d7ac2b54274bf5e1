"""Arcee AFM."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={"squares": {}, "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}},
)
