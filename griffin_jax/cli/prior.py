"""`griffin-jax prior`: measure what a model's neurons do in general text."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from griffin_jax.cli.options import (
    add_batch_argument,
    add_dtype_argument,
    add_mesh_argument,
    add_model_argument,
    check_files,
    check_output,
    chosen_batch,
    chosen_mesh,
    chosen_needs,
    load_chosen,
)
from griffin_jax.evaluation import general_text
from griffin_jax.evaluation.general_text import (
    LEAST_TEXTS,
    MOST_HELD_OUT,
    MOST_SKETCHED,
    measure,
    self_generated,
    windows,
    with_budgets,
)
from griffin_jax.evaluation.samples import Skipped, nothing_left, read_texts
from griffin_jax.extensions.prior import prior_path
from griffin_jax.extensions.reconstruction import DEFAULT_CALIBRATION
from griffin_jax.llm.memory import Parts

DESCRIPTION = general_text.__doc__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    add_model_argument(parser)
    add_dtype_argument(parser)
    add_mesh_argument(parser)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="FILE", nargs="+", type=Path, help="text files (UTF-8)")
    text.add_argument("--self-generated", metavar="N", type=int, help="N texts that the dense model writes")
    parser.add_argument(
        "--window", metavar="T", type=int, default=512, help="tokens of each text, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", metavar="C", type=int, default=DEFAULT_CALIBRATION,
        help="calibration rows of each layer, for reconstruction; 0 for none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--budget-texts", metavar="N", type=int, default=32,
        help="texts that the sensitivity of neurons is measured on, by a backward pass over each; 0 for none"
        " (default: %(default)s)",
    )  # fmt: skip
    add_batch_argument(parser, 4)
    parser.add_argument("--seed", type=int, default=0, help="of the texts that are written (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="(default: next to the model, *.prior.safetensors)")


def run(options: argparse.Namespace) -> None:
    """Measures a prior and writes its file."""
    least = {"--window": 2, "--rows": 0, "--budget-texts": 0, "--self-generated": 1, "--seed": 0}
    for name, minimum in least.items():
        value = getattr(options, name[2:].replace("-", "_"))
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if options.seed >= 2**31:
        raise ValueError(f"--seed must be less than 2**31, got {options.seed}")
    output = options.output or prior_path(options.model)
    check_output("--output", output)
    check_files(options.text or ())

    mesh = chosen_mesh(options)
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}")
    needs = chosen_needs(options, mesh)

    def needed(batch: int) -> Parts:
        window = min(options.window, needs.config.max_positions)
        budgets, written = bool(options.budget_texts), options.text is None
        return needs.prior(batch, window, rows=options.rows, sketched=MOST_SKETCHED, budgets=budgets, written=written)

    options.batch = chosen_batch(options, needed, "a shorter --window or fewer --rows", mesh)
    llm = load_chosen(options, mesh)
    window = min(options.window, llm.config.max_positions)
    if options.text:
        if llm.tokenizer is None:
            raise ValueError(f"{options.model} has no tokenizer, so it cannot read texts; give --self-generated")
        skipped = Skipped()
        texts = [
            tokens for _, text in read_texts(options.text, skipped) for tokens in windows(llm.tokenizer, text, window)
        ]
        skipped.report()
        if not texts:
            raise nothing_left(skipped, ", ".join(map(str, options.text)))
    else:
        texts = self_generated(llm.model, options.self_generated, window, size=options.batch, seed=options.seed)
    held_out = _held_out(texts) if options.budget_texts else []
    measured = [text for number, text in enumerate(texts) if number not in held_out]
    prior = measure(llm.model, measured, size=options.batch, rows=options.rows, seed=options.seed)
    if held_out:
        trial = [texts[number] for number in held_out]
        sensitive = measured[:: -(-len(measured) // options.budget_texts)]
        prior = with_budgets(llm.model, prior, sensitive, trial, size=options.batch, seed=options.seed)
    elif options.budget_texts:
        prior = dataclasses.replace(prior, uniform=f"fewer than {LEAST_TEXTS} texts are too few to try budgets on")
    prior.save(output)
    rows = prior.rows[0].shape[0] if prior.rows else 0
    print(f"{output}: {prior.tokens:,} tokens in {len(measured):,} texts, {rows:,} calibration rows of each layer")
    if prior.strength:
        print(f"layers keep shares of their own, {prior.strength:g} of the way to those with the least loss")
    else:
        print(f"layers keep the same share: {prior.uniform}")


def _held_out(texts: Sequence[Sequence[int]]) -> list[int]:
    """Which texts are for the trial: of those that have two halves every fifth, at most `MOST_HELD_OUT`."""
    whole = [number for number, text in enumerate(texts) if len(text) > 1]
    return whole[4::5][:MOST_HELD_OUT]
