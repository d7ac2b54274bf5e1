"""GPT-J."""

from __future__ import annotations

from cases import CONTEXT, FF, HEADS, LAYERS, VOCABULARY, WIDTH, Cases

CASES = Cases(
    config={
        "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_inner": FF, "n_layer": LAYERS, "n_head": HEADS,
        "n_positions": CONTEXT, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2,
    },
    variants={
        "half turns": {},
        "tied, all turns, relu": {"tie_word_embeddings": True, "rotary_dim": 8, "activation_function": "relu"},
        "two heads, gelu, four times the width": {"n_head": 2, "activation_function": "gelu", "n_inner": None},
    },
    down="mlp.fc_out",
)  # fmt: skip
