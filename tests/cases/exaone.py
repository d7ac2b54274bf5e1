"""EXAONE 3."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 8},
    variants={
        "gqa": {},
        "llama3 rope, tied": {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
    },
)  # fmt: skip
