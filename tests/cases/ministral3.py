"""Ministral 3."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

GROWING = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 16.0, "original_max_position_embeddings": 16,
    "max_position_embeddings": 256, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}  # fmt: skip

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 16, "rope_parameters": GROWING},
    variants={
        "growing queries": {},
        "windows, tied": {"sliding_window": 8, "tie_word_embeddings": True},
    },
    not_in_gguf={"windows, tied": "the window is not in the file"},
)  # fmt: skip
