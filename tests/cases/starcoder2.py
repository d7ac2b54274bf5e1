"""StarCoder2."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "tie_word_embeddings": False},
    variants={
        "biases": {},
        "window, no biases, tied": {"sliding_window": 8, "use_bias": False, "tie_word_embeddings": True},
    },
    down="mlp.c_proj",
    not_in_gguf={"window, no biases, tied": "the window is not in the file"},
)
