"""HunYuan."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "head_dim": 16},
    variants={
        "gqa": {},
        "alpha, tied, biases": {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "alpha": 50.0, "factor": 1.0},
            "tie_word_embeddings": True, "attention_bias": True,
        },
    },
    not_in_gguf={"alpha, tied, biases": "the converter writes another context"},
)  # fmt: skip
