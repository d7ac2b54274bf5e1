"""GPT-NeoX-20B and Pythia."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={name: value for name, value in LLAMA_LIKE.items() if name != "num_key_value_heads"},
    variants={
        "quarter turns": {},
        "sequential, half turns": {
            "use_parallel_residual": False,
            "hidden_act": "gelu_fast",
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
        "one head, all turns, no attention bias": {
            "num_attention_heads": 1,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        "tied, linear rope": {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            },
        },
        "yarn": {
            "num_attention_heads": 2,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64,
                "partial_rotary_factor": 0.5,
            },
        },
    },
    down="mlp.dense_4h_to_h",
    not_in_gguf={
        "sequential, half turns": "the activation and the base are not in the file",
        "tied, linear rope": "the scaling is not in the file",
        "yarn": "the scaling is not in the file",
    },
)  # fmt: skip
