"""Tiny GGUF files, the way llama.cpp writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import gguf
import numpy as np

from griffin_jax.families.llama import GGUF_RULES


def to_gguf_name(name: str) -> str:
    layer = name.split(".")[2] if ".layers." in name else "0"
    (found,) = [rule.name.format(layer=layer) for rule in GGUF_RULES if rule.hf_name.format(layer=layer) == name]
    return found


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter does: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    file: Path, weights, config=checkpoints.CONFIG, quantise=None, metadata=None, extra=(), leave_out=()
) -> Path:
    """The twin of a Hugging Face folder, the way llama.cpp writes it."""
    writer = gguf.GGUFWriter(file, "llama")
    fields = {
        "block_count": (writer.add_block_count, config["num_hidden_layers"]),
        "context_length": (writer.add_context_length, config["max_position_embeddings"]),
        "embedding_length": (writer.add_embedding_length, config["hidden_size"]),
        "feed_forward_length": (writer.add_feed_forward_length, config["intermediate_size"]),
        "head_count": (writer.add_head_count, config["num_attention_heads"]),
        "head_count_kv": (writer.add_head_count_kv, config["num_key_value_heads"]),
        "key_length": (writer.add_key_length, config["head_dim"]),
        "value_length": (writer.add_value_length, config["head_dim"]),
        "dimension_count": (writer.add_rope_dimension_count, config["head_dim"]),
        "freq_base": (writer.add_rope_freq_base, config.get("rope_theta", 10_000.0)),
        "eps": (writer.add_layer_norm_rms_eps, config["rms_norm_eps"]),
        "vocab_size": (writer.add_vocab_size, config["vocab_size"]),
        "bos": (writer.add_bos_token_id, config["bos_token_id"]),
        "eos": (writer.add_eos_token_id, config["eos_token_id"]),
    }
    for name, (add, value) in fields.items():
        if name not in leave_out:
            add(value)
    for name, value in (metadata or {}).items():
        if name not in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"):
            add_field(writer, name, value)
    for add in extra:
        add(writer)
    for name, array in weights.items():
        if "q_proj" in name or "k_proj" in name:
            array = permute(array, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        kind = None
        if quantise is not None and array.ndim == 2:
            kind = quantise
            array = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(to_gguf_name(name), np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_field(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """Any metadata, by the type of its value."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    kinds[type(value)](name, value)
