"""`griffin-jax info`: describe a model without loading its weights."""

from __future__ import annotations

import argparse
import json
import math

import jax

from griffin_jax.checkpoints.loading import describe, parse_dtype, parse_weights, precision_of
from griffin_jax.checkpoints.native import NativeCheckpoint
from griffin_jax.cli.options import add_dtype_argument, add_model_argument, add_options
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.llm.memory import Needs
from griffin_jax.model.assembly import NEURON_MAJOR, parameter_shapes
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.sizes import Sizes, part_read
from griffin_jax.model.weights import Precision
from griffin_jax.utils import memory

PROMPT, NEW = 512, 128
"""Tokens of the prompts and answers for which the needed memory is shown."""

DESCRIPTION = """Describes a model, and what is left of it at a density, without loading its weights. A config.json is
enough; the weights need not exist."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_model_argument(parser)
    add_options(parser, GriffinConfig, "density")
    add_dtype_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the description as one JSON object")


def run(options: argparse.Namespace) -> None:
    """Prints a description of the model, made from the headers of its files."""
    config, source = describe(options.model, options.allow_pickle)
    shapes = parameter_shapes(config)
    kept = GriffinConfig(options.density).kept(config.neuron_ranges)
    total = sum(math.prod(shape) for shape in shapes.values())
    neuron_major = tuple(f".{part}.{name}" for part in ("ff", "experts", "shared") for name in NEURON_MAJOR)
    ff = sum(math.prod(shape) for path, shape in shapes.items() if path.endswith(neuron_major))
    of_each = ff // sum(config.neurons)
    active = total - ff + round(of_each * sum(k * part_read(config, layer) for layer, k in enumerate(kept)))
    precision = precision_of(config, parse_dtype(options.dtype), parse_weights(options.weights), source)
    needs = Needs(config, precision, platform=jax.default_backend())
    sizes = Sizes(config, 1, 1, precision, shared=True)
    room = min(PROMPT + NEW, config.max_positions)
    lengths = room - min(NEW, room // 2), min(NEW, room // 2)
    memory_needed = {
        f"batch {batch}{', shared' if shared else ''}": needs.generation(batch, *lengths, kept, shared=shared)
        for batch, shared in ((1, False), (8, True), (8, False))
    }
    facts = {
        "model": options.model,
        **config.to_json(),
        "parameters": total,
        "ff_parameters": ff,
        "density": options.density,
        "kept": kept,
        "active_parameters": active,
        "dtype": precision.dtype.name,
        "weights": str(precision.weights),
        "weight_bytes": sizes.weights(None),
        "memory": memory_needed,
    }
    if isinstance(source, NativeCheckpoint):
        facts["source"] = {"name": source.converted_from, "sha256": source.hashes}
    if options.json:
        print(json.dumps(facts))
        return
    print(f"{options.model}: {config.family}, {total / 1e6:,.1f} M parameters")
    print(f"  {config.num_layers} layers, width {config.width}, context {config.max_positions:,} tokens")
    print(f"  attention: {config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values")
    print(f"  feed-forward: {_neurons(config)}, {'gated ' if config.gated else ''}{config.activation}", end="")
    print(f", {ff / total:.0%} of the parameters")
    print(f"  vocabulary: {config.vocab_size:,}, head {'tied' if config.tied_head else 'untied'}")
    widths = str(kept[0]) if len(set(kept)) == 1 else f"{min(kept)} to {max(kept)}"
    print(f"  at density {options.density}: {widths} neurons a layer, {active / 1e6:,.1f} M parameters active")
    needed = [f"{name}: {memory.shown(sum(parts.values()))}" for name, parts in memory_needed.items()]
    print(f"  memory in {precision}, at most, for prompts of {lengths[0]} tokens and answers of {lengths[1]}:")
    print(f"    {'; '.join(needed)} (of which weights {memory.shown(sizes.weights(None))})")
    if isinstance(source, NativeCheckpoint):
        print(f"  stored in {Precision.of(source.dtype, source.weights)}, from {source.converted_from}")
        for file, digest in source.hashes.items():
            print(f"    sha256 {digest}  {file}")


def _neurons(config: ModelConfig) -> str:
    """The neurons and experts of the feed-forward layers, in words."""
    routing = config.routing
    if routing is None:
        return f"{config.ff_width} neurons"
    words = f"{routing.active} of {routing.experts} experts with {routing.width} neurons each"
    if routing.shared_width:
        words += f", {routing.shared_width} shared"
    dense = len(routing.dense_layers)
    return words + (f", {dense} dense layers with {config.ff_width}" if dense else "")
