"""Milliseconds of prefill, statistic, select, prune and decode, beside what the memory bandwidth allows.

Every decode time stands beside its ceiling: the bytes that one step must read (weights in use and
cache), over the bandwidth that this run measured by summing a large array. With --peers the same work
is run in PyTorch, in turn, in the same process: transformers' dense model, and GRIFFIN as its authors
published it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import griffin_jax as gj
from griffin_jax import demo, jitted
from griffin_jax.checkpoint import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=demo.NAME, help="any model that griffin_jax loads (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights")
    parser.add_argument("--prompt-tokens", type=int, default=999, metavar="P", help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--density", type=float, nargs="+", default=[1.0, 0.5], help="default: 1 0.5")
    parser.add_argument("--repeats", type=int, default=5, help="medians of this many (default: %(default)s)")
    parser.add_argument("--peers", action="store_true", help="run PyTorch in turn (needs torch)")


def run(options: argparse.Namespace) -> None:
    for density in options.density:
        gj.GriffinConfig(density)
    if min(options.prompt_tokens, options.repeats) < 1 or options.new_tokens < 2:
        raise ValueError("--prompt-tokens and --repeats must be at least 1, --new-tokens at least 2")
    if options.peers and options.prompt_tokens < 2:
        raise ValueError("--peers needs --prompt-tokens of 2 or more: the published code takes one token for decoding")
    model, _ = gj.load_model(options.model, options.dtype)
    if options.peers and (jax.default_backend() != "cpu" or model.dtype != jnp.float32):
        raise ValueError("--peers compares float32 on the CPU; use --dtype float32 and JAX_PLATFORMS=cpu")
    length, new = options.prompt_tokens, options.new_tokens
    if length + new > model.config.max_positions:
        raise ValueError(f"{length} + {new} tokens are more than the model's context of {model.config.max_positions}")
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, length).tolist()
    torch_model = _torch_model(model) if options.peers else None
    bandwidth = _bandwidth()
    print(
        f"{options.model}: {length} prompt + {new} new tokens, batch 1, {model.dtype}, {jax.default_backend()},"
        f" {os.cpu_count()} threads, medians of {options.repeats}; bandwidth {bandwidth / 1e9:.1f} GB/s",
        flush=True,
    )

    ours = [_Ours(model, prompt, new, density) for density in options.density]
    runs: list[tuple[str, float, Callable[[], dict[str, float]]]] = [
        ("griffin_jax", o.density, o.measure) for o in ours
    ]
    if torch_model is not None:
        runs += [("PyTorch", density, _torch_run(torch_model, prompt, new, density)) for density in options.density]
    samples: list[list[dict[str, float]]] = [[] for _ in runs]
    for repeat in range(options.repeats + 1):
        for (_, _, measure), collected in zip(runs, samples, strict=True):
            time.sleep(0.3)  # idle threads of the other library spin for a while
            sample = measure()
            if repeat:
                collected.append(sample)

    rows = []
    for (system, density, _), collected in zip(runs, samples, strict=True):
        row: dict[str, Any] = {"system": system, "density": density}
        row |= {key: float(np.median([sample[key] for sample in collected])) for key in collected[0]}
        if "prefill_without_statistic_ms" in row:
            # Neighbours in time: the median of their ratios is steadier than the ratio of two medians.
            ratios = [sample["prefill_ms"] / sample["prefill_without_statistic_ms"] for sample in collected]
            row["statistic_share"] = float(np.median(ratios)) - 1
        row["step_bytes"] = _step_bytes(model, density, length + new // 2)
        row["ceiling_ms"] = row["step_bytes"] / bandwidth * 1e3
        row["fraction_of_ceiling"] = row["ceiling_ms"] / row["decode_ms"]
        rows.append(row)
    _print_table(rows)
    _print_ratios(rows)
    result = {
        "model": options.model, "prompt_tokens": length, "new_tokens": new, "batch": 1, "dtype": str(model.dtype),
        "backend": jax.default_backend(), "threads": os.cpu_count(), "bandwidth": bandwidth, "rows": rows,
    }  # fmt: skip
    print(json.dumps(result))


class _Ours:
    """One density of griffin_jax: every phase timed alone, on the same prompt."""

    def __init__(self, model: gj.Transformer, prompt: list[int], new: int, density: float):
        self.model, self.density, self.new, self.room = model, density, new, gj.bucket(new)
        self.config = gj.GriffinConfig(density)
        self.tokens, self.lengths = gj.pad([prompt], gj.bucket(len(prompt)))

    def measure(self) -> dict[str, float]:
        times: dict[str, float] = {}

        def timed(name: str, call: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = jax.block_until_ready(call())
            times[name] = (time.perf_counter() - start) * 1e3
            return result

        def read(collect: bool) -> gj.Prefilled:
            return jitted.prefill(self.model, self.tokens, self.lengths, room=self.room, collect=collect)

        timed("prefill_without_statistic_ms", lambda: read(False))
        prefilled = timed("prefill_ms", lambda: read(True))
        model = self.model
        if self.density < 1:
            experts = timed("select_ms", lambda: jitted.select(prefilled.statistics, self.config))
            model = timed("prune_ms", lambda: gj.prune(self.model, experts))
        answer = jax.block_until_ready(jitted.begin(prefilled))
        timed("decode_ms", lambda: jitted.decode(model, answer, self.new))
        times["decode_ms"] /= self.new - 1
        return times


def _torch_model(model: gj.Transformer) -> Any:
    try:
        import torch

        from benchmarks.peers import from_jax
    except ImportError as error:
        raise ValueError("--peers needs PyTorch: pip install 'griffin-jax[bench]'") from error
    torch.set_num_threads(os.cpu_count() or 1)
    return from_jax(model)


def _torch_run(model: Any, prompt: list[int], new: int, density: float) -> Callable[[], dict[str, float]]:
    from benchmarks import peers

    def measure() -> dict[str, float]:
        with peers.pruned(model, density):
            _, prefill, step = peers.greedy(model, prompt, new)
        return {"prefill_ms": prefill * 1e3, "decode_ms": step * 1e3}

    return measure


def _bandwidth() -> float:
    """Bytes per second that summing 512 MB reads."""
    array = jnp.ones((1 << 27,), jnp.float32)
    total = jax.jit(jnp.sum)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        total(array).block_until_ready()
        times.append(time.perf_counter() - start)
    return array.nbytes / min(times)


def _step_bytes(model: gj.Transformer, density: float, context: int) -> int:
    """Bytes that one decode step must read: every weight in use once, and the cache of `context` tokens."""
    c = model.config
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    rows = sum(neurons - gj.kept_neurons(neurons, density) for neurons in model.neurons)
    matrices = 3 if c.gated else 2
    if not c.tied_head:
        weights -= model.embedding[...].nbytes
    cache = 2 * c.num_layers * c.num_kv_heads * c.head_dim * context
    return weights + model.dtype.itemsize * (cache - rows * c.width * matrices)


COLUMNS = {
    "prefill_ms": "prefill ms", "select_ms": "select ms", "prune_ms": "prune ms", "decode_ms": "decode ms/token",
    "ceiling_ms": "ceiling ms/token", "fraction_of_ceiling": "of ceiling",
}  # fmt: skip


def _print_table(rows: list[dict[str, Any]]) -> None:
    print("  ".join([f"{'system':12}", f"{'density':>7}", *(f"{name:>16}" for name in COLUMNS.values())]))
    for row in rows:
        cells = []
        for key in COLUMNS:
            value = row.get(key)
            text = "" if value is None else f"{value:.0%}" if key == "fraction_of_ceiling" else f"{value:.2f}"
            cells.append(f"{text:>16}")
        print("  ".join([f"{row['system']:12}", f"{row['density']:>7}", *cells]))


def _print_ratios(rows: list[dict[str, Any]]) -> None:
    by = {(row["system"], row["density"]): row for row in rows}
    for (system, density), row in by.items():
        dense = by.get((system, 1.0))
        if dense is not None and density < 1:
            print(
                f"{system} at {density}: {dense['decode_ms'] / row['decode_ms']:.2f}x its dense decoding;"
                f" the bytes allow {dense['step_bytes'] / row['step_bytes']:.2f}x"
            )
        if system == "griffin_jax" and density < 1:
            share = row["statistic_share"]
            steps = (row["select_ms"] + row["prune_ms"]) / row["decode_ms"]
            print(f"  the statistic costs prefill {share:+.1%}; select and prune together {steps:.1f} decode steps")
        peer = by.get(("PyTorch", density))
        if system == "griffin_jax" and peer is not None:
            print(
                f"  PyTorch at {density} takes {peer['decode_ms'] / row['decode_ms']:.2f}x as long to decode,"
                f" {peer['prefill_ms'] / row['prefill_ms']:.2f}x as long to prefill"
            )
