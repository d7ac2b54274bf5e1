"""OLMoE."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "num_experts": 8, "num_experts_per_tok": 3},
    variants={"usual": {}, "all experts": {"num_experts_per_tok": 8}},
    routed=True,
)
