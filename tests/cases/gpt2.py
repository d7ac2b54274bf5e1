"""GPT-2."""

from __future__ import annotations

from cases import CONTEXT, FF, HEADS, LAYERS, VOCABULARY, WIDTH, Cases

CASES = Cases(
    config={
        "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_inner": FF, "n_layer": LAYERS, "n_head": HEADS,
        "n_positions": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    },
    variants={
        "tied": {},
        "own head, gelu, four times the width": {
            "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": None,
        },
        "unscaled scores, relu": {
            "scale_attn_weights": False, "activation_function": "relu", "reorder_and_upcast_attn": True,
        },
        "one head": {"n_head": 1},
    },
    down="mlp.c_proj",
)  # fmt: skip
