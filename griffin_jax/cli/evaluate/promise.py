"""`griffin-jax eval promise`: how often a promised divergence holds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from griffin_jax.cli.evaluate.arguments import add_lengths, add_model, add_output, add_prior, add_qualities, add_sample
from griffin_jax.cli.evaluate.comparisons import choose_qualities
from griffin_jax.cli.evaluate.running import Evaluation
from griffin_jax.cli.evaluate.texts import check_lengths, first_items
from griffin_jax.cli.options import add_excerpt_arguments, add_options, numbers
from griffin_jax.evaluation import front, promise
from griffin_jax.evaluation.grid import DEFAULTS, Variant
from griffin_jax.evaluation.samples import Skipped
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.promise import MARGIN, SHORTEST, allowed_densities, trial_tokens
from griffin_jax.griffin.config import GriffinConfig, check_density
from griffin_jax.llm.llm import LLM
from griffin_jax.llm.memory import Needs


def add(kinds: Any) -> None:
    """Declare the evaluation."""
    kind = kinds.add_parser(
        "promise",
        help="max_divergence: how often the promise holds on the answer, and at which densities",
        description="The full model reads the first tokens of each text. Models of a few densities are tried on the"
        " last of these tokens, and then scored on what follows: on the dense model's own greedy answer, and on what"
        " really follows in the text. The table shows, for each promise and each file, which densities are taken and"
        " how often the promise holds. --limit counts the texts of each file.",
    )
    kind.add_argument("files", metavar="FILE", nargs="+", type=Path, help="JSONL files (UTF-8) with one text per line")
    kind.add_argument("--column", default="text", help="column that holds the text (default: %(default)s)")
    add_excerpt_arguments(kind)
    add_lengths(kind)
    add_model(kind)
    what = kind.add_argument_group("what is compared")
    what.add_argument(
        "--max-divergence", dest="promises", metavar="NATS", default="0.05,0.1,0.2",
        help="promises to test: the largest divergence from the dense model, in nats per token, separated by commas"
        " (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--margin", type=float, metavar="Z", default=MARGIN,
        help="number of standard errors that are added to the mean of a trial; outside this evaluation it is always the"
        " default (default: %(default)s)",
    )  # fmt: skip
    add_options(
        what, GriffinConfig, "density", type=str, metavar="D",
        help="lowest share of feed-forward neurons that may be kept",
    )  # fmt: skip
    what.add_argument(
        "--mixed-weights", dest="mixed", metavar="FORMAT",
        help="read the less important neurons in FORMAT, such as int4, and let densities count bytes, which then pay"
        " for more neurons. A share of precise neurons after @, as in int4@0.25, is not possible here, since each"
        " density determines it (default: all neurons are read in the model's own format)",
    )  # fmt: skip
    add_qualities(what)
    add_sample(what, size=4)
    add_prior(kind, healing=False)
    add_output(kind)
    kind.set_defaults(
        prepare=prepare, choose=choose, check=check, reference=None, baselines=(),
        refresh_every=DEFAULTS.refresh_every, prompt_tokens=512, healing=None,
    )  # fmt: skip


def choose(options: argparse.Namespace) -> None:
    """Sets the promises, the methods, the prior and the densities of the options.

    Raises:
        FileNotFoundError: the prior of quality best does not exist.
        ValueError: a quality is unknown, a number is outside its range, or the prompts are too short for a trial.
    """
    options.promises = numbers("--max-divergence", options.promises, float)
    for most in options.promises:
        Extensions(max_divergence=most, mixed_weights=options.mixed)
    if not 0 <= options.margin < math.inf:
        raise ValueError(f"--margin must be at least 0, got {options.margin}")
    choose_qualities(options)
    (least, *more) = numbers("--density", str(options.density), float)
    if more:
        raise ValueError(f"--density is the least one that may be taken, give one, got {options.density}")
    check_density(least)
    options.density = ",".join(map(str, allowed_densities(least)))
    if not options.density:
        raise ValueError("--density 1 is the dense model; give the least density that may be taken")
    if not trial_tokens(options.prompt_tokens):
        raise ValueError(
            f"prompts of {options.prompt_tokens} tokens are too short for a trial: --prompt-tokens {SHORTEST} or more"
        )


def check(options: argparse.Namespace, needs: Needs, variants: Sequence[Variant], extensions: Extensions) -> None:
    """Sets the formats of kept neurons, and raises `ValueError` unless this model can have them."""
    options.mixed = Extensions(mixed_weights=options.mixed).mixed(needs.precision.weights)
    if options.mixed is not None:
        options.mixed.check(needs.config.width, needs.config.embedding_width)
        front.check_variants(needs.config, variants, [options.mixed], extensions)


def prepare(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    prompt, new = options.prompt_tokens, options.new_tokens
    check_lengths(llm, prompt, new)
    of_files = {file.name: first_items(options, llm, file, [options.column], skipped) for file in options.files}
    items = [item for found in of_files.values() for item in found]
    kinds = {item.name: kind for kind, found in of_files.items() for item in found}
    trial = trial_tokens(prompt)
    return Evaluation(
        items,
        {
            "column": options.column, "after": options.after, "before": options.before, "prompt": prompt, "new": new,
            "trial": trial, "weights": str(options.mixed or llm.model.weights),
        },
        lambda journal: promise.try_densities(
            llm, items, variants, journal, trial=trial, new=new, size=options.batch, seed=options.seed,
            extensions=extensions, mixed=options.mixed,
        ),
        lambda scores: promise.figures(
            scores, kinds, variants, options.qualities, options.promises, options.seed, options.margin
        ),
        promise.table,
        promise.plot,
    )  # fmt: skip
