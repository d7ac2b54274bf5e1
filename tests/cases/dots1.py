"""dots.llm1."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={
        **LLAMA_LIKE, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "num_hidden_layers": 3,
        "head_dim": 8,
    },
    variants={
        "usual": {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "sliding_window": None},
        "groups, windows": {
            "n_group": 4, "topk_group": 2, "sliding_window": 9, "max_window_layers": 1, "routed_scaling_factor": 1.5,
        },
    },
    not_in_gguf={"groups, windows": "llama.cpp has no windows in this architecture"},
    routed=True,
)  # fmt: skip
