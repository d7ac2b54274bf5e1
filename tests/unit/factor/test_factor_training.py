"""What routers learn from, and both stages of training."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import first_and_slow
from test_factorize import LLAMA, PLAIN, logits, same, with_biases

from griffin_jax.factor.config import FactorConfig, FactorTraining
from griffin_jax.factor.factorize import factorize
from griffin_jax.factor.general import activations, centred
from griffin_jax.factor.layer import expert_outputs, in_training, trainable
from griffin_jax.factor.losses import balance, oracle_labels, prior_approximate
from griffin_jax.factor.training import (
    ROUTERS,
    TOGETHER,
    Curve,
    expert_loss,
    load_curve,
    read,
    train_factors,
    trained,
)
from griffin_jax.model.assembly import random_model
from griffin_jax.model.weights import WeightFormat
from griffin_jax.parallel.mesh import make_mesh
from griffin_jax.training.data import pack
from griffin_jax.training.loss import next_token_loss

TRAINING = FactorTraining(router_steps=3, router_updates=2, steps=3, batch=2, length=9, warmup=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(3)
    return pack([rng.integers(0, 64, 40).tolist() for _ in range(4)], TRAINING.length)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class TestLosses:
    def test_the_prior_approximate_loss_and_its_gradient(self, rng):
        x, labels = rng.normal(size=(6, 4)), np.stack([rng.permutation([1.0, 1.0, 0.0, 0.0]) for _ in range(6)])
        p, q = softmax(x), softmax(labels)
        got = prior_approximate(jnp.asarray(x, jnp.float32), jnp.asarray(labels, jnp.float32))
        each = (p * np.log(p / q)).sum(-1)
        np.testing.assert_allclose(got, each, rtol=1e-5, atol=1e-6)
        # dL/dx_i = p_i (log(p_i / q_i) - L)
        gradient = jax.grad(lambda x: prior_approximate(x, jnp.asarray(labels, jnp.float32)).sum())(jnp.asarray(x))
        np.testing.assert_allclose(gradient, p * (np.log(p / q) - each[:, None]), rtol=1e-4, atol=1e-6)

    def test_probabilities_are_clipped(self):
        logits = jnp.asarray([[200.0, 0.0, 0.0, 0.0]])
        labels = jnp.asarray([[0.0, 1.0, 1.0, 0.0]])
        p = np.asarray([1 - 1e-7, 1e-7, 1e-7, 1e-7])
        want = (p * np.log(p / softmax(np.asarray(labels))[0])).sum()
        np.testing.assert_allclose(prior_approximate(logits, labels), [want], rtol=1e-5)
        assert jnp.isfinite(jax.grad(lambda x: prior_approximate(x, labels).sum())(logits)).all()

    def test_balance(self, rng):
        x, chosen = rng.normal(size=(5, 4)), np.asarray([[1, 1, 0, 0]] * 5)
        got = balance(jnp.asarray(x, jnp.float32), jnp.asarray(chosen, jnp.float32))
        np.testing.assert_allclose(got, (chosen * softmax(x)).mean(-1), rtol=1e-5)

    @pytest.mark.parametrize("oracle", ["each", "joint"])
    def test_labels(self, oracle, rng):
        outputs, scale = rng.normal(size=(7, 4, 16)).astype(np.float32), 1.5
        target = outputs.sum(1)
        found = oracle_labels(jnp.asarray(outputs), jnp.asarray(target), 2, scale, oracle)
        for token, (of_token, whole) in enumerate(zip(outputs, target, strict=True)):
            if oracle == "each":
                best = np.argsort(((of_token - whole / scale) ** 2).mean(-1))[:2]
            else:
                pairs = [(i, j) for i in range(4) for j in range(i)]
                best = min(pairs, key=lambda pair: ((scale * of_token[list(pair)].sum(0) - whole) ** 2).sum())
            assert set(np.flatnonzero(found[token])) == set(best)

    def test_too_many_sets(self):
        with pytest.raises(ValueError, match=r"all sets of 16 of 32 experts, which are 601,080,390; take 'each'"):
            oracle_labels(jnp.ones((1, 32, 4)), jnp.ones((1, 4)), 16, 1.0, "joint")


@pytest.fixture(scope="module", params=first_and_slow(1, "gated", "plain"))
def factored(request):
    config = LLAMA if request.param == "gated" else dataclasses.replace(LLAMA, **PLAIN, activation="gelu")
    return factorize(with_biases(random_model(config), np.random.default_rng(1)), 4, 2, grouping="random", scale=1.5)


class TestLayer:
    @pytest.mark.thorough
    def test_it_computes_what_a_step_of_decoding_does(self, factored, rng):
        layer = factored.layers[0].ff
        x = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32)
        same(in_training(factored).layers[0].ff.project(in_training(factored).layers[0].ff.intermediate(x)), layer(x))

    def test_all_routes_are_the_dense_layer(self, factored, rng):
        layer = in_training(factored, routes="all").layers[0].ff
        x = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32)
        whole = expert_outputs(factored.layers[0].ff.experts, x).sum(-2) + factored.layers[0].ff.down_bias[...]
        same(layer.project(layer.intermediate(x)), whole)

    def test_gradients_are_those_of_the_weighted_sum(self, factored, rng):
        """Straight-through: those of scale * sum_i (c_i + p_i - p_i') E_i, p' being constant."""
        layer = in_training(factored).layers[0].ff
        x = jnp.asarray(rng.normal(size=(1, 3, 32)), jnp.float32)
        towards = jnp.asarray(rng.normal(size=(1, 3, 32)), jnp.float32)

        def loss(router):
            changed = jax.tree.map(lambda leaf: leaf, layer)
            changed.layer.router[...] = router
            return jnp.sum(changed.project(changed.intermediate(x)) * towards)

        router = np.asarray(layer.layer.router[...], np.float64)
        p = softmax(np.asarray(x, np.float64)[0] @ router.T + np.asarray(layer.layer.router_bias[...]))
        gains = 1.5 * np.einsum("ted,td->te", np.asarray(layer.intermediate(x).outputs, np.float64)[0], towards[0])
        want = (p * (gains - (p * gains).sum(-1, keepdims=True))).T @ np.asarray(x, np.float64)[0]
        np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(router, jnp.float32)), want, rtol=1e-4, atol=1e-4)


class TestCentred:
    def test_all_experts_stay_the_dense_layer(self, texts):
        model = random_model(LLAMA)
        whole = centred(factorize(model, 4, 4), texts)
        same(logits(whole, np.random.default_rng(0)), logits(model, np.random.default_rng(0)))

    @pytest.mark.thorough
    def test_the_layer_has_what_the_others_would_give(self, texts):
        """The error of the oracle's choices is smaller."""
        plain = factorize(random_model(LLAMA), 4, 2)
        batch = texts.batches(8, seed=1)(0)
        exact = read(in_training(plain, routes="all"), batch)[0]
        errors = [
            float(jnp.square(read(in_training(model, routes="oracle"), batch)[0] - exact).mean())
            for model in (plain, centred(plain, texts))
        ]
        assert errors[1] < errors[0]


def test_activations_are_relative(texts):
    for layer in activations(random_model(LLAMA), texts):
        np.testing.assert_allclose(np.square(layer.astype(np.float32)).sum(-1), 1, atol=5e-3)


def test_half_a_line_of_a_curve_is_neither_read_nor_continued(tmp_path):
    file = tmp_path / "curve.jsonl"
    figures = {name: np.asarray([0.5]) for name in ("agreement", "load")}
    Curve(file, 10).add("routers", 0, 0, figures)
    whole = file.read_text()
    file.write_text(whole + whole[:30])
    for step in (1, 2):
        curve = Curve(file, 10)
        curve.add("routers", 0, step, figures)
        assert [line["step"] for line in load_curve(file)] == [*range(step + 1)]
        assert curve.lines == load_curve(file)


class TestTraining:
    @pytest.mark.slow
    def test_a_run_that_was_interrupted_gives_what_it_would_have_given(self, texts, tmp_path):
        model = factorize(random_model(LLAMA), 4, 2)
        run = functools.partial(train_factors, model, quiet=True, save_every=2)
        unbroken, curve = run(texts, TRAINING)

        class Breaking(type(texts)):
            def batches(self, size, *, seed):
                inner = super().batches(size, seed=seed)

                def batch(number):
                    if number == 5:
                        raise KeyboardInterrupt
                    return inner(number)

                return batch

        with pytest.raises(KeyboardInterrupt):
            run(Breaking(texts.tokens, texts.lengths), TRAINING, folder=tmp_path / "run")
        resumed, again = run(texts, TRAINING, folder=tmp_path / "run")
        assert again == curve == load_curve(tmp_path / "run" / "curve.jsonl")
        for one, other in zip(*map(jax.tree.leaves, (unbroken, resumed)), strict=True):
            np.testing.assert_array_equal(one, other)
        assert [line["stage"] for line in curve] == ["routers"] * 3 + ["together"] * 3
        with pytest.raises(ValueError, match="checkpoint of another run"):
            run(texts, dataclasses.replace(TRAINING, seed=1), folder=tmp_path / "run")

    def test_routers_learn_the_labels_and_nothing_else_changes(self, texts):
        model = factorize(random_model(LLAMA), 4, 2)
        training = dataclasses.replace(TRAINING, router_steps=60, router_rate=3e-2, steps=0)
        after, curve = train_factors(model, texts, training, quiet=True)
        assert np.mean(curve[-1]["agreement"]) > np.mean(curve[0]["agreement"]) + 0.1
        changed = [
            jax.tree_util.keystr(path)
            for (path, one), other in zip(jax.tree.leaves_with_path(model), jax.tree.leaves(after), strict=True)
            if not np.array_equal(one, other)
        ]
        assert len(changed) == 4
        assert all("router" in path for path in changed)

    def test_where_all_experts_are_active_routers_change_nothing(self, texts):
        model = factorize(random_model(LLAMA), 4, 4)
        after, _ = train_factors(model, texts, dataclasses.replace(TRAINING, steps=0), quiet=True)
        assert not np.array_equal(after.layers[0].ff.router[...], model.layers[0].ff.router[...])
        same(logits(after, np.random.default_rng(0)), logits(model, np.random.default_rng(0)))

    def test_both_stages_change_experts_and_routers_alone(self, texts):
        model = factorize(random_model(LLAMA), 4, 2)
        after, curve = train_factors(model, texts, dataclasses.replace(TRAINING, steps=20), quiet=True)
        assert curve[-1]["kl"] < 0.8 * curve[3]["kl"]
        for (path, one), other in zip(jax.tree.leaves_with_path(model), jax.tree.leaves(after), strict=True):
            name = jax.tree_util.keystr(path)
            assert np.array_equal(one, other) != (".experts" in name or "router" in name), name


@pytest.fixture(scope="module")
def model():
    return factorize(random_model(LLAMA), 4, 2)


class TestStep:
    def gradient(self, model, batch, training=TRAINING):
        loss = functools.partial(expert_loss, model=model, batch=batch, training=training)
        return jax.jit(jax.grad(loss, has_aux=True))(trainable(model, experts=True))

    @pytest.mark.thorough
    def test_the_teacher_of_itself_is_not_diverged_from(self, texts):
        model = factorize(random_model(LLAMA), 4, 4)
        training = dataclasses.replace(TRAINING, approximate=0.0, balance=0.0)
        loss, figures = expert_loss(
            trainable(model, experts=True), model, texts.batches(2, seed=0)(0), training=training
        )
        assert abs(float(loss)) < 1e-6
        np.testing.assert_allclose(figures["agreement"], 1)
        np.testing.assert_allclose(figures["load"], 1)

    @pytest.mark.thorough
    def test_parts_of_a_batch_are_the_whole(self, model, monkeypatch):
        """Without Adam, whose first update makes as much of a gradient that is all rounding as of any other."""
        monkeypatch.setattr("griffin_jax.factor.training.make_optimizer", lambda _: optax.sgd(0.1))
        texts = pack([np.random.default_rng(3).integers(0, 64, 72).tolist()], TRAINING.length)
        training = dataclasses.replace(TRAINING, router_steps=0, batch=4, steps=1, warmup=0)
        runs = [train_factors(model, texts, dataclasses.replace(training, accumulate=n), quiet=True) for n in (1, 2)]
        for name in ("loss", "kl"):
            np.testing.assert_allclose(runs[0][1][-1][name], runs[1][1][-1][name], rtol=1e-5)
        for one, other in zip(*(jax.tree.leaves(model) for model, _ in runs), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
        changed = jax.tree.leaves(model)
        assert any(
            np.abs(one - was).max() > 1e-4 for one, was in zip(jax.tree.leaves(runs[0][0]), changed, strict=True)
        )

    @pytest.mark.slow
    def test_on_a_mesh(self, texts):
        batch = texts.batches(2, seed=0)(0)
        found = [
            self.gradient(factorize(random_model(LLAMA, mesh=mesh), 4, 2), batch) for mesh in (None, make_mesh(2, 1))
        ]
        for one, many in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(one, many, rtol=0, atol=1e-5 * max(float(jnp.abs(one).max()), 1e-3))

    @pytest.mark.slow
    def test_bfloat16_is_trained_in_float32(self, texts):
        model = factorize(random_model(LLAMA, jnp.bfloat16), 4, 2)
        gradients, figures = self.gradient(model, texts.batches(2, seed=0)(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
        assert jnp.isfinite(figures["kl"])
        after = trained(model, trainable(model, experts=True))
        assert after.layers[0].ff.experts.down.dtype == jnp.bfloat16

    def test_the_loss_of_the_text(self, texts):
        """Where no expert is left out, it is that of the dense model."""
        whole = factorize(random_model(LLAMA), 4, 4)
        training = dataclasses.replace(TRAINING, objective="ce", approximate=0.0, balance=0.0)
        batch = texts.batches(2, seed=0)(0)
        got = expert_loss(trainable(whole, experts=True), whole, batch, training=training)[0]
        np.testing.assert_allclose(got, next_token_loss(random_model(LLAMA), batch), rtol=1e-5)

    def test_integers_are_not_trained(self):
        model = factorize(random_model(LLAMA, weights=WeightFormat("int8")), 4, 2)
        with pytest.raises(ValueError, match="the experts are int8, and only floating weights are trained"):
            trainable(model, experts=True)
        assert trainable(model, experts=False)[0]["router"].shape == (4, 32)


def test_routers_are_trained_as_the_options_say():
    routers = dataclasses.replace(TRAINING, clip=0.25, beta1=0.5, beta2=0.75).routers()
    assert (routers.clip, routers.beta1, routers.beta2, routers.weight_decay) == (0.25, 0.5, 0.75, 0.0)


def test_figures_are_those_of_the_stages_of_the_run(tmp_path):
    """Another run may have trained experts in the same folder."""
    curve = Curve(tmp_path / "curve.jsonl", 4)
    for stage, first in ((ROUTERS, 0), (TOGETHER, 1)):
        curve.add(stage, first, 0, {"agreement": np.zeros(1), "load": np.zeros(2)})
    assert [line["stage"] for line in Curve(tmp_path / "curve.jsonl", 4).of(ROUTERS)] == [ROUTERS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_updates": 17}, "2 sequences of 9 tokens are too few for 17 updates"),
        ({"accumulate": 3}, "2 sequences cannot be read in 3 equal parts"),
        ({"objective": "mse"}, "objective is 'mse'"),
        ({"approximate": -1}, "approximate must be"), ({"warmup": 4}, "warmup is 4 steps of 3"),
    ],
)  # fmt: skip
def test_options_outside_their_range(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAINING, **change)


@pytest.mark.parametrize("change", [{"active": 5}, {"grouping": "x"}, {"oracle": "x"}, {"scale": 0.0}])
def test_factors_outside_their_range(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        FactorConfig(**change)
