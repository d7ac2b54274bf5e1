"""Analyses of weights alone (D1 to D4), layer by layer, with one matrix of all experts of a layer in memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Num
from tqdm import tqdm

from griffin_jax.analysis.experts.checkpoint import Experts
from griffin_jax.analysis.experts.components import neuron_components, principal_components
from griffin_jax.analysis.experts.matching import match
from griffin_jax.analysis.experts.routers import router_against_experts
from griffin_jax.analysis.experts.similarity import cosines, cosines_of_rows, grams, mean_neurons, outlier, pairs_of

NEURON_POINTS = 1024
"""Number of neurons of a layer whose principal components are computed."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How much is compared if comparing everything would take too long.

    Attributes:
        neurons: greatest number of neurons of an expert that are paired with those of another.
        pairs: greatest number of pairs of experts in a layer whose neurons are paired.
        seed: seed of all draws.
    """

    neurons: int = 1024
    pairs: int = 6
    seed: int = 0


def analyse(experts: Experts, layers: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    """Similarity, matching, routers and components of some layers.

    Args:
        experts: experts to read.
        layers: numbers of the layers, ascending.
        sampling: how much is compared.

    Returns:
        `layers`, and a dictionary for each kind of matrix. It has numbers, as lists over the layers, and what is drawn,
        as arrays with an axis for the layers.
    """
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in experts.kinds}
    steps = [(layer, kind) for layer in layers for kind in experts.kinds]
    router: Float[np.ndarray, "e d"] | None = None
    for layer, kind in tqdm(steps, unit="matrix", desc="weights", disable=None, leave=False):
        if kind == experts.kinds[0]:
            router = experts.router(layer)
        assert router is not None
        rng = np.random.default_rng((sampling.seed, layer, experts.kinds.index(kind)))
        # Only the results outlive a matrix: the next one is read into its place.
        found[kind].append(analyse_matrix(experts.matrix(layer, kind), router, sampling, rng))
    return {"layers": list(layers)} | {
        kind: {name: _joined([layer[name] for layer in of_layers]) for name in of_layers[0]}
        for kind, of_layers in found.items()
    }


def _joined(of_layers: list[Any]) -> Any:
    return np.stack(of_layers) if isinstance(of_layers[0], np.ndarray) else of_layers


def analyse_matrix(
    matrix: Num[np.ndarray, "e f d"],
    router: Float[np.ndarray, "e d"],
    sampling: Sampling,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """All numbers of one kind of matrix of the experts of a layer."""
    products = grams(matrix)
    similarity = cosines(products.plain)
    least, distance = outlier(similarity)
    means = cosines_of_rows(mean_neurons(matrix))
    r2, permuted, p = router_against_experts(cosines_of_rows(router), means, rng)
    coordinates, explained = principal_components(products.standardised, 2)
    neurons, neurons_explained = neuron_components(matrix, NEURON_POINTS, 3, rng)
    matched = [match(matrix[a], matrix[b], sampling.neurons, rng) for a, b in _pairs(len(matrix), sampling.pairs, rng)]
    return {
        "similarity": similarity,
        "mean_similarity": float(pairs_of(similarity).mean()),
        "outlier": least,
        "outlier_distance": distance if np.isfinite(distance) else None,
        "mean_similarity_of_averages": float(pairs_of(means).mean()),
        "router_r2": r2,
        "router_r2_permuted": permuted,
        "router_p": p,
        "matched_before": float(np.mean([found.before for found in matched])),
        "matched_after": float(np.mean([found.after for found in matched])),
        "matched_tau": float(np.mean([found.tau for found in matched])),
        "components": coordinates,
        "components_explained": float(explained.sum()),
        "neuron_components": neurons,
        "neuron_components_explained": float(neurons_explained.sum()),
    }


def numbers_of(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers of an analysis without what is drawn, for JSON."""
    return {
        kind: {name: values for name, values in parts.items() if not isinstance(values, np.ndarray)}
        if isinstance(parts, dict)
        else parts
        for kind, parts in found.items()
    }


def arrays_of(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """What is drawn, by names such as `gate similarity`."""
    return {
        f"{kind} {name}": values
        for kind, parts in found.items()
        if isinstance(parts, dict)
        for name, values in parts.items()
        if isinstance(values, np.ndarray)
    }


def _pairs(experts: int, most: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """All pairs of different experts, or `most` of them, drawn at random."""
    every = list(itertools.combinations(range(experts), 2))
    chosen = range(len(every)) if len(every) <= most else np.sort(rng.choice(len(every), most, replace=False))
    return (every[number] for number in chosen)
