"""GLM-4-0414."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 16},
    variants={"half turns": {}, "no biases, tied": {"attention_bias": False, "tie_word_embeddings": True}},
)
