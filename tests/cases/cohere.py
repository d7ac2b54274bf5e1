"""Command R and Aya."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "tied": {},
        "head norms": {"use_qk_norm": True, "logit_scale": 0.4},
        "own head, biases": {"tie_word_embeddings": False, "attention_bias": True},
    },
    not_in_gguf={"own head, biases": "neither is in the file"},
)
