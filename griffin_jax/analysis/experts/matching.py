"""D2b: the neurons of one expert, each paired with one of another so that they are as alike as can be."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num


@dataclasses.dataclass(frozen=True)
class Matching:
    """Two experts compared neuron by neuron.

    Attributes:
        neurons: numbers of the first expert's neurons that were paired, ascending.
        partners: those of the second that each of them is paired with, no two the same.
        before: the cosine of the flattened neurons, each next to the one of the same number.
        after: the cosine of the flattened neurons, each next to its partner.
        tau: Kendall's tau of `partners`: 1 if both experts have their neurons in the same order, 0 if the order of one
            says nothing about that of the other.
    """

    neurons: Int[np.ndarray, "n"]
    partners: Int[np.ndarray, "n"]
    before: float
    after: float
    tau: float


def match(
    first: Num[np.ndarray, "f d"], second: Num[np.ndarray, "f d"], sampled: int, rng: np.random.Generator
) -> Matching:
    """Pair neurons by a linear assignment on their cosines.

    An assignment of all F neurons takes time that grows with F^3. Where there are more than `sampled`, so many of the
    first expert, drawn at random, are paired with any neurons of the second: it takes time that grows with F and
    memory for `sampled` x F cosines, and every partner that an assignment of all could choose is still there.

    Args:
        first: the neurons of an expert, one in each row.
        second: those of another.
        sampled: neurons of the first that are paired, at most.
        rng: draws them.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.stats import kendalltau

    count = len(first)
    chosen = np.arange(count) if count <= sampled else np.sort(rng.choice(count, sampled, replace=False))
    rows, others = first[chosen].astype(np.float32), second.astype(np.float32)
    lengths, other_lengths = np.linalg.norm(rows, axis=1), np.linalg.norm(others, axis=1)
    products = rows @ others.T
    before = _cosine(np.arange(len(chosen)), chosen, products, lengths, other_lengths)
    similar = products / np.where(lengths > 0, lengths, 1)[:, None] / np.where(other_lengths > 0, other_lengths, 1)
    _, partners = linear_sum_assignment(similar, maximize=True)
    after = _cosine(np.arange(len(chosen)), partners, products, lengths, other_lengths)
    order: Any = kendalltau(chosen, partners)
    return Matching(chosen, partners, before, after, float(order.statistic))


def _cosine(
    rows: Int[np.ndarray, "n"],
    columns: Int[np.ndarray, "n"],
    products: Float[np.ndarray, "n f"],
    lengths: Float[np.ndarray, "n"],
    other_lengths: Float[np.ndarray, "f"],
) -> float:
    """The cosine of two flattened lists of neurons."""
    both = float(np.linalg.norm(lengths)) * float(np.linalg.norm(other_lengths[columns]))
    return float(products[rows, columns].sum(dtype=np.float64)) / both if both > 0 else 0.0
