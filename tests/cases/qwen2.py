"""Qwen2."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "gqa": {},
        "tied, mha": {"tie_word_embeddings": True, "num_key_value_heads": 4},
        "upper windows": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "window unused": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
        "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    },
    not_in_gguf={
        "upper windows": "windows are not in the file",
    },
)
