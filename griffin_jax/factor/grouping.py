"""Divides the neurons of a feed-forward layer into groups of equal size, which become the experts.

contiguous    neurons that are neighbours in the checkpoint
random        neurons drawn at random
kmeans        neurons that respond to similar inputs: k-means of their input rows, with clusters of equal size
coactivation  neurons that fire together in general text: the same k-means of their activations
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from griffin_jax.model.feed_forward import FeedForward
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import to_host
from griffin_jax.utils.options import check_choice

Grouping = Literal["contiguous", "random", "kmeans", "coactivation"]

ROUNDS = 10
"""Largest number of times that k-means assigns points to groups of equal size and moves its centroids."""

Groups = Int[np.ndarray, "e f"]
"""The neurons of each expert of a layer."""


def group_neurons(
    model: Transformer,
    experts: int,
    grouping: Grouping,
    *,
    activations: Sequence[Float[np.ndarray, "t _f"]] = (),
    seed: int = 0,
) -> tuple[Groups, ...]:
    """Group the neurons of every layer.

    Args:
        model: a dense model.
        experts: number of groups; it must divide the number of neurons of a layer.
        grouping: how neurons are grouped.
        activations: for each layer, the relative activations of some tokens of general text, (T, F), as
            `griffin_jax.factor.general.activations` returns them; only `coactivation` needs them.
        seed: seed of random groups and of k-means.

    Returns:
        For each layer, the neurons of each expert.

    Raises:
        ValueError: the grouping is unknown or lacks activations, or `experts` does not divide the number of neurons.
        ImportError: k-means needs scikit-learn, which is not installed.
    """
    check_choice("grouping", grouping, get_args(Grouping))
    if grouping == "coactivation" and len(activations) != len(model.layers):
        raise ValueError(
            f"grouping 'coactivation' needs the activations of {len(model.layers)} layers, got {len(activations)}"
        )
    found = []
    for number, layer in enumerate(model.layers):
        check_divisible(layer.ff.neurons, experts)
        layer_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        if grouping == "contiguous":
            groups = np.arange(layer.ff.neurons).reshape(experts, -1)
        elif grouping == "random":
            groups = np.random.default_rng(layer_seed).permutation(layer.ff.neurons).reshape(experts, -1)
        elif grouping == "kmeans":
            groups = balanced_clusters(input_rows(layer.ff), experts, layer_seed)
        else:
            groups = balanced_clusters(firing_patterns(activations[number]), experts, layer_seed)
        # The order within a group does not matter; ascending order is that of the checkpoint.
        found.append(np.sort(groups, axis=1).astype(np.int32))
    return tuple(found)


def check_divisible(neurons: int, experts: int) -> None:
    """Raise `ValueError` unless the neurons of a layer can be divided evenly among the experts."""
    if isinstance(experts, bool) or not isinstance(experts, int) or experts < 1:
        raise ValueError(f"experts must be a whole number of at least 1, got {experts!r}")
    if neurons % experts:
        possible = ", ".join(str(count) for count in range(1, 4 * experts + 1) if neurons % count == 0)
        raise ValueError(f"{experts} experts cannot share {neurons} neurons evenly; these can: {possible}")


def input_rows(layer: FeedForward) -> Float[np.ndarray, "f n"]:
    """The weights that each neuron multiplies its input by: its rows of all input matrices, together of length 1."""
    rows = np.asarray(to_host(layer.gate_up_matrix()), np.float32)
    return _normalised(rows.swapaxes(0, 1).reshape(rows.shape[1], -1))


def firing_patterns(activations: Float[np.ndarray, "t f"]) -> Float[np.ndarray, "f t"]:
    """How strongly each neuron takes part at each token, centred and scaled to length 1: products are correlations."""
    strength = np.abs(activations.astype(np.float32)).T
    return _normalised(strength - strength.mean(axis=1, keepdims=True))


def _normalised(rows: Float[np.ndarray, "f n"]) -> Float[np.ndarray, "f n"]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def balanced_clusters(points: Float[np.ndarray, "f n"], count: int, seed: int) -> Groups:
    """Cluster points into groups of equal size: k-means that assigns points at the least cost for equal sizes.

    The first centroids are those of k-means without that constraint.

    Args:
        points: the points, one in each row.
        count: number of clusters; it must divide the number of points.
        seed: seed of the first centroids.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("k-means needs scikit-learn: pip install 'griffin-jax[factor]'") from error
    means: Any = KMeans(count, n_init=1, random_state=seed % 2**32)  # pyright: ignore[reportArgumentType]
    centroids = means.fit(points).cluster_centers_
    labels = np.full(len(points), -1)
    for _ in range(ROUNDS):
        # Squared distances, without the term that is the same for all centroids.
        costs = np.square(centroids).sum(axis=1) - 2 * points @ centroids.T
        assigned = cheapest_of_equal_sizes(costs)
        if np.array_equal(assigned, labels):
            break
        labels = assigned
        centroids = np.stack([points[labels == cluster].mean(axis=0) for cluster in range(count)])
    return np.stack([np.flatnonzero(labels == cluster) for cluster in range(count)])


def cheapest_of_equal_sizes(costs: Float[np.ndarray, "f n"]) -> Int[np.ndarray, "f"]:
    """Assign points to clusters of equal size at the least total cost.

    Each point begins in its cheapest cluster, which is the best assignment for the sizes that result. Then the clusters
    with too many points give them away one by one, each time by the cheapest chain of moves to a cluster with too few.
    After each step the assignment is still the best one for its sizes (successive shortest paths: Ahuja, Magnanti and
    Orlin, Network Flows, 1993, section 9.7). The paths lead over n clusters, not over F points. For a layer of 4,864
    neurons this takes a fraction of a second; a linear sum assignment with a place for each neuron takes minutes.

    Args:
        costs: the cost of each point in each cluster; the number of clusters must divide the number of points.

    Returns:
        The cluster of each point.
    """
    points, count = costs.shape
    costs = costs.astype(np.float64)
    labels = costs.argmin(axis=1)
    missing = points // count - np.bincount(labels, minlength=count)
    moves, movers = np.full((count, count), np.inf), np.zeros((count, count), np.int64)

    def look_again(cluster: int) -> None:
        """Update the cheapest move from this cluster to each of the others."""
        members = np.flatnonzero(labels == cluster)
        if not len(members):
            moves[cluster] = np.inf
            return
        extra = costs[members] - costs[members, cluster][:, None]
        cheapest = extra.argmin(axis=0)
        moves[cluster], movers[cluster] = extra[cheapest, np.arange(count)], members[cheapest]

    for cluster in range(count):
        look_again(cluster)
    while (missing < 0).any():
        chain = _cheapest_chain(moves, missing)
        for source, target in itertools.pairwise(chain):
            labels[movers[source, target]] = target
        missing[chain[0]] += 1
        missing[chain[-1]] -= 1
        for cluster in chain:
            look_again(cluster)
    return labels


def _cheapest_chain(moves: Float[np.ndarray, "n n"], missing: Int[np.ndarray, "n"]) -> list[int]:
    """The cheapest path from any cluster with too many points to any with too few (Bellman and Ford).

    Args:
        moves: cost of the cheapest move from each cluster to each other one; no cycle has a negative cost.
        missing: number of points that each cluster lacks; negative if it has too many.
    """
    distance, before = np.where(missing < 0, 0.0, np.inf), np.full(len(missing), -1)
    for _ in missing:
        over = distance[:, None] + moves
        nearest = over.argmin(axis=0)
        # Paths that are shorter only through rounding could form a cycle.
        shorter = over.min(axis=0) < distance - 1e-12 * (1 + np.abs(np.where(np.isfinite(distance), distance, 0)))
        if not shorter.any():
            break
        distance = np.where(shorter, over.min(axis=0), distance)
        before = np.where(shorter, nearest, before)
    chain = [int(np.where(missing > 0, distance, np.inf).argmin())]
    while before[chain[0]] >= 0:
        chain.insert(0, int(before[chain[0]]))
    return chain
