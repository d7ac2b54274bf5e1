"""Arguments that several evaluations have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from griffin_jax.cli.options import (
    add_batch_argument,
    add_dtype_argument,
    add_excerpt_arguments,
    add_mesh_arguments,
    add_model_argument,
    add_options,
)
from griffin_jax.evaluation import drafts
from griffin_jax.evaluation.grid import (
    BASELINES,
    DEFAULTS,
    HEALING,
    MEASURED,
    METHODS,
    PRIOR,
    RECONSTRUCTION,
    REFRESH,
    STEPS,
)
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.reconstruction import DEFAULT_ROWS
from griffin_jax.griffin.config import GriffinConfig


def add_drafters(group: Any, text: str) -> None:
    """Declare --drafters; `text` says in the help what is written by speculative decoding."""
    group.add_argument(
        "--drafters", metavar="FORMAT@D", default="",
        help="also compare speculative decoding, in which these drafters write for the dense model of each format with"
        f" more bits, by the bytes read for each token of {text}. A drafter is a format and, after @, a density:"
        f" int4@0.5 drafts in int4 with half of the neurons. int4@0.5+{drafts.LOOKUP} also copies drafts,"
        f" {drafts.LOOKUP} only copies them. Several drafters are separated by commas (default: none)",
    )  # fmt: skip


def add_text_file(parser: argparse.ArgumentParser, column: str) -> None:
    """Declare a file of texts, the column that holds them, and what is cut out of each."""
    parser.add_argument("file", metavar="FILE", type=Path, help="JSONL file (UTF-8) with one text per line")
    parser.add_argument("--column", default=column, help=f"column that holds the {column} (default: %(default)s)")
    add_excerpt_arguments(parser)


def add_lengths(
    parser: argparse.ArgumentParser,
    new: str = "tokens scored after each prompt; the dense model's own continuation may be shorter",
) -> None:
    """Declare the lengths of the prompts and of what follows them, which `new` describes in the help."""
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="P",
        default=256,
        help="tokens of each text that are the prompt, which is read without pruning (default: %(default)s)",
    )
    parser.add_argument("--new-tokens", type=int, metavar="G", default=128, help=f"{new} (default: %(default)s)")


def add_reference(parser: argparse.ArgumentParser) -> None:
    """Declare --reference, the column of the texts that follow the prompts."""
    parser.add_argument(
        "--reference",
        metavar="COLUMN",
        help="score the text of this column after the whole text of --column, instead of cutting one text in two",
    )


def add_model(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    """Declare which model is loaded, and how: its dtype, formats and devices."""
    add_model_argument(parser)
    add_dtype_argument(parser, weights=weights)
    add_mesh_arguments(parser)


def add_qualities(what: Any) -> None:
    """Declare --quality."""
    what.add_argument(
        "--quality", dest="qualities", metavar="Q",
        help="qualities to compare: griffin, best, or both separated by commas (default: griffin, and best if there is"
        " a prior: that of --prior, or the file next to the model)",
    )  # fmt: skip


def add_sample(what: Any, size: int) -> None:
    """Declare which texts are used, how many at a time, and the seed."""
    what.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="use the first N texts that can be used (perplexity: windows; promise: texts of each file; solve:"
        " problems)",
    )
    what.add_argument(
        "--seed", type=int, default=0, help="seed of the draws and of the bootstrap intervals (default: %(default)s)"
    )
    add_batch_argument(what, size)


def add_prior(parser: argparse.ArgumentParser, what_for: str = "", *, healing: bool = True) -> None:
    """Declare what the qualities use: the prior, the healing adapter and the refit."""
    beyond = parser.add_argument_group("beyond GRIFFIN")
    measured = (
        f"file that griffin-jax prior has measured for this model{what_for} (default: the file next to the model)"
    )
    add_options(beyond, Extensions, "prior", type=Path, help=measured)
    if healing:
        what = "also compare every quality with the adapter in FOLDER, which griffin-jax heal has trained"
        add_options(beyond, Extensions, "healing", type=Path, help=what)
    _add_beyond(beyond)


def _add_beyond(beyond: Any) -> None:
    add_options(beyond, Extensions, "prior_weight", "ridge", "calibration_weight")
    beyond.add_argument(
        "--rows", type=int, default=DEFAULT_ROWS, metavar="R",
        help=f"tokens of each prompt, at most, that the refit (+{RECONSTRUCTION}, or quality best) fits to (default:"
        " %(default)s)",
    )  # fmt: skip


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declare where the results go."""
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for scores and results (default: in the current folder, eval- and the name of the evaluation, as"
        " in eval-front)",
    )
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="if the folder holds scores of other settings, or a damaged file, drop them instead of stopping",
    )
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures as a PNG (needs griffin-jax[plot])")
    output.add_argument("--json", action="store_true", help="print results.json as the last line")
    output.add_argument("--json-file", type=Path, metavar="FILE", help="also write the results to FILE, as JSON")


def add_densities(what: Any) -> None:
    """Declare --density."""
    add_options(
        what, GriffinConfig, "density", type=str, default="0.5", metavar="D",
        help="shares of feed-forward neurons to keep, separated by commas",
    )  # fmt: skip


def add_common(parser: argparse.ArgumentParser, size: int) -> None:
    """Declare all that evaluations of methods have in common; steps beyond GRIFFIN may follow each method."""
    add_model(parser)
    what = parser.add_argument_group("what is compared")
    add_densities(what)
    what.add_argument(
        "--method", default="topk",
        help=f"methods to compare, separated by commas: {', '.join(METHODS)} (default: %(default)s). Steps beyond"
        f" GRIFFIN may follow each of them: +{' +'.join(STEPS)}, as in"
        f" topk,topk+{PRIOR},topk+{PRIOR}+{RECONSTRUCTION}",
    )  # fmt: skip
    what.add_argument(
        "--no-baselines", dest="baselines", action="store_const", const=(), default=BASELINES,
        help=f"leave out the baselines: {', '.join(BASELINES)}",
    )  # fmt: skip
    add_sample(what, size)
    beyond = parser.add_argument_group("beyond GRIFFIN")
    measured = f"file that griffin-jax prior has measured for this model; needed by +{' +'.join(MEASURED)}"
    add_options(beyond, Extensions, "prior", type=Path, help=measured)
    add_options(
        beyond, Extensions, "healing", type=Path,
        help=f"folder with the adapter that griffin-jax heal has trained for this model; needed by +{HEALING}",
    )  # fmt: skip
    _add_beyond(beyond)
    refresh = f"number of tokens after which +{REFRESH} chooses the neurons anew; for given continuations only"
    add_options(beyond, Extensions, "refresh_every", default=DEFAULTS.refresh_every, help=refresh)
    add_output(parser)
