"""D4: principal components of whole experts and of single neurons."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Num


def principal_components(
    gram: Float[np.ndarray, "n n"], count: int
) -> tuple[Float[np.ndarray, "n _c"], Float[np.ndarray, "_c"]]:
    """Coordinates along the first principal components, from the dot products of all pairs of points.

    Args:
        gram: dot products of points whose mean is zero.
        count: number of components.

    Returns:
        The coordinates, where the sign of each component makes its largest coordinate positive, and the share of the
        variance that each component explains.
    """
    from scipy.linalg import eigh

    size = len(gram)
    count = min(count, size)
    values, vectors = eigh(gram, subset_by_index=(size - count, size - 1))
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    coordinates = vectors * np.where(largest < 0, -1, 1) * np.sqrt(values)
    total = float(np.trace(gram))
    return coordinates, values / total if total > 0 else np.zeros(count)


def neuron_components(
    matrix: Num[np.ndarray, "e f d"], sampled: int, count: int, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "e n _c"], Float[np.ndarray, "_c"]]:
    """Neurons of all experts along their common principal components.

    Args:
        matrix: one kind of matrix, for all experts.
        sampled: greatest number of neurons of all experts together; as many are drawn at random from each expert.
        count: number of components.
        rng: generator that draws the neurons.
    """
    experts, neurons, width = matrix.shape
    each = min(neurons, max(1, sampled // experts))
    rows = np.stack([expert[np.sort(rng.choice(neurons, each, replace=False))] for expert in matrix])
    points = rows.reshape(-1, width).astype(np.float64)
    points -= points.mean(axis=0)
    coordinates, explained = principal_components(points @ points.T, count)
    return coordinates.reshape(experts, each, -1), explained
