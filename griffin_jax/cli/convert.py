"""`griffin-jax convert`: convert a checkpoint to the native format."""

from __future__ import annotations

import argparse
import sys
import warnings

from griffin_jax.checkpoints.loading import SOURCES, convert, plan
from griffin_jax.checkpoints.native import DTYPES
from griffin_jax.checkpoints.planning import NarrowingWarning
from griffin_jax.checkpoints.verification import VerificationError
from griffin_jax.cli.options import add_pickle_argument, add_weights_argument

DESCRIPTION = "Converts a checkpoint to the native format: a folder with the parameters, the config and the tokenizer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCES)
    parser.add_argument(
        "output", metavar="OUTPUT", nargs="?", help="folder to write; must not exist yet (not needed with --dry-run)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights (default: that of most of the source's weights, or float32 if they are quantised)",
    )
    add_weights_argument(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing; list every parameter with the tensor that it comes from, shapes, dtypes and sizes",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="afterwards, compare the logits with those of the source in PyTorch, which must be installed; if they"
        " differ, the exit code is 1, and OUTPUT is kept so that you can inspect it",
    )
    add_pickle_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the convert command and print what it did; returns 1 if the result differs from what PyTorch computes.

    Raises:
        ImportError: see `convert`.
        ValueError: likewise.
        OSError: likewise.
    """
    source, dtype, allow_pickle = arguments.source, arguments.dtype, arguments.allow_pickle
    if arguments.dry_run:
        if arguments.verify:
            raise ValueError("--verify needs a conversion, and --dry-run makes none; give one of them")
        planned = plan(source, dtype, allow_pickle, arguments.weights)
        print(planned)
        if planned.narrowing:
            warnings.warn(planned.narrowing, NarrowingWarning, stacklevel=2)
        return 0
    if arguments.output is None:
        raise ValueError("give OUTPUT, the folder to write, or --dry-run")
    try:
        options = {"allow_pickle": allow_pickle, "verify": arguments.verify, "weights": arguments.weights}
        print(convert(source, arguments.output, dtype, **options))
    except VerificationError as error:
        print(f"verification failed: {error}. The folder was written and stays, to be looked at", file=sys.stderr)
        return 1
    return 0
