"""Arguments and checks of the commands that train on texts and write a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from griffin_jax.checkpoints.native import check_free
from griffin_jax.cli.options import (
    add_dtype_argument,
    add_mesh_argument,
    add_model_argument,
    check_files,
    check_output,
)
from griffin_jax.evaluation.samples import Skipped, nothing_left, read_files
from griffin_jax.llm.llm import LLM
from griffin_jax.model.config import ModelConfig
from griffin_jax.training.data import Packed, pack


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder to write, the model with its dtype and mesh, and the texts."""
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write; must not exist yet")
    add_model_argument(parser)
    add_dtype_argument(parser)
    add_mesh_argument(parser)
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", type=Path, required=True,
        help="texts to train on: JSONL files with one text per line, or text files (UTF-8) of one text each",
    )  # fmt: skip
    parser.add_argument(
        "--column", default="text", help="column of JSONL files that holds the text (default: %(default)s)"
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser, what: str, each: str) -> None:
    """Declare --training and --save-every.

    Args:
        parser: the command's parser.
        what: what the folder of --training holds, for its help text.
        each: the unit of --save-every, such as "updates".
    """
    parser.add_argument("--training", metavar="FOLDER", type=Path, help=f"folder for {what} (default: OUTPUT.training)")
    parser.add_argument(
        "--save-every",
        metavar="N",
        type=int,
        default=50,
        help=f"number of {each} between two checkpoints (default: %(default)s)",
    )


def check_training(options: argparse.Namespace) -> None:
    """Raise unless the texts exist and the folder can be written.

    Raises:
        FileExistsError: the folder exists already.
        FileNotFoundError: a text, or the folder to write into, does not exist.
        ValueError: --save-every is less than 1, or the folder cannot be written.
    """
    if options.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, got {options.save_every}")
    check_free(options.output)
    check_output("OUTPUT", options.output)
    check_files(options.text)


def check_length(config: ModelConfig, length: int) -> None:
    """Raise `ValueError` unless sequences of --length fit into a model's context."""
    if length > config.max_positions:
        raise ValueError(f"--length {length} is more than the context of {config.max_positions} tokens")


def checkpoints(options: argparse.Namespace) -> Path:
    """The folder of --training, or its default."""
    return options.training or options.output.with_name(f"{options.output.name}.training")


def packed_texts(llm: LLM, files: Sequence[Path], column: str, length: int) -> Packed:
    """The texts of JSONL and text files, packed into sequences of one length.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: none of the texts can be used.
    """
    skipped = Skipped()
    texts = [text for _, text in read_files(files, column, skipped)]
    skipped.report(sys.stderr)
    if not texts:
        raise nothing_left(skipped, ", ".join(map(str, files)))
    assert llm.tokenizer is not None
    end = llm.config.eos_token_ids[0] if llm.config.eos_token_ids else None
    return pack([llm.tokenizer.encode(text) for text in texts], length, end)
