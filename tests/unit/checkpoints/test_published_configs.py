"""config.json files as they are published, with the attributes in them that no code reads."""

from __future__ import annotations

import json

import pytest

from griffin_jax.checkpoints.huggingface import read_hf_config

QWEN2_5 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip

PUBLISHED = {
    "Qwen2.5-0.5B": (QWEN2_5, "use_mrope=False"),
    "Qwen2.5-1.5B": (
        {
            **QWEN2_5, "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 131072,
            "max_window_layers": 28, "num_attention_heads": 12, "num_hidden_layers": 28, "sliding_window": 131072,
        },
        "use_mrope=False",
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        {
            **QWEN2_5, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_size": 1536, "intermediate_size": 8960,
            "max_position_embeddings": 131072, "max_window_layers": 21, "num_attention_heads": 12,
            "num_hidden_layers": 28, "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False,
            "transformers_version": "4.44.0",
        },
        "use_mrope=False",
    ),
    "gemma-2-9b-it": (
        {
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
            "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
            "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2",
            "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
            "sliding_window_size": 4096, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
            "use_cache": True, "vocab_size": 256000,
        },
        "sliding_window_size=4096",
    ),
    "a fine-tune of Llama 2 7B": (
        {
            "_flash_attn_2_enabled": True, "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
            "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
        },
        "_flash_attn_2_enabled=True",
    ),
    "SmolLM3-3B": (
        {
            "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
            "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
            "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
            "no_rope_layer_interval": 4, "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(36)],
            "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004,
            "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0,
            "sliding_window": None, "torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0",
            "use_cache": False, "use_sliding_window": False, "vocab_size": 128256,
        },
        "max_window_layers=28",
    ),
    "Yarn-Mistral-7b-128k": (
        {
            "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "max_sequence_length": 131072, "model_type": "mistral",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 16.0, "finetuned": True, "original_max_position_embeddings": 8192, "type": "yarn",
            },
            "rope_theta": 10000.0, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.35.0.dev0", "use_cache": True, "vocab_size": 32000,
        },
        "finetuned=True",
    ),
}  # fmt: skip
"""What the models are called, with their configuration and what a warning says of it."""


@pytest.mark.parametrize(("values", "unread"), PUBLISHED.values(), ids=PUBLISHED)
def test_attributes_without_effect(tmp_path, values, unread):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=f"{unread}.* changes nothing here, and nothing in transformers"):
        _, config = read_hf_config(tmp_path)
    assert config.num_layers == values["num_hidden_layers"]
    assert config.windows == () or values["model_type"] in ("gemma2", "mistral")


def test_early_llama(tmp_path):
    """Written before transformers kept the length of the context, which was 2,048."""
    values = {
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_sequence_length": 2048,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1,
        "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.28.0.dev0", "use_cache": True,
        "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="max_sequence_length=2048 changes nothing"):
        _, config = read_hf_config(tmp_path)
    assert config.max_positions == 2048
