"""Plots the loss, the agreement of routers with the oracle, and the load of experts over training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from griffin_jax.factor.training import ROUTERS
from griffin_jax.utils.figures import new_figure

SMOOTHED = 8
"""Largest number of steps that a point of a line is the mean of."""


def plot_curve(curve: Sequence[Mapping[str, Any]], title: str, file: str | os.PathLike[str]) -> None:
    """Draw three panels: the loss of each stage, agreement with the oracle, and load; each thin line is a layer.

    Args:
        curve: figures from `griffin_jax.factor.training.train_factors` or `load_curve`.
        title: title of the whole figure.
        file: PNG file to write.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = new_figure(11.0, 3.8)
    figure.suptitle(title, fontsize="medium")
    losses, agreements, loads = figure.subplots(1, 3)
    stages = list(dict.fromkeys(line["stage"] for line in curve))
    for number, stage in enumerate(stages):
        lines = [line for line in curve if line["stage"] == stage]
        tokens = np.asarray([line["tokens"] for line in lines]) / 1000
        losses.plot(tokens, _smoothed([line["loss"] for line in lines]), color=f"C{number}", label=stage)
        for layer in np.asarray([line["agreement"] for line in lines]).T:
            agreements.plot(tokens, _smoothed(layer), color="0.8", linewidth=0.6)
        mean = [np.mean(line["agreement"]) for line in lines]
        agreements.plot(tokens, _smoothed(mean), color=f"C{number}", label=f"{stage}, all layers")
        load = np.sort(np.asarray([line["load"] for line in lines]), axis=-1)
        for expert in range(load.shape[-1]):
            for layer in load[..., expert].T:
                loads.plot(tokens, _smoothed(layer), color=f"C{expert + 2}", linewidth=0.4, alpha=0.35)
            ranked = _smoothed(load[..., expert].mean(axis=1))
            busiest = load.shape[-1] - expert
            label = f"expert {busiest} by load" if number == 0 else None
            loads.plot(tokens, ranked, color=f"C{expert + 2}", label=label)
    for axis, name in ((losses, "loss"), (agreements, "choices that the oracle makes, too"), (loads, "tokens' share")):
        axis.set_xlabel("thousand tokens")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        if len(stages) > 1:
            boundary = max(line["tokens"] for line in curve if line["stage"] == ROUTERS) / 1000
            axis.axvline(boundary, color="black", linewidth=0.6, linestyle=":")
    for axis in (losses, agreements, loads):
        axis.legend(fontsize="x-small", loc="best")
    figure.savefig(file, format="png")


def _smoothed(values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """The mean of each value and those before it, over at most `SMOOTHED` values."""
    values = np.asarray(values, float)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - SMOOTHED, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
