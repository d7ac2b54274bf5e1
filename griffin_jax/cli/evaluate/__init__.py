"""`griffin-jax eval`: measure what pruning costs in quality."""

from __future__ import annotations

import argparse

from griffin_jax.cli.evaluate import divergence, drafts, front, groups, perplexity, promise, solve, summarize
from griffin_jax.cli.evaluate.running import run

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = """Measures what pruning costs in quality, on your own model and texts.

Every text is answered or scored by the dense model and, at each density, by the pruned models. divergence, perplexity
and summarize also compare GRIFFIN with baselines: the oracle, which keeps the best neurons by the statistic of the
answer itself, and magnitude and random pruning, which ignore the prompt. Figures are means over texts with 95%
bootstrap intervals.

The scores of each text are written to the output folder at once, so running the same command again resumes after an
interruption. At the end, results.json and table.txt are written next to them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the evaluations."""
    # Functions of a task that set and check further options, before and after the model's config is read.
    parser.set_defaults(choose=None, check=None)
    kinds = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in (divergence, front, drafts, promise, groups, perplexity, summarize, solve):
        task.add(kinds)
