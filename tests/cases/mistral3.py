"""Mistral Small 3.1 and Ministral 3, with images."""

from __future__ import annotations

from cases import LLAMA_LIKE, VISION, Cases
from cases.ministral3 import GROWING

CASES = Cases(
    config={"vision_config": {"model_type": "pixtral", **VISION}, "image_token_index": 5},
    variants={
        "mistral": {
            "text_config": {
                **LLAMA_LIKE, "model_type": "mistral", "sliding_window": None, "head_dim": 16, "rms_norm_eps": 1e-5,
            },
            "tie_word_embeddings": False,
        },
        "ministral3, tied": {
            "text_config": {
                **LLAMA_LIKE, "model_type": "ministral3", "head_dim": 16, "rope_parameters": GROWING,
                "tie_word_embeddings": True,
            },
        },
    },
)  # fmt: skip
