"""Shows what `griffin-jax flocking` found: a table, and the paper's figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from jaxtyping import Float

from griffin_jax.utils.figures import new_figure

TEXTS, PERMUTED, RANDOM = "texts", "permuted", "random_tokens"
KINDS = {TEXTS: "different texts", PERMUTED: "their tokens permuted", RANDOM: "random tokens"}
"""Kinds of prompts whose experts are compared: their names in JSON, and those to show."""

OWN_PERMUTATION = "a text and its permutation"
STABILITY = {
    "windows": "a prompt and a window after it",
    "other_windows": "another prompt and this window",
    "so_far": "a prompt and all after it",
    "other_so_far": "another prompt and all this",
}
"""Comparisons with the tokens that follow a prompt: their names in JSON, and those to show."""

RANDOM_EXPERTS = "experts chosen at random"
BRIGHTEST = 99.5
"""Percentage of a layer's relative activations that lie within its colour scale."""

Results = Mapping[str, Any]


def table(results: Results) -> str:
    """Jaccard similarities at the density that is drawn: the mean over layers, and the lowest and the highest layer."""
    at = _drawn(results)
    rows: list[tuple[str, Sequence[float | None]]] = [
        *((title, results["similarity"][kind][at]) for kind, title in KINDS.items()),
        (OWN_PERMUTATION, results["own_permutation"][at]),
    ]
    windows, window = len(results["stability"]["texts"]), results["window"]
    for key, title in STABILITY.items():
        # At the end of the first window, that window is all so far.
        whole = key.endswith("so_far")
        for number in [windows - 1] if whole else dict.fromkeys([0, windows - 1]):
            first = 1 if whole else number * window + 1
            layers = [layer[number] for layer in results["stability"][key][at]]
            rows.append((f"{title}, tokens {first} to {(number + 1) * window}", layers))
    width = max(len(title) for title, _ in rows) + 2
    lines = [
        f"{results['model_name']}, {results['dtype']}: {results['used']} texts of {results['prompt']} tokens,"
        f" {results['left_out']['count']} left out;",
        f"experts are {results['kept'][at]:,} of {results['neurons']:,} neurons{_of_each(results)} (density"
        f" {results['density']:g})",
        "",
        f"{'Jaccard similarity of experts':{width}}{'mean':>6}  {'lowest layer':>14}  {'highest layer':>14}",
    ]
    for title, layers in rows:
        known = {number: value for number, value in enumerate(layers) if value is not None}
        if not known:
            lines.append(f"{title:{width}}{'-':>6}  {'-':>14}  {'-':>14}")
            continue
        low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        cells = (f"{f'{known[layer]:.3f} (in {layer})':>14}" for layer in (low, high))
        lines.append(f"{title:{width}}{np.mean(list(known.values())):6.3f}  {'  '.join(cells)}")
    return "\n".join([*lines, f"{RANDOM_EXPERTS:{width}}{results['random_experts'][at]:6.3f}"])


def _of_each(results: Results) -> str:
    return " of each routed expert" if results.get("routed") else ""


def plot_activations(
    maps: Mapping[int, Mapping[int, Float[np.ndarray, "t f"]]], model: str, file: str | os.PathLike[str]
) -> None:
    """Draws heat maps of |zbar|, tokens x neurons: one row of panels for each layer, one column for each text.

    Args:
        maps: heat maps by the number of the text, then by layer.
        model: name of the model.
        file: PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    layers = list(next(iter(maps.values())))
    figure = new_figure(0.8 + 3.4 * len(maps), 0.7 + 3.0 * len(layers))
    axes = figure.subplots(len(layers), len(maps), squeeze=False, sharex=True, sharey=True)
    for down, layer in enumerate(layers):
        brightest = np.percentile(np.concatenate([found[layer].ravel() for found in maps.values()]), BRIGHTEST)
        for axis, (number, found) in zip(axes[down], maps.items(), strict=True):
            axis.imshow(found[layer], vmin=0, vmax=brightest, cmap="magma", aspect="auto", interpolation="nearest")
            axis.set_title(f"text {number}, layer {layer}", fontsize="medium")
            axis.set_xlabel("neuron")
            axis.set_ylabel("token")
            axis.label_outer()
        figure.colorbar(
            axes[down][0].images[0],
            ax=list(axes[down]),
            extend="max",
            label="relative activation |z| / ||z||",
            shrink=0.9,
            aspect=25,
        )
    figure.suptitle(f"{_short(model)}: relative activations")
    figure.savefig(file, format="png")


def plot_similarity(results: Results, file: str | os.PathLike[str]) -> None:
    """Draws how similar the experts of different prompts are: against the density for every layer, and by layer.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = new_figure(8.4, 7.2)
    axes = list(figure.subplots(2, 2).flat)
    layers, densities, at = results["layers"], results["densities"], _drawn(results)
    colours = _layer_colours(layers)
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=False):
        values = np.asarray(results["similarity"][kind], np.float64)
        for layer in range(layers):
            axis.plot(densities, values[:, layer], color=colours.to_rgba(layer), linewidth=0.9)
        axis.plot(densities, np.nanmean(values, axis=1), "o-", color="black", markersize=3, label="mean of layers")
        axis.plot(densities, results["random_experts"], "--", color="C3", label=RANDOM_EXPERTS)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("density (share of neurons that are experts)")
        axis.set_ylabel("Jaccard similarity")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower right")
    last = axes[3]
    last.plot(results["own_permutation"][at], "o-", color="C2", markersize=3, label=OWN_PERMUTATION)
    for number, (kind, title) in enumerate(KINDS.items()):
        colour = ("C0", "C1", "0.5")[number]
        last.plot(results["similarity"][kind][at], "o-", color=colour, markersize=3, label=title)
    last.axhline(results["random_experts"][at], linestyle="--", color="C3", label=RANDOM_EXPERTS)
    last.set_title(f"density {results['density']:g}", fontsize="medium")
    last.set_xlabel("layer")
    last.xaxis.get_major_locator().set_params(integer=True)
    last.set_ylabel("Jaccard similarity")
    last.set_ylim(0, 1)
    last.grid(alpha=0.3)
    last.legend(fontsize="x-small", loc="lower center", ncols=2)
    figure.colorbar(colours, ax=axes, label="layer", location="bottom", shrink=0.5, aspect=40)
    figure.suptitle(
        f"{_short(results['model_name'])}: experts of {results['used']} prompts of {results['prompt']} tokens,"
        " means over all pairs"
    )
    figure.savefig(file, format="png")


def plot_stability(results: Results, file: str | os.PathLike[str]) -> None:
    """Draws how a prompt's experts compare with those of what follows: layer by layer, and the mean over layers.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = new_figure(8.4, 8.0)
    axes = list(figure.subplots(2, 2).flat)
    window, at = results["window"], _drawn(results)
    # None becomes NaN, which is drawn as nothing.
    stability = {key: np.asarray(results["stability"][key][at], np.float64) for key in STABILITY}
    known = np.concatenate([found[np.isfinite(found)] for found in stability.values()])
    limits = {"vmin": known.min(), "vmax": known.max()} if known.size else {}
    layers, windows = stability["windows"].shape
    for axis, key in zip(axes, ("windows", "other_windows", "so_far"), strict=False):
        axis.imshow(
            stability[key],
            extent=(0, windows * window, layers - 0.5, -0.5),
            cmap="viridis",
            aspect="auto",
            interpolation="nearest",
            **limits,
        )
        axis.set_title(STABILITY[key], fontsize="medium")
        axis.set_xlabel("tokens after the prompt")
        axis.set_ylabel("layer")
    figure.colorbar(axes[0].images[0], ax=axes[:2], label="Jaccard similarity (of all heat maps)")
    lines, ends = axes[3], window * np.arange(1, windows + 1)
    for (key, title), style in zip(STABILITY.items(), ("C0o-", "C0o:", "C1s-", "C1s:"), strict=True):
        lines.plot(ends, stability[key].mean(axis=0), style, markersize=4, label=title)
    lines.axhline(results["random_experts"][at], linestyle="--", color="C3", label=RANDOM_EXPERTS)
    lines.set_title("means over layers", fontsize="medium")
    lines.set_xlabel("tokens after the prompt (end of a window)")
    lines.set_ylabel("Jaccard similarity")
    lines.set_xlim(0, (windows + 0.5) * window)
    lines.grid(alpha=0.3)
    figure.legend(*lines.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    following = "what the model writes" if results["continuation"] == "own" else "the text"
    figure.suptitle(
        f"{_short(results['model_name'])}: experts of {results['used']} prompts of {results['prompt']} tokens,\n"
        f"and of {following} after them, at density {results['density']:g}"
    )
    figure.savefig(file, format="png")


def _short(model: str) -> str:
    """The last part of a path or repository id, which fits into a title."""
    return PurePath(model).name or model


def _drawn(results: Results) -> int:
    """The index of the density that is drawn by layer."""
    return results["densities"].index(results["density"])


def _layer_colours(layers: int) -> Any:
    from matplotlib.cm import ScalarMappable  # pyright: ignore[reportMissingImports]
    from matplotlib.colors import Normalize  # pyright: ignore[reportMissingImports]

    return ScalarMappable(Normalize(0, max(1, layers - 1)), "viridis")
