"""SmolLM3."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "num_hidden_layers": 4},
    variants={
        "every fourth layer without rotary": {},
        "every other, untied": {"no_rope_layer_interval": 2, "tie_word_embeddings": False},
        "listed, biases": {"no_rope_layers": [1, 0, 0, 1], "attention_bias": True, "mlp_bias": True},
        "windows": {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 2},
        "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    },
    not_in_gguf={
        "every other, untied": "which layers have no rotary embedding is not in the file",
        "listed, biases": "which layers have no rotary embedding is not in the file",
        "windows": "windows are not in the file",
    },
)
