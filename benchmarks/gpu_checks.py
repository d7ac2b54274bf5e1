"""Checks that an accelerator computes what the CPU computes, with tiny models of five families on both."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import griffin_jax as gj
from griffin_jax.generation import jitted
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.feed_forward import NEURON_AXES
from griffin_jax.model.named import named
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import WeightFormat
from griffin_jax.utils.wholefile import write_text

FAMILIES = ("Gemma-2-9B", "Llama-3-8B", "Qwen2.5-7B", "Qwen3-8B", "OPT-6.7B")
"""In this order: windows, soft caps and norms of two kinds; grouped heads; biases; norms of heads; no gate, and learned
positions."""

PROMPTS, NEW = (100, 37), 24
"""Numbers of tokens of the two prompts, and of each answer."""
DENSITY = 0.5
SPARE = 2.0
"""How many times the CPU's error in bfloat16 the accelerator's may be, because it adds up in another order."""


def tiny(name: str) -> ModelConfig:
    """A well-known model's architecture in the smallest sizes that the kernels accept."""
    config, heads, width = named(name, layers=2), 4, 256
    return dataclasses.replace(
        config, vocab_size=512, width=width, ff_width=512, num_heads=heads, head_dim=width // heads, max_positions=256,
        num_kv_heads=heads if config.num_kv_heads == config.num_heads else heads // 2,
        windows=(16, 0) if config.windows else (),
        embedding_scale=1.0 if config.embedding_scale == 1 else width**0.5,
    )  # fmt: skip


def _row(family: str, check: str, value: float, allowed: float) -> dict[str, Any]:
    return {"family": family, "check": check, "value": value, "allowed": allowed, "passed": value <= allowed}


def _prompts(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return gj.pad([rng.integers(0, config.vocab_size, n).astype(np.int32) for n in PROMPTS], 128)


def _answers(model: Transformer) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray, np.ndarray]:
    """The kept neurons of every layer, the tokens of the full and the pruned model, and logits after the prompts."""
    tokens, lengths = _prompts(model.config)

    def read() -> gj.Prefilled:
        return jitted.prefill(model, tokens, lengths, max_new_tokens=NEW)

    prefilled = read()
    experts = jitted.select(prefilled.statistics, config=gj.GriffinConfig(DENSITY))
    kept, logits = tuple(map(np.asarray, experts.indices)), np.asarray(prefilled.logits)
    both = []
    for decoder in (model, gj.prune(model, experts)):
        both.append(np.asarray(jitted.decode(decoder, jitted.init_decode(read()), np.int32(NEW)).tokens))
    return kept, *both, logits


def _forced_logits(model: Transformer, answers: np.ndarray) -> np.ndarray:
    """Logits after the prompts and after each token of given answers but the last, through the cache."""
    tokens, lengths = _prompts(model.config)
    prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=NEW, collect=False)

    @jax.jit
    def step(model: Transformer, column: jax.Array, positions: jax.Array, cache: gj.KVCache) -> Any:
        x, cache, _ = model(column, positions, cache)
        return model.logits(x), cache

    found, cache = [np.asarray(prefilled.logits)], prefilled.cache
    for number in range(NEW - 1):
        column, positions = answers[:, number : number + 1], (lengths + number)[:, None].astype(np.int32)
        logits, cache = step(model, jnp.asarray(column), jnp.asarray(positions), cache)
        found.append(np.asarray(logits[:, 0]))
    return np.stack(found)


def _gathered(model: Transformer, experts: tuple[np.ndarray, ...], pruned: Transformer) -> float:
    """The share of a pruned model's arrays that are not, bit for bit, the rows that NumPy takes."""
    differ = total = 0
    for full, kept, indices in zip(model.layers, pruned.layers, experts, strict=True):
        for name, axis in NEURON_AXES.items():
            if getattr(full.ff, name) is None:
                continue
            whole, found = (np.asarray(getattr(layer.ff, name)[...]) for layer in (full, kept))
            expected = np.stack([np.take(whole, row, axis=axis) for row in indices], axis=axis)
            total += 1
            differ += found.shape != expected.shape or found.tobytes() != expected.tobytes()
    return differ / total


def checks(family: str) -> list[dict[str, Any]]:
    """All checks of one family: this process's default device against its CPU."""
    config, cpu, device = tiny(family), jax.devices("cpu")[0], jax.devices()[0]

    def on(where: Any, dtype: Any, weights: str | None = None) -> Transformer:
        with jax.default_device(cpu):
            model = random_model(config, dtype, weights=None if weights is None else WeightFormat.parse(weights))
        return jax.device_put(model, where)

    with jax.default_matmul_precision("highest"):
        with jax.default_device(cpu):
            expected = _answers(on(cpu, jnp.float32))
        found = _answers(on(device, jnp.float32))
    wrong = [np.mean(np.sort(a) != np.sort(b)) for a, b in zip(found[0], expected[0], strict=True)]
    rows = [
        _row(family, "float32: expert neurons that differ", float(np.max(wrong)), 0),
        _row(family, "float32: tokens that differ, dense", float(np.mean(found[1] != expected[1])), 0),
        _row(family, "float32: tokens that differ, pruned", float(np.mean(found[2] != expected[2])), 0),
        _row(family, "float32: error of logits", _error(found[3], expected[3]), 1e-4),
    ]
    for weights in ("bfloat16", "int8", "int4"):
        with jax.default_device(cpu):
            # The same rounded weights, but computed in float32.
            rounded = on(cpu, jnp.bfloat16, weights)
            exact = _forced_logits(jax.tree.map(_in_float32, rounded), expected[1])
            of_cpu = _error(_forced_logits(rounded, expected[1]), exact)
        model = on(device, jnp.bfloat16, weights)
        of_device = _error(_forced_logits(model, expected[1]), exact)
        rows.append(_row(family, f"{weights}: error of logits", of_device, SPARE * of_cpu))
        tokens, lengths = _prompts(config)
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=NEW)
        experts = jitted.select(prefilled.statistics, config=gj.GriffinConfig(DENSITY))
        indices = tuple(map(np.asarray, experts.indices))
        rows.append(
            _row(family, f"{weights}: arrays pruned wrongly", _gathered(model, indices, gj.prune(model, experts)), 0)
        )
    return rows


def _in_float32(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference, relative to the largest exact magnitude."""
    return float(np.max(np.abs(found - exact)) / np.max(np.abs(exact)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES), metavar="NAMES", help="models, separated by commas")
    parser.add_argument("--json-file", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    families = options.families.split(",")
    # Most of the time is compiling, so families run in parallel. They share the device, so none may take all of its
    # memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    # To find out which of its products is fastest, XLA would compile all of them.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    workers = min(len(families), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as processes:
        rows = [row for found in processes.map(checks, families) for row in found]
    write_text(options.json_file, json.dumps({"format": "griffin_jax checks 1", "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
