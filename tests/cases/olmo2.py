"""OLMo 2."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "mha": {"num_key_value_heads": 4},
        "gqa, biases": {"attention_bias": True},
        "tied, theta": {
            "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
)  # fmt: skip
