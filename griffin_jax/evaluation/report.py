"""Turns the scores of texts into figures with intervals, for programs, and into tables and plots, for people."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from griffin_jax.evaluation.grid import BASELINES, DENSE, ORACLE, Variant
from griffin_jax.evaluation.intervals import Interval, exponential, mean, ratio_of_sums
from griffin_jax.evaluation.tasks import OWN, REAL, ROUGE
from griffin_jax.utils.figures import new_figure

CONTINUATIONS = {REAL: "what really follows", OWN: "the dense model's own continuation"}
COLOURS = {DENSE: "black", ORACLE: "C2", "magnitude": "C3", "random": "0.55"}
METHOD_COLOURS = ("C0", "C1", "C4", "C5", "C6", "C8", "C9")
WIDTH = 27
"""The width of a table's column for a figure with its interval."""

Figures = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of tables and plots.

    Attributes:
        key: its key in JSON.
        title: its title for people, with the unit.
        digits: number of digits after the decimal point.
        log: whether the axis of a plot is logarithmic.
    """

    key: str
    title: str
    digits: int
    log: bool = False


PERPLEXITY = Metric("perplexity", "perplexity", 1, log=True)
KL = Metric("kl", "KL (nats/token)", 3)
TOP1 = Metric("top1", "top-1 agreement", 3)
FORCED = (PERPLEXITY, KL, TOP1)
ROUGES = tuple(Metric(key, f"ROUGE-{key[5:]} (F, %)", 1) for key in ROUGE)


def forced_figures(scores: Sequence[Mapping[str, Any]], variant: Variant, at: int, seed: int) -> dict[str, Any]:
    """Perplexity, KL and top-1 agreement over all tokens of all texts, each with its interval over texts.

    Args:
        scores: the scores of each text, as `score_answers` returns them.
        variant: the variant whose figures these are.
        at: index of the answer length.
        seed: seed of the bootstrap.
    """
    tokens = [text["tokens"][at] for text in scores]

    def per_token(name: str) -> Interval:
        return ratio_of_sums([text[variant.name][name][at] for text in scores], tokens, seed)

    figures = {"perplexity": exponential(per_token("loss")), "kl": per_token("kl"), "top1": per_token("agree")}
    return {"tokens": sum(tokens)} | {name: as_json(figure) for name, figure in figures.items()}


def divergence_figures(scores: Mapping[str, Any], variants: Sequence[Variant], seed: int) -> Figures:
    """One entry for each continuation and variant."""
    return [
        {"continuation": kind, "method": variant.method, "density": variant.density}
        | forced_figures([text[kind] for text in scores.values()], variant, 0, seed)
        for kind in CONTINUATIONS
        for variant in variants
    ]


def perplexity_figures(
    scores: Mapping[str, Any], variants: Sequence[Variant], prompts: Sequence[int], news: Sequence[int], seed: int
) -> Figures:
    """One entry for each prompt length, answer length and variant."""
    return [
        {"prompt": prompt, "new": new, "method": variant.method, "density": variant.density}
        | forced_figures([text[str(prompt)] for text in scores.values()], variant, at, seed)
        for at, new in enumerate(news)
        for prompt in prompts
        for variant in variants
    ]


def summarize_figures(scores: Mapping[str, Any], variants: Sequence[Variant], seed: int) -> Figures:
    """One entry for each variant: ROUGE F-measures in percent."""
    return [
        {"method": variant.method, "density": variant.density}
        | {key: as_json(mean([100 * text[variant.name][key] for text in scores.values()], seed)) for key in ROUGE}
        for variant in variants
    ]


def as_json(interval: Interval) -> dict[str, float | None]:
    """An interval as results hold it; None stands for numbers that are not finite."""
    values = dataclasses.asdict(interval)
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def table(title: str, figures: Figures, metrics: Sequence[Metric]) -> str:
    """A table of the figures with their intervals."""
    first = _first_width(figures)
    lines = [title, f"{'selection':{first}}{'density':>8}" + titles(metrics)]
    for entry in figures:
        lines.append(f"{entry['method']:{first}}{entry['density']:>8g}{cells(entry, metrics)}")
    return "\n".join(lines)


def perplexity_table(figures: Figures, prompts: Sequence[int], news: Sequence[int]) -> str:
    """A block for every answer length, with a column for each prompt length."""
    blocks, first = [], _first_width(figures)
    for new in news:
        entries = [entry for entry in figures if entry["new"] == new]
        lines = [
            f"perplexity of the next {new} tokens after prompts of",
            f"{'selection':{first}}{'density':>8}" + "".join(f"{f'{prompt:,} tokens':>{WIDTH}}" for prompt in prompts),
        ]
        by_row: dict[tuple[str, float], list[str]] = {}
        for entry in entries:
            by_row.setdefault((entry["method"], entry["density"]), []).append(cell(entry["perplexity"], 1))
        lines += [f"{m:{first}}{d:>8g}" + "".join(f"{c:>{WIDTH}}" for c in cells) for (m, d), cells in by_row.items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _first_width(figures: Figures) -> int:
    """The width of the column with the names of the rows."""
    return max([14, *(len(entry["method"]) + 1 for entry in figures)])


def width_of(figures: Figures, key: str) -> int:
    """The width of a table's column of names."""
    return max([8, *(len(entry[key]) + 1 for entry in figures)])


def titles(metrics: Sequence[Metric]) -> str:
    """The headings of a table's columns for these figures."""
    return "".join(f"{metric.title:>{WIDTH}}" for metric in metrics)


def cells(entry: Mapping[str, Any], metrics: Sequence[Metric]) -> str:
    """The columns of a row, under the `titles`."""
    return "".join(f"{cell(entry[metric.key], metric.digits):>{WIDTH}}" for metric in metrics)


def cell(figure: Mapping[str, float | None], digits: int) -> str:
    """A figure with its interval, in the form that tables show."""
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None:
        return "overflow"
    if low is None or high is None:
        return _number(value, digits)
    return f"{_number(value, digits)} [{_number(low, digits)}, {_number(high, digits)}]"


def _number(value: float, digits: int) -> str:
    return f"{value:.1e}" if value >= 1e6 else f"{value:,.{digits if value < 1000 else 0}f}"


def plot_by_density(
    panels: Mapping[str, Figures], metrics: Sequence[Metric], title: str, file: str | os.PathLike[str]
) -> None:
    """Draws every metric against density, with a line for each method, and a horizontal one for the dense model.

    Bars show 95% intervals.

    Args:
        panels: figures of each row of the plot, by its title.
        metrics: the metric of each column.
        title: title of the plot.
        file: the PNG file that is written.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure, axes = _panels(len(panels), len(metrics), title)
    colours = _colours([entry for figures in panels.values() for entry in figures])
    for down, (name, figures) in enumerate(panels.items()):
        for across, metric in enumerate(metrics):
            axis = axes[down][across]
            for method, entries in _by_method(figures).items():
                if method == DENSE:
                    _across(axis, entries[0][metric.key])
                else:
                    _line(axis, method, entries, [entry["density"] for entry in entries], metric, colours)
            axis.set_xlabel("density (share of neurons kept)")
            axis.set_ylabel(metric.title)
            densities = sorted({entry["density"] for entry in figures if entry["method"] != DENSE})
            axis.set_xticks(densities, [f"{density:g}" for density in densities])
            _finish(axis, metric, name if across == 0 else "")
    draw_legend(figure, axes[0][0])
    figure.savefig(file, format="png")


def plot_by_length(
    figures: Figures, prompts: Sequence[int], news: Sequence[int], title: str, file: str | os.PathLike[str]
) -> None:
    """Draws perplexity against prompt length (at the longest answer) and answer length (at the longest prompt).

    This is the paper's figure, with one row of panels for each density.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    densities = sorted({entry["density"] for entry in figures if entry["method"] != DENSE}, reverse=True)
    figure, axes = _panels(max(1, len(densities)), 2, title)
    colours = _colours(figures)
    kinds = (
        ("prompt", "prompt (tokens)", "new", max(news), "the next {:,} tokens"),
        ("new", "answer (tokens)", "prompt", max(prompts), "a prompt of {:,} tokens"),
    )
    for down, density in enumerate(densities or [1.0]):
        for across, (key, label, fixed, value, said) in enumerate(kinds):
            axis = axes[down][across]
            chosen = [
                entry for entry in figures if entry[fixed] == value and entry["density"] in (1.0, density)
            ]  # fmt: skip
            for method, entries in _by_method(chosen).items():
                _line(axis, method, entries, [entry[key] for entry in entries], PERPLEXITY, colours)
            axis.set_xlabel(label)
            axis.set_ylabel("perplexity")
            axis.set_xscale("log", base=2)
            lengths = sorted({entry[key] for entry in chosen})
            axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axis.minorticks_off()
            _finish(axis, PERPLEXITY, f"density {density:g}, {said.format(value)}")
    draw_legend(figure, axes[0][0])
    figure.savefig(file, format="png")


def _panels(down: int, across: int, title: str) -> tuple[Any, Any]:
    figure = new_figure(2.8 * across + 0.4, 2.7 * down + 1.0)
    figure.suptitle(title, fontsize="medium")
    return figure, figure.subplots(down, across, squeeze=False)


def _by_method(figures: Figures) -> dict[str, Figures]:
    found: dict[str, Figures] = {}
    for entry in figures:
        found.setdefault(entry["method"], []).append(entry)
    return found


def _colours(figures: Figures) -> dict[str, str]:
    """The colour of each method; those without a fixed one get theirs in order."""
    others = [method for method in _by_method(figures) if method not in COLOURS]
    return COLOURS | {method: METHOD_COLOURS[at % len(METHOD_COLOURS)] for at, method in enumerate(others)}


def _line(
    axis: Any, method: str, entries: Figures, at: Sequence[float], metric: Metric, colours: Mapping[str, str]
) -> None:
    figures = [(x, entry[metric.key]) for x, entry in zip(at, entries, strict=True)]
    shown = [(x, f) for x, f in figures if f["value"] is not None and (f["value"] > 0 or not metric.log)]
    draw_line(
        axis,
        [x for x, _ in shown],
        [figure for _, figure in shown],
        marker="o",
        linewidth=1.5 if method not in BASELINES else 1.0,
        linestyle="--" if method in BASELINES else "-",
        color=colours[method],
        label=method,
    )


def draw_line(axis: Any, at: Sequence[float], figures: Figures, **style: Any) -> None:
    """Draws figures at these places as points of a line, with bars for their intervals."""
    values = [figure["value"] for figure in figures]
    axis.errorbar(at, values, yerr=_bars(figures), **{"markersize": 4, "capsize": 2, **style})


def _bars(figures: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """How far intervals reach below and above their values; 0 for values without an interval."""
    return [
        [max(0.0, sign * (f["value"] - (f[bound] if f[bound] is not None else f["value"]))) for f in figures]
        for bound, sign in (("low", 1), ("high", -1))
    ]


def _across(axis: Any, figure: Mapping[str, float | None]) -> None:
    if figure["value"] is not None:
        axis.axhline(figure["value"], color=COLOURS[DENSE], linewidth=1.0, label=DENSE)


def _finish(axis: Any, metric: Metric, title: str) -> None:
    if metric.log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.set_title(title, fontsize="small", loc="left")


def draw_legend(figure: Any, axis: Any, columns: int | None = None) -> None:
    """Draws the legend of one panel below all panels; by default with as many columns as there is room for."""
    handles, labels = axis.get_legend_handles_labels()
    columns = columns or (len(labels) if max(map(len, labels)) < 15 else 3)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")
