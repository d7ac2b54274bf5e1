"""Qwen3."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 16},
    variants={
        "gqa": {},
        "tied, biases": {"tie_word_embeddings": True, "attention_bias": True},
        "windows, mqa": {
            "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_key_value_heads": 1,
        },
    },
    not_in_gguf={
        "windows, mqa": "windows are not in the file",
    },
)  # fmt: skip
