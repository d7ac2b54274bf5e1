"""Shows quality against bytes to people, as a table and a plot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from griffin_jax.evaluation.grid import DENSE
from griffin_jax.evaluation.report import TOP1, Figures, Metric, cells, draw_legend, draw_line, titles, width_of
from griffin_jax.utils.figures import new_figure

DRAFTED = "drafted"
"""Takes the place of a quality if a drafter writes and the full model verifies; the density is then the drafter's."""

KL = Metric("kl", "KL (nats/token)", 4, log=True)
MARKERS = ("o", "s", "^", "D", "v")
DRAFT_MARKERS = ("*", "P", "X", "p")
STYLES = ("-", "--", ":", "-.")
LABEL_SPACE = 34, 16
"""Width and height of the label of a point, in pixels."""


def table(figures: Figures) -> str:
    """A table of the figures with their intervals, and a star for rows on the Pareto front."""
    width, kind = width_of(figures, "weights"), width_of(figures, "quality")
    lines = [
        "what really follows, against the unquantised dense model:",
        f"{'weights':{width}}{'quality':{kind}}{'density':>8}{'MB/token':>10}{titles((KL, TOP1))}{'front':>7}",
    ]
    for entry in figures:
        lines.append(
            f"{entry['weights']:{width}}{entry['quality']:{kind}}{entry['density']:>8g}{_megabytes(entry):>10,.1f}"
            f"{cells(entry, (KL, TOP1))}{'*' if entry['front'] else '':>7}".rstrip()
        )
    return "\n".join(lines)


def draw_drafted(axis: Any, figures: Figures, formats: Sequence[str], what: str) -> None:
    """Draws models with drafters, in the colour of the full model's format, with a marker for each kind of drafter.

    Args:
        axis: the axis, which has megabytes per token from left to right.
        figures: entries of models with drafters, and others, which are ignored.
        formats: formats of the full models, in the order of their colours.
        what: key of the figure that is drawn.
    """
    drafted = [entry for entry in figures if entry["method"] == DRAFTED]
    kinds = sorted({_drafter(entry["weights"]) for entry in drafted})
    for weights in dict.fromkeys(entry["weights"] for entry in drafted):
        marker = DRAFT_MARKERS[kinds.index(_drafter(weights)) % len(DRAFT_MARKERS)]
        line = [entry for entry in drafted if entry["weights"] == weights]
        draw_line(
            axis, [_megabytes(entry) for entry in line], [entry[what] for entry in line], elinewidth=0.8,
            marker=marker, markersize=11, linewidth=1.2, linestyle=":", label=weights,
            color=f"C{formats.index(weights.split()[0]) % 10}",
        )  # fmt: skip


def _drafter(weights: str) -> str:
    """The part of `int8 (int4 drafts)` that says what drafts."""
    return weights.partition(" ")[2]


def _megabytes(entry: Any) -> float:
    return entry["bytes_per_token"] / 1e6


def plot(figures: Figures, title: str, file: str | os.PathLike[str]) -> None:
    """Draws KL against megabytes per token, with a line for each format and quality, and the Pareto front marked.

    Points are labelled with their densities.

    Args:
        figures: what `griffin_jax.evaluation.front.figures` returned.
        title: title of the plot.
        file: the PNG file that is written.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = new_figure(7.2, 5.2)
    figure.suptitle(title, fontsize="medium")
    axis = figure.subplots()
    alone = [entry for entry in figures if entry["method"] != DRAFTED]
    formats = list(dict.fromkeys(entry["weights"] for entry in reversed(alone)))
    qualities = list(dict.fromkeys(entry["quality"] for entry in alone if entry["method"] != DENSE)) or [DENSE]
    shown = [entry for entry in figures if entry["kl"]["value"] is not None and entry["kl"]["value"] > 0]
    for number, weights in enumerate(formats):
        colour = f"C{number % 10}"
        for quality, style in zip(sorted(qualities, reverse=True), STYLES, strict=False):
            line = [
                e for e in shown if e["weights"] == weights and (e["quality"] == quality or e["method"] == DENSE)
            ]  # fmt: skip
            draw_line(
                axis, [_megabytes(entry) for entry in line], [entry["kl"] for entry in line], elinewidth=0.8,
                marker=MARKERS[number % len(MARKERS)], linewidth=1.2, linestyle=style, color=colour,
                label=f"{weights}, {quality}",
            )  # fmt: skip
        for entry in (e for e in figures if e["weights"] == weights and e not in shown):
            axis.axvline(
                _megabytes(entry), color=colour, linewidth=1, alpha=0.6, linestyle="-.", label=f"{weights}, dense: KL 0"
            )
    draw_drafted(axis, shown, formats, "kl")
    front = [entry for entry in shown if entry["front"]]
    places = [_megabytes(entry) for entry in front], [entry["kl"]["value"] for entry in front]
    axis.step(*places, where="post", color="0.6", linewidth=5, alpha=0.4, zorder=0)
    axis.scatter(*places, s=90, facecolors="none", edgecolors="black", linewidths=1, zorder=3, label="on the front")
    axis.set_xscale("log")
    axis.set_yscale("log")
    labelled: list[tuple[float, float]] = []
    # If points of several formats are close to each other, only one gets a label; those on the front come first.
    for entry in sorted(shown, key=lambda entry: not entry["front"]):
        point = _megabytes(entry), entry["kl"]["value"]
        x, y = axis.transData.transform(point)
        if any(abs(x - left) < LABEL_SPACE[0] and abs(y - low) < LABEL_SPACE[1] for left, low in labelled):
            continue
        labelled.append((x, y))
        axis.annotate(
            f"{entry['density']:g}", point, fontsize=7, color="0.2", xytext=(7, 4), textcoords="offset points"
        )
    reads = sorted({_megabytes(entry) for entry in figures})
    ticks = [n * 10**power for power in range(-3, 7) for n in (1, 1.5, 2, 3, 5, 7)]
    inside = [tick for tick in ticks if reads[0] * 0.95 <= tick <= reads[-1] * 1.05]
    axis.set_xticks(inside, [f"{tick:,g}" for tick in inside])
    axis.minorticks_off()
    axis.set_xlabel("MB read per token (points: density)")
    axis.set_ylabel(KL.title)
    axis.grid(alpha=0.3)
    draw_legend(figure, axis, columns=4)
    figure.savefig(file, format="png")
