"""What routed experts cost: a model with them next to a dense one with as many neurons as a token reads of it.

Both have random weights in true shape, except for a vocabulary of 256 tokens, and so next to no head: what is timed is
their layers. They are run in turn. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np

from griffin_jax.bench.runner import measure_bandwidth
from griffin_jax.generation import jitted
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.named import named
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import Precision, WeightFormat

VOCABULARY = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="Qwen3-30B-A3B", help="a well-known one (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, metavar="L", help="(default: %(default)s)")
    parser.add_argument("--weights", default="float32", metavar="FORMAT", help="(default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=1024, metavar="T", help="tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, metavar="N", help="tokens decoded (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="(default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    config = named(options.model, options.layers)
    if config.routing is None:
        raise ValueError(f"{options.model} has no routed experts")
    routed = dataclasses.replace(config, vocab_size=VOCABULARY)
    configs = {"routed": routed, "dense": _twin(routed)}
    weights = WeightFormat.parse(options.weights)
    dtype = np.dtype("bfloat16") if jax.default_backend() != "cpu" else np.dtype(np.float32)
    models = {name: random_model(each, dtype, weights=weights) for name, each in configs.items()}
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, (1, options.prompt)).astype(np.int32)
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    bandwidth = measure_bandwidth()
    for repeat in range(options.repeats + 1):
        for name, model in models.items():
            seconds = timed_answer(model, prompt, options.new)
            # The first round compiles.
            for phase, value in seconds.items() if repeat else ():
                found[name][phase].append(value)
    bandwidth = max(bandwidth, measure_bandwidth())
    medians = {name: {phase: float(np.median(v)) for phase, v in each.items()} for name, each in found.items()}
    ratios = {phase: medians["routed"][phase] / medians["dense"][phase] for phase in ("prefill", "decode")}
    slots = options.prompt + options.new
    read = {
        name: Sizes(each, 1, slots, Precision.of(dtype, weights), shared=True).step(None)
        for name, each in configs.items()
    }
    print(
        f"{options.model}: {options.layers} layers, {weights}, {options.prompt} + {options.new} tokens, batch 1,"
        f" {jax.default_backend()}, bandwidth {bandwidth / 1e9:.1f} GB/s, medians of {options.repeats}"
    )
    for name, each in medians.items():
        step = each["decode"] / options.new
        print(
            f"{name:7} prefill {each['prefill'] * 1e3:9,.1f} ms   decode {step * 1e3:7.2f} ms/token,"
            f" {read[name] / 1e6:,.1f} MB read at {read[name] / step / 1e9:.1f} GB/s,"
            f" {step / (read[name] / bandwidth):.2f} of the time that these bytes take"
        )
    print(f"routed / dense: prefill {ratios['prefill']:.2f}, decode {ratios['decode']:.2f}")
    print(json.dumps({"ratios": ratios, "seconds": medians, "read": read, "bandwidth": bandwidth}))


def _twin(config: ModelConfig) -> ModelConfig:
    """The dense model whose layers have as many neurons as a token reads of the routed one's."""
    assert config.routing is not None
    read = config.routing.active * config.routing.width + config.routing.shared_width
    return dataclasses.replace(config, routing=None, ff_width=read)


def timed_answer(model: Transformer, prompt: np.ndarray, new: int) -> dict[str, float]:
    """Seconds of the prompt, and of the answer's other tokens."""
    lengths = np.asarray([prompt.shape[1]], np.int32)

    def timed(work: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        result = jax.block_until_ready(work())
        return result, time.perf_counter() - start

    prefilled, prefill = timed(lambda: jitted.prefill(model, prompt, lengths, max_new_tokens=new, collect=False))
    state = jax.block_until_ready(jitted.init_decode(prefilled))
    _, decode = timed(lambda: jitted.decode(model, state, np.int32(new), eos=()).tokens)
    return {"prefill": prefill, "decode": decode}
