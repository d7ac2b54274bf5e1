"""`griffin-jax eval drafts`: what speculative decoding accepts and reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from griffin_jax.cli.evaluate.arguments import (
    add_lengths,
    add_model,
    add_output,
    add_prior,
    add_qualities,
    add_text_file,
)
from griffin_jax.cli.evaluate.comparisons import choose_qualities
from griffin_jax.cli.evaluate.running import Evaluation
from griffin_jax.cli.evaluate.texts import continued
from griffin_jax.cli.options import add_options, numbers
from griffin_jax.evaluation import drafts
from griffin_jax.evaluation.grid import DEFAULTS, Variant
from griffin_jax.evaluation.samples import Skipped
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.drafter import draft_format
from griffin_jax.extensions.speculative import MOST_DRAFTS, MOST_WITH_COPIES
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.llm.llm import LLM
from griffin_jax.llm.memory import Needs
from griffin_jax.utils.options import whole


def add(kinds: Any) -> None:
    """Declare the evaluation."""
    kind = kinds.add_parser(
        "drafts",
        help="speculative decoding: how many drafts are accepted, and the bytes read for each token",
        description="The full model reads the first tokens of each text. They are then continued greedily: by the dense"
        " model, and by speculative decoding with drafters of several formats and densities. All answers are the dense"
        " model's; the table shows the bytes that they read and the time that they took, next to dense decoding.",
    )
    add_text_file(kind, "text")
    add_lengths(kind, "tokens of each answer")
    add_model(kind)
    what = kind.add_argument_group("what is compared")
    what.add_argument(
        "--draft-weights", dest="formats", metavar="FORMAT", default=f"{drafts.OWN},int4",
        help=f"formats of the drafters, separated by commas: {drafts.OWN} (the model's own weights), int8, int4, or one"
        " of these with a group size, as in int4:64 (default: %(default)s)",
    )  # fmt: skip
    add_options(
        what, GriffinConfig, "density", type=str, default="1,0.5", metavar="D",
        help="densities of the drafters, separated by commas",
    )  # fmt: skip
    add_qualities(what)
    what.add_argument(
        "--drafts",
        default=drafts.AUTO,
        metavar="N",
        help=f"numbers of drafts in a round, separated by commas; {drafts.AUTO} is as many as are worth it, up to"
        f" {MOST_DRAFTS}, or {MOST_WITH_COPIES} with copies (default: %(default)s)",
    )
    what.add_argument(
        "--lookup", dest="copies", action="store_true",
        help="also measure each drafter with tokens that are copied from the prompt and the answer, and copies alone",
    )  # fmt: skip
    what.add_argument("--limit", type=int, metavar="N", help="use the first N texts that can be used")
    what.add_argument("--seed", type=int, default=0, help="seed of the bootstrap intervals (default: %(default)s)")
    add_prior(kind, healing=False)
    add_output(kind)
    kind.set_defaults(
        prepare=prepare, choose=choose, check=check,
        reference=None, baselines=(), refresh_every=DEFAULTS.refresh_every, batch=1, largest_batch=1, healing=None,
    )  # fmt: skip


def choose(options: argparse.Namespace) -> None:
    """Sets the methods, the prior, the formats and the numbers of drafts (True for as many as are worth it).

    Raises:
        FileNotFoundError: the prior of quality best does not exist.
        ValueError: a quality or a format is unknown, or a number of drafts is neither auto nor a number from 1.
    """
    choose_qualities(options)
    names = [name.strip() for name in options.formats.split(",")]
    options.formats = list(dict.fromkeys(None if name == drafts.OWN else draft_format(name) for name in names))
    given = [text.strip() for text in options.drafts.split(",")]
    auto, fixed = drafts.AUTO in given, ",".join(text for text in given if text != drafts.AUTO)
    counted = numbers("--drafts", fixed, int) if fixed or not auto else []
    options.drafts = [True] * auto + [whole("--drafts", number, 1) for number in counted]


def check(options: argparse.Namespace, needs: Needs, variants: Sequence[Variant], extensions: Extensions) -> None:
    """Raises `ValueError` unless drafters of this model can have all of the formats."""
    for weights in filter(None, options.formats):
        weights.check(needs.config.width, needs.config.embedding_width)


def prepare(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    every = drafts.drafters(options.formats, variants, options.qualities, options.drafts, lookup=options.copies)
    if not every:
        raise ValueError("nothing drafts: give --density below 1, --draft-weights such as int4, or --lookup")
    items, settings = continued(options, llm, skipped)
    new = options.new_tokens
    # True counts as 1: an adaptive number of drafts is smaller in a shorter answer.
    most = max(int(number) for number in options.drafts)
    if new <= most:
        raise ValueError(f"--new-tokens must be more than the {most} of --drafts, got {new}")
    slots = max((len(item.prompt) for item in items), default=0) + new
    return Evaluation(
        items,
        settings | {"drafters": [drafter.name for drafter in every], "weights": str(llm.model.weights)},
        lambda journal: drafts.compare_drafters(llm, items, every, journal, new=new, extensions=extensions),
        lambda scores: drafts.figures(
            scores, every, llm, slots=slots, new=new, seed=options.seed, extensions=extensions
        ),
        drafts.table,
        drafts.plot,
    )
