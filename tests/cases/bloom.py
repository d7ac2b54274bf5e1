"""BLOOM."""

from __future__ import annotations

from cases import HEADS, LAYERS, VOCABULARY, WIDTH, Cases

CASES = Cases(
    config={
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    variants={
        "tied": {},
        "own head, six heads": {"tie_word_embeddings": False, "n_head": 6, "hidden_size": 48},
        "one head": {"n_head": 1},
    },
    down="mlp.dense_4h_to_h",
)  # fmt: skip
