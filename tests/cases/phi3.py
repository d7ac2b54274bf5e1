"""Phi-3 and its successors."""

from __future__ import annotations

from typing import Any

from cases import LLAMA_LIKE, Cases


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    """Different factors for every pair of dimensions, for short texts and long."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "short_factor": [1.0 + 0.2 * pair for pair in range(pairs)],
        "long_factor": [1.5 + 2.5 * pair for pair in range(pairs)],
        **more,
    }


CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "gqa": {},
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "window": {"sliding_window": 8},
        "partial rotary, theta": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75},
        },
        # Almost every text of the tests is longer than 16 tokens, only one longer than 64.
        "longrope beyond the context": {"original_max_position_embeddings": 16, "rope_parameters": longrope(4)},
        "longrope within the context": {"original_max_position_embeddings": 64, "rope_parameters": longrope(4)},
        "partial longrope, window": {
            "original_max_position_embeddings": 16,
            "rope_parameters": longrope(3, partial_rotary_factor=0.75),
            "sliding_window": 8,
        },
        "longrope, attention factor": {
            "original_max_position_embeddings": 16,
            "rope_parameters": longrope(4, attention_factor=1.3),
        },
    },
    not_in_gguf={"longrope, attention factor": "llama.cpp's converter takes it from the two contexts"},
)
