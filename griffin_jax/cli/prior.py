"""`griffin-jax prior`: measure how a model's neurons behave in general text."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
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
from griffin_jax.evaluation.journal import Journal
from griffin_jax.evaluation.samples import Skipped, nothing_left, read_texts
from griffin_jax.extensions.prior import Prior, load_for_best, prior_path
from griffin_jax.extensions.reconstruction import DEFAULT_CALIBRATION
from griffin_jax.llm.memory import Parts
from griffin_jax.model.fingerprint import fingerprint

DESCRIPTION = general_text.__doc__

OF_MODEL = ("model", "dtype", "weights", "allow_pickle", "mesh", "expert_parallel")
"""The options, common to all commands, that say which model is loaded and how."""

QUICK = {"self_generated": 16, "window": 256, "budget_texts": 0}
"""Defaults if neither --text nor --self-generated is given; measuring then takes minutes on a CPU."""

THOROUGH = {"window": 512, "budget_texts": 32}
"""Defaults if one of them is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_model_argument(parser)
    add_dtype_argument(parser)
    add_mesh_argument(parser)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", nargs="+", type=Path, help="text files to measure on (UTF-8)")
    text.add_argument(
        "--self-generated", metavar="N", type=int,
        help=f"measure on N texts that the dense model writes (default without --text: {QUICK['self_generated']} texts"
        f" of {QUICK['window']} tokens and no --budget-texts, which takes minutes)",
    )  # fmt: skip
    parser.add_argument(
        "--window",
        metavar="T",
        type=int,
        help="tokens of each text, at most; files are cut into windows of this length (default: 512)",
    )
    parser.add_argument(
        "--rows", metavar="C", type=int, default=DEFAULT_CALIBRATION,
        help="number of calibration rows of each layer, to which --refit also fits; 0 for none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--budget-texts", metavar="N", type=int,
        help="number of texts on which the sensitivity of neurons is measured, with a backward pass over each; 0 for"
        " none (default: 32)",
    )  # fmt: skip
    add_batch_argument(parser, 4)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--output", metavar="FILE", type=Path,
        help="file to write (default: *.prior.safetensors, next to the model, or in the current folder if --model is no"
        " path)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a prior that is there")


def chosen_prior(options: argparse.Namespace) -> Prior | None:
    """The prior of --prior. With --quality best, by default the one next to the model, measured first if missing.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged.
    """
    if options.quality == "best":
        if getattr(options, "in_place", False):
            raise ValueError("--in-place moves the model's own rows, which --quality best refits: give one of the two")
        return prior_for_best(options)
    return Prior.load(options.prior) if options.prior else None


def prior_for_best(options: argparse.Namespace) -> Prior:
    """The prior of --prior, or the one next to the model, which is first measured with `QUICK` if it is missing.

    With --distributed, none is measured.

    Args:
        options: parsed arguments of a command that loads a model.

    Raises:
        FileNotFoundError: the file does not exist, and is not to be measured.
        MemoryError: there is not enough memory to measure a prior.
        ValueError: the file is damaged.
    """
    if options.prior or prior_path(options.model).is_file() or getattr(options, "distributed", None):
        return load_for_best(options.model, options.prior)
    output = prior_path(options.model)
    print(
        f"--quality best needs a prior, and there is no {output} yet: the model writes {QUICK['self_generated']} short"
        " texts and is measured on them, once. On yours, griffin-jax prior --overwrite --text measures a better one",
        file=sys.stderr,
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    of_model = {name: value for name, value in vars(options).items() if name in OF_MODEL}
    # stdout is for the answer only.
    with contextlib.redirect_stdout(sys.stderr):
        run(argparse.Namespace(**(vars(parser.parse_args([])) | of_model)))
    return Prior.load(output)


def run(options: argparse.Namespace) -> None:
    """Measures a prior and writes it to a file."""
    named = any(vars(options)[name] is not None for name in ("text", "self_generated"))
    for name, value in (THOROUGH if named else QUICK).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    least = {"--window": 2, "--rows": 0, "--budget-texts": 0, "--self-generated": 1, "--seed": 0}
    for name, minimum in least.items():
        value = getattr(options, name[2:].replace("-", "_"))
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if options.seed >= 2**31:
        raise ValueError(f"--seed must be less than 2**31, got {options.seed}")
    output = options.output or prior_path(options.model)
    check_output("--output", output)
    if output.exists() and not options.overwrite:
        raise FileExistsError(f"{output} exists already: give another --output, or --overwrite to measure it anew")
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
    journal = None
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
        journal = _journal(options, output, fingerprint(llm.model))
        count, seed = options.self_generated, options.seed
        texts = self_generated(llm.model, count, window, size=options.batch, seed=seed, journal=journal)
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
    if journal is not None:
        journal.remove()
    rows = prior.rows[0].shape[0] if prior.rows else 0
    print(f"{output}: {prior.tokens:,} tokens in {len(measured):,} texts, {rows:,} calibration rows of each layer")
    if prior.strength:
        print(f"layers keep shares of their own, {prior.strength:g} of the way to those with the least loss")
    else:
        print(f"layers keep the same share: {prior.uniform}")


def _journal(options: argparse.Namespace, output: Path, model: str) -> Journal:
    """A journal of the texts that the model writes, kept next to the prior's file until that is complete."""
    settings = {"model": model, "texts": options.self_generated, "window": options.window, "seed": options.seed}
    return Journal.going_on(output.with_name(f"{output.name}.part"), settings)


def _held_out(texts: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the texts for the trial: every fifth text of two tokens or more, at most `MOST_HELD_OUT`."""
    whole = [number for number, text in enumerate(texts) if len(text) > 1]
    return whole[4::5][:MOST_HELD_OUT]
