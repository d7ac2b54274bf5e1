"""D3: whether two experts are as similar as the router's rows for them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from griffin_jax.analysis.experts.similarity import pairs_of

PERMUTATIONS = 200
"""Number of permutations of the experts with which the regression is compared."""


def r_squared(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """The share of the variance of y that a linear regression on x explains; 0 if one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    variances = float(x @ x) * float(y @ y)
    return float(x @ y) ** 2 / variances if variances > 0 else 0.0


def router_against_experts(
    router: Float[np.ndarray, "e e"], experts: Float[np.ndarray, "e e"], rng: np.random.Generator
) -> tuple[float, float, float]:
    """R^2 of experts' similarities regressed on those of the router's rows, over all pairs, and what chance gives.

    Args:
        router: cosines of the router's rows.
        experts: cosines of experts, such as those of their mean neurons.
        rng: generator that draws permutations.

    Returns:
        R^2; its mean if the router's rows are given to experts at random; and the share of such permutations with an
        R^2 at least as large, where the given order counts as one of them. (Pairs that share an expert are not
        independent, so the usual p-value of a regression would be too small.)
    """
    y = pairs_of(experts)
    found = r_squared(pairs_of(router), y)
    permuted = np.empty(PERMUTATIONS)
    for number in range(PERMUTATIONS):
        order = rng.permutation(len(router))
        permuted[number] = r_squared(pairs_of(router[np.ix_(order, order)]), y)
    # Rounding must not make a permutation that changes nothing look worse.
    as_large = np.count_nonzero(permuted >= found * (1 - 1e-12))
    return found, float(permuted.mean()), (1 + as_large) / (1 + PERMUTATIONS)
