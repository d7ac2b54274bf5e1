"""D8: which experts the tokens of a text choose, how evenly, and how often successive tokens choose the same."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int


def choice_counts(chosen: Bool[np.ndarray, "t e"]) -> Int[np.ndarray, "e"]:
    """How many tokens of a text chose each expert."""
    return chosen.sum(axis=0)


def evenness(counts: Int[np.ndarray, "e"]) -> float:
    """The entropy of the choices over its maximum, log E: 1 if all experts have as many tokens, 0 if one has all."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts)))


def repetition(chosen: Bool[np.ndarray, "t e"]) -> tuple[float, float]:
    """The share of a token's experts that the token before it also chose, and the same for tokens in random order.

    Args:
        chosen: choices of a text of two tokens or more, each of which chose the same number of experts.

    Returns:
        The share in the text, and its exact mean over all orders of the tokens.
    """
    tokens, active = len(chosen), int(chosen[0].sum())
    found = float((chosen[1:] & chosen[:-1]).sum() / (active * (tokens - 1)))
    counts = choice_counts(chosen).astype(np.float64)
    # Pairs of different tokens that share an expert, over all pairs.
    return found, float((counts * (counts - 1)).sum() / (active * tokens * (tokens - 1)))


def most_chosen(counts: Int[np.ndarray, "texts e"], kept: int) -> Bool[np.ndarray, "texts e"]:
    """Masks of the `kept` experts that each text chose most; among equals the first ones."""
    order = np.argsort(-counts, axis=-1, kind="stable")[:, :kept]
    found = np.zeros(counts.shape, bool)
    np.put_along_axis(found, order, True, axis=-1)
    return found
