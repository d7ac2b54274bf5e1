"""Granite 3 with routed experts."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={
        **LLAMA_LIKE,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 3.0,
    },
    variants={"usual": {}, "one of all": {"num_experts_per_tok": 1}},
    routed=True,
)
