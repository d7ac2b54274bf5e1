"""GLM-4.5."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={
        **LLAMA_LIKE, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "num_hidden_layers": 3,
        "head_dim": 16,
    },
    variants={
        "usual": {"routed_scaling_factor": 2.5},
        "head norms, biases, groups": {
            "use_qk_norm": True, "attention_bias": True, "n_group": 2, "topk_group": 1, "norm_topk_prob": False,
        },
    },
    routed=True,
)  # fmt: skip
