"""Llama 1 to 3 and their kin."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "gqa": {},
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "head size, relu": {"head_dim": 16, "hidden_act": "relu"},
        "gelu, theta": {
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        "tanh gelu, linear rope": {
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
        },
        "llama3 rope": {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
        "yarn rope": {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
        "dynamic rope": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    },
    not_in_gguf={
        "head size, relu": "the activation is not in the file",
        "gelu, theta": "the activation is not in the file",
        "tanh gelu, linear rope": "the activation is not in the file",
    },
)  # fmt: skip
