"""OLMo 1."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "clip": {"clip_qkv": 0.5},
        "tied, biases": {"tie_word_embeddings": True, "attention_bias": True},
    },
    not_in_gguf={"tied, biases": "no biases"},
)
