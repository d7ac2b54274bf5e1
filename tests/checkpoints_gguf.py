"""Tiny GGUF files, the way llama.cpp writes them: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np
from safetensors.numpy import load_file

Config = Mapping[str, Any]
Fields = dict[str, Any]
Tensors = Iterable[tuple[str, np.ndarray]]


def write_twin(folder: Path, file: Path, quantise: gguf.GGMLQuantizationType | None = None, **options: Any) -> Path:
    """The twin of a Hugging Face folder, but for its tokenizer. Further options are those of `write_gguf`."""
    weights = {name: array for part in sorted(folder.glob("*.safetensors")) for name, array in load_file(part).items()}
    for name, array in weights.items():
        if array.dtype.name == "bfloat16":
            weights[name] = array.astype(np.float32)
    return write_gguf(file, weights, json.loads((folder / "config.json").read_text()), quantise, **options)


def write_gguf(
    file: Path,
    weights: Mapping[str, np.ndarray],
    config: Config = checkpoints.CONFIG,
    quantise: gguf.GGMLQuantizationType | None = None,
    metadata: Mapping[str, Any] | None = None,
    extra: Iterable[Callable[[gguf.GGUFWriter], None]] = (),
    leave_out: Collection[str] = (),
    without: str | None = None,
) -> Path:
    """Hugging Face tensors and configuration as a GGUF file.

    Args:
        file: to write.
        weights: by the names of Hugging Face checkpoints.
        config: content of config.json.
        quantise: type of the matrices, by default that of `weights`.
        metadata: further fields, for example those of a tokenizer.
        extra: called with the writer, for anything else.
        leave_out: fields to leave out, each by a part of the name of the method that would add it.
        without: a part of the names of tensors to leave out; None for all tensors.
    """
    recipe = RECIPES[config["model_type"]]
    # Of models that read more than text, the converter writes the text model.
    config = {**config, **config.get("text_config", {})}
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[recipe.architecture])
    fields = {
        "file_type": gguf.LlamaFileType["ALL_F32" if quantise is None else f"MOSTLY_{quantise.name}"],
        **recipe.fields(config),
        **recipe.fields_of_tensors(weights),
        **{f"{kind}_token_id": config.get(f"{kind}_token_id") for kind in SPECIAL_TOKENS},
    }
    for name, value in fields.items():
        # Of several tokens that end a text, llama.cpp does not take one from config.json.
        unknown = value is None or (name.endswith("_token_id") and not isinstance(value, int))
        if not unknown and not any(part in name for part in leave_out):
            getattr(writer, f"add_{name}")(value)
    for name, value in (metadata or {}).items():
        if name not in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"):
            add_field(writer, name, value)
    for add in extra:
        add(writer)
    kept = [
        (name, array)
        for name, array in weights.items()
        if not name.endswith(NOT_PARAMETERS) and (without is None or without not in name)
    ]
    for name, array in recipe.tensors(kept, config):
        add_tensor(writer, to_gguf_name(name, recipe.architecture), array, quantise)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """Any metadata, by the type of its value."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    kinds[type(value)](name, value)


def add_tensor(
    writer: gguf.GGUFWriter, name: str, array: np.ndarray, quantise: gguf.GGMLQuantizationType | None = None
) -> None:
    """Vectors, norms and position embeddings stay in float32 whatever the type of the file."""
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    array = np.ascontiguousarray(array)
    if quantise is None or array.ndim < 2 or name.endswith("_norm.weight") or name == "position_embd.weight":
        writer.add_tensor(name, array)
        return
    try:
        packed = gguf.quants.quantize(array, quantise)
    except gguf.QuantError:  # rows that do not divide into blocks
        quantise = gguf.GGMLQuantizationType.F16
        packed = gguf.quants.quantize(array, quantise)
    writer.add_tensor(name, packed, raw_dtype=quantise)


@functools.cache
def tensor_names(architecture: gguf.MODEL_ARCH) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(architecture, n_blocks=32)


def to_gguf_name(name: str, architecture: gguf.MODEL_ARCH = gguf.MODEL_ARCH.LLAMA) -> str:
    found = tensor_names(architecture).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, f"llama.cpp has no name for {name}"
    return found


# ---- Metadata: names of the writer's methods without `add_`, and values; None is left out.

SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def first(config: Config, *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def width_of(config: Config) -> int:
    return first(config, "hidden_size", "n_embd", "d_model")


def heads_of(config: Config) -> int:
    return first(config, "num_attention_heads", "n_head", "n_heads")


def head_dim_of(config: Config) -> int:
    return config.get("head_dim") or width_of(config) // heads_of(config)


def kv_heads_of(config: Config) -> int:
    return config.get("num_key_value_heads") or heads_of(config)


def rope_of(config: Config) -> Fields:
    """The rotary embedding's attributes, in old spelling or new; of layers with full attention, where others exist."""
    rope = dict(first(config, "rope_parameters", "rope_scaling") or {})
    rope |= rope.get("full_attention", {})
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(name) is not None:
            rope.setdefault(name, config[name])
    if "rope_local_base_freq" in config:
        rope.setdefault("sliding_attention", {"rope_theta": config["rope_local_base_freq"]})
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def size_fields(config: Config) -> Fields:
    """What every architecture says."""
    return {
        "block_count": first(config, "num_hidden_layers", "n_layer", "n_layers"),
        "context_length": first(config, "max_position_embeddings", "n_ctx", "max_seq_len"),
        "embedding_length": width_of(config),
        "feed_forward_length": config.get("intermediate_size") or 4 * width_of(config),
        "head_count": heads_of(config),
        "head_count_kv": config.get("num_key_value_heads"),
        "layer_norm_rms_eps": first(config, "rms_norm_eps", "norm_eps"),
        "layer_norm_eps": first(config, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    }


def head_fields(config: Config) -> Fields:
    return dict.fromkeys(("key_length", "value_length"), config.get("head_dim"))


def rope_fields(config: Config) -> Fields:
    rope = rope_of(config)
    fields = {
        "rope_freq_base": rope.get("rope_theta"),
        "rope_freq_base_swa": rope.get("sliding_attention", {}).get("rope_theta"),
    }
    if rope["rope_type"] == "linear":
        fields |= {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        fields |= {
            "rope_scaling_type": gguf.RopeScalingType.YARN,
            "rope_scaling_factor": rope["factor"],
            "rope_scaling_orig_ctx_len": rope["original_max_position_embeddings"],
            "rope_scaling_yarn_attn_factor": first(rope, "attention_factor", "attn_factor"),
            "rope_scaling_yarn_beta_fast": rope.get("beta_fast"),
            "rope_scaling_yarn_beta_slow": rope.get("beta_slow"),
        }
    return fields


def standard_fields(config: Config) -> Fields:
    return size_fields(config) | head_fields(config) | rope_fields(config)


def expert_fields(config: Config) -> Fields:
    """What every architecture says of routed experts."""
    return {
        "expert_count": first(config, "num_local_experts", "num_experts"),
        "expert_used_count": config["num_experts_per_tok"],
    }


def smollm3_fields(config: Config) -> Fields:
    """Those of Llama where config.json does not say `head_dim`. Nothing says which layers have no rotary embedding."""
    return standard_fields(config) | {
        "head_count_kv": kv_heads_of(config),
        "vocab_size": config["vocab_size"],
        "rope_dimension_count": head_dim_of(config),
    }


def llama_fields(config: Config) -> Fields:
    """The converter reads config.json with transformers, which fills in `head_dim`. Mistral's window is not written."""
    return smollm3_fields({**config, "head_dim": head_dim_of(config)})


def mistral3_fields(config: Config) -> Fields:
    fields, rope = llama_fields(config), rope_of(config)
    if config["model_type"] == "ministral3":
        fields |= {
            "rope_scaling_yarn_log_mul": rope["mscale_all_dim"],
            "attn_temperature_scale": rope["llama_4_scaling_beta"],
        }
    return fields


def olmo_fields(config: Config) -> Fields:
    return standard_fields(config) | {"layer_norm_eps": 1e-5, "clamp_kqv": config.get("clip_qkv")}


def olmo3_fields(config: Config) -> Fields:
    return standard_fields(config) | {
        "sliding_window": config["sliding_window"],
        "sliding_window_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
    }


def exaone_fields(config: Config) -> Fields:
    """Those that llama.cpp reads, and its converter wrote until it took them from where all others are.

    Since then, epsilon has another name, if config.json is published with the names of GPT-2.
    """
    return standard_fields(config) | {"rope_dimension_count": width_of(config) // heads_of(config)}


def jais2_fields(config: Config) -> Fields:
    return standard_fields(config) | {"rope_dimension_count": head_dim_of(config)}


def partial_rotary_fields(config: Config) -> Fields:
    turning = int(rope_of(config).get("partial_rotary_factor", 0.5) * head_dim_of(config))
    return standard_fields(config) | {"rope_dimension_count": turning}


def chatglm_fields(config: Config) -> Fields:
    """By the names of models published as ChatGLM, without which some fields have these defaults."""
    width, heads = width_of(config), heads_of(config)
    return {
        "block_count": first(config, "num_layers", "num_hidden_layers"),
        "context_length": config.get("seq_length", width),
        "embedding_length": width,
        "feed_forward_length": first(config, "ffn_hidden_size", "intermediate_size"),
        "head_count": heads,
        "head_count_kv": config.get("multi_query_group_num", kv_heads_of(config)),
        "layer_norm_rms_eps": config.get("layernorm_epsilon", 1e-5),
        "rope_dimension_count": int(width // heads * config.get("partial_rotary_factor", 0.5)),
        "add_bos_token": False,
        "rope_freq_base": 10_000 * config.get("rope_ratio", 1),
    }


def nemotron_fields(config: Config) -> Fields:
    rope = rope_of(config)
    return standard_fields(config) | {
        "vocab_size": config["vocab_size"],
        "layer_norm_eps": config["norm_eps"],
        "rope_dimension_count": int(rope["partial_rotary_factor"] * width_of(config)) // heads_of(config),
        "rope_scaling_type": gguf.RopeScalingType.LINEAR if "factor" in rope else gguf.RopeScalingType.NONE,
        "rope_scaling_factor": rope.get("factor"),
    }


def cohere_fields(config: Config) -> Fields:
    return standard_fields(config) | {
        "logit_scale": config["logit_scale"],
        "rope_scaling_type": gguf.RopeScalingType.NONE,
    }


def cohere2_fields(config: Config) -> Fields:
    return cohere_fields(config) | {
        "sliding_window": config["sliding_window"],
        "vocab_size": config["vocab_size"],
        "rope_dimension_count": head_dim_of(config),
    }


def phi_fields(config: Config) -> Fields:
    return size_fields(config) | {
        "feed_forward_length": 4 * width_of(config),
        "head_count_kv": heads_of(config),
        "rope_dimension_count": int(rope_of(config)["partial_rotary_factor"] * width_of(config)) // heads_of(config),
        "add_bos_token": False,
    }


def starcoder_fields(config: Config) -> Fields:
    return size_fields(config) | {
        "context_length": config["n_positions"],
        "feed_forward_length": 4 * width_of(config),
        "head_count_kv": 1,
    }


def exaone4_fields(config: Config) -> Fields:
    fields = standard_fields(config) | {"vocab_size": config["vocab_size"]}
    if config.get("sliding_window") is not None:
        fields["sliding_window"] = config["sliding_window"]
        fields["sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
    return fields


def granite_fields(config: Config) -> Fields:
    return smollm3_fields({**config, "head_dim": None}) | {
        "attention_scale": config.get("attention_multiplier"),
        "embedding_scale": config.get("embedding_multiplier"),
        "residual_scale": config.get("residual_multiplier"),
        "logit_scale": config.get("logits_scaling"),
    }


def granitemoe_fields(config: Config) -> Fields:
    return (
        granite_fields(config)
        | expert_fields(config)
        | {"expert_shared_feed_forward_length": config.get("shared_intermediate_size") or None}
    )


def granite4_fields(config: Config) -> Fields:
    """Of a model whose layers all have attention, which then has Granite's architecture, and no experts."""
    layers = config["num_hidden_layers"]
    assert set(config["layer_types"]) <= {"attention", "full_attention"}
    assert not config["num_local_experts"]
    return granite_fields(config) | {
        "expert_count": 0,
        "expert_used_count": 0,
        "expert_shared_feed_forward_length": config["shared_intermediate_size"],
        "ssm_conv_kernel": config["mamba_d_conv"],
        "ssm_state_size": config["mamba_d_state"],
        "ssm_group_count": config["mamba_n_groups"],
        "ssm_inner_size": config["mamba_expand"] * width_of(config),
        "ssm_time_step_rank": config["mamba_n_heads"],
        "head_count_kv": [kv_heads_of(config)] * layers,
        "rope_scaling_finetuned": True,
    }


def mixtral_fields(config: Config) -> Fields:
    return llama_fields(config) | expert_fields(config)


def olmoe_fields(config: Config) -> Fields:
    return standard_fields(config) | expert_fields(config)


def gpt_oss_fields(config: Config) -> Fields:
    return olmoe_fields(config) | {
        "sliding_window": config["sliding_window"],
        "expert_feed_forward_length": config["intermediate_size"],
    }


def qwen_moe_fields(config: Config) -> Fields:
    """That the weights are divided by their sum is not written: llama.cpp does so for Qwen3, and not for Qwen2."""
    return olmoe_fields(config) | {
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
    }


def deepseek_fields(config: Config) -> Fields:
    """Of models whose experts are chosen in the way of DeepSeek V3."""
    return standard_fields(config) | {
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
    }


def glm4_moe_fields(config: Config) -> Fields:
    """Layers that draft count as others."""
    drafting = config.get("num_nextn_predict_layers")
    return (
        deepseek_fields(config)
        | {"rope_dimension_count": partial_rotary_fields(config)["rope_dimension_count"]}
        | {"block_count": config["num_hidden_layers"] + (drafting or 0), "nextn_predict_layers": drafting}
    )


def ernie_moe_fields(config: Config) -> Fields:
    """The width of shared experts is computed from what is not about them."""
    shared = config["moe_num_shared_experts"]
    return standard_fields(config) | {
        "expert_count": config["moe_num_experts"],
        "expert_used_count": config["moe_k"],
        "interleave_moe_layer_step": config["moe_layer_interval"],
        "leading_dense_block_count": config["moe_layer_start_index"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": shared,
        "expert_shared_feed_forward_length": config["intermediate_size"] // kv_heads_of(config) if shared else None,
    }


def gemma_fields(config: Config) -> Fields:
    """Without the base of the rotary embedding, as with StableLM, Falcon and GPT-NeoX."""
    return size_fields(config) | head_fields(config)


def gemma2_fields(config: Config) -> Fields:
    return gemma_fields(config) | {
        "attn_logit_softcapping": config["attn_logit_softcapping"],
        "final_logit_softcapping": config["final_logit_softcapping"],
        "sliding_window": config["sliding_window"],
    }


def gemma3_fields(config: Config) -> Fields:
    window = config["sliding_window"] if config.get("sliding_window_pattern") != 1 else None
    softcap = config.get("final_logit_softcapping")
    return standard_fields(config) | {"final_logit_softcapping": softcap, "sliding_window": window}


def phi3_fields(config: Config) -> Fields:
    rope = rope_of(config)
    original = rope["original_max_position_embeddings"]
    magnitude = None
    if rope.get("long_factor"):  # the type of scaling itself is not written
        stretch = max(1.0, config["max_position_embeddings"] / original)
        magnitude = math.sqrt(1 + math.log(stretch) / math.log(original))
    return size_fields(config) | {
        "rope_scaling_orig_ctx_len": original,
        "rope_scaling_attn_factors": magnitude,
        "rope_dimension_count": int(rope.get("partial_rotary_factor", 1.0) * width_of(config)) // heads_of(config),
        "rope_freq_base": rope["rope_theta"],
        "sliding_window": config.get("sliding_window") or 0,
    }


def phimoe_fields(config: Config) -> Fields:
    return phi3_fields(config) | expert_fields(config)


def stablelm_fields(config: Config) -> Fields:
    return size_fields(config) | {
        "rope_dimension_count": int(rope_of(config)["partial_rotary_factor"] * head_dim_of(config)),
        "parallel_residual": config.get("use_parallel_residual", True),
    }


def falcon_kv_heads(config: Config) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return config.get("num_kv_heads") or heads_of(config)


def falcon_fields(config: Config) -> Fields:
    return size_fields(config) | {
        "context_length": 2048,
        "tensor_data_layout": "jploski",
        "head_count_kv": falcon_kv_heads(config),
    }


def gpt_neox_fields(config: Config) -> Fields:
    part = first(config, "rotary_pct") or rope_of(config)["partial_rotary_factor"]
    return size_fields(config) | {
        "rope_dimension_count": int(part * head_dim_of(config)),
        "parallel_residual": config.get("use_parallel_residual", True),
        "file_type": None,
    }


def gpt2_fields(config: Config) -> Fields:
    return size_fields(config) | {"context_length": first(config, "n_ctx", "n_positions")}


def bloom_fields(config: Config) -> Fields:
    return size_fields(config) | {
        "context_length": config.get("seq_length", width_of(config)),
        "head_count_kv": heads_of(config),
    }


def mpt_fields(config: Config) -> Fields:
    attention = config["attn_config"]
    return size_fields(config) | {
        "head_count_kv": attention.get("kv_n_heads"),
        "layer_norm_eps": 1e-5,
        "clamp_kqv": attention.get("clip_qkv"),
        "max_alibi_bias": attention.get("alibi_bias_max", 8) if attention.get("alibi", True) else 0.0,
        "file_type": None,
    }


def apertus_numbers(weights: Mapping[str, np.ndarray]) -> Fields:
    """The numbers of each layer's xIELU."""
    fields: Fields = {}
    for layer in range(sum(name.endswith(".act_fn.alpha_p") for name in weights)):
        for name in ("alpha_p", "alpha_n", "beta", "eps"):
            number = weights[f"model.layers.{layer}.mlp.act_fn.{name}"].astype(np.float32).item()
            fields.setdefault(f"xielu_{name}", []).append(number)
    return fields


# ---- Tensors: names of Hugging Face (or already of GGUF), and values as llama.cpp stores them.

# Masks and wavelengths in old checkpoints.
NOT_PARAMETERS = (".attention.bias", ".attn.bias", ".attention.masked_bias", ".attn.masked_bias", ".inv_freq")


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head pair by pair: the dimensions that rotate together, half a head apart, become neighbours."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def unchanged(tensors: Tensors, config: Config) -> Tensors:
    return tensors


def llama_tensors(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in tensors:
        if "q_proj" in name:
            array = permute(array, heads_of(config))
        elif "k_proj" in name:
            array = permute(array, kv_heads_of(config))
        yield name, array
    yield from rope_freqs(config)


def with_rope_freqs(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    yield from tensors
    yield from rope_freqs(config)


def apertus_tensors(tensors: Tensors, config: Config) -> Tensors:
    return with_rope_freqs([(name, array) for name, array in tensors if ".act_fn." not in name], config)


def rope_freqs(config: Config) -> Iterator[tuple[str, np.ndarray]]:
    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        yield "rope_freqs.weight", llama3_factors(rope, head_dim_of(config))


def llama3_factors(rope: Config, head_dim: int) -> np.ndarray:
    """By how much each wavelength grows: the short ones not, the long ones by `factor`."""
    frequencies = 1.0 / (rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim))
    wavelengths = 2 * math.pi / frequencies
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (context / wavelengths - low) / (high - low)
    between = np.where(wavelengths > context / low, factor, 1 / ((1 - smooth) / factor + smooth))
    return np.where(wavelengths < context / high, 1, between).astype(np.float32)


def joined_experts(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a layer's experts of each kind as one, where each is by itself."""
    each: dict[str, dict[int, np.ndarray]] = {}
    for name, array in tensors:
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+\.weight)", name):
            each.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = array
        else:
            yield name, array
    for name, arrays in each.items():
        layer = name.partition(".block_sparse_moe.")[0].removeprefix("model.")
        named = name if "block_sparse_moe" not in name else f"{layer}.feed_forward.experts.{name.split('.')[-2]}.weight"
        yield named, np.stack([arrays[expert] for expert in range(len(arrays))])


def qwen_moe_tensors(tensors: Tensors, config: Config) -> Tensors:
    return joined_experts(tensors)


def choice_bias_tensors(tensors: Tensors, config: Config) -> Tensors:
    """The names that the list of tensors has for what is added to the scores of experts."""
    renamed = [(name.replace("e_score_correction_bias", "e_score_correction.bias"), array) for name, array in tensors]
    return joined_experts(renamed)


def mixtral_tensors(tensors: Tensors, config: Config) -> Tensors:
    return joined_experts(llama_tensors(tensors, config))


def granitemoe_tensors(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """Gate and up, which are one tensor, are divided."""
    for name, array in llama_tensors(tensors, config):
        module, fused, _ = name.partition(".input_linear.weight")
        if not fused:
            yield name, array
            continue
        block, kind = module.split(".")[2], "shexp" if module.endswith("shared_mlp") else "exps"
        for part, half in zip(("gate", "up"), np.split(array, 2, axis=-2), strict=True):
            yield f"blk.{block}.ffn_{part}_{kind}.weight", half


def granite4_tensors(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """The expert that every token reads is the feed-forward layer, if there are no others."""
    for name, array in granitemoe_tensors(tensors, config):
        module, down, _ = name.partition(".shared_mlp.output_linear.")
        named = f"blk.{module.split('.')[2]}.ffn_down.weight" if down else name.replace("_shexp", "")
        yield named, array


def gpt_oss_tensors(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """Gate and up, which take turns in one tensor, are divided, and matrices turned."""
    for name, array in tensors:
        module, experts, matrix = name.partition(".experts.")
        if not experts:
            yield (f"{name}.weight" if name.endswith(".sinks") else name), array
            continue
        kind = "bias" if matrix.endswith("_bias") else "weight"
        matrix = matrix.removesuffix("_bias")
        array = array if kind == "bias" else array.swapaxes(1, 2)
        parts = {matrix: array}
        if matrix == "gate_up_proj":
            parts = {"gate_proj": array[:, ::2], "up_proj": array[:, 1::2]}
        for part, values in parts.items():
            yield f"{module}.experts.{part}.{kind}", values


def chatglm_tensors(tensors: Tensors, config: Config) -> Tensors:
    return [(name.removeprefix("transformer."), array) for name, array in tensors]


def gemma3_tensors(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in tensors:
        yield name, array + array.dtype.type(1) if name.endswith("norm.weight") else array


def text_tensors(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """Those of the text model, as it has them by itself."""
    for name, array in tensors:
        if "vision_tower" not in name and "multi_modal_projector" not in name:
            yield name.replace("language_model.", ""), array


def gemma3_text_part(tensors: Tensors, config: Config) -> Tensors:
    return gemma3_tensors(text_tensors(tensors), config)


def mistral3_tensors(tensors: Tensors, config: Config) -> Tensors:
    return llama_tensors(text_tensors(tensors), config)


def gemma_tensors(tensors: Tensors, config: Config) -> Tensors:
    return gemma3_tensors([(name, array) for name, array in tensors if name != "lm_head.weight"], config)


def phi3_tensors(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    yield from tensors
    for length in ("long", "short"):
        if factors := rope_of(config).get(f"{length}_factor"):
            yield f"rope_factors_{length}.weight", np.asarray(factors, np.float32)


def phimoe_tensors(tensors: Tensors, config: Config) -> Tensors:
    return joined_experts(phi3_tensors(tensors, config))


def stablelm_tensors(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """The norms of a layer's heads are one matrix."""
    norms: dict[str, dict[int, np.ndarray]] = {}
    for name, array in tensors:
        block, is_norm, head = name.removesuffix(".weight").partition(".norms.")
        if is_norm:
            norms.setdefault(block, {})[int(head)] = array
        else:
            yield name, array
    for block, heads in norms.items():
        yield f"{block}.weight", np.stack([heads[head] for head in range(len(heads))])


def falcon_tensors(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """All queries, all keys, all values, instead of each group's queries, key and value."""
    groups, size = falcon_kv_heads(config), head_dim_of(config)
    for name, array in tensors:
        if "query_key_value" in name:
            parts = np.split(array.reshape(groups, -1, size, *array.shape[1:]), (-2, -1), axis=1)
            array = np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])
        yield name, array


def gpt_neox_tensors(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """All queries, all keys, all values, instead of each head's three."""
    heads = heads_of(config)
    for name, array in tensors:
        if "query_key_value" in name:
            array = array.reshape(heads, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        yield name, array


def bloom_tensors(tensors: Tensors, config: Config) -> Tensors:
    return gpt_neox_tensors([(name.removeprefix("transformer."), array) for name, array in tensors], config)


def gpt2_tensors(tensors: Tensors, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in tensors:
        yield name, array.T if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) else array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How llama.cpp writes a family.

    Attributes:
        architecture: of the file.
        fields: metadata from the configuration.
        tensors: those of the file, by their names in the checkpoint or in the file.
        fields_of_tensors: metadata from the checkpoint's tensors.
    """

    architecture: gguf.MODEL_ARCH
    fields: Callable[[Config], Fields]
    tensors: Callable[[Tensors, Config], Tensors] = unchanged
    fields_of_tensors: Callable[[Mapping[str, np.ndarray]], Fields] = lambda weights: {}


RECIPES = {
    "llama": Recipe(gguf.MODEL_ARCH.LLAMA, llama_fields, llama_tensors),
    "mistral": Recipe(gguf.MODEL_ARCH.LLAMA, llama_fields, llama_tensors),
    "mistral3": Recipe(gguf.MODEL_ARCH.MISTRAL3, mistral3_fields, mistral3_tensors),
    "ministral3": Recipe(gguf.MODEL_ARCH.MISTRAL3, mistral3_fields, mistral3_tensors),
    "smollm3": Recipe(gguf.MODEL_ARCH.SMOLLM3, smollm3_fields, llama_tensors),
    "granite": Recipe(gguf.MODEL_ARCH.GRANITE, granite_fields, llama_tensors),
    "qwen2": Recipe(gguf.MODEL_ARCH.QWEN2, standard_fields),
    "qwen3": Recipe(gguf.MODEL_ARCH.QWEN3, standard_fields),
    "olmo2": Recipe(gguf.MODEL_ARCH.OLMO2, standard_fields),
    "olmo": Recipe(gguf.MODEL_ARCH.OLMO, olmo_fields, llama_tensors),
    "olmo3": Recipe(gguf.MODEL_ARCH.OLMO2, olmo3_fields),
    "glm": Recipe(gguf.MODEL_ARCH.CHATGLM, chatglm_fields, chatglm_tensors),
    "glm4": Recipe(gguf.MODEL_ARCH.GLM4, partial_rotary_fields),
    "starcoder2": Recipe(gguf.MODEL_ARCH.STARCODER2, standard_fields),
    "seed_oss": Recipe(gguf.MODEL_ARCH.SEED_OSS, standard_fields),
    "arcee": Recipe(gguf.MODEL_ARCH.ARCEE, llama_fields, llama_tensors),
    "nemotron": Recipe(gguf.MODEL_ARCH.NEMOTRON, nemotron_fields, gemma3_tensors),
    "cohere": Recipe(gguf.MODEL_ARCH.COMMAND_R, cohere_fields),
    "cohere2": Recipe(gguf.MODEL_ARCH.COHERE2, cohere2_fields),
    "phi": Recipe(gguf.MODEL_ARCH.PHI2, phi_fields),
    "gpt_bigcode": Recipe(gguf.MODEL_ARCH.STARCODER, starcoder_fields),
    "ernie4_5": Recipe(gguf.MODEL_ARCH.ERNIE4_5, standard_fields),
    "hunyuan_v1_dense": Recipe(gguf.MODEL_ARCH.HUNYUAN_DENSE, standard_fields),
    "exaone4": Recipe(gguf.MODEL_ARCH.EXAONE4, exaone4_fields),
    "gemma": Recipe(gguf.MODEL_ARCH.GEMMA, gemma_fields, gemma_tensors),
    "gemma2": Recipe(gguf.MODEL_ARCH.GEMMA2, gemma2_fields, gemma_tensors),
    "gemma3_text": Recipe(gguf.MODEL_ARCH.GEMMA3, gemma3_fields, gemma3_tensors),
    "gemma3": Recipe(gguf.MODEL_ARCH.GEMMA3, gemma3_fields, gemma3_text_part),
    "phi3": Recipe(gguf.MODEL_ARCH.PHI3, phi3_fields, phi3_tensors),
    "stablelm": Recipe(gguf.MODEL_ARCH.STABLELM, stablelm_fields, stablelm_tensors),
    "falcon": Recipe(gguf.MODEL_ARCH.FALCON, falcon_fields, falcon_tensors),
    "gpt_neox": Recipe(gguf.MODEL_ARCH.GPTNEOX, gpt_neox_fields, gpt_neox_tensors),
    "gpt2": Recipe(gguf.MODEL_ARCH.GPT2, gpt2_fields, gpt2_tensors),
    "bloom": Recipe(gguf.MODEL_ARCH.BLOOM, bloom_fields, bloom_tensors),
    "internlm3": Recipe(gguf.MODEL_ARCH.LLAMA, llama_fields, llama_tensors),
    "iquestcoder": Recipe(gguf.MODEL_ARCH.LLAMA, llama_fields, llama_tensors),
    "exaone": Recipe(gguf.MODEL_ARCH.EXAONE, exaone_fields, with_rope_freqs),
    "jais2": Recipe(gguf.MODEL_ARCH.JAIS2, jais2_fields),
    "apertus": Recipe(gguf.MODEL_ARCH.APERTUS, smollm3_fields, apertus_tensors, apertus_numbers),
    "mpt": Recipe(gguf.MODEL_ARCH.MPT, mpt_fields),
    "mixtral": Recipe(gguf.MODEL_ARCH.LLAMA, mixtral_fields, mixtral_tensors),
    "qwen2_moe": Recipe(gguf.MODEL_ARCH.QWEN2MOE, qwen_moe_fields, qwen_moe_tensors),
    "qwen3_moe": Recipe(gguf.MODEL_ARCH.QWEN3MOE, qwen_moe_fields, qwen_moe_tensors),
    "olmoe": Recipe(gguf.MODEL_ARCH.OLMOE, olmoe_fields, qwen_moe_tensors),
    "gpt_oss": Recipe(gguf.MODEL_ARCH.GPT_OSS, gpt_oss_fields, gpt_oss_tensors),
    "granitemoeshared": Recipe(gguf.MODEL_ARCH.GRANITE_MOE, granitemoe_fields, granitemoe_tensors),
    "phimoe": Recipe(gguf.MODEL_ARCH.PHIMOE, phimoe_fields, phimoe_tensors),
    "dots1": Recipe(gguf.MODEL_ARCH.DOTS1, deepseek_fields, choice_bias_tensors),
    "glm4_moe": Recipe(gguf.MODEL_ARCH.GLM4_MOE, glm4_moe_fields, choice_bias_tensors),
    "ernie4_5_moe": Recipe(gguf.MODEL_ARCH.ERNIE4_5_MOE, ernie_moe_fields, choice_bias_tensors),
    "granitemoe": Recipe(gguf.MODEL_ARCH.GRANITE_MOE, granitemoe_fields, granitemoe_tensors),
    "granitemoehybrid": Recipe(gguf.MODEL_ARCH.GRANITE, granite4_fields, granite4_tensors),
}
