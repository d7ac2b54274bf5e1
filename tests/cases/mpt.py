"""MPT: ALiBi instead of position embeddings, and no biases."""

from __future__ import annotations

from cases import CONTEXT, HEADS, LAYERS, VOCABULARY, WIDTH, Cases

CASES = Cases(
    # transformers' feed-forward layers have four times the width whatever the configuration says.
    config={
        "vocab_size": VOCABULARY, "d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": CONTEXT,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    variants={
        "tied": {},
        "own head, 6 heads": {"tie_word_embeddings": False, "d_model": 48, "n_heads": 6},
        "3 heads": {"d_model": 24, "n_heads": 3},
        "clip": {"attn_config": {"clip_qkv": 0.7}},
        "scale, norm epsilon": {"attn_config": {"softmax_scale": 0.2}, "layer_norm_epsilon": 1e-3},
    },
    down="ffn.down_proj",
    not_in_gguf={"scale, norm epsilon": "no field for the scale, and 1e-5 whatever epsilon is"},
)  # fmt: skip
