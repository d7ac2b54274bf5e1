"""Figures of the analyses, at most 800 pixels wide."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from griffin_jax.utils.figures import new_figure

WIDTH = 6.6
"""Width of a figure, in inches of 120 pixels."""

PANELS = 32
"""Greatest number of layers that have a panel in a figure; of more layers, this many at equal distances are shown."""

COLUMNS = 8
TITLES = {"up": "Wup", "gate": "Wact", "down": "Wdown"}
"""Matrices of experts, as the paper calls them."""

BRIGHTEST = 99.5
"""Percentage of the numbers of a heat map that lie within its colour scale."""

NULL = "null: "
"""Beginning of the labels of null models."""

Lines = Mapping[str, Sequence[Mapping[str, float | None]] | Sequence[float]]


def png(figure: Any) -> bytes:
    """A figure as the contents of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def shown_layers(layers: Sequence[int], most: int = PANELS) -> list[int]:
    """Indices into a list of layers: all, or `most` at equal distances, including the first and the last."""
    if len(layers) <= most:
        return list(range(len(layers)))
    return [round(place) for place in np.linspace(0, len(layers) - 1, most)]


def heat_maps(
    matrices: Float[np.ndarray, "l e e"] | Int[np.ndarray, "l e e"],
    layers: Sequence[int],
    title: str,
    *,
    own_scale: bool = False,
    diagonal: bool = True,
    axes: tuple[str, str] = ("expert", "expert"),
) -> Any:
    """A small heat map for each layer.

    Args:
        matrices: one matrix for each layer.
        layers: numbers of the layers.
        title: title of the figure, which says what is drawn.
        own_scale: whether the colours of each panel range from its own least to its own largest number, instead of one
            scale for all panels.
        diagonal: whether the diagonal counts for the scale of colours; it should not if all its numbers are 1.
        axes: labels of the columns and of the rows.
    """
    at = shown_layers(layers)
    columns = min(COLUMNS, len(at))
    rows = math.ceil(len(at) / columns)
    figure = new_figure(WIDTH, 1.1 + rows * (WIDTH / max(columns, 4) * 1.12 + 0.2 * own_scale))
    panels = figure.subplots(rows, columns, squeeze=False)
    counted = np.ones(matrices.shape[1:], bool) if diagonal else ~np.eye(matrices.shape[-1], dtype=bool)
    every = matrices[at][:, counted]
    for panel, place in zip(panels.flat, at, strict=False):
        own = matrices[place][counted] if own_scale else every
        panel.imshow(matrices[place], vmin=own.min(), vmax=own.max(), cmap="viridis", interpolation="nearest")
        # On separate lines, or the numbers would reach into the next panel.
        low_high = f"\n{own.min():.2g}\nto {own.max():.2g}" if own_scale else ""
        panel.set_title(f"layer {layers[place]}{low_high}", fontsize="x-small")
        panel.tick_params(labelsize=6, length=2)
        if matrices.shape[-1] <= 8:
            panel.set_xticks(range(matrices.shape[-1]))
            panel.set_yticks(range(matrices.shape[-1]))
    for panel in panels.flat[len(at) :]:
        panel.axis("off")
    if not own_scale:
        bar = figure.colorbar(panels.flat[0].images[0], ax=panels, location="bottom", shrink=0.6, aspect=40)
        bar.ax.tick_params(labelsize=7)
    figure.supxlabel(axes[0], fontsize="small")
    figure.supylabel(axes[1], fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def by_layer(
    layers: Sequence[int],
    panels: Mapping[str, Lines],
    chances: Mapping[str, Mapping[str, float]] | None = None,
) -> Any:
    """Lines over the layers, with bands for intervals where numbers have them.

    Args:
        layers: numbers of the layers.
        panels: lines by their labels, for each panel by its title; lines whose label begins with `NULL` are grey.
        chances: horizontal lines by their labels, for each panel by its title.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(WIDTH, 0.5 + 3.0 * rows)
    drawn = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, lines) in zip(drawn, panels.items(), strict=False):
        nulls = [label for label in lines if label.startswith(NULL)]
        for number, (label, values) in enumerate(lines.items()):
            style = {"color": f"C{number}", "linestyle": "-"}
            if label in nulls:
                style = {"color": "0.55", "linestyle": ("-.", ":")[nulls.index(label) % 2]}
            _line(axis, layers, values, label, style)
        for number, (label, value) in enumerate((chances or {}).get(title, {}).items()):
            axis.axhline(value, color="C3", linestyle=("--", ":")[number % 2], linewidth=1, label=label)
        axis.set_title(title, fontsize="small")
        axis.set_xlabel("layer", fontsize="small")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        # Below the panel, since lines over many layers leave no room in it.
        axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
    for axis in drawn[len(panels) :]:
        axis.axis("off")
    return figure


def _line(axis: Any, layers: Sequence[int], values: Sequence[Any], label: str, style: Mapping[str, Any]) -> None:
    if isinstance(values[0], Mapping):
        # None becomes NaN, which is drawn as nothing.
        value, low, high = (np.asarray([each[name] for each in values], float) for name in ("value", "low", "high"))
        axis.fill_between(layers, low, high, color=style["color"], alpha=0.2, linewidth=0)
    else:
        value = np.asarray(values, float)
        if len(value) == 1 < len(layers):
            axis.axhline(value[0], linewidth=1, label=label, **style)
            return
    axis.plot(layers, value, "o", markersize=2, linewidth=1.2, label=label, **style)


def points(coordinates: Float[np.ndarray, "l e 2"], layers: Sequence[int], title: str) -> Any:
    """Experts along two principal components, a small panel for each layer."""
    at = shown_layers(layers, 16)
    columns = min(4, len(at))
    rows = math.ceil(len(at) / columns)
    figure = new_figure(WIDTH, 0.6 + 1.6 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, place in zip(panels.flat, at, strict=False):
        x, y = coordinates[place, :, 0], coordinates[place, :, min(1, coordinates.shape[-1] - 1)]
        colours = np.arange(len(x))
        panel.scatter(x, y, c=colours, cmap="tab10" if len(x) <= 10 else "viridis", s=14)
        if len(x) <= 16:
            for number, point in enumerate(zip(x, y, strict=True)):
                panel.annotate(str(number), point, fontsize=6, xytext=(2, 2), textcoords="offset points")
        panel.margins(0.15)
        panel.set_title(f"layer {layers[place]}", fontsize="x-small")
        panel.set_xticks([])
        panel.set_yticks([])
    for panel in panels.flat[len(at) :]:
        panel.axis("off")
    figure.suptitle(title, fontsize="medium")
    return figure


def clouds(coordinates: Float[np.ndarray, "l e n 3"], layers: Sequence[int], title: str) -> Any:
    """Neurons along two principal components and along three, coloured by expert, for up to four layers."""
    at = shown_layers(layers, 4)
    figure = new_figure(WIDTH, 4.2)
    experts = coordinates.shape[1]
    for column, place in enumerate(at):
        flat = coordinates[place].reshape(-1, coordinates.shape[-1])
        colours = np.repeat(np.arange(experts), coordinates.shape[2])
        style: dict[str, Any] = {"c": colours, "cmap": "tab10" if experts <= 10 else "viridis", "s": 2, "alpha": 0.6}
        plane = figure.add_subplot(2, len(at), 1 + column)
        plane.scatter(flat[:, 0], flat[:, 1], **style)
        plane.set_title(f"layer {layers[place]}", fontsize="x-small")
        space = figure.add_subplot(2, len(at), 1 + len(at) + column, projection="3d")
        space.scatter(*flat.T[:3], **style)
        for axis in (plane, space):
            axis.tick_params(labelsize=5, length=1, pad=0)
    figure.suptitle(title, fontsize="medium")
    return figure


def tokens_by_layer(values: Float[np.ndarray, "l t"], layers: Sequence[int], title: str) -> Any:
    """A heat map of one number for each token in each layer."""
    figure = new_figure(WIDTH, 1.2 + 0.11 * max(len(layers), 8))
    axis = figure.subplots()
    places = shown_layers(layers, 8)
    drawn = axis.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest")
    axis.set_yticks(places, [str(layers[place]) for place in places])
    axis.set_xlabel("token")
    axis.set_ylabel("layer")
    figure.colorbar(drawn, ax=axis).ax.tick_params(labelsize=7)
    axis.tick_params(labelsize=7)
    axis.set_title(title, fontsize="medium")
    return figure


def states(arrays: Mapping[int, Float[np.ndarray, "t e f"]], title: str) -> Any:
    """D7: heat maps of tokens x neurons, for up to eight experts of each layer next to each other."""
    most = 8
    shown = min(most, next(iter(arrays.values())).shape[1])
    figure = new_figure(WIDTH, 0.8 + 2.2 * len(arrays))
    panels = figure.subplots(len(arrays), shown, squeeze=False, sharey="row")
    for row, (layer, values) in zip(panels, arrays.items(), strict=True):
        brightest = np.percentile(np.abs(values[:, :shown]), BRIGHTEST)
        for expert, panel in enumerate(row):
            panel.imshow(
                np.abs(values[:, expert]), vmin=0, vmax=brightest, cmap="magma", aspect="auto", interpolation="nearest"
            )
            panel.set_title(f"expert {expert}" if values.shape[1] > 1 else "", fontsize="x-small")
            panel.tick_params(labelsize=6)
        row[0].set_ylabel(f"layer {layer}: token", fontsize="small")
        figure.colorbar(row[0].images[0], ax=list(row), extend="max", aspect=25).ax.tick_params(labelsize=7)
    figure.supxlabel("neuron", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def choices(chosen: Bool[np.ndarray, "l t e"], layers: Sequence[int], title: str) -> Any:
    """D8: which experts the tokens of a text chose, in up to six layers."""
    at = shown_layers(layers, 6)
    figure = new_figure(WIDTH, 0.7 + len(at) * (0.55 + 0.06 * min(chosen.shape[-1], 16)))
    panels = figure.subplots(len(at), 1, squeeze=False, sharex=True)[:, 0]
    for panel, place in zip(panels, at, strict=True):
        panel.imshow(chosen[place].T, cmap="Greys", aspect="auto", interpolation="nearest", vmin=0, vmax=1)
        panel.set_ylabel(f"layer {layers[place]}\nexpert", fontsize="x-small")
        panel.tick_params(labelsize=6)
    panels[-1].set_xlabel("token")
    figure.suptitle(title, fontsize="medium")
    return figure
