"""`griffin-jax eval`: what pruning costs in quality."""

from __future__ import annotations

import argparse

from griffin_jax.cli.evaluate import divergence, drafts, front, groups, perplexity, promise, solve, summarize
from griffin_jax.cli.evaluate.running import run

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = """What pruning costs, on a user's own model and texts.

Every text is answered or scored by the dense model and, at each density, by GRIFFIN and by what stands next to it: the
oracle, which keeps the best neurons by the statistic of the answer itself, and magnitude and random pruning, which do
not look at the prompt. Figures are means over texts with 95% bootstrap intervals.

The scores of each text are written to the output folder at once: the same command goes on after an interruption. At the
end, results.json and table.txt are next to them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the evaluations."""
    # What sets and checks more options of a task: before the model is looked at, and then.
    parser.set_defaults(choose=None, check=None)
    kinds = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in (divergence, front, drafts, promise, groups, perplexity, summarize, solve):
        task.add(kinds)
