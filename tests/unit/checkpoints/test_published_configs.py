"""Configurations as they were published, with what they leave out, name in an older way, or have for nobody."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from griffin_jax.checkpoints.families import families

PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-3-4b-it": {
        "model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106],
        "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
    "Olmo-3-7B": {
        "model_type": "olmo3", "attention_bias": False, "eos_token_id": 100257, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 65536, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_theta": 500000,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
            "original_max_position_embeddings": 8192, "rope_type": "yarn",
        },
        "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 100278,
    },
    "starcoder2-3b": {
        "model_type": "starcoder2", "activation_function": "gelu", "attention_dropout": 0.1, "bos_token_id": 0,
        "embedding_dropout": 0.1, "eos_token_id": 0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072,
        "intermediate_size": 12288, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 16384,
        "mlp_type": "default", "norm_epsilon": 1e-05, "norm_type": "layer_norm", "num_attention_heads": 24,
        "num_hidden_layers": 30, "num_key_value_heads": 2, "residual_dropout": 0.1, "rope_theta": 999999.4420358813,
        "sliding_window": 4096, "use_bias": True, "vocab_size": 49152,
    },
    "Hunyuan-7B": {
        "model_type": "hunyuan_v1_dense", "attention_bias": False, "attention_head_dim": 128, "bos_token_id": 1,
        "eod_token_id": 127967, "eos_token_id": 127960, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "rope_scaling": {
            "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "type": "dynamic",
        },
        "use_qk_norm": True, "vocab_size": 128167,
    },
    "EXAONE-4.0-32B": {
        "model_type": "exaone4", "bos_token_id": 1, "eos_token_id": 361, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 5120, "intermediate_size": 27392, "max_position_embeddings": 131072, "num_attention_heads": 40,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16, "num_hidden_layers": 64,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000,
        "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "sliding_window": 4096, "sliding_window_pattern": "LLLG", "vocab_size": 102400,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*changes nothing here:UserWarning")
@pytest.mark.parametrize("name", PUBLISHED)
def test_they_are_read_as_transformers_reads_them(name):
    """What transformers writes out in full is the same model."""
    from transformers import AutoConfig

    values = PUBLISHED[name]
    family = families()[values["model_type"]]
    # It puts more into the dictionaries that it is given.
    filled = json.loads(AutoConfig.for_model(**copy.deepcopy(values)).to_json_string())
    assert family.model_config(values, name) == family.model_config(filled, name)


@pytest.mark.filterwarnings("ignore:.*changes nothing here:UserWarning")
def test_what_they_mean():
    configs = {name: families()[values["model_type"]].model_config(values, name) for name, values in PUBLISHED.items()}
    gemma, hunyuan, exaone = (configs[name] for name in ("gemma-3-4b-it", "Hunyuan-7B", "EXAONE-4.0-32B"))
    assert (gemma.vocab_size, gemma.num_heads, gemma.max_positions) == (262_208, 8, 131_072)
    assert gemma.eos_token_ids == (1, 106)
    assert hunyuan.rotary is not None
    assert hunyuan.rotary.theta == pytest.approx(11_158_839.9251)
    assert exaone.unrotated_layers == tuple(range(3, 64, 4))
