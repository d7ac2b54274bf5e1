"""Tiny checkpoints, written without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from griffin_jax.model.cache import empty_cache
from griffin_jax.model.transformer import Transformer

WIDTH, FF, VOCABULARY, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 16, 24, 32, 2, 4, 2, 6
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(**changes: Any) -> dict[str, Any]:
    """A config.json; a change to None removes the attribute."""
    return {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}


def tensors(seed: int = 0, tied: bool = False) -> dict[str, np.ndarray]:
    """The tensors that belong to `CONFIG`, float32. No two axes but heads and width have equal sizes."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return random.normal(0, 0.3, shape).astype(np.float32)

    found = {"model.embed_tokens.weight": draw(VOCABULARY, WIDTH), "model.norm.weight": draw(WIDTH)}
    if not tied:
        found["lm_head.weight"] = draw(VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {
            prefix + "input_layernorm.weight": draw(WIDTH),
            prefix + "post_attention_layernorm.weight": draw(WIDTH),
            prefix + "self_attn.q_proj.weight": draw(HEADS * HEAD_DIM, WIDTH),
            prefix + "self_attn.k_proj.weight": draw(KV_HEADS * HEAD_DIM, WIDTH),
            prefix + "self_attn.v_proj.weight": draw(KV_HEADS * HEAD_DIM, WIDTH),
            prefix + "self_attn.o_proj.weight": draw(WIDTH, HEADS * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": draw(FF, WIDTH),
            prefix + "mlp.up_proj.weight": draw(FF, WIDTH),
            prefix + "mlp.down_proj.weight": draw(WIDTH, FF),
        }
    return found


def write(
    folder: Path, weights: dict[str, np.ndarray] | None = None, shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """A Hugging Face folder, in one file or in several with an index."""
    weights = tensors() if weights is None else weights
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    files = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    parts = {file: dict(list(weights.items())[shard::shards]) for shard, file in enumerate(files)}
    for file, part in parts.items():
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def logits(model: Transformer, tokens: list[int]) -> np.ndarray:
    """Scores of the next token at every position, (T, V)."""
    positions = jnp.arange(len(tokens))[None]
    x, _, _ = model(jnp.array([tokens]), positions, empty_cache(model.config, 1, len(tokens)))
    return np.asarray(model.logits(x))[0]
