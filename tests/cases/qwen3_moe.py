"""Qwen3 with routed experts."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    variants={"usual": {"norm_topk_prob": True}, "dense layers": {"mlp_only_layers": [1]}},
    not_in_gguf={"dense layers": "llama.cpp has no names for tensors of dense layers"},
    routed=True,
)
