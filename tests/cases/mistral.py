"""Mistral."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "window": {"sliding_window": 8},
        "narrow window, mqa": {"sliding_window": 2, "num_key_value_heads": 1},
        "no window, head size": {"sliding_window": None, "head_dim": 16},
        "default window, tied": {"tie_word_embeddings": True},
    },
    not_in_gguf={
        "window": "windows are not in the file",
        "narrow window, mqa": "windows are not in the file",
    },
)
