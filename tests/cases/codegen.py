"""CodeGen."""

from __future__ import annotations

from cases import CONTEXT, FF, LAYERS, VOCABULARY, WIDTH, Cases

CASES = Cases(
    config={
        "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_inner": FF, "n_layer": LAYERS, "n_head": 8,
        "n_positions": CONTEXT, "n_ctx": CONTEXT, "rotary_dim": 2, "bos_token_id": 1, "eos_token_id": 2,
    },
    variants={"half turns": {}},
    down="mlp.fc_out",
)  # fmt: skip
