"""The arguments that evaluations share."""

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
    """The drafters of the dense models; `text` says what of."""
    group.add_argument(
        "--drafters", metavar="FORMAT@D", default="",
        help="also the dense model of each format by speculative decoding, with drafters of a format and a density,"
        f" separated by commas, such as int4@0.5, and the bytes that it reads for a token of {text}; with"
        f" int4@0.5+{drafts.LOOKUP} also copied tokens, with {drafts.LOOKUP} no others (default: none)",
    )  # fmt: skip


def add_text_file(parser: argparse.ArgumentParser, column: str) -> None:
    """A file of texts, with the column that holds them and what is cut out of each."""
    parser.add_argument("file", metavar="FILE", type=Path, help="JSONL (UTF-8), one text a line")
    parser.add_argument("--column", default=column, help=f"that holds the {column} (default: %(default)s)")
    add_excerpt_arguments(parser)


def add_lengths(parser: argparse.ArgumentParser, new: str = "tokens scored, at most of the dense model's own") -> None:
    """Tokens of the prompts and of what follows them; `new` says what that is."""
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="P", default=256, help="tokens read densely (default: %(default)s)"
    )
    parser.add_argument("--new-tokens", type=int, metavar="G", default=128, help=f"{new} (default: %(default)s)")


def add_reference(parser: argparse.ArgumentParser) -> None:
    """The column of texts that follow the prompts."""
    parser.add_argument(
        "--reference",
        metavar="COLUMN",
        help="score this column's text after the whole of the other, instead of cutting one text in two",
    )


def add_model(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    """The model, and how it is held and computes."""
    add_model_argument(parser)
    add_dtype_argument(parser, weights=weights)
    add_mesh_arguments(parser)


def add_qualities(what: Any) -> None:
    """The qualities that are compared."""
    what.add_argument(
        "--quality", dest="qualities", metavar="Q",
        help="griffin, best or both, separated by commas (default: griffin, and best if there is a --prior)",
    )  # fmt: skip


def add_sample(what: Any, size: int) -> None:
    """Which texts, how many at a time, and the seed."""
    what.add_argument("--limit", type=int, metavar="N", help="use the first N texts that can be used")
    what.add_argument("--seed", type=int, default=0, help="of the draws and intervals (default: %(default)s)")
    add_batch_argument(what, size)


def add_prior(parser: argparse.ArgumentParser, what_for: str = "", *, healing: bool = True) -> None:
    """What the qualities take: the prior, the healing and the refit."""
    beyond = parser.add_argument_group("beyond GRIFFIN")
    measured = f"that griffin-jax prior measured for this model{what_for} (default: the file next to it)"
    add_options(beyond, Extensions, "prior", type=Path, help=measured)
    if healing:
        what = "also every quality with the adapter that griffin-jax heal trained for pruned models"
        add_options(beyond, Extensions, "healing", type=Path, help=what)
    _add_beyond(beyond)


def _add_beyond(beyond: Any) -> None:
    add_options(beyond, Extensions, "prior_weight", "ridge", "calibration_weight")
    beyond.add_argument(
        "--rows", type=int, default=DEFAULT_ROWS, metavar="R",
        help=f"tokens of each prompt, at most, that +{RECONSTRUCTION} fits to (default: %(default)s)",
    )  # fmt: skip


def add_output(parser: argparse.ArgumentParser) -> None:
    """Where the results go."""
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of scores and results (default: eval-TASK in this folder)"
    )
    output.add_argument("--overwrite", action="store_true", help="drop what the folder holds of other settings")
    output.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (needs griffin-jax[plot])")
    output.add_argument("--json", action="store_true", help="print results.json as the last line")
    output.add_argument("--json-file", type=Path, metavar="FILE", help="write it to FILE, too")


def add_common(parser: argparse.ArgumentParser, size: int) -> None:
    """All of these for evaluations of methods, which steps beyond GRIFFIN may follow."""
    add_model(parser)
    what = parser.add_argument_group("what is compared")
    add_options(what, GriffinConfig, "density", type=str, default="0.5", metavar="D", help="separated by commas")
    what.add_argument(
        "--method", default="topk",
        help=f"of {', '.join(METHODS)}, separated by commas (default: %(default)s). After each may be steps beyond"
        f" GRIFFIN: +{' +'.join(STEPS)}, such as topk,topk+{PRIOR},topk+{PRIOR}+{RECONSTRUCTION}",
    )  # fmt: skip
    what.add_argument(
        "--no-baselines", dest="baselines", action="store_const", const=(), default=BASELINES,
        help=f"leave out {', '.join(BASELINES)}, which stand next to the methods",
    )  # fmt: skip
    add_sample(what, size)
    beyond = parser.add_argument_group("beyond GRIFFIN")
    measured = f"that griffin-jax prior measured for this model, for +{' +'.join(MEASURED)}"
    add_options(beyond, Extensions, "prior", type=Path, help=measured)
    add_options(
        beyond, Extensions, "healing", type=Path, help=f"that griffin-jax heal trained for this model, for +{HEALING}"
    )
    _add_beyond(beyond)
    refresh = f"tokens, for +{REFRESH}, which scores given continuations only"
    add_options(beyond, Extensions, "refresh_every", default=DEFAULTS.refresh_every, help=refresh)
    add_output(parser)
