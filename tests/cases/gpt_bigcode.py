"""StarCoder."""

from __future__ import annotations

from cases import CONTEXT, FF, HEADS, LAYERS, VOCABULARY, WIDTH, Cases

CASES = Cases(
    config={
        "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_inner": FF, "n_layer": LAYERS, "n_head": HEADS,
        "n_positions": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    },
    variants={
        "mqa, four times the width": {"n_inner": None},
        "mha, own head, unscaled scores": {
            "multi_query": False, "tie_word_embeddings": False, "scale_attn_weights": False,
        },
    },
    down="mlp.c_proj",
    not_in_gguf={"mha, own head, unscaled scores": "neither is in the file"},
)  # fmt: skip
