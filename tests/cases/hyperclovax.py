"""HyperCLOVA X SEED."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={
        **LLAMA_LIKE, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.09,
        "logits_scaling": 0.3,
    },
    variants={"norms after": {}, "none after, tied": {"use_post_norm": False, "tie_word_embeddings": True}},
)  # fmt: skip
