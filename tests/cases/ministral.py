"""Ministral 8B."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "sliding_window": 8},
    variants={
        "alternating windows": {"layer_types": ["full_attention", "sliding_attention"], "head_dim": 16},
        "windows everywhere, tied": {"tie_word_embeddings": True, "head_dim": 8},
    },
)  # fmt: skip
