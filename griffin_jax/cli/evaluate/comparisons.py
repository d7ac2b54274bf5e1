"""What several evaluations compare: qualities, formats and drafters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from griffin_jax.evaluation import drafts, front
from griffin_jax.evaluation.grid import BUDGETS, CALIBRATION, DENSE, HEALING, PRIOR, RECONSTRUCTION, Variant
from griffin_jax.extensions.config import Extensions, check_quality
from griffin_jax.extensions.mixed import MixedFormat
from griffin_jax.extensions.prior import load_for_best, prior_path
from griffin_jax.llm.llm import LLM
from griffin_jax.llm.memory import Needs


def choose_qualities(options: argparse.Namespace) -> None:
    """Sets the methods and the prior that the qualities of the options stand for.

    Raises:
        FileNotFoundError: the prior of quality best does not exist.
        ValueError: a quality is unknown.
    """
    named = options.qualities
    if named is None:
        found = options.prior is not None or prior_path(options.model).is_file()
        named = "griffin,best" if found else "griffin"
    methods = {}
    for quality in named.split(","):
        check_quality(quality)
        methods[quality] = "topk"
        if quality == "best":
            prior = load_for_best(options.model, options.prior)
            options.prior = options.prior or prior_path(options.model)
            has = {PRIOR: True, BUDGETS: prior.strength, RECONSTRUCTION: True, CALIBRATION: prior.rows}
            methods[quality] = "+".join(["topk", *(step for step, there in has.items() if there)])
    if options.healing is not None:
        methods |= {f"{quality}+heal": f"{method}+{HEALING}" for quality, method in methods.items()}
    options.method = ",".join(methods.values())
    options.qualities = {DENSE: "-"} | {method: quality for quality, method in methods.items()}


def choose_formats(options: argparse.Namespace) -> None:
    """Sets the methods, the prior, the formats and the drafters of the options, as far as that needs no model.

    Raises:
        FileNotFoundError: the prior of quality best does not exist.
        ValueError: a quality, a format or a drafter is unknown.
    """
    choose_qualities(options)
    options.formats = [MixedFormat.parse(name) for name in options.formats.split(",")] if options.formats else []
    _choose_drafters(options)


def _choose_drafters(options: argparse.Namespace) -> None:
    """Sets the drafters, and raises `ValueError` if one is unknown or the answers are too short to be drafted."""
    names = options.drafters.split(",") if options.drafters else []
    options.drafters = list(dict.fromkeys(map(drafts.Drafter.parse, names)))
    if names and options.new_tokens < 2:
        raise ValueError(f"--new-tokens must be 2 at least, so that something is drafted, got {options.new_tokens}")


def check_formats(
    options: argparse.Namespace, needs: Needs, variants: Sequence[Variant], extensions: Extensions
) -> None:
    """Raises `ValueError` unless this model can have the formats and drafters, and every variant in each format."""
    for weights in options.formats:
        weights.check(needs.config.width, needs.config.embedding_width)
    front.check_variants(needs.config, variants, options.formats, extensions)
    _check_pairs(options, needs)


def _check_pairs(options: argparse.Namespace, needs: Needs) -> None:
    """Raises `ValueError` unless this model can have the drafters, and a format has more bits than one of them."""
    for drafter in (each for each in options.drafters if each.weights is not None):
        drafter.weights.check(needs.config.width, needs.config.embedding_width)
    if options.drafters and not front.pairs(options.formats, options.drafters):
        raise ValueError(
            "--drafters have fewer bits than the model they draft for, and no format of --weights has more"
        )


def bytes_per_token(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, slots: int
) -> dict[tuple[str, Variant], int]:
    """The bytes that are read for a token, by the name of the format and the variant."""
    config, dtype = llm.config, llm.model.dtype
    return {
        (str(weights), variant): front.bytes_per_token(config, dtype, weights, slots, variant, extensions)
        for weights, variant in front.compared(options.formats, variants)
    }
