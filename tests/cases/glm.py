"""GLM-4-9B."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "half turns": {"head_dim": 8, "rms_norm_eps": 1e-5},
        "no biases, all turns": {
            "head_dim": 16,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        },
    },
    not_in_gguf={"no biases, all turns": "the converter writes neither head size nor epsilon, base and share"},
)
