"""Labels that say which experts are the best for a token, and the losses by which routers learn them.

The teacher is the frozen dense layer on the same input. Shapes have any axes of tokens, followed by E experts.
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
"""Largest number of sets of experts that `joint` compares."""

CLIP = 1e-7
"""Smallest distance of probabilities from 0 and 1, to which they are clipped."""


def oracle_labels(
    outputs: Float[Array, "*t e d"], target: Float[Array, "*t d"], active: int, scale: float, oracle: Oracle = "joint"
) -> Float[Array, "*t e"]:
    """1 for each expert that a token should choose, 0 for the others; float32.

    Args:
        outputs: E_i(x) of every expert.
        target: FF(x) of the dense layer, without its bias.
        active: k, the number of experts that a token chooses.
        scale: factor of the sum of the chosen experts.
        oracle: `each` takes the k experts with the least e_i = mean_d (E_i(x) - FF(x) / scale)^2, as FactorLLM does;
            `joint` takes the set of k experts whose scaled sum is nearest to FF(x).

    Raises:
        ValueError: the oracle is unknown, or `joint` would have too many sets to compare.
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
    # The squared distance of scale * sum of the set from the target, without the target's own square.
    inside = jnp.einsum("si,sj,...ij->...s", sets, sets, grams)
    costs = scale**2 * inside - 2 * scale * jnp.einsum("si,...i->...s", sets, along)
    return sets[jnp.argmin(costs, axis=-1)]


def sets_of(count: int, active: int) -> Float[np.ndarray, "s e"]:
    """All sets of `active` out of `count` experts, as rows of 0 and 1.

    Raises:
        ValueError: the number of sets is more than `MOST_SETS`.
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
    """1 for the chosen experts, 0 for the others; float32."""
    return jnp.sum(jax.nn.one_hot(experts, count, dtype=jnp.float32), axis=-2)


def prior_approximate(logits: Float[Array, "*t e"], labels: Float[Array, "*t e"]) -> Float[Array, "*t"]:
    """The Prior-Approximate loss of each token: KL(p || q) of p = softmax(logits) and q = softmax(labels), in nats.

    Args:
        logits: the router's logits.
        labels: labels from `oracle_labels`.
    """
    p = jnp.clip(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), CLIP, 1 - CLIP)
    return jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(labels, axis=-1)), axis=-1)


def balance(logits: Float[Array, "*t e"], chosen: Float[Array, "*t e"]) -> Float[Array, "*t"]:
    """The balance loss of each token: the mean over all experts of p for chosen experts and 0 for the others.

    Args:
        logits: the router's logits, whose softmax is p.
        chosen: 1 for the experts that the token chooses, 0 for the others.
    """
    return jnp.mean(chosen * jax.nn.softmax(logits.astype(jnp.float32), axis=-1), axis=-1)
