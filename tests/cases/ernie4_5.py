"""ERNIE 4.5."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 16},
    variants={"tied": {}, "own head, biases": {"tie_word_embeddings": False, "use_bias": True}},
)
