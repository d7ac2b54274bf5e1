"""Phi-3.5-MoE."""

from __future__ import annotations

from typing import Any

from cases import LLAMA_LIKE, Cases
from cases.phi3 import longrope


def rope(magnitude: float) -> dict[str, Any]:
    """transformers has one set of factors for all texts, so that all texts of the tests are short ones."""
    return longrope(4, original_max_position_embeddings=64, short_mscale=magnitude, long_mscale=magnitude)


CASES = Cases(
    config={**LLAMA_LIKE, "num_local_experts": 6, "num_experts_per_tok": 2},
    variants={
        "usual": {"rope_parameters": rope((4 / 3) ** 0.5), "attention_bias": True, "lm_head_bias": True},
        "no rope scaling or biases": {"router_jitter_noise": 0.2},
        "windows, other magnitude": {"rope_parameters": rope(1.3), "sliding_window": 9, "router_jitter_noise": 0.1},
    },
    not_in_gguf={
        "no rope scaling or biases": "no field for how near logits must be",
        "windows, other magnitude": "llama.cpp's converter takes the magnitude from the two contexts",
    },
    routed=True,
)
