"""Gemma 3 with images."""

from __future__ import annotations

from cases import LLAMA_LIKE, VISION, Cases

TEXT = {
    **LLAMA_LIKE, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16,
}  # fmt: skip

CASES = Cases(
    config={
        "vision_config": {"model_type": "siglip_vision_model", **VISION}, "image_token_index": 5,
        "mm_tokens_per_image": 4,
    },
    variants={
        "five to one": {"text_config": {**TEXT, "num_hidden_layers": 6}},
    },
)  # fmt: skip
