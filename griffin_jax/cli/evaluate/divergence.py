"""`griffin-jax eval divergence`: KL, top-1 agreement and perplexity against the dense model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from jax.sharding import AbstractMesh

from griffin_jax.cli.evaluate.arguments import add_common, add_lengths, add_reference, add_text_file
from griffin_jax.cli.evaluate.running import Evaluation
from griffin_jax.cli.evaluate.texts import continued
from griffin_jax.cli.options import numbers
from griffin_jax.evaluation import report, tasks
from griffin_jax.evaluation.factored import Factored, check_comparable
from griffin_jax.evaluation.grid import Variant
from griffin_jax.evaluation.samples import Skipped
from griffin_jax.extensions.config import Extensions
from griffin_jax.factor.losses import Oracle
from griffin_jax.griffin.config import check_density
from griffin_jax.llm.llm import LLM, load
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.parallel.mesh import mesh_of


def add(kinds: Any) -> None:
    """Declare the evaluation."""
    kind = kinds.add_parser(
        "divergence",
        help="KL, top-1 agreement and perplexity against the dense model",
        description="The full model reads the first tokens of each text. The pruned models then score the tokens that"
        " follow: those of the text itself, and those that the dense model would write there.",
    )
    add_text_file(kind, "text")
    add_lengths(kind)
    add_reference(kind)
    add_common(kind, size=4)
    others = kind.add_argument_group("factored models")
    others.add_argument(
        "--factored", metavar="FOLDER", nargs="+", type=Path, default=[],
        help="also score these models, which griffin-jax factorize has made from the model; all are held next to it in"
        " memory",
    )  # fmt: skip
    others.add_argument(
        "--inside", metavar="D", type=str, default="",
        help="also prune the experts of these models with GRIFFIN, to these shares of each expert's neurons, separated"
        " by commas (default: none)",
    )  # fmt: skip
    others.add_argument(
        "--oracle-routing", metavar="O", choices=get_args(Oracle), nargs="+", default=[],
        help="also score these models with the best experts for each token, found one by one or as a set (O is"
        f" {' or '.join(get_args(Oracle))}), instead of those that the router chooses; for models whose experts are not"
        " trained",
    )  # fmt: skip
    kind.set_defaults(prepare=prepare)


def prepare(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    items, settings = continued(options, llm, skipped)
    others = _factored(options, llm)
    every = (*variants, *(variant for other in others for variant in other.variants))
    names = [variant.name for variant in every]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two rows of the table would be called {twice[0]!r}: rename the folder of --factored, after which rows of"
            " factored models are named"
        )
    if others:
        settings |= {"factored": {other.name: fingerprint(other.model) for other in others}}
        settings |= {"rows": names}

    def tabulate(figures: report.Figures) -> str:
        return "\n\n".join(
            report.table(f"{title}:", [f for f in figures if f["continuation"] == kind], report.FORCED)
            for kind, title in report.CONTINUATIONS.items()
        )

    def plot(figures: report.Figures, title: str, file: Path) -> None:
        panels = {
            name: [entry for entry in figures if entry["continuation"] == kind]
            for kind, name in report.CONTINUATIONS.items()
        }
        report.plot_by_density(panels, report.FORCED, title, file)

    return Evaluation(
        items,
        settings,
        lambda journal: tasks.divergence(
            llm,
            items,
            variants,
            journal,
            new=options.new_tokens,
            size=options.batch,
            seed=options.seed,
            extensions=extensions,
            factored=others,
        ),
        lambda scores: report.divergence_figures(scores, every, options.seed),
        tabulate,
        plot,
    )


def _factored(options: argparse.Namespace, llm: LLM) -> list[Factored]:
    """Loads the factored models of the options.

    Raises:
        ValueError: a density is outside (0, 1], a model does not come from this one, or two have the same name.
    """
    densities = numbers("--inside", options.inside, float) if options.inside else []
    for density in densities:
        check_density(density)
    names = [folder.name for folder in options.factored]
    if len(set(names)) < len(names):
        raise ValueError(f"folders of --factored have the same name: {', '.join(names)}")
    found, mesh = [], mesh_of(llm.model.embedding[...])
    assert not isinstance(mesh, AbstractMesh)
    for name, folder in zip(names, options.factored, strict=True):
        other = load(folder, options.dtype, mesh=mesh)
        check_comparable(llm.config, other.config, str(folder))
        found.append(Factored(name, other.model, densities, options.oracle_routing))
    return found
