"""The page that shows all results: figures, the numbers that they draw, and what the paper found."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import jinja2
import numpy as np

from griffin_jax.analysis.experts import figures, published
from griffin_jax.analysis.experts.published import Study
from griffin_jax.evaluation.intervals import mean
from griffin_jax.evaluation.report import as_json

RANDOM_WEIGHTS, RANDOM_SETS = "random weights", "random sets"
"""The null models: the same architecture before any training, and sets of neurons drawn at random."""

OF_WEIGHTS: dict[str, dict[str, str]] = {
    "D1": {"mean_similarity": "mean cosine of pairs of experts"},
    "D2": {
        "mean_similarity_of_averages": "mean cosine of experts' mean neurons",
        "matched_before": "cosine of neurons of the same number",
        "matched_after": "cosine of neurons after matching",
        "matched_tau": "Kendall's tau of the matching",
    },
    "D3": {"router_r2": "R² on the router's rows", "router_r2_permuted": "the same, rows given at random"},
    "D4": {
        "components_explained": "variance of experts in two components",
        "neuron_components_explained": "variance of neurons in three components",
    },
}
"""Numbers of each analysis of weights, with their titles."""

OF_TEXTS: dict[str, dict[str, str]] = {
    "D5": {
        "similarity": "similarity of outputs, all pairs of experts",
        "similarity_chosen": "pairs that were both chosen",
        "similarity_others": "all other pairs",
    },
    "D6": {
        "top_is_largest": "the best score has the largest output, share of tokens",
        "largest_chosen": "the largest output is that of a chosen expert, share of tokens",
        "rank_correlation": "rank correlation of output norms and scores",
        "chosen_over_other_norm": "output norm of chosen experts over others",
    },
    "D7": {"chosen_active": "share of active neurons, chosen experts", "other_active": "other experts"},
    "D8": {
        "evenness": "evenness of the choices (entropy / log E)",
        "repetition": "share of experts that the token before chose, too",
        "repetition_permuted": "the same, tokens in random order",
    },
    "GRIFFIN": {
        "overlap_own": "overlap of the neurons of a text's halves",
        "overlap_others": "overlap of the neurons of different texts",
        "choice_overlap_own": "overlap of the most chosen experts of a text's halves",
        "choice_overlap_others": "overlap of the most chosen experts of different texts",
        "kept_over_dropped_norm": "norm of what kept neurons add, over dropped ones",
        "kept_over_dropped_weight": "norm of kept rows of Wdown, over dropped ones",
    },
}
"""Numbers of each analysis of texts, with their titles."""

CHANCES = {
    "overlap_own": "overlap", "overlap_others": "overlap", "choice_overlap_own": "choice_overlap",
    "choice_overlap_others": "choice_overlap",
}  # fmt: skip
"""Names of the chances of those numbers whose chance has another name than the number itself."""


@dataclasses.dataclass(frozen=True)
class Section:
    """What the page shows of one analysis.

    Attributes:
        study: the analysis.
        null_names: null models for which the table has a column.
        rows: rows of the table.
        images: captions and PNG files, in base64.
    """

    study: Study
    null_names: Sequence[str] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    images: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What the figures need in addition to the results.

    Attributes:
        weights: what `weights.analyse` found, including arrays; None if weights were not analysed.
        similarity: similarity of experts' outputs, (layers, E, E).
        ranks: number of tokens by rank of norm and of score, (layers, E, E).
        chosen: experts that the tokens of the first text chose, (layers, tokens, E).
        token_cosines: mean cosines of experts' outputs for the first text, (layers, tokens).
        states: act(Wg x) for the first text, by layer, (tokens, E, neurons).
    """

    weights: Mapping[str, Any] | None = None
    similarity: np.ndarray | None = None
    ranks: np.ndarray | None = None
    chosen: np.ndarray | None = None
    token_cosines: np.ndarray | None = None
    states: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)


Images = dict[str, dict[str, bytes]]
"""PNG files by analysis and caption."""


def short_name(model: str) -> str:
    """The last part of a path or repository id."""
    return PurePath(model).name or model


def draw(results: Mapping[str, Any], drawing: Drawing) -> Images:
    """Draws all figures.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found: Images = {}
    if drawing.weights is not None:
        found |= _figures_of_weights(drawing.weights, results["weights_null"])
    if results["texts"] is not None:
        found |= _figures_of_texts(results, drawing)
    return found


def _figures_of_weights(weights: Mapping[str, Any], null: Mapping[str, Any]) -> Images:
    layers = weights["layers"]
    kinds = [kind for kind in figures.TITLES if kind in weights]

    def lines(name: str, title: str) -> dict[str, Any]:
        each = {figures.TITLES[kind]: weights[kind][name] for kind in kinds}
        return {
            title: {
                **each,
                f"{figures.NULL}{RANDOM_WEIGHTS}": [float(np.mean([null[kind][name][0] for kind in kinds]))],
            }
        }

    similar = {}
    for kind in kinds:
        for own in (False, True):
            scale = "each layer with its own scale" if own else "one scale for all layers"
            caption = f"{figures.TITLES[kind]}: cosine of experts, {scale}"
            drawn = figures.heat_maps(weights[kind]["similarity"], layers, caption, own_scale=own, diagonal=False)
            similar[caption] = figures.png(drawn)
    trend = figures.by_layer(layers, lines("mean_similarity", "mean cosine of pairs of experts"))
    components = {
        f"{figures.TITLES[kind]}: experts along two principal components": figures.points(
            weights[kind]["components"], layers, f"{figures.TITLES[kind]}: experts along two principal components"
        )
        for kind in kinds
    } | {
        f"{figures.TITLES[kind]}: neurons along principal components, coloured by expert": figures.clouds(
            weights[kind]["neuron_components"], layers, f"{figures.TITLES[kind]}: neurons, coloured by expert"
        )
        for kind in kinds
    }
    matched = (
        lines("mean_similarity_of_averages", "cosine of experts' mean neurons")
        | lines("matched_before", "cosine of neurons of the same number")
        | lines("matched_after", "cosine of neurons after matching")
        | lines("matched_tau", "Kendall's tau of the matching")
    )
    routers = {
        "R² of experts' mean neurons on the router's rows": {
            **{figures.TITLES[kind]: weights[kind]["router_r2"] for kind in kinds},
            f"{figures.NULL}rows given at random": np.mean(
                [weights[kind]["router_r2_permuted"] for kind in kinds], axis=0
            ),
        }
    }
    return {
        "D1": {"Mean similarity of experts": figures.png(trend), **similar},
        "D2": {"Experts' mean neurons, and their neurons matched": figures.png(figures.by_layer(layers, matched))},
        "D3": {"Router against experts": figures.png(figures.by_layer(layers, routers))},
        "D4": {caption: figures.png(drawn) for caption, drawn in components.items()},
    }


def _figures_of_texts(results: Mapping[str, Any], drawing: Drawing) -> Images:
    texts, nulls, routed = results["texts"], results["nulls"], results["kind"] == "routed"
    layers, numbers, chance = texts["layers"], texts["numbers"], texts["chance"]
    one = "expert" if routed else "set"

    def lines(*names: tuple[str, str], null: bool = True) -> dict[str, Any]:
        found = {label: numbers[name]["layers"] for name, label in names if name in numbers}
        if null:
            first = names[0][0]
            found |= {
                f"{figures.NULL}{title}": found["numbers"][first]["layers"]
                for title, found in nulls.items()
                if first in found["numbers"]
            }
        return found

    assert drawing.similarity is not None
    assert drawing.ranks is not None
    assert drawing.token_cosines is not None
    similar = {f"similarity of {one}s' outputs": lines(
        ("similarity", "all pairs"), ("similarity_chosen", "both chosen"), ("similarity_others", "other pairs")
    )}  # fmt: skip
    trend = figures.by_layer(layers, similar, {next(iter(similar)): {"nothing in common": 0.5}})
    norms = {
        "the best score has the largest output": lines(("top_is_largest", "share of tokens")),
        f"the largest output is of a chosen {one}": lines(("largest_chosen", "share of tokens")),
        "rank correlation of norms and scores": lines(("rank_correlation", "correlation")),
        f"output norm of chosen {one}s over others": lines(("chosen_over_other_norm", "ratio")),
    }
    chances = dict(
        zip(norms, ({"chance": chance[name]} for name in ("top_is_largest", "largest_chosen")), strict=False)
    )
    shares = drawing.ranks / np.maximum(drawing.ranks.sum(axis=(1, 2), keepdims=True) / drawing.ranks.shape[-1], 1)
    active = {"share of active neurons": lines(("chosen_active", f"chosen {one}s"), ("other_active", f"other {one}s"))}
    overlap = {
        "overlap of neurons": lines(("overlap_own", "halves of a text"), ("overlap_others", "different texts")),
        "norm of what kept neurons add, over dropped": lines(("kept_over_dropped_norm", "ratio")),
        "norm of kept rows of Wdown, over dropped": lines(("kept_over_dropped_weight", "ratio")),
    }
    of_overlap = {"overlap of neurons": {"chance": chance["overlap"]}}
    if routed:
        title = "overlap of the most chosen experts"
        overlap[title] = lines(("choice_overlap_own", "halves of a text"), ("choice_overlap_others", "different texts"))
        of_overlap[title] = {"chance": chance["choice_overlap"]}
    outputs = f"Similarity of {one}s' outputs"
    first = f"Mean cosine of {one}s' outputs, tokens of the first text"
    ranks = f"Tokens by rank of an {one}'s norm and of its score" if routed else "Tokens by rank of norm and score"
    state = "|act(Wact x)| of the first neurons, first text" if routed else "|z| of the first neurons, first text"
    found: Images = {
        "D5": {
            "Similarity of outputs by layer": figures.png(trend),
            outputs: figures.png(figures.heat_maps(drawing.similarity, layers, outputs, diagonal=False,
                                                   axes=(one, one))),
            first: figures.png(figures.tokens_by_layer(drawing.token_cosines, layers, first)),
        },
        "D6": {
            "Norms and scores by layer": figures.png(figures.by_layer(layers, norms, chances)),
            ranks: figures.png(
                figures.heat_maps(shares, layers, ranks, axes=("rank by score, best first", "rank by norm"))
            ),
        },
        "D7": {
            "Active neurons by layer": figures.png(figures.by_layer(layers, active)),
            state: figures.png(figures.states(drawing.states, state)),
        },
        "GRIFFIN": {"Neuron sets by layer": figures.png(figures.by_layer(layers, overlap, of_overlap))},
    }  # fmt: skip
    if routed:
        assert drawing.chosen is not None
        title = "Experts that the tokens of the first text chose"
        spread = {
            "evenness of the choices": lines(("evenness", "entropy / log E")),
            "share of experts that the token before chose": lines(
                ("repetition", "in the text"), ("repetition_permuted", "tokens in random order")
            ),
        }
        found["D8"] = {
            "Choices by layer": figures.png(figures.by_layer(layers, spread)),
            title: figures.png(figures.choices(drawing.chosen, layers, title)),
        }
    return found


def rows_of_weights(results: Mapping[str, Any], key: str, seed: int) -> list[dict[str, Any]]:
    """Rows of a table: means over layers with intervals over layers, next to random weights."""
    weights, null = results["weights"], results["weights_null"]
    return [
        {
            "title": f"{figures.TITLES[kind]}: {title}",
            "found": as_json(mean(weights[kind][name], seed)),
            "chance": None,
            "nulls": {RANDOM_WEIGHTS: {"value": null[kind][name][0], "low": None, "high": None}},
        }
        for name, title in OF_WEIGHTS[key].items()
        for kind in figures.TITLES
        if kind in weights
    ]


def rows_of_texts(results: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Rows of a table: means over layers with intervals over texts, next to null models."""
    texts, routed = results["texts"], results["kind"] == "routed"
    return [
        {
            "title": title if routed else title.replace("expert", "set"),
            "found": texts["numbers"][name]["mean"],
            "chance": texts["chance"].get(CHANCES.get(name, name)),
            "nulls": {
                null: found["numbers"][name]["mean"]
                for null, found in results["nulls"].items()
                if name in found["numbers"]
            },
        }
        for name, title in OF_TEXTS[key].items()
        if name in texts["numbers"]
    ]


def page(results: Mapping[str, Any], images: Images, about: str) -> str:
    """The whole page, which needs no other files.

    Args:
        results: results as `griffin-jax analyze` writes them.
        images: figures from `draw`.
        about: sentence about the model and the texts.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("griffin_jax.analysis", "experts"), autoescape=True, trim_blocks=True
    )
    nulls = list(results["nulls"])

    def section(study: Study, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Section:
        pictures = [(c, base64.b64encode(image).decode("ascii")) for c, image in images.get(study.key, {}).items()]
        return Section(study, names, rows, pictures)

    sections = []
    if results["weights"] is not None:
        sections += [
            section(study, rows_of_weights(results, study.key, results["seed"]), [RANDOM_WEIGHTS])
            for study in published.WEIGHTS
        ]
    if results["texts"] is not None:
        sections += [
            section(study, rows_of_texts(results, study.key), nulls)
            for study in (*published.TEXTS, published.GRIFFIN)
            if study.key in images
        ]
    sections.append(Section(published.PRETRAINING))
    return environment.get_template("report.html").render(
        model=short_name(results["model_name"]), about=about, sections=sections, verdicts=results["verdicts"],
        evidence=results["evidence"], null_names=nulls, interval=interval, number=number,
    )  # fmt: skip


def table(results: Mapping[str, Any]) -> str:
    """The findings and the numbers by which they are judged, for a terminal."""
    lines = []
    for claim, verdict in results["verdicts"].items():
        lines.append(f"{claim} {verdict.upper()}")
        for row in results["evidence"]:
            if row["claim"] == claim:
                nulls = "".join(f"; {name} {interval(found)}" for name, found in row["nulls"].items())
                lines.append(
                    f"  {row['verdict']:10}{row['what']}: {interval(row)}, chance {number(row['chance'])}{nulls}"
                )
    return "\n".join(lines)


def number(value: float | None) -> str:
    """A number with three decimals, or with none from 100 on; empty if there is no finite number."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def interval(found: Mapping[str, float | None] | None) -> str:
    """A value with its interval, if it has one."""
    if found is None or found["value"] is None:
        return ""
    if found["low"] is None:
        return number(found["value"])
    return f"{number(found['value'])} [{number(found['low'])}, {number(found['high'])}]"
