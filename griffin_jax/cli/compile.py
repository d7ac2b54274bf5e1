"""`griffin-jax compile`: compile a model for an accelerator that this machine need not have."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from griffin_jax.aot.compilation import compile_for
from griffin_jax.aot.report import table
from griffin_jax.aot.targets import TARGETS
from griffin_jax.checkpoints.loading import describe
from griffin_jax.checkpoints.native import DTYPES
from griffin_jax.cli.options import add_options
from griffin_jax.extensions.config import Extensions
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.model.named import NAMED, named, with_layers

DESCRIPTION = """Compiles prefill, pruning and decoding of a full-size model for a GPU or TPU that this machine
need not have, without the model's weights. Shows memory, kernels, copies, and the ceiling on speed that
memory bandwidth sets. Unless XLA's compiler for the chip is installed, it is downloaded on first use
(less than 200 MB)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--target", required=True, metavar="CHIP", help=f"chip to compile for: {', '.join(TARGETS)}")
    parser.add_argument(
        "--model",
        required=True,
        help=f"folder, GGUF file or hub id (owner/name) of a model, whose config.json is enough, or one of"
        f" {', '.join(NAMED)}",
    )
    parser.add_argument("--layers", type=int, metavar="L", help="compile only the first L layers (default: all)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="dtype of the computation and the cache (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        metavar="FORMAT",
        help="format in which the weight matrices are stored, such as int8 or int4 (default: --dtype)",
    )
    add_options(parser, GriffinConfig, "density", "round_to")
    groups = "as in generate (default: as many as --devices, so that pruning moves no rows between them)"
    add_options(parser, GriffinConfig, "groups", help=groups)
    sets = parser.add_mutually_exclusive_group()
    add_options(sets, GriffinConfig, "shared")
    sets.add_argument(
        "--per-sequence", dest="shared", action="store_false", help="keep one set for each sequence (the default)"
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="divide heads, neurons and vocabulary among N such chips; all sizes in bytes are then those of one chip"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--expert-parallel",
        action="store_true",
        help="if the model has routed experts, give each chip whole experts (default: a share of the neurons of every"
        " expert)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="number of sequences (default: %(default)s)")
    parser.add_argument(
        "--prompt", type=int, default=2048, metavar="P", help="tokens of each prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--new", type=int, default=128, metavar="N", help="tokens of each answer (default: %(default)s)"
    )
    best = "with best, prefill also keeps rows of the prompt, and pruning refits the kept neurons to them"
    add_options(parser, Extensions, "quality", help=best)
    add_options(parser, Extensions, "refresh_every", help="also compile a refresh after every N tokens")
    drafts = "also compile speculative decoding, with N drafts at a time"
    add_options(parser, Extensions, "speculative", help=drafts, metavar="N", nargs=None, const=None, default=None)
    mixed = "read the kept neurons in two formats, as in generate"
    add_options(parser, Extensions, "mixed_weights", help=mixed)
    parser.add_argument("--hlo", metavar="FOLDER", help="write the optimised HLO of every program to FOLDER")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(options: argparse.Namespace) -> None:
    """Run the compile command.

    Raises:
        FileNotFoundError: the model's folder lacks files that are needed.
        ValueError: the model is unknown or unsupported; or see `compile_for`.
        RuntimeError: see `compile_for`.
    """
    exists = Path(os.path.expanduser(options.model)).exists()
    config = describe(options.model)[0] if exists or "/" in options.model else named(options.model)
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
