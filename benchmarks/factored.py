"""Measures what factoring gains: a dense model against itself divided into experts, of which each token reads some.

A well-known model has random weights in its true shape, except for a vocabulary of only 256 tokens, so it has next to
no head; any other model is loaded. Training does not change the speed, so the routers are random. Both models are run
in turn. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax
import numpy as np

from benchmarks.routed import VOCABULARY, compare, random_models
from griffin_jax.factor.factorize import check_factors, divide, factored_config
from griffin_jax.factor.grouping import group_neurons
from griffin_jax.llm.llm import load
from griffin_jax.model.named import NAMED, named
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import Precision, WeightFormat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="Llama-2-13B", help="a well-known model or a checkpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--layers", type=int, default=2, metavar="L", help="layers of a well-known model (default: %(default)s)"
    )
    parser.add_argument("--experts", type=int, default=4, metavar="N", help="experts of a layer (default: %(default)s)")
    parser.add_argument(
        "--active", type=int, default=2, metavar="K", help="experts that a token reads (default: %(default)s)"
    )
    parser.add_argument("--weights", default="float32", metavar="FORMAT", help="(default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=256, metavar="T", help="prompt tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, metavar="N", help="tokens to decode (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="of each timing (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    models = _models(options)
    dense = models["dense"]
    prompt = np.random.default_rng(0).integers(0, dense.config.vocab_size, (1, options.prompt)).astype(np.int32)
    measured = compare(models, prompt, options.new, options.repeats)
    medians, read, bandwidth = measured.medians, measured.read, measured.bandwidth
    precision = Precision.of(dense.dtype, dense.weights)
    print(
        f"{options.model}: {len(dense.layers)} layers, {precision}, {options.active} of {options.experts} experts,"
        f" {options.prompt} + {options.new} tokens, batch 1, {jax.default_backend()}, bandwidth"
        f" {bandwidth / 1e9:.1f} GB/s, medians of {options.repeats}"
    )
    for name in medians:
        print(measured.line(name))
    ratios = {phase: medians["dense"][phase] / medians["factored"][phase] for phase in ("prefill", "decode")}
    print(
        f"factored is {ratios['decode']:.2f} times as fast in decoding, of {read['dense'] / read['factored']:.2f} that"
        f" bytes allow, and {ratios['prefill']:.2f} times in reading the prompt"
    )
    print(json.dumps({"ratios": ratios, "seconds": medians, "read": read, "bandwidth": bandwidth}))


def _models(options: argparse.Namespace) -> dict[str, Transformer]:
    """The dense model and the factored one."""
    if options.model not in NAMED:
        dense = load(options.model, weights=options.weights).model
        check_factors(dense.config, options.experts, options.active)
        groups = group_neurons(dense, options.experts, "contiguous")
        return {"dense": dense, "factored": divide(dense, groups, options.active)}
    config = dataclasses.replace(named(options.model, options.layers), vocab_size=VOCABULARY)
    check_factors(config, options.experts, options.active)
    configs = {"dense": config, "factored": factored_config(config, options.experts, options.active)}
    return random_models(configs, WeightFormat.parse(options.weights))
