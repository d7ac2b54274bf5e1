"""Command R7B."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "sliding_window": 8},
    variants={
        "three to one": {"num_hidden_layers": 4},
        "listed windows, biases": {
            "layer_types": ["full_attention", "sliding_attention"], "attention_bias": True,
            "tie_word_embeddings": False,
        },
    },
    not_in_gguf={"listed windows, biases": "which layers have windows is not in the file"},
)  # fmt: skip
