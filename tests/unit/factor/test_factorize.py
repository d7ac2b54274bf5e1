"""Dividing dense layers into experts, before any training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_and_slow
from scipy.optimize import linear_sum_assignment

import griffin_jax as gj
from griffin_jax.factor.factorize import divide, factorize
from griffin_jax.factor.grouping import balanced_clusters, cheapest_of_equal_sizes, firing_patterns, group_neurons
from griffin_jax.generation import jitted
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.weights import WeightFormat
from griffin_jax.parallel.mesh import make_mesh

LLAMA = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, 128)
PLAIN = {"gated": False, "ff_bias": True, "attention_bias": True, "norm": "layer", "norm_bias": True}
FAMILIES = {
    "llama": LLAMA,
    "gemma2": dataclasses.replace(LLAMA, activation="gelu_tanh", norm_placement="sandwich", norm_plus_one=True),
    "gpt2": dataclasses.replace(LLAMA, **PLAIN, activation="gelu_tanh", rotary=None, learned_positions=True),
    "opt": dataclasses.replace(LLAMA, **PLAIN, activation="relu", norm_placement="post", final_norm=False),
    "apertus": dataclasses.replace(LLAMA, activation="xielu", gated=False),
    "neox": dataclasses.replace(LLAMA, **PLAIN, activation="gelu", parallel=True),
}


def with_biases(model, rng):
    """The model with biases that are not zero, wherever it has some."""

    def drawn(path, leaf):
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if "bias" in jax.tree_util.keystr(path) else leaf

    return jax.tree.map_with_path(drawn, model)


def logits(model, rng):
    tokens, lengths = jnp.asarray(rng.integers(0, 64, (2, 12)), jnp.int32), jnp.asarray([12, 7])
    return jitted.prefill(model, tokens, lengths, max_new_tokens=2).logits


def same(got, want, tolerance=1e-6):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(jnp.abs(want).max()))


@pytest.mark.parametrize("family", first_and_slow(2, *FAMILIES))
def test_all_experts_are_the_dense_layer(family):
    model = with_biases(random_model(FAMILIES[family]), np.random.default_rng(1))
    groups = group_neurons(model, 4, "random")
    means = [np.random.default_rng(2).normal(size=(4, 32)).astype(np.float32)] * 2
    factored = divide(model, groups, 4, means=means)
    assert factored.config.routing.experts == 4
    same(logits(factored, np.random.default_rng(0)), logits(model, np.random.default_rng(0)))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8:16", "int8"])
def test_integers_stay_as_they_are(weights):
    model = random_model(LLAMA, weights=WeightFormat.parse(weights))
    factored = factorize(model, 4, 4, grouping="kmeans")
    assert factored.weights == model.weights
    same(logits(factored, np.random.default_rng(0)), logits(model, np.random.default_rng(0)))


@pytest.mark.slow
def test_on_a_mesh():
    found = [
        logits(factorize(random_model(LLAMA, mesh=mesh), 4, 2, grouping="random"), np.random.default_rng(0))
        for mesh in (None, make_mesh(1, 2))
    ]
    same(*found)


@pytest.mark.slow
def test_it_is_a_model_like_any_other(tmp_path):
    """Saved, loaded, pruned within its experts, and answering."""
    factored = factorize(random_model(LLAMA), 4, 2, grouping="random")
    gj.save(factored, tmp_path / "model")
    loaded = gj.load(tmp_path / "model")
    assert fingerprint(loaded.model) == fingerprint(factored)
    answer = loaded.generate([[1, 2, 3, 4]], density=0.5, max_new_tokens=3)
    assert len(answer.tokens[0]) == 3
    int8 = gj.load(tmp_path / "model", weights="int8")
    got, want = (logits(model, np.random.default_rng(0)) for model in (int8.model, factored))
    assert float(jnp.abs(got - want).max()) < 0.1 * float(jnp.abs(want).max())


class TestGroups:
    @pytest.mark.parametrize("grouping", ["contiguous", "random", "kmeans", "coactivation"])
    def test_every_neuron_is_in_one(self, grouping, rng):
        activations = [rng.normal(size=(20, 48)).astype(np.float32)] * 2
        for groups in group_neurons(random_model(LLAMA), 3, grouping, activations=activations):
            assert groups.shape == (3, 16)
            np.testing.assert_array_equal(np.sort(groups, axis=None), np.arange(48))

    def test_clusters_of_equal_size_are_found(self, rng):
        centres = rng.normal(size=(3, 8)) * 10
        labels = rng.permutation(np.repeat(np.arange(3), 5))
        groups = balanced_clusters((centres[labels] + rng.normal(size=(15, 8))).astype(np.float32), 3, seed=0)
        assert sorted(map(tuple, groups.tolist())) == sorted(
            tuple(np.flatnonzero(labels == n).tolist()) for n in range(3)
        )

    def test_clusters_are_as_large_as_each_other_where_points_are_not(self, rng):
        points = np.concatenate([rng.normal(size=(9, 4)), rng.normal(size=(3, 4)) + 50]).astype(np.float32)
        groups = balanced_clusters(points, 2, seed=0)
        assert groups.shape == (2, 6)
        assert any({9, 10, 11} <= set(group.tolist()) for group in groups)

    @pytest.mark.parametrize("kind", ["any", "tied", "one cluster is cheap for all"])
    def test_the_assignment_is_the_cheapest(self, rng, kind):
        for count, size in ((1, 4), (2, 1), (3, 7), (6, 9)):
            costs = rng.normal(size=(count * size, count))
            costs = np.round(costs) if kind == "tied" else costs - 5 * (kind != "any") * (np.arange(count) == 0)
            labels = cheapest_of_equal_sizes(costs)
            np.testing.assert_array_equal(np.bincount(labels, minlength=count), size)
            points, places = linear_sum_assignment(np.repeat(costs, size, axis=1))
            cheapest = costs[points, places // size].sum()
            np.testing.assert_allclose(costs[points, labels].sum(), cheapest, rtol=0, atol=1e-12)

    def test_neurons_that_fire_together_are_together(self, rng):
        first = rng.random(200) < 0.5
        activations = np.where(np.stack([first, ~first] * 4, axis=1), rng.choice([-1, 1], (200, 8)), 0.01)
        groups = balanced_clusters(firing_patterns(activations.astype(np.float32)), 2, seed=0)
        assert sorted(map(tuple, groups.tolist())) == [(0, 2, 4, 6), (1, 3, 5, 7)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 5}, "5 experts cannot share 48 neurons evenly; these can: 1, 2, 3"),
        ({"experts": 0}, "experts must be a whole number"), ({"active": 5}, "active must be a whole number from 1 to"),
        ({"grouping": "colour"}, "grouping is 'colour'"), ({"grouping": "coactivation"}, "needs the activations"),
    ],
)  # fmt: skip
def test_what_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        factorize(random_model(LLAMA), **change)


def test_experts_are_not_divided_again():
    with pytest.raises(ValueError, match="routed experts already"):
        factorize(factorize(random_model(LLAMA)))
