"""Measures what routed experts cost: a model with them against a dense one with as many neurons as a token reads.

Both have random weights in their true shapes, except for a vocabulary of only 256 tokens. They have next to no head, so
the timings are those of their layers. The models are run in turn. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
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
    parser.add_argument("--model", default="Qwen3-30B-A3B", help="a well-known model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, metavar="L", help="number of layers (default: %(default)s)")
    parser.add_argument("--weights", default="float32", metavar="FORMAT", help="(default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=1024, metavar="T", help="prompt tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, metavar="N", help="tokens to decode (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="of each timing (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    config = named(options.model, options.layers)
    if config.routing is None:
        raise ValueError(f"{options.model} has no routed experts")
    routed = dataclasses.replace(config, vocab_size=VOCABULARY)
    configs = {"routed": routed, "dense": _twin(routed)}
    weights = WeightFormat.parse(options.weights)
    models = random_models(configs, weights)
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, (1, options.prompt)).astype(np.int32)
    measured = compare(models, prompt, options.new, options.repeats)
    medians, read, bandwidth = measured.medians, measured.read, measured.bandwidth
    ratios = {phase: medians["routed"][phase] / medians["dense"][phase] for phase in ("prefill", "decode")}
    print(
        f"{options.model}: {options.layers} layers, {weights}, {options.prompt} + {options.new} tokens, batch 1,"
        f" {jax.default_backend()}, bandwidth {bandwidth / 1e9:.1f} GB/s, medians of {options.repeats}"
    )
    for name in medians:
        step = measured.step(name)
        print(f"{measured.line(name)}, {step / (read[name] / bandwidth):.2f} of the time that these bytes take")
    print(f"routed / dense: prefill {ratios['prefill']:.2f}, decode {ratios['decode']:.2f}")
    print(json.dumps({"ratios": ratios, "seconds": medians, "read": read, "bandwidth": bandwidth}))


@dataclasses.dataclass(frozen=True)
class Compared:
    """How long answers of several models take, each timed alone.

    Attributes:
        new: number of tokens of an answer.
        medians: for each model, seconds of `prefill`, and of `decode`: all tokens of the answer but the first.
        read: bytes that a decode step of each model reads.
        bandwidth: bytes per second that the memory gives, at best.
    """

    new: int
    medians: dict[str, dict[str, float]]
    read: dict[str, int]
    bandwidth: float

    def step(self, name: str) -> float:
        """Seconds of a decode step; the first token of an answer needs none."""
        return self.medians[name]["decode"] / (self.new - 1)

    def line(self, name: str) -> str:
        """The figures of a model, for people."""
        width, read = max(map(len, self.medians)), self.read[name]
        prefill, step = self.medians[name]["prefill"], self.step(name)
        return (
            f"{name:{width}} prefill {prefill * 1e3:9,.1f} ms   decode {step * 1e3:7.2f} ms/token,"
            f" {read / 1e6:,.1f} MB read at {read / step / 1e9:.1f} GB/s"
        )


def compare(models: Mapping[str, Transformer], prompt: np.ndarray, new: int, repeats: int) -> Compared:
    """Time answers of `new` tokens by all models in turn."""
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    bandwidth = measure_bandwidth()
    for repeat in range(repeats + 1):
        for name, model in models.items():
            # The first round compiles.
            for phase, value in _timed(model, prompt, new).items() if repeat else ():
                found[name][phase].append(value)
    bandwidth = max(bandwidth, measure_bandwidth())
    medians = {name: {phase: float(np.median(v)) for phase, v in each.items()} for name, each in found.items()}
    read = {
        name: Sizes(model.config, 1, prompt.shape[1] + new, Precision.of(model.dtype, model.weights), shared=True).step(
            None
        )
        for name, model in models.items()
    }
    return Compared(new, medians, read, bandwidth)


def random_models(configs: Mapping[str, ModelConfig], weights: WeightFormat) -> dict[str, Transformer]:
    """Models with random weights, in the dtype that this platform computes in."""
    dtype = np.dtype("bfloat16") if jax.default_backend() != "cpu" else np.dtype(np.float32)
    return {name: random_model(each, dtype, weights=weights) for name, each in configs.items()}


def _twin(config: ModelConfig) -> ModelConfig:
    """The dense model whose layers have as many neurons as a token reads in the routed model."""
    assert config.routing is not None
    read = config.routing.active * config.routing.width + config.routing.shared_width
    return dataclasses.replace(config, routing=None, ff_width=read)


def _timed(model: Transformer, prompt: np.ndarray, new: int) -> dict[str, float]:
    """Seconds of reading the prompt, and of writing the answer's tokens after the first."""
    lengths = np.asarray([prompt.shape[1]], np.int32)

    def timed(work: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        result = jax.block_until_ready(work())
        return result, time.perf_counter() - start

    prefilled, prefill = timed(lambda: jitted.prefill(model, prompt, lengths, max_new_tokens=new, collect=False))
    state = jax.block_until_ready(jitted.init_decode(prefilled))
    _, decode = timed(lambda: jitted.decode(model, state, np.int32(new), eos=()).tokens)
    return {"prefill": prefill, "decode": decode}
