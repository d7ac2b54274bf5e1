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
        "one head, four times the width": {"n_head": 1, "n_inner": None},
    },
    down="mlp.c_proj",
    not_in_gguf={
        "tied": "another width than four times n_embd is not in the file",
        "own head, gelu, four times the width": "the activation is not in the file",
        "unscaled scores, relu": "the activation and the scale are not in the file",
    },
)  # fmt: skip
