"""ERNIE 4.5 with experts."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={
        **LLAMA_LIKE, "moe_intermediate_size": 24, "moe_num_experts": 8, "moe_k": 3, "num_hidden_layers": 3,
        "moe_num_shared_experts": 2,
    },
    variants={
        "usual": {},
        "other layers, no shared ones": {
            "moe_layer_start_index": 0, "moe_layer_interval": 2, "moe_num_shared_experts": 0,
            "tie_word_embeddings": False,
        },
    },
    routed=True,
)  # fmt: skip
