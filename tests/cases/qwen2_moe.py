"""Qwen2 with routed experts."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={
        **LLAMA_LIKE,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 20,
    },
    variants={"usual": {}, "dense layers": {"decoder_sparse_step": 2, "norm_topk_prob": True}},
    not_in_gguf={"dense layers": "llama.cpp has no names for tensors of dense layers"},
    routed=True,
)
