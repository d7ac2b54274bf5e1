"""The config.json of published models, at least one for each family, and how many parameters they have.

They are written down by hand, from what is known and quoted of them, and not downloaded: a value here may differ from
the file on the hub, and attributes that only describe training or tooling may be missing. The millions of parameters
are those that the hub, a paper or a model card states, of the text model where there are others, and None where the
number is not known well enough; round ones are from the model's name. So a model that agrees with its number has the
right sizes, which says nothing about its other attributes.
"""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]


def sizes(width: int, ff: int, layers: int, heads: int, kv_heads: int | None, vocab: int) -> Values:
    """The sizes by their usual names."""
    values = {
        "hidden_size": width, "intermediate_size": ff, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}


def tokens(bos: int | None, eos: int | list[int] | None, positions: int) -> Values:
    """The special tokens, and how long a text may be."""
    return {"bos_token_id": bos, "eos_token_id": eos, "max_position_embeddings": positions}


def gpt2_sizes(width: int, layers: int, heads: int, positions: int, vocab: int) -> Values:
    """The sizes by GPT-2's names."""
    return {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": positions, "vocab_size": vocab}


def llama3_scaling(factor: float) -> Values:
    """The scaling of Llama 3.1's rotary embedding."""
    return {
        "factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip


def of(model_type: str, architecture: str, *parts: Values, **more: Any) -> Values:
    """What every config.json has, and the parts and attributes of this one."""
    return {
        "_name_or_path": "", "architectures": [architecture], "initializer_range": 0.02, "model_type": model_type,
        "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True,
    } | {name: value for part in (*parts, more) for name, value in part.items()}  # fmt: skip


SILU = {"attention_dropout": 0.0, "hidden_act": "silu", "tie_word_embeddings": False}
UNBIASED = {"attention_bias": False, "mlp_bias": False}
SUMMARY = {
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
}  # fmt: skip
GPT_OSS = {
    "attention_bias": True, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64,
    "initial_context_length": 4096, "max_position_embeddings": 131072, "num_experts_per_tok": 4,
    "output_router_logits": False, "pad_token_id": 199999, "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
        "lm_head"], "quant_method": "mxfp4"}, "rms_norm_eps": 1e-05,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False}, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
    "sliding_window": 128, "swiglu_limit": 7.0,
}  # fmt: skip
GPT2_DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-05}
LOCAL_LAST = ["sliding_attention"] * 3 + ["full_attention"]
LLAMA_31 = {**UNBIASED, "rms_norm_eps": 1e-05, "rope_theta": 500000.0}


def llama(*parts: Values, **more: Any) -> Values:
    """A model of the family of Llama."""
    return of("llama", "LlamaForCausalLM", {**SILU, "pretraining_tp": 1, "rope_scaling": None}, *parts, **more)


def mistral(*parts: Values, **more: Any) -> Values:
    """A model of the family of Mistral."""
    return of("mistral", "MistralForCausalLM", SILU, {"rms_norm_eps": 1e-05}, *parts, **more)


def qwen2(*parts: Values, **more: Any) -> Values:
    """A model of the family of Qwen2."""
    window = {"rms_norm_eps": 1e-06, "use_mrope": False, "use_sliding_window": False}
    return of("qwen2", "Qwen2ForCausalLM", SILU, window, *parts, **more)


def qwen3(*parts: Values, **more: Any) -> Values:
    """A model of the family of Qwen3."""
    window = {"rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "head_dim": 128}
    rest = {"attention_bias": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000, **tokens(151643, 151645, 40960)}
    return of("qwen3", "Qwen3ForCausalLM", SILU, window, rest, *parts, **more)


SPARSE = {
    "decoder_sparse_step": 1, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "use_sliding_window": False,
}  # fmt: skip
GEMMA = {
    "attention_bias": False, "attention_dropout": 0.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    **tokens(2, 1, 8192),
}  # fmt: skip
GEMMA_2 = {
    **GEMMA, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
GEMMA_3 = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, **tokens(2, [1, 106], 32768),
}  # fmt: skip


def gemma3(text: Values, **more: Any) -> Values:
    """A Gemma 3 that also reads images."""
    long = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    vision = {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    images = {
        "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "mm_tokens_per_image": 256, "text_config": {**long, **text}, "vision_config": vision,
    }  # fmt: skip
    return of("gemma3", "Gemma3ForConditionalGeneration", images, more)


def gpt_neox(*parts: Values, **more: Any) -> Values:
    """A model of the family of GPT-NeoX."""
    values = {
        "hidden_act": "gelu", "layer_norm_eps": 1e-05, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "tie_word_embeddings": False, "use_parallel_residual": True, **tokens(0, 0, 2048),
    }  # fmt: skip
    return of("gpt_neox", "GPTNeoXForCausalLM", values, *parts, **more)


def falcon(width: int, layers: int, heads: int, vocab: int = 65024, **more: Any) -> Values:
    """A model of the family of Falcon."""
    values = {
        "alibi": False, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "bias": False,
        "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "hidden_size": width,
        "layer_norm_epsilon": 1e-05, "multi_query": True, "new_decoder_architecture": False,
        "num_attention_heads": heads, "num_hidden_layers": layers, "parallel_attn": True, "vocab_size": vocab,
    }  # fmt: skip
    return of("falcon", "FalconForCausalLM", values, more)


def mpt(width: int, layers: int, heads: int, positions: int) -> Values:
    """A model of the family of MPT."""
    attention = {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
    }  # fmt: skip
    start = {
        "emb_init_std": None, "emb_init_uniform_lim": None, "fan_mode": "fan_in", "init_div_is_residual": True,
        "init_gain": 0, "init_nonlinearity": "relu", "init_std": 0.02, "name": "kaiming_normal_", "verbose": 0,
    }  # fmt: skip
    return of(
        "mpt", "MPTForCausalLM", attn_config=attention, d_model=width, emb_pdrop=0, embedding_fraction=1.0,
        expansion_ratio=4, init_config=start, init_device="cpu", learned_pos_emb=True, logit_scale=None,
        max_seq_len=positions, n_heads=heads, n_layers=layers, no_bias=True, norm_type="low_precision_layernorm",
        resid_pdrop=0, tokenizer_name="EleutherAI/gpt-neox-20b", verbose=0, vocab_size=50432,
    )  # fmt: skip


def bloom(layers: int, heads: int, **more: Any) -> Values:
    """A model of the family of BLOOM."""
    values = {
        "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0,
        "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "n_inner": None, "n_layer": layers,
        "num_attention_heads": heads, "offset_alibi": 100, "pad_token_id": 3, "pretraining_tp": 1, "seq_length": 2048,
        "skip_bias_add": True, "skip_bias_add_qkv": False, "slow_but_exact": False, "unk_token_id": 0,
        "vocab_size": 250880,
    }  # fmt: skip
    return of("bloom", "BloomForCausalLM", values, more)


def opt(width: int, layers: int, heads: int, **more: Any) -> Values:
    """A model of the family of OPT."""
    values = {
        "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
        "attention_dropout": 0.0, "do_layer_norm_before": True, "dropout": 0.1, "ffn_dim": 4 * width,
        "hidden_size": width, "init_std": 0.02, "layerdrop": 0.0, "num_attention_heads": heads,
        "num_hidden_layers": layers, "pad_token_id": 1, "prefix": "</s>", "vocab_size": 50272,
        "word_embed_proj_dim": width, **tokens(2, 2, 2048),
    }  # fmt: skip
    return of("opt", "OPTForCausalLM", values, more)


def phi(*parts: Values, **more: Any) -> Values:
    """A model of the family of Phi-1."""
    values = {
        "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "gelu_new", "layer_norm_eps": 1e-05,
        "num_key_value_heads": None, "qk_layernorm": False, "resid_pdrop": 0.0, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    return of("phi", "PhiForCausalLM", values, *parts, **more)


PHI_3_AUTO = {
    "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"
}  # fmt: skip
# Published with the decimals of float32.
PHI_35_LONG = [
    1.08, 1.11, 1.14, 1.34, 1.59, 1.6, 1.62, 2.62, 3.23, 3.23, 4.79, 7.4, 7.7, 9.09, 12.2, 17.67, 24.46, 28.57, 30.42,
    30.84, 32.59, 32.93, 42.32, 44.96, 50.34, 50.45, 57.55, 57.93, 58.21, 60.14, 62.61, 62.62, 62.71, 63.14, 63.14,
    63.77, 63.93, 63.96, 63.97, 64.03, 64.07, 64.08, 64.12, 64.41, 64.48, 64.51, 64.53, 64.84,
]  # fmt: skip
PHI_35_SHORT = [
    1.0, 1.02, 1.03, 1.03, *[1.05] * 5, 1.07, 1.1, 1.11, 1.16, 1.16, 1.17, 1.29, 1.34, 1.68, 1.79, 1.82, 1.85, 1.88,
    1.91, 1.94, 1.99, *[2.02] * 6, *[2.03] * 9, 2.08, 2.09, 2.19, 2.22, 2.59, 2.73, 2.75, 2.84,
]  # fmt: skip
PHI_4_MINI_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip


def phi3(*parts: Values, **more: Any) -> Values:
    """A model of the family of Phi-3."""
    values = {
        "attention_bias": False, "auto_map": PHI_3_AUTO, "embd_pdrop": 0.0, "original_max_position_embeddings": 4096,
        "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    }  # fmt: skip
    return of("phi3", "Phi3ForCausalLM", SILU, values, *parts, **more)


def stablelm(*parts: Values, **more: Any) -> Values:
    """A model of the family of StableLM."""
    values = {"layer_norm_eps": 1e-05, "partial_rotary_factor": 0.25, "rope_theta": 10000, "use_qkv_bias": False}
    return of("stablelm", "StableLmForCausalLM", SILU, values, *parts, **more)


STABLELM_2 = {
    "hidden_dropout": 0.0, "qk_layernorm": False, "rope_scaling": None, "use_parallel_residual": False,
    **tokens(100257, 100257, 4096),
}  # fmt: skip
OLMO = {"attention_bias": False, "pad_token_id": 1, "rope_scaling": None, "rope_theta": 10000.0}
OLMO_2 = {**OLMO, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_theta": 500000}


def granite(*parts: Values, **more: Any) -> Values:
    """A dense Granite 3."""
    values = {
        **UNBIASED, "embedding_multiplier": 12.0, "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
        "rope_scaling": None,
    }  # fmt: skip
    return of("granite", "GraniteForCausalLM", SILU, values, *parts, **more, tie_word_embeddings=True)


COHERE = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "layer_norm_eps": 1e-05, "pad_token_id": 0,
    "use_qk_norm": False,
}  # fmt: skip
COHERE_2 = {
    **COHERE, "cache_implementation": "hybrid", "head_dim": 128, "layer_switch": 4, "logit_scale": 0.25,
    "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "rope_scaling": None,
    "rope_theta": 50000, "rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern": 4,
    "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True,
    "use_parallel_embedding": False,
}  # fmt: skip
GLM = {
    "attention_bias": True, "head_dim": 128, "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rope_theta": 10000.0
}  # fmt: skip
GLM_ENDS = [151329, 151336, 151338]


def gpt_bigcode(*parts: Values, **more: Any) -> Values:
    """A model of the family of StarCoder."""
    values = {
        **GPT2_DROPOUT, **SUMMARY, "activation_function": "gelu_pytorch_tanh", "attention_softmax_in_fp32": True,
        "bos_token_id": 0, "eos_token_id": 0, "inference_runner": 0, "max_batch_size": None,
        "max_sequence_length": None, "multi_query": True, "pad_key_length": True, "pre_allocate_kv_cache": False,
        "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True, "validate_runner_input": True,
    }  # fmt: skip
    return of("gpt_bigcode", "GPTBigCodeForCausalLM", values, *parts, **more)


def starcoder2(*parts: Values, **more: Any) -> Values:
    """A model of the family of StarCoder2."""
    values = {
        "activation_function": "gelu", "attention_dropout": 0.1, "embedding_dropout": 0.1,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-05, "mlp_type": "default", "norm_epsilon": 1e-05,
        "norm_type": "layer_norm", "residual_dropout": 0.1, "sliding_window": 4096, "use_bias": True,
        **tokens(0, 0, 16384),
    }  # fmt: skip
    return of("starcoder2", "Starcoder2ForCausalLM", values, *parts, **more)


def nemotron(*parts: Values, **more: Any) -> Values:
    """A model of the family of Nemotron."""
    values = {
        **UNBIASED, "attention_dropout": 0.0, "hidden_act": "relu2", "hidden_dropout": 0.0, "norm_eps": 1e-05,
        "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "tie_word_embeddings": False, **tokens(2, 3, 4096),
    }  # fmt: skip
    return of("nemotron", "NemotronForCausalLM", values, *parts, **more)


def hunyuan(*parts: Values, **more: Any) -> Values:
    """A dense HunYuan."""
    scaling = {
        "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "type": "dynamic",
    }  # fmt: skip
    values = {
        **UNBIASED, "attention_head_dim": 128, "head_dim": 128, "rms_norm_eps": 1e-05, "rope_scaling": scaling,
        "rope_theta": 10000.0, "use_cla": False, "use_qk_norm": True,
    }  # fmt: skip
    return of("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", SILU, values, *parts, **more)


def exaone(*parts: Values, **more: Any) -> Values:
    """A model of the family of EXAONE 3."""
    values = {
        "activation_function": "silu", "attention_dropout": 0.0, "bos_token_id": 1, "embed_dropout": 0.0,
        "eos_token_id": 361, "layer_norm_epsilon": 1e-05, "pad_token_id": 0, "rope_scaling": None, "vocab_size": 102400,
        "auto_map": {
            "AutoConfig": "configuration_exaone.ExaoneConfig",
            "AutoModelForCausalLM": "modeling_exaone.ExaoneForCausalLM",
        },
    }  # fmt: skip
    return of("exaone", "ExaoneForCausalLM", values, *parts, **more)


EXAONE_4 = {**SILU, "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_theta": 1000000}
GPT_NEO = {
    **SUMMARY, "activation_function": "gelu_new", "attention_dropout": 0, "embed_dropout": 0,
    "gradient_checkpointing": False, "intermediate_size": None, "layer_norm_epsilon": 1e-05, "resid_dropout": 0,
    "vocab_size": 50257, "window_size": 256, **tokens(50256, 50256, 2048),
}  # fmt: skip


def codegen(*parts: Values, **more: Any) -> Values:
    """A model of the family of CodeGen."""
    values = {
        **GPT2_DROPOUT, **SUMMARY, "activation_function": "gelu_new", "bos_token_id": 1, "eos_token_id": 50256,
        "gradient_checkpointing": False, "n_ctx": 2048, "n_inner": None, "scale_attn_weights": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
        "tie_word_embeddings": False, "tokenizer_class": "GPT2Tokenizer",
    }  # fmt: skip
    return of("codegen", "CodeGenForCausalLM", values, *parts, **more)


PIXTRAL = {
    "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024, "image_size": 1540,
    "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16, "num_channels": 3,
    "num_hidden_layers": 24, "patch_size": 14, "rope_theta": 10000.0,
}  # fmt: skip
IMAGES = {
    "image_token_index": 10, "multimodal_projector_bias": False, "projector_hidden_act": "gelu",
    "spatial_merge_size": 2, "vision_config": PIXTRAL, "vision_feature_layer": -1,
}  # fmt: skip
MINISTRAL_3 = {
    "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-05, "sliding_window": None, "tie_word_embeddings": True, "use_cache": True,
    "rope_parameters": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0, "rope_type": "yarn",
        "type": "yarn",
    },
    **sizes(3072, 9216, 26, 32, 8, 131072),
}  # fmt: skip
MISTRAL_SMALL = {
    "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 131072,
    "model_type": "mistral", "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None,
    "use_cache": True, **sizes(5120, 32768, 40, 32, 8, 131072),
}  # fmt: skip

# fmt: off
PUBLISHED: dict[str, tuple[float | None, Values]] = {
    "llama-7b": (6738.4, llama(sizes(4096, 11008, 32, 32, None, 32000), tokens(1, 2, 2048),
        max_sequence_length=2048, pad_token_id=0, rms_norm_eps=1e-06)),
    "Llama-2-7b-hf": (6738.4, llama(sizes(4096, 11008, 32, 32, 32, 32000), tokens(1, 2, 4096), rms_norm_eps=1e-05)),
    "vicuna-7b-v1.5": (6738.4, llama(sizes(4096, 11008, 32, 32, 32, 32000), tokens(1, 2, 4096), pad_token_id=0,
        rms_norm_eps=1e-05)),
    "ReluLLaMA-7B": (6738.4, llama(sizes(4096, 11008, 32, 32, 32, 32000), tokens(1, 2, 4096), hidden_act="relu",
        rms_norm_eps=1e-05)),
    "Meta-Llama-3-8B": (8030.3, llama(sizes(4096, 14336, 32, 32, 8, 128256), tokens(128000, 128001, 8192),
        attention_bias=False, rms_norm_eps=1e-05, rope_theta=500000.0)),
    "Llama-3.1-8B-Instruct": (8030.3, llama(LLAMA_31, sizes(4096, 14336, 32, 32, 8, 128256),
        tokens(128000, [128001, 128008, 128009], 131072), rope_scaling=llama3_scaling(8.0))),
    "Llama-3.2-1B": (1235.8, llama(LLAMA_31, sizes(2048, 8192, 16, 32, 8, 128256), tokens(128000, 128001, 131072),
        head_dim=64, rope_scaling=llama3_scaling(32.0), tie_word_embeddings=True)),
    "SmolLM2-135M": (134.515, llama(UNBIASED, sizes(576, 1536, 30, 9, 3, 49152), tokens(0, 0, 8192),
        is_llama_config=True, rms_norm_eps=1e-05, rope_interleaved=False, rope_theta=100000, tie_word_embeddings=True,
        initializer_range=0.041666666666666664)),
    "TinyLlama-1.1B-Chat-v1.0": (1100.0, llama(sizes(2048, 5632, 22, 32, 4, 32000), tokens(1, 2, 2048),
        attention_bias=False, rms_norm_eps=1e-05, rope_theta=10000.0)),
    "Mistral-7B-v0.1": (7241.7, mistral(sizes(4096, 14336, 32, 32, 8, 32000), tokens(1, 2, 32768),
        rope_theta=10000.0, sliding_window=4096)),
    "Mistral-7B-v0.3": (7248.0, mistral(sizes(4096, 14336, 32, 32, 8, 32768), tokens(1, 2, 32768),
        rope_theta=1000000.0, sliding_window=None)),
    "Mistral-Nemo-Instruct-2407": (12247.8, mistral(sizes(5120, 14336, 40, 32, 8, 131072), tokens(1, 2, 1024000),
        head_dim=128, rope_theta=1000000.0, sliding_window=None)),
    # 23,572.4 with the head of its own, of which the configuration says nothing.
    "Mistral-Small-3.1-24B-Instruct-2503": (22901.3, of("mistral3", "Mistral3ForConditionalGeneration", IMAGES,
        text_config=MISTRAL_SMALL)),
    "Ministral-3-3B-Instruct-2512": (3400, of("mistral3", "Mistral3ForConditionalGeneration", IMAGES,
        dtype="bfloat16", text_config={**MINISTRAL_3, "model_type": "ministral3"})),
    "Ministral-3-3B-Instruct-2512 (text)": (3400, of("ministral3", "Ministral3ForCausalLM", MINISTRAL_3)),
    "Ministral-8B-Instruct-2410": (8019.8, of("ministral", "MinistralForCausalLM", SILU,
        sizes(4096, 12288, 36, 32, 8, 131072), tokens(1, 2, 32768), head_dim=128, rms_norm_eps=1e-05,
        layer_types=["full_attention", *["sliding_attention"] * 3] * 9, rope_theta=100000000.0, sliding_window=32768)),
    "Qwen2-0.5B": (494.0, qwen2(sizes(896, 4864, 24, 14, 2, 151936), tokens(151643, 151643, 131072),
        max_window_layers=24, rope_theta=1000000.0, sliding_window=131072, tie_word_embeddings=True)),
    "Qwen2.5-Coder-7B-Instruct": (7615.6, qwen2(sizes(3584, 18944, 28, 28, 4, 152064), tokens(151643, 151645, 32768),
        max_window_layers=28, rope_theta=1000000.0, sliding_window=131072)),
    "DeepSeek-R1-Distill-Qwen-1.5B": (1777.1, qwen2(sizes(1536, 8960, 28, 12, 2, 151936),
        tokens(151643, 151643, 131072), max_window_layers=21, rope_theta=10000, sliding_window=4096)),
    "Qwen3-0.6B": (596.0, qwen3(sizes(1024, 3072, 28, 16, 8, 151936), max_window_layers=28, tie_word_embeddings=True)),
    "Qwen3-8B": (8190.7, qwen3(sizes(4096, 12288, 36, 32, 8, 151936), max_window_layers=36)),
    "Mixtral-8x7B-v0.1": (46702.8, of("mixtral", "MixtralForCausalLM", SILU, sizes(4096, 14336, 32, 32, 8, 32000),
        tokens(1, 2, 32768), num_experts_per_tok=2, num_local_experts=8, output_router_logits=False, rms_norm_eps=1e-05,
        rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None)),
    "Qwen1.5-MoE-A2.7B": (14315.8, of("qwen2_moe", "Qwen2MoeForCausalLM", SILU, sizes(2048, 5632, 24, 16, 16, 151936),
        tokens(151643, 151643, 8192), **SPARSE, max_window_layers=21, moe_intermediate_size=1408, norm_topk_prob=False,
        num_experts=60, num_experts_per_tok=4, shared_expert_intermediate_size=5632, sliding_window=32768)),
    "Qwen3-30B-A3B": (30532.1, of("qwen3_moe", "Qwen3MoeForCausalLM", SILU, sizes(2048, 6144, 48, 32, 4, 151936),
        tokens(151643, 151645, 40960), **SPARSE, attention_bias=False, head_dim=128, max_window_layers=48,
        mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True, num_experts=128, num_experts_per_tok=8,
        rope_scaling=None, sliding_window=None)),
    "OLMoE-1B-7B-0924": (6919.2, of("olmoe", "OlmoeForCausalLM", SILU, sizes(2048, 1024, 16, 16, 16, 50304),
        attention_bias=False, clip_qkv=None, eos_token_id=50279, max_position_embeddings=4096, norm_topk_prob=False,
        num_experts=64, num_experts_per_tok=8, output_router_logits=False, rms_norm_eps=1e-05, rope_scaling=None,
        rope_theta=10000.0, router_aux_loss_coef=0.01)),
    "granite-3.0-1b-a400m-instruct": (1334.6, of("granitemoe", "GraniteMoeForCausalLM", SILU,
        sizes(1024, 512, 24, 16, 8, 49155), tokens(0, 0, 4096), attention_bias=False, attention_multiplier=0.015625,
        embedding_multiplier=12.0, logits_scaling=6.0, num_experts_per_tok=8, num_local_experts=32,
        output_router_logits=False, residual_multiplier=0.22, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=10000,
        router_aux_loss_coef=0.0, tie_word_embeddings=True)),
    "gpt-oss-20b": (20914.8, of("gpt_oss", "GptOssForCausalLM", SILU, GPT_OSS, sizes(2880, 2880, 24, 64, 8, 201088),
        layer_types=["sliding_attention", "full_attention"] * 12, num_local_experts=32)),
    "gpt-oss-120b": (116829.2, of("gpt_oss", "GptOssForCausalLM", SILU, GPT_OSS, sizes(2880, 2880, 36, 64, 8, 201088),
        layer_types=["sliding_attention", "full_attention"] * 18, num_local_experts=128)),
    "Phi-3.5-MoE-instruct": (41873.2, of("phimoe", "PhiMoEForCausalLM", SILU,
        sizes(4096, 6400, 32, 32, 8, 32064), tokens(1, 32000, 131072), attention_bias=True, hidden_dropout=0.0,
        input_jitter_noise=0.01, lm_head_bias=True, num_experts_per_tok=2, num_local_experts=16,
        original_max_position_embeddings=4096, output_router_logits=False, rms_norm_eps=1e-05,
        rope_scaling={"long_factor": [1.01] * 64, "long_mscale": 1.243163121016122, "short_factor": [1.0] * 64,
            "original_max_position_embeddings": 4096, "short_mscale": 1.243163121016122, "type": "longrope"},
        rope_theta=10000.0, router_aux_loss_coef=0.0, router_jitter_noise=0.01, sliding_window=131072)),
    "dots.llm1.inst": (142000, of("dots1", "Dots1ForCausalLM", SILU, sizes(4096, 10944, 62, 32, 32, 152064),
        tokens(None, 151645, 32768), attention_bias=False, first_k_dense_replace=1, max_window_layers=62,
        moe_intermediate_size=1408, moe_layer_freq=1, n_group=1, n_routed_experts=128, n_shared_experts=2,
        norm_topk_prob=True, num_experts_per_tok=6, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000000,
        routed_scaling_factor=2.5, scoring_func="sigmoid", sliding_window=None, topk_group=1, topk_method="noaux_tc",
        use_sliding_window=False)),
    "GLM-4.5-Air": (106000, of("glm4_moe", "Glm4MoeForCausalLM", SILU, sizes(4096, 10944, 46, 96, 8, 151552),
        attention_bias=True, eos_token_id=[151329, 151336, 151338], first_k_dense_replace=1, head_dim=128,
        max_position_embeddings=131072, moe_intermediate_size=1408, n_group=1, n_routed_experts=128,
        n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8, num_nextn_predict_layers=1,
        pad_token_id=151329, partial_rotary_factor=0.5, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=1000000,
        routed_scaling_factor=1.0, topk_group=1, use_qk_norm=False)),
    "ERNIE-4.5-21B-A3B-PT": (None, of("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", SILU,
        sizes(2560, 12288, 28, 20, 4, 103424), tokens(1, 2, 131072), moe_intermediate_size=1536, moe_k=6,
        moe_layer_end_index=-1, moe_layer_interval=1, moe_layer_start_index=1, moe_norm_min=1e-12, moe_num_experts=64,
        moe_num_shared_experts=2, pad_token_id=0, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=500000.0,
        tie_word_embeddings=True, use_bias=False)),
    "moe-7b-1b-active-shared-experts": (None, of("granitemoeshared", "GraniteMoeSharedForCausalLM", SILU,
        sizes(1536, 512, 40, 24, 8, 49152), tokens(0, 0, 4096), attention_bias=False, attention_multiplier=0.015625,
        embedding_multiplier=12.0, logits_scaling=6.0, num_experts_per_tok=6, num_local_experts=62,
        output_router_logits=False, residual_multiplier=0.22, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=10000,
        router_aux_loss_coef=0.0, shared_intermediate_size=1024, tie_word_embeddings=True)),
    "gemma-2b": (2506.2, of("gemma", "GemmaForCausalLM", GEMMA, sizes(2048, 16384, 18, 8, 1, 256000))),
    "codegemma-7b": (8537.7, of("gemma", "GemmaForCausalLM", GEMMA, sizes(3072, 24576, 28, 16, 16, 256000))),
    "gemma-2-2b": (2614.3, of("gemma2", "Gemma2ForCausalLM", GEMMA_2, sizes(2304, 9216, 26, 8, 4, 256000))),
    "gemma-2-9b": (9241.7, of("gemma2", "Gemma2ForCausalLM", GEMMA_2, sizes(3584, 14336, 42, 16, 8, 256000),
        sliding_window_size=4096)),
    "gemma-2-27b": (27227.1, of("gemma2", "Gemma2ForCausalLM", GEMMA_2, sizes(4608, 36864, 46, 32, 16, 256000),
        head_dim=128, query_pre_attn_scalar=144)),
    "gemma-3-1b-it": (999.9, of("gemma3_text", "Gemma3ForCausalLM", GEMMA_3, sizes(1152, 6912, 26, 4, 1, 262144))),
    "gemma-3-4b-it": (3884, gemma3({"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34})),
    "gemma-3-27b-it": (27016, gemma3({"head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504,
        "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168})),
    "medgemma-4b-it": (3884, gemma3({**GEMMA_3, **sizes(2560, 10240, 34, 8, 4, 262208), "sliding_window": 1024,
        "max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}})),
    "vaultgemma-1b": (1038.7, of("vaultgemma", "VaultGemmaForCausalLM", GEMMA_2, sizes(1152, 6912, 26, 4, 4, 256000),
        attn_logit_softcapping=None, final_logit_softcapping=None, max_position_embeddings=1024, sliding_window=512,
        layer_types=["sliding_attention", "full_attention"] * 13)),
    "gpt2": (124.4, of("gpt2", "GPT2LMHeadModel", GPT2_DROPOUT, SUMMARY, gpt2_sizes(768, 12, 12, 1024, 50257),
        activation_function="gelu_new", bos_token_id=50256, eos_token_id=50256, n_ctx=1024,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}})),
    "distilgpt2": (81.9, of("gpt2", "GPT2LMHeadModel", GPT2_DROPOUT, SUMMARY, gpt2_sizes(768, 6, 12, 1024, 50257),
        _num_labels=1, activation_function="gelu_new", bos_token_id=50256, eos_token_id=50256, n_ctx=1024,
        id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0},
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}})),
    "gpt-j-6b": (6050.9, of("gptj", "GPTJForCausalLM", GPT2_DROPOUT, SUMMARY, gpt2_sizes(4096, 28, 16, 2048, 50400),
        activation_function="gelu_new", attn_pdrop=0.0, bos_token_id=50256, embd_pdrop=0.0, eos_token_id=50256,
        gradient_checkpointing=False, n_inner=None, resid_pdrop=0.0, rotary=True, rotary_dim=64,
        scale_attn_weights=True, tie_word_embeddings=False, tokenizer_class="GPT2Tokenizer",
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}})),
    "gpt-neox-20b": (20554.6, gpt_neox(sizes(6144, 24576, 44, 64, None, 50432), attention_probs_dropout_prob=0,
        hidden_act="gelu_fast", hidden_dropout_prob=0)),
    "pythia-70m": (70.4, gpt_neox(sizes(512, 2048, 6, 8, None, 50304))),
    "pythia-1.4b": (1414.6, gpt_neox(sizes(2048, 8192, 24, 16, None, 50304))),
    "dolly-v2-3b": (2775.1, gpt_neox(sizes(2560, 10240, 32, 32, None, 50280), gradient_checkpointing=False,
        custom_pipelines={"text-generation": {"impl": "instruct_pipeline.InstructionTextGenerationPipeline"}})),
    # The hub counts the copies of the head that are stored with Falcon 7B (7,217.2) and Falcon 180B (179,522.6).
    "falcon-7b": (6921.7, falcon(4544, 32, 71, num_kv_heads=71)),
    "falcon-40b": (41303.3, falcon(8192, 60, 128, new_decoder_architecture=True, num_kv_heads=8)),
    "falcon-180B": (178557.1, falcon(14848, 80, 232, new_decoder_architecture=True, num_kv_heads=8)),
    "falcon-11B": (11103, falcon(4096, 60, 32, activation="gelu", ff_factor=4, ffn_hidden_size=16384,
        max_position_embeddings=8192, new_decoder_architecture=True, num_kv_heads=8, num_ln_in_parallel_attn=1,
        rope_scaling=None, rope_theta=500042.0, tie_word_embeddings=False)),
    "falcon-rw-1b": (1311.6, falcon(2048, 24, 32, 50304, alibi=True, bias=True, bos_token_id=1, eos_token_id=2,
        multi_query=False, num_kv_heads=32, parallel_attn=False)),
    "mpt-7b": (6649.3, mpt(4096, 32, 32, 2048)),
    "mpt-30b": (29957.8, mpt(7168, 48, 64, 8192)),
    "bloom-560m": (559.2, bloom(24, 16, hidden_size=1024)),
    "bloomz-7b1": (7069.0, bloom(30, 32, hidden_size=4096)),
    "bloom": (176247.3, bloom(70, 112, n_embed=14336)),
    "opt-125m": (125.2, opt(768, 12, 12)),
    "opt-350m": (331.2, opt(1024, 24, 16, do_layer_norm_before=False, word_embed_proj_dim=512)),
    "opt-6.7b": (6658.5, opt(4096, 32, 32)),
    "opt-iml-1.3b": (1315.8, opt(2048, 24, 32)),
    "galactica-1.3b": (1315.2, opt(2048, 24, 32, activation_function="gelu", bos_token_id=0, enable_bias=True,
        layer_norm_elementwise_affine=True, learned_embeddings=True, scale_embeddings=False, vocab_size=50000)),
    "phi-1_5": (1418.3, phi(sizes(2048, 8192, 24, 32, None, 51200), tokens(None, None, 2048),
        partial_rotary_factor=0.5)),
    "phi-2": (2779.7, phi(sizes(2560, 10240, 32, 32, None, 51200), tokens(50256, 50256, 2048),
        partial_rotary_factor=0.4, resid_pdrop=0.1)),
    "Phi-3-mini-4k-instruct": (3821.1, phi3(sizes(3072, 8192, 32, 32, 32, 32064), tokens(1, 32000, 4096),
        rope_scaling=None, sliding_window=2047)),
    "Phi-3.5-mini-instruct": (3821.1, phi3(sizes(3072, 8192, 32, 32, 32, 32064), tokens(1, 32000, 131072),
        rope_scaling={"long_factor": PHI_35_LONG, "short_factor": PHI_35_SHORT, "type": "longrope"},
        sliding_window=262144)),
    "phi-4": (14659.5, phi3(sizes(5120, 17920, 40, 40, 10, 100352), tokens(100257, 100265, 16384),
        original_max_position_embeddings=16384, pad_token_id=100349, rope_scaling=None, rope_theta=250000,
        sliding_window=None)),
    "Phi-4-mini-instruct": (3836.0, phi3(sizes(3072, 8192, 32, 24, 8, 200064), tokens(199999, 199999, 131072),
        full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False, pad_token_id=199999,
        partial_rotary_factor=0.75, sliding_window=262144, tie_word_embeddings=True,
        rope_scaling={"long_factor": PHI_4_MINI_LONG, "short_factor": [1.0] * 48, "type": "longrope"})),
    "stablelm-3b-4e1t": (2795.4, stablelm(sizes(2560, 6912, 32, 32, 32, 50304), tokens(0, 0, 4096))),
    "stablelm-zephyr-3b": (2795.4, stablelm(sizes(2560, 6912, 32, 32, 32, 50304), tokens(0, 0, 4096))),
    "stable-code-3b": (2795.4, stablelm(sizes(2560, 6912, 32, 32, 32, 50304), tokens(0, 0, 16384),
        rope_theta=1000000, rotary_scaling_factor=1.0)),
    "stablelm-2-1_6b": (1644.5, stablelm(STABLELM_2, sizes(2048, 5632, 24, 32, 32, 100352), use_qkv_bias=True)),
    "stablelm-2-12b": (12143.6, stablelm(STABLELM_2, sizes(5120, 13824, 40, 32, 8, 100352), qk_layernorm=True,
        use_parallel_residual=True)),
    "OLMo-1B-hf": (1176.8, of("olmo", "OlmoForCausalLM", SILU, OLMO, sizes(2048, 8192, 16, 16, 16, 50304),
        tokens(None, 50279, 2048), clip_qkv=None, tie_word_embeddings=True)),
    "OLMo-1.7-7B-hf": (6888.1, of("olmo", "OlmoForCausalLM", SILU, OLMO, sizes(4096, 11008, 32, 32, 32, 50304),
        tokens(None, 50279, 4096), clip_qkv=8.0)),
    "OLMo-2-1124-7B": (7298.6, of("olmo2", "Olmo2ForCausalLM", SILU, OLMO_2, sizes(4096, 11008, 32, 32, 32, 100352),
        tokens(None, 100257, 4096))),
    "OLMo-2-0425-1B": (1484.9, of("olmo2", "Olmo2ForCausalLM", SILU, OLMO_2, sizes(2048, 8192, 16, 16, 16, 100352),
        tokens(None, 100257, 4096))),
    "Olmo-3-1025-7B": (7298.0, of("olmo3", "Olmo3ForCausalLM", SILU, OLMO_2, sizes(4096, 11008, 32, 32, 32, 100278),
        tokens(None, 100257, 65536), layer_types=LOCAL_LAST * 8, sliding_window=4096, rope_scaling={
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
            "original_max_position_embeddings": 8192, "rope_type": "yarn"})),
    "granite-3.0-2b-base": (2533.5, granite(sizes(2048, 8192, 40, 32, 8, 49152), tokens(0, 0, 4096),
        attention_multiplier=0.015625, logits_scaling=8.0, rope_theta=10000.0)),
    "granite-3.3-8b-instruct": (8170.9, granite(sizes(4096, 12800, 40, 32, 8, 49159), tokens(0, 0, 131072),
        attention_multiplier=0.0078125, logits_scaling=16.0, rope_theta=10000000.0)),
    "SmolLM3-3B": (3075.1, of("smollm3", "SmolLM3ForCausalLM", UNBIASED, sizes(2048, 11008, 36, 16, 4, 128256),
        tokens(128000, 128012, 65536), attention_dropout=0.0, hidden_act="silu", layer_types=["full_attention"] * 36,
        max_window_layers=28, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, pad_token_id=128004,
        pretraining_tp=2, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=5000000.0, sliding_window=None,
        use_sliding_window=False)),
    "c4ai-command-r-v01": (34980.8, of("cohere", "CohereForCausalLM", COHERE, sizes(8192, 22528, 40, 64, 64, 256000),
        tokens(5, 255001, 8192), logit_scale=0.0625, model_max_length=131072, pretraining_tp=1,
        rope_theta=8000000.0)),
    "c4ai-command-r-plus": (103810.8, of("cohere", "CohereForCausalLM", COHERE,
        sizes(12288, 33792, 64, 96, 8, 256000), tokens(5, 255001, 131072), logit_scale=0.8333333333333334,
        rope_theta=75000000.0, use_qk_norm=True)),
    "aya-23-8B": (8028.0, of("cohere", "CohereForCausalLM", COHERE, sizes(4096, 14336, 32, 32, 8, 256000),
        tokens(5, 255001, 8192), logit_scale=0.0625, rope_theta=10000)),
    "aya-expanse-8b": (8028.0, of("cohere", "CohereForCausalLM", COHERE, sizes(4096, 14336, 32, 32, 8, 256000),
        tokens(5, 255001, 8192), logit_scale=0.125, model_max_length=8192, rope_scaling=None, rope_theta=10000)),
    "c4ai-command-r7b-12-2024": (8028.0, of("cohere2", "Cohere2ForCausalLM", COHERE_2,
        sizes(4096, 14336, 32, 32, 8, 256000), tokens(5, 255001, 132096))),
    "c4ai-command-a-03-2025": (111057.6, of("cohere2", "Cohere2ForCausalLM", COHERE_2,
        sizes(12288, 36864, 64, 96, 8, 256000), tokens(5, 255001, 131072))),
    "tiny-aya-global": (None, of("cohere2", "Cohere2ForCausalLM", COHERE_2, sizes(2048, 11008, 36, 16, 4, 262144),
        tokens(2, 3, 500000), layer_types=LOCAL_LAST * 9, logit_scale=1.0)),
    "glm-4-9b-chat-hf": (9400, of("glm", "GlmForCausalLM", SILU, GLM, sizes(4096, 13696, 40, 32, 2, 151552),
        tokens(None, GLM_ENDS, 131072), rms_norm_eps=1.5625e-07)),
    "glm-edge-1.5b-chat": (1593.4, of("glm", "GlmForCausalLM", SILU, GLM, sizes(2048, 6144, 28, 16, 4, 59264),
        tokens(None, [59246, 59253, 59255], 8192), attention_bias=False, pad_token_id=59246, partial_rotary_factor=1.0,
        rms_norm_eps=1e-05)),
    "GLM-4-9B-0414": (9400, of("glm4", "Glm4ForCausalLM", SILU, GLM, sizes(4096, 13696, 40, 32, 2, 151552),
        tokens(None, GLM_ENDS, 32768), rms_norm_eps=1e-05)),
    "starcoder": (15517.5, gpt_bigcode(gpt2_sizes(6144, 40, 48, 8192, 49152), activation_function="gelu",
        n_inner=24576)),
    "starcoderbase-1b": (1137.2, gpt_bigcode(gpt2_sizes(2048, 24, 16, 8192, 49152), n_inner=8192)),
    "gpt_bigcode-santacoder": (1124.9, gpt_bigcode(gpt2_sizes(2048, 24, 16, 2048, 49280), bos_token_id=49152,
        eos_token_id=49152, n_inner=8192, runner_max_sequence_length=None)),
    "starcoder2-3b": (3030.4, starcoder2(sizes(3072, 12288, 30, 24, 2, 49152), rope_theta=999999.4420358813)),
    "starcoder2-7b": (7173.9, starcoder2(sizes(4608, 18432, 32, 36, 4, 49152), rope_theta=1000000)),
    "starcoder2-15b": (15957.9, starcoder2(sizes(6144, 24576, 40, 48, 4, 49152), rope_theta=100000,
        tie_word_embeddings=False)),
    "Seed-OSS-36B-Instruct": (36151.1, of("seed_oss", "SeedOssForCausalLM", SILU,
        sizes(5120, 27648, 64, 80, 8, 155136), tokens(0, 2, 524288), attention_bias=True, attention_dropout=0.1,
        attention_out_bias=False, head_dim=128, mlp_bias=False, pad_token_id=1, pretraining_tp=1, residual_dropout=0.1,
        rms_norm_eps=1e-06, rope_scaling={"rope_type": "default"}, rope_theta=10000000.0)),
    "AFM-4.5B": (4619, of("arcee", "ArceeForCausalLM", SILU, UNBIASED, sizes(2560, 18432, 36, 20, 4, 128004),
        tokens(128000, 128003, 65536), head_dim=128, hidden_act="relu2", rms_norm_eps=1e-05, rope_theta=10000.0,
        rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "type": "yarn"})),
    "Minitron-4B-Base": (4190, nemotron(sizes(3072, 9216, 32, 24, 8, 256000), head_dim=128)),
    "Nemotron-4-340B-Base-hf": (341000, nemotron(sizes(18432, 73728, 96, 96, 8, 256000))),
    "Apertus-8B-Instruct-2509": (8053.3, of("apertus", "ApertusForCausalLM", SILU, UNBIASED,
        sizes(4096, 21504, 32, 32, 8, 131072), tokens(1, 68, 65536), hidden_act="xielu", hidden_dropout=0.0,
        pad_token_id=3, post_norm=False, qk_norm=True, rms_norm_eps=1e-05, rope_scaling={**llama3_scaling(8.0),
        "type": "llama3"}, rope_theta=12000000)),
    "Hunyuan-0.5B-Instruct": (539.0, hunyuan(sizes(1024, 3584, 24, 16, 8, 120818), tokens(120000, 120020, 262144),
        eod_token_id=120020, pad_token_id=120002, tie_word_embeddings=True)),
    "Hunyuan-7B-Instruct": (None, hunyuan(sizes(4096, 14336, 32, 32, 8, 128167), tokens(1, 127960, 32768),
        eod_token_id=127967, tie_word_embeddings=True)),
    "ERNIE-4.5-0.3B-PT": (360.7, of("ernie4_5", "Ernie4_5ForCausalLM", sizes(1024, 3072, 18, 16, 2, 103424),
        tokens(1, 2, 131072), head_dim=128, hidden_act="silu", pad_token_id=0, rms_norm_eps=1e-05, rope_scaling=None,
        rope_theta=500000.0, tie_word_embeddings=True, use_bias=False)),
    "EXAONE-3.0-7.8B-Instruct": (7818.4, exaone(hidden_size=4096, intermediate_size=14336, num_layers=32,
        max_position_embeddings=4096, num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0,
        tie_word_embeddings=False)),
    "EXAONE-3.5-2.4B-Instruct": (2405.3, exaone(head_dim=80, hidden_size=2560, intermediate_size=7168, num_layers=30,
        max_position_embeddings=32768, num_attention_heads=32, num_key_value_heads=8, rope_theta=1000000.0,
        rope_scaling=llama3_scaling(8.0), tie_word_embeddings=True)),
    "EXAONE-Deep-7.8B": (7818.4, exaone(head_dim=128, hidden_size=4096, intermediate_size=14336, num_layers=32,
        max_position_embeddings=32768, num_attention_heads=32, num_key_value_heads=8, rope_theta=1000000.0,
        rope_scaling=llama3_scaling(8.0), tie_word_embeddings=False)),
    "EXAONE-4.0-1.2B": (1279.4, of("exaone4", "Exaone4ForCausalLM", EXAONE_4, sizes(2048, 4096, 30, 32, 8, 102400),
        tokens(1, 361, 65536), head_dim=64, layer_types=["full_attention"] * 30, rope_scaling=llama3_scaling(16.0),
        sliding_window=None, sliding_window_pattern=None, tie_word_embeddings=True)),
    "EXAONE-4.0-32B": (32003.2, of("exaone4", "Exaone4ForCausalLM", EXAONE_4, sizes(5120, 27392, 64, 40, 8, 102400),
        tokens(1, 361, 131072), head_dim=128, layer_types=LOCAL_LAST * 16, rope_scaling=llama3_scaling(16.0),
        sliding_window=4096, sliding_window_pattern="LLLG")),
    "internlm3-8b-instruct": (8804.2, of("internlm3", "InternLM3ForCausalLM", SILU,
        sizes(4096, 10240, 48, 32, 2, 128512), tokens(1, 2, 32768), bias=False, head_dim=128, pad_token_id=2,
        qkv_bias=False, rms_norm_eps=1e-05, rope_scaling={"factor": 6.0, "rope_type": "dynamic"}, rope_theta=50000000,
        auto_map={"AutoConfig": "configuration_internlm3.InternLM3Config", "AutoModel":
            "modeling_internlm3.InternLM3Model", "AutoModelForCausalLM": "modeling_internlm3.InternLM3ForCausalLM"})),
    "helium-1-preview-2b": (2172.6, of("helium", "HeliumForCausalLM", SILU, UNBIASED,
        sizes(2560, 7040, 24, 20, 20, 48000), tokens(1, 2, 4096), head_dim=128, pretraining_tp=1, rms_norm_eps=1e-08,
        rope_theta=100000.0)),
    "codegen-350M-mono": (356.7, codegen(gpt2_sizes(1024, 20, 16, 2048, 51200), rotary_dim=32)),
    "codegen-2B-mono": (2779.7, codegen(gpt2_sizes(2560, 32, 32, 2048, 51200), rotary_dim=64)),
    "gpt-neo-125m": (125.2, of("gpt_neo", "GPTNeoForCausalLM", GPT_NEO, hidden_size=768, num_heads=12, num_layers=12,
        attention_layers=["global", "local"] * 6, attention_types=[[["global", "local"], 6]])),
    "gpt-neo-1.3B": (1315.6, of("gpt_neo", "GPTNeoForCausalLM", GPT_NEO, hidden_size=2048, num_heads=16, num_layers=24,
        attention_layers=["global", "local"] * 12, attention_types=[[["global", "local"], 12]])),
    "cwm": (None, of("cwm", "CwmForCausalLM", SILU, UNBIASED, sizes(6144, 21504, 64, 48, 8, 128256),
        tokens(128000, [128001, 128008, 128009], 131072), head_dim=128, pretraining_tp=1, rms_norm_eps=1e-05,
        layer_types=["full_attention", *["sliding_attention"] * 3] * 16, rope_scaling=llama3_scaling(16.0),
        rope_theta=1000000.0, sliding_window=8192)),
    "IQuest-Coder-V1-40B-Instruct": (40000, of("iquestcoder", "IQuestCoderForCausalLM", SILU, UNBIASED,
        sizes(5120, 27648, 80, 40, 8, 76800), tokens(1, [2, 75864, 75869], 131072), clip_qkv=None, head_dim=128,
        rms_norm_eps=1e-05, rope_scaling=None, rope_theta=500000.0, use_sliding_window=False, sliding_window=None,
        max_window_layers=0)),
    "Jais-2-8B-Chat": (8090, of("jais2", "Jais2ForCausalLM", sizes(3328, 26624, 32, 26, 26, 150272),
        tokens(0, 150024, 8192), attention_bias=True, attention_dropout=0.0, head_dim=128, hidden_act="relu2",
        layer_norm_eps=1e-05, mlp_bias=True, rope_scaling=None, rope_theta=500000.0, tie_word_embeddings=False)),
    "HyperCLOVAX-SEED-Think-14B": (14700, of("hyperclovax", "HyperCLOVAXForCausalLM", SILU, UNBIASED,
        sizes(6144, 14336, 38, 48, 8, 110592), tokens(100257, 100257, 131072), attention_multiplier=0.0078125,
        embedding_multiplier=10.0, head_dim=128, logits_scaling=0.125, pad_token_id=100257, pretraining_tp=1,
        residual_multiplier=1.0, resid_pdrop=0.2, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=100000000,
        use_post_norm=True)),
}
# fmt: on
