"""EXAONE 4."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "three to one": {"num_hidden_layers": 4, "sliding_window": 8},
        "no windows, tied": {
            "sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True,
        },
    },
)  # fmt: skip
