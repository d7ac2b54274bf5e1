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
    variants={
        "usual": {},
        "lower windows": {
            "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3, "num_hidden_layers": 4,
        },
        "dense layers": {"decoder_sparse_step": 2, "norm_topk_prob": True},
    },
    not_in_gguf={
        "lower windows": "windows are not in the file",
        "dense layers": "llama.cpp has no names for tensors of dense layers",
    },
    routed=True,
)  # fmt: skip
