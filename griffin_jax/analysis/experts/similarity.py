"""D1 and D2a: cosines between flattened matrices of experts, and between their mean neurons."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Num

from griffin_jax.analysis.experts.checkpoint import blocks


@dataclasses.dataclass(frozen=True)
class Grams:
    """Dot products of all pairs of flattened experts, float64.

    Attributes:
        plain: products of the matrices as they are.
        standardised: products after each number was standardised to mean 0 and variance 1 over the experts.
    """

    plain: Float[np.ndarray, "e e"]
    standardised: Float[np.ndarray, "e e"]


def grams(matrix: Num[np.ndarray, "e f d"]) -> Grams:
    """Both products in one pass over a matrix of all experts, with memory for a copy of some of its columns."""
    plain = np.zeros((len(matrix), len(matrix)))
    standardised = np.zeros_like(plain)
    for block in blocks(matrix):
        plain += block @ block.T
        block -= block.mean(axis=0)
        spread = block.std(axis=0)
        # A number that is the same in all experts says nothing.
        block /= np.where(spread > 0, spread, 1)
        standardised += block @ block.T
    return Grams(plain, standardised)


def cosines(gram: Float[np.ndarray, "e e"]) -> Float[np.ndarray, "e e"]:
    """Cosines of all pairs from their dot products; zero for anything of length zero."""
    norms = np.sqrt(np.diagonal(gram))
    scale = np.where(norms > 0, norms, 1)
    return gram / scale[:, None] / scale


def cosines_of_rows(rows: Float[np.ndarray, "e d"]) -> Float[np.ndarray, "e e"]:
    """Cosines of all pairs of rows."""
    rows = rows.astype(np.float64)
    return cosines(rows @ rows.T)


def mean_neurons(matrix: Num[np.ndarray, "e f d"]) -> Float[np.ndarray, "e d"]:
    """D2a: the mean over an expert's neurons, float64."""
    return np.stack([expert.astype(np.float32).mean(axis=0, dtype=np.float64) for expert in matrix])


def pairs_of(matrix: Float[np.ndarray, "e e"]) -> Float[np.ndarray, "pairs"]:
    """The values below the diagonal: one for each pair of different experts."""
    return matrix[np.tril_indices(len(matrix), -1)]


def outlier(similarity: Float[np.ndarray, "e e"]) -> tuple[int, float]:
    """The expert that is least similar to the others, and how far it is from them.

    Returns:
        The number of the expert, and the distance of its mean similarity from the median of all experts' mean
        similarities, in median absolute deviations of these (scaled to be standard deviations of normal numbers);
        infinite if the others are all equal.
    """
    count = len(similarity)
    means = (similarity.sum(axis=1) - np.diagonal(similarity)) / (count - 1)
    least = int(means.argmin())
    distance = float(np.median(means) - means[least])
    spread = 1.4826 * float(np.median(np.abs(means - np.median(means))))
    if spread > 0:
        return least, distance / spread
    return least, 0.0 if distance == 0 else float("inf")
