"""D2b: the neurons of one expert paired with those of another, so that pairs are as similar as possible."""

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
        partners: number of the second expert's neuron that each of them is paired with; no two are the same.
        before: cosine of the flattened neurons, each paired with the neuron of the same number.
        after: cosine of the flattened neurons, each paired with its partner.
        tau: Kendall's tau of `partners`: 1 if both experts have their neurons in the same order, 0 if the order in one
            says nothing about the order in the other.
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

    An assignment of all F neurons takes time that grows with F^3. If there are more than `sampled` neurons, only that
    many of the first expert, drawn at random, are paired, with any neurons of the second. The time then grows with F,
    and memory holds `sampled` x F cosines. Every partner that an assignment of all neurons could choose is still
    available.

    Args:
        first: neurons of one expert, one in each row.
        second: neurons of another expert.
        sampled: greatest number of neurons of the first expert that are paired.
        rng: generator that draws these neurons.
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
