"""`griffin-jax eval groups`: the best neurons of each group against the best of all."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from griffin_jax.cli.evaluate.arguments import (
    add_densities,
    add_lengths,
    add_model,
    add_output,
    add_sample,
    add_text_file,
)
from griffin_jax.cli.evaluate.running import Evaluation
from griffin_jax.cli.evaluate.texts import check_lengths, first_items
from griffin_jax.cli.options import numbers
from griffin_jax.evaluation import groups, report
from griffin_jax.evaluation.grid import DEFAULTS, Variant
from griffin_jax.evaluation.samples import Skipped
from griffin_jax.extensions.config import Extensions
from griffin_jax.llm.llm import LLM


def add(kinds: Any) -> None:
    """Declare the evaluation."""
    kind = kinds.add_parser(
        "groups",
        help="the best neurons of each of several groups against the best of all",
        description="The full model reads the first tokens of each text. The tokens that follow are scored by models"
        " that keep the best of all neurons, and by models that keep equally many of each of several equal ranges, as"
        " devices that share a model can do without exchanging rows.",
    )
    add_text_file(kind, "text")
    add_lengths(kind)
    kind.add_argument(
        "--groups", metavar="M", default="2,4,8", help="numbers of ranges, separated by commas (default: %(default)s)"
    )
    add_model(kind)
    what = kind.add_argument_group("what is compared")
    add_densities(what)
    add_sample(what, size=4)
    add_output(kind)
    kind.set_defaults(
        prepare=prepare, reference=None, method="topk", baselines=(), prior=None, healing=None,
        prior_weight=DEFAULTS.prior_weight, rows=DEFAULTS.rows, ridge=DEFAULTS.ridge,
        calibration_weight=DEFAULTS.calibration_weight, refresh_every=DEFAULTS.refresh_every,
    )  # fmt: skip


def prepare(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    densities = [variant.density for variant in variants if variant.method == "topk"]
    rules = groups.rules(densities, numbers("--groups", options.groups, int), llm.model.config.neuron_ranges)
    prompt, new = options.prompt_tokens, options.new_tokens
    check_lengths(llm, prompt, new)
    items = first_items(options, llm, options.file, [options.column], skipped)
    return Evaluation(
        items,
        {
            "column": options.column, "after": options.after, "before": options.before, "prompt": prompt, "new": new,
            "rows": [variant.name for variant in rules],
        },
        lambda journal: groups.compare_groups(
            llm, items, rules, journal, new=new, size=options.batch, seed=options.seed
        ),
        lambda scores: groups.figures(scores, rules, options.seed),
        lambda figures: report.table("what really follows:", figures, groups.METRICS),
        lambda figures, title, file: report.plot_by_density({"": figures}, groups.METRICS, title, file),
    )  # fmt: skip
