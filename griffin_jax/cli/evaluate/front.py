"""`griffin-jax eval front`: KL against the bytes that a token reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from griffin_jax.cli.evaluate.arguments import (
    add_drafters,
    add_lengths,
    add_model,
    add_output,
    add_prior,
    add_qualities,
    add_reference,
    add_sample,
    add_text_file,
)
from griffin_jax.cli.evaluate.comparisons import bytes_per_token, check_formats, choose_formats
from griffin_jax.cli.evaluate.running import Evaluation
from griffin_jax.cli.evaluate.texts import continued
from griffin_jax.cli.options import add_options
from griffin_jax.evaluation import front, front_report, report
from griffin_jax.evaluation.grid import DEFAULTS, Variant
from griffin_jax.evaluation.journal import Journal
from griffin_jax.evaluation.samples import Skipped
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.mixed import MixedFormat
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.llm.llm import LLM
from griffin_jax.llm.memory import Needs

QUANTISED = ("int8", "int4")
"""Formats that are compared with the model's own unless --weights names others."""


def add(kinds: Any) -> None:
    """Declare the evaluation."""
    kind = kinds.add_parser(
        "front",
        help="KL against bytes read per token: is it better to quantise or to prune?",
        description="The first tokens of each text are read without pruning. The tokens that follow are scored by"
        " models whose weights are stored in each of several formats and pruned to each of several densities. All are"
        " compared with the dense model in its own format. A row is on the Pareto front if no other row is better in"
        " bytes or in KL without being worse in the other.",
    )
    add_text_file(kind, "text")
    add_lengths(kind)
    add_reference(kind)
    add_model(kind, weights=False)
    what = kind.add_argument_group("what is compared")
    what.add_argument(
        "--weights", dest="formats", metavar="FORMAT",
        help="formats of the weight matrices, separated by commas, such as float32,int8,int4:64. The number after @ is"
        " a share of the kept neurons: int8+int4@0.25 reads the quarter that the prompt needs most in int8, and the"
        " others in int4. Without a share, as in int8+int4, the density counts bytes of int8, which pay for more"
        f" neurons in int4 (default: the model's own, and {', '.join(QUANTISED)})",
    )  # fmt: skip
    add_options(
        what, GriffinConfig, "density", type=str, default="1,0.75,0.5,0.35,0.25", metavar="D",
        help="shares of feed-forward neurons to keep, separated by commas",
    )  # fmt: skip
    add_qualities(what)
    add_drafters(what, "the model's own greedy continuation")
    add_sample(what, size=4)
    add_prior(kind, ", used for all formats")
    add_output(kind)
    kind.set_defaults(
        prepare=prepare, choose=choose_formats, check=check,
        weights=None, baselines=(), refresh_every=DEFAULTS.refresh_every,
    )  # fmt: skip


def check(options: argparse.Namespace, needs: Needs, variants: Sequence[Variant], extensions: Extensions) -> None:
    """Sets the formats if --weights names none, and raises `ValueError` unless this model can have all of them."""
    own = needs.precision.weights
    if own.quantised:
        raise ValueError(f"formats are compared with floating weights, and {options.model} holds {own}")
    options.formats = list(dict.fromkeys(options.formats or [own, *map(MixedFormat.parse, QUANTISED)]))
    check_formats(options, needs, variants, extensions)


def prepare(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    items, settings = continued(options, llm, skipped)
    slots = max((len(item.prompt) + len(item.answer) for item in items), default=0)
    drafted, new = front.pairs(options.formats, options.drafters), options.new_tokens

    def compare(journal: Journal) -> dict[str, Any]:
        scores = front.compare_formats(
            llm, items, variants, options.formats, journal, new=new, size=options.batch, seed=options.seed,
            extensions=extensions,
        )  # fmt: skip
        return {"scores": scores, "drafts": front.compare_drafted(llm, items, drafted, journal, new=new)}

    def figures(found: dict[str, Any]) -> report.Figures:
        read = {
            pair: front.drafted_bytes(
                llm.config,
                llm.model.dtype,
                *pair,
                slots,
                (new - 1) * len(items),
                found["drafts"][front.drafted_name(*pair)].values(),
            )
            for pair in drafted
        }
        sizes = bytes_per_token(options, llm, variants, extensions, slots)
        return front.figures(found["scores"], variants, options.qualities, sizes, options.seed, read)

    settings |= {"weights": [str(weights) for weights in options.formats]}
    return Evaluation(items, settings, compare, figures, front_report.table, front_report.plot)
