"""`griffin-jax compile`: what a model needs and can reach on an accelerator that is not there."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from griffin_jax.aot.compilation import compile_for
from griffin_jax.aot.report import table
from griffin_jax.aot.targets import TARGETS
from griffin_jax.checkpoints.loading import open_source
from griffin_jax.checkpoints.native import DTYPES
from griffin_jax.cli.options import add_options
from griffin_jax.extensions.config import Extensions
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.model.named import NAMED, named, with_layers

DESCRIPTION = """Compiles prefill, pruning and decoding of a full-size model for a chip, which need not be there,
without its weights, and shows memory, kernels, copies and the ceiling that the bandwidth sets."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the compile command takes."""
    parser.add_argument("--target", required=True, metavar="CHIP", help=f"one of {', '.join(TARGETS)}")
    parser.add_argument(
        "--model",
        required=True,
        help=f"a model's folder or GGUF file, or one of {', '.join(NAMED)} (no weights needed)",
    )
    parser.add_argument("--layers", type=int, metavar="L", help="compile the first L layers only (default: all)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the computation and the cache (default: %(default)s)"
    )
    parser.add_argument(
        "--weights", metavar="FORMAT", help="how matrices are stored, such as int8 or int4 (default: in --dtype)"
    )
    add_options(parser, GriffinConfig, "density", "round_to")
    groups = "as in generate (default: as many as --devices; then pruning moves no rows between these)"
    add_options(parser, GriffinConfig, "groups", help=groups)
    sets = parser.add_mutually_exclusive_group()
    add_options(sets, GriffinConfig, "shared")
    sets.add_argument(
        "--per-sequence", dest="shared", action="store_false", help="one set for every sequence (the default)"
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="divide heads, neurons and vocabulary among N of the chip; all bytes are then those of each"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--expert-parallel",
        action="store_true",
        help="these have whole experts each, of a model with routed experts (default: neurons of every expert)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=2048, metavar="P", help="tokens of each (default: %(default)s)")
    parser.add_argument("--new", type=int, default=128, metavar="N", help="tokens of an answer (default: %(default)s)")
    best = "best: with rows of the prompt, to which prune refits what is kept"
    add_options(parser, Extensions, "quality", help=best)
    add_options(parser, Extensions, "refresh_every", help="compile refreshing, too")
    drafts = "compile speculative decoding, too, with N drafts"
    add_options(parser, Extensions, "speculative", help=drafts, metavar="N", nargs=None, const=None, default=None)
    mixed = "the pruned model has kept neurons in two formats, as generate has them"
    add_options(parser, Extensions, "mixed_weights", help=mixed)
    parser.add_argument("--hlo", metavar="FOLDER", help="write the optimised HLO of every program there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> None:
    """Run the compile command.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: see `compile_for`.
        RuntimeError: likewise.
    """
    path = Path(os.path.expanduser(options.model))
    config = open_source(path).config if path.exists() else named(options.model)
    if options.layers is not None:
        config = with_layers(config, options.layers)
    report = compile_for(
        options.target, config, devices=options.devices, expert_parallel=options.expert_parallel,
        density=options.density, round_to=options.round_to, groups=options.groups, shared=options.shared,
        batch=options.batch, prompt=options.prompt, new=options.new, dtype=options.dtype, weights=options.weights,
        quality=options.quality, refresh_every=options.refresh_every, speculative=options.speculative,
        mixed_weights=options.mixed_weights, hlo=options.hlo, notice=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    if options.json:
        print(json.dumps({"model": options.model, **report.to_json()}))
    else:
        print(table(options.model, report))
