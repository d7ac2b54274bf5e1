"""What routers learn from: which experts would have been the best ones, and how far a router is from that.

The teacher is the frozen dense layer on the same input. Shapes have E experts and any axes of tokens before them.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from griffin_jax.utils.options import check_choice

Oracle = Literal["each", "joint"]

MOST_SETS = 4096
"""Sets of experts that `joint` compares, at most."""

CLIP = 1e-7
"""Probabilities are kept this far from 0 and 1."""


def oracle_labels(
    outputs: Float[Array, "*t e d"], target: Float[Array, "*t d"], active: int, scale: float, oracle: Oracle = "joint"
) -> Float[Array, "*t e"]:
    """1 for each expert that a token should choose, 0 for the others; float32.

    Args:
        outputs: E_i(x) of every expert.
        target: FF(x) of the dense layer, without its bias.
        active: k, experts that a token chooses.
        scale: what the sum of chosen experts is multiplied by.
        oracle: `each` takes the k experts of least e_i = mean_d (E_i(x) - FF(x) / scale)^2, as FactorLLM does; `joint`
            the set of k experts whose scaled sum is nearest to FF(x).

    Raises:
        ValueError: there is no such oracle, or there are too many sets to compare.
    """
    check_choice("oracle", oracle, get_args(Oracle))
    outputs, target = outputs.astype(jnp.float32), target.astype(jnp.float32)
    count = outputs.shape[-2]
    if oracle == "each":
        errors = jnp.mean(jnp.square(outputs - target[..., None, :] / scale), axis=-1)
        return k_hot(jax.lax.top_k(-errors, active)[1], count)
    sets = jnp.asarray(sets_of(count, active))
    grams = jnp.einsum("...id,...jd->...ij", outputs, outputs)
    along = jnp.einsum("...id,...d->...i", outputs, target)
    # The squared distance of scale * sum of the set from the target, but for the target's own square.
    inside = jnp.einsum("si,sj,...ij->...s", sets, sets, grams)
    costs = scale**2 * inside - 2 * scale * jnp.einsum("si,...i->...s", sets, along)
    return sets[jnp.argmin(costs, axis=-1)]


def sets_of(count: int, active: int) -> Float[np.ndarray, "s e"]:
    """Every set of `active` of `count` experts, as rows of 0 and 1.

    Raises:
        ValueError: there are more than `MOST_SETS`.
    """
    if math.comb(count, active) > MOST_SETS:
        raise ValueError(
            f"oracle 'joint' compares all sets of {active} of {count} experts, which are {math.comb(count, active):,};"
            " take 'each'"
        )
    rows = [
        [float(expert in chosen) for expert in range(count)] for chosen in itertools.combinations(range(count), active)
    ]
    return np.asarray(rows, np.float32)


def k_hot(experts: Int[Array, "*t k"], count: int) -> Float[Array, "*t e"]:
    """1 for the experts that were chosen, 0 for the others; float32."""
    return jnp.sum(jax.nn.one_hot(experts, count, dtype=jnp.float32), axis=-2)


def prior_approximate(logits: Float[Array, "*t e"], labels: Float[Array, "*t e"]) -> Float[Array, "*t"]:
    """The Prior-Approximate loss of each token: KL(p || q) of p = softmax(logits) and q = softmax(labels), in nats.

    Args:
        logits: of the router.
        labels: from `oracle_labels`.
    """
    p = jnp.clip(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), CLIP, 1 - CLIP)
    return jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(labels, axis=-1)), axis=-1)


def balance(logits: Float[Array, "*t e"], chosen: Float[Array, "*t e"]) -> Float[Array, "*t"]:
    """The balance loss of each token: the mean over experts of p where an expert is chosen, else 0.

    Args:
        logits: of the router.
        chosen: 1 for experts that the token chooses, 0 for the others.
    """
    return jnp.mean(chosen * jax.nn.softmax(logits.astype(jnp.float32), axis=-1), axis=-1)
