"""OPT."""

from __future__ import annotations

from cases import CONTEXT, FF, HEADS, LAYERS, VOCABULARY, WIDTH, Cases

CASES = Cases(
    config={
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "ffn_dim": FF, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    },
    variants={
        "125m": {},
        "350m, norms behind, projected embedding": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
        "no biases, gelu, own head": {
            "enable_bias": False, "activation_function": "gelu", "tie_word_embeddings": False,
        },
        "no final norm, projected own head": {
            "_remove_final_layer_norm": True, "word_embed_proj_dim": 48, "tie_word_embeddings": False,
        },
    },
    down="fc2",
)  # fmt: skip
