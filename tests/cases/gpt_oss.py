"""gpt-oss."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={
        **LLAMA_LIKE,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 9,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        },
    },
    variants={
        "usual": {},
        "tight limit, no biases": {
            "swiglu_limit": 0.6, "attention_bias": False, "layer_types": ["full_attention", "sliding_attention"],
        },
    },
    not_in_gguf={"tight limit, no biases": "neither the limit nor which layers have windows is in the file"},
    routed=True,
)  # fmt: skip
