"""GPT-Neo."""

from __future__ import annotations

from cases import CONTEXT, FF, HEADS, LAYERS, VOCABULARY, WIDTH, Cases

CASES = Cases(
    config={
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": FF, "num_layers": LAYERS,
        "num_heads": HEADS, "max_position_embeddings": CONTEXT, "window_size": 8,
        "attention_types": [[["global", "local"], 1]], "bos_token_id": 1, "eos_token_id": 2,
    },
    variants={"every other": {}, "own head, four times the width": {
        "tie_word_embeddings": False, "intermediate_size": None, "attention_types": [[["local"], 2]],
    }},
    down="mlp.c_proj",
)  # fmt: skip
