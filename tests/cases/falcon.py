"""Falcon in its forms: one group of heads, several, or one for each head; one norm or two; in parallel or not."""

from __future__ import annotations

from cases import CONTEXT, FF, HEADS, LAYERS, VOCABULARY, WIDTH, Cases

CASES = Cases(
    config={
        # Eager attention adds the biases of ALiBi twice: they are part of the mask as well.
        "attn_implementation": "sdpa",
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
    },
    variants={
        "7b": {},
        "40b": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "11b": {
            "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        "biases, mha, linear rope": {
            "bias": True, "multi_query": False,
            "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
        },
        "sequential, tanh gelu": {
            "parallel_attn": False, "activation": "gelu_pytorch_tanh", "ffn_hidden_size": FF,
        },
        "rw": {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        "rw, 6 heads": {
            "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False,
            "hidden_size": 48, "num_attention_heads": 6,
        },
        "alibi, groups, two norms": {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    },
    down="mlp.dense_4h_to_h",
    not_in_gguf={
        "11b": "no field for the base of the rotary embedding",
        "biases, mha, linear rope": "no biases",
        "sequential, tanh gelu": "parallel layers only",
        "rw": "parallel layers only",
        "rw, 6 heads": "parallel layers only",
        "alibi, groups, two norms": "no field for ALiBi",
    },
)  # fmt: skip
