"""StableLM, its second generation with a norm for every head."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config=LLAMA_LIKE,
    variants={
        "gqa": {},
        "mha, biases": {"num_key_value_heads": 4, "use_qkv_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "tied, half rotary": {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        "head norms": {"qk_layernorm": True},
        "parallel, head norms, biases": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
        "parallel, whole rotary": {"use_parallel_residual": True, "partial_rotary_factor": 1.0},
    },
    not_in_gguf={"gelu": "no field for the activation"},
)
