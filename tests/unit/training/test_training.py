"""Packing, the step, and a loop that goes on as if it had not been interrupted."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from griffin_jax.training.config import TrainingConfig
from griffin_jax.training.data import Batch, pack
from griffin_jax.training.loop import init_state, make_optimizer, make_step, train
from griffin_jax.training.loss import next_token_loss, next_token_losses

CONFIG = TrainingConfig(steps=6, batch=2, length=4, learning_rate=0.1, warmup=2)


def quadratic(parameters, frozen, batch):
    return jnp.mean(jnp.square(parameters["w"] @ batch - frozen))


def batches(step: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(step).normal(size=3), jnp.float32)


def begin():
    optimizer = make_optimizer(CONFIG)
    state = init_state({"w": jnp.asarray([1.0, -2.0, 0.5])}, optimizer)
    return jax.jit(make_step(quadratic, optimizer)), state


def same(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


class TestPacking:
    def test_texts_lie_one_after_the_other(self):
        packed = pack([[1, 2, 3], [4, 5], [6, 7, 8, 9]], 4, end=0)
        np.testing.assert_array_equal(packed.tokens, [[1, 2, 3, 0], [4, 5, 0, 6], [7, 8, 9, 0]])
        np.testing.assert_array_equal(packed.lengths, [4, 4, 4])

    def test_only_the_last_sequence_is_shorter(self):
        packed = pack([[1, 2, 3], [4, 5, 6]], 4)
        np.testing.assert_array_equal(packed.lengths, [4, 2])
        np.testing.assert_array_equal(packed.tokens[1, :2], [5, 6])

    def test_a_token_that_predicts_nothing_is_left_out(self):
        assert len(pack([[1, 2, 3, 4, 5]], 4)) == 1

    def test_too_few_tokens(self):
        with pytest.raises(ValueError, match="1 texts have 1 tokens"):
            pack([[1]], 4)

    def test_every_sequence_is_in_every_epoch_once(self):
        batch = pack([[10 * n, 10 * n + 1] for n in range(6)], 2).batches(3, seed=5)
        epochs = [np.concatenate([batch(step).tokens[:, 0] for step in (first, first + 1)]) for first in (0, 2)]
        for epoch in epochs:
            assert sorted(epoch) == [0, 10, 20, 30, 40, 50]
        assert list(epochs[0]) != list(epochs[1])
        np.testing.assert_array_equal(batch(3).tokens, batch(3).tokens)

    def test_the_digest_tells_texts_apart(self):
        assert pack([[1, 2]], 2).digest != pack([[1, 3]], 2).digest


class TestLoss:
    @pytest.mark.thorough
    def test_padding_does_not_count(self, tiny):
        tokens = np.asarray([[1, 5, 7, 9, 4, 8]], np.int32)
        changed = tokens.copy()
        changed[0, 4:] = 99
        found = [next_token_loss(tiny.llm.model, Batch(t, np.asarray([4], np.int32))) for t in (tokens, changed)]
        np.testing.assert_array_equal(found[0], found[1])

    def test_it_is_the_mean_negative_log_likelihood(self, tiny):
        tokens = np.asarray([[1, 5, 7, 9, 4, 8]], np.int32)
        logits = np.asarray(tiny.llm.logits(tokens, prompt_length=6, density=1.0), np.float64)[0]
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = -scores[np.arange(5), tokens[0, 1:]]
        losses, counted = next_token_losses(tiny.llm.model, Batch(tokens, np.asarray([6], np.int32)))
        np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
        assert counted.sum() == 5


class TestStep:
    def test_it_is_that_of_optax(self):
        step, state = begin()
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 6, 0.01), 0.9, 0.999, weight_decay=0.0),
        )
        parameters, own = {"w": jnp.asarray([1.0, -2.0, 0.5])}, None
        own = optimizer.init(parameters)
        for number in range(6):
            state, _ = step(state, jnp.float32(3.0), batches(number))
            gradients = jax.grad(quadratic)(parameters, jnp.float32(3.0), batches(number))
            updates, own = optimizer.update(gradients, own, parameters)
            parameters = optax.apply_updates(parameters, updates)
        np.testing.assert_allclose(state.parameters["w"], parameters["w"], rtol=1e-6)
        assert state.step == 6

    def test_several_at_once_are_those_alone(self):
        step, state = begin()
        both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
        together = jax.jit(jax.vmap(step, in_axes=(0, None, 0)))
        alone = [state, state]
        for number in range(3):
            data = jnp.stack([batches(number), batches(number + 50)])
            both, losses = together(both, jnp.float32(3.0), data)
            alone = [step(one, jnp.float32(3.0), batch)[0] for one, batch in zip(alone, data, strict=True)]
        assert losses.shape == (2,)
        for row, one in enumerate(alone):
            np.testing.assert_allclose(both.parameters["w"][row], one.parameters["w"], rtol=1e-6)


class TestLoop:
    def test_a_run_that_was_interrupted_gives_what_it_would_have_given(self, tmp_path):
        step, state = begin()
        run = functools.partial(train, step, state, jnp.float32(3.0), about="this", quiet=True)
        unbroken, losses = run(batches, 6)
        assert len(losses) == 6
        assert losses[-1] < losses[0]

        def breaking(number: int) -> jax.Array:
            if number == 4:
                raise KeyboardInterrupt
            return batches(number)

        with pytest.raises(KeyboardInterrupt):
            run(breaking, 6, folder=tmp_path / "run", save_every=3)
        resumed, more = run(batches, 6, folder=tmp_path / "run", save_every=3)
        assert more == losses[3:]
        same(resumed, unbroken)
        # And a run that is complete makes no update.
        again, none = run(batches, 6, folder=tmp_path / "run", save_every=3)
        assert none == []
        same(again, unbroken)

    def test_a_checkpoint_of_something_else_is_refused(self, tmp_path):
        step, state = begin()
        run = functools.partial(train, step, state, jnp.float32(3.0), batches, 2, folder=tmp_path / "run", quiet=True)
        run(about="this")
        with pytest.raises(ValueError, match="checkpoint of another run"):
            run(about="that")

    def test_a_loss_that_is_not_finite_ends_it(self):
        step, state = begin()
        with pytest.raises(FloatingPointError, match="loss of step 0 is nan"):
            train(step, state, jnp.float32(np.nan), batches, 2, quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be"), ({"learning_rate": 0.0}, "learning_rate must be"),
        ({"final": 2.0}, "final must be"), ({"warmup": 7}, "warmup is 7 steps of 6"),
        ({"steps": 1, "warmup": 1}, "the only step would be the first of the warm-up"),
        ({"beta2": 1.0}, "beta2 must be"), ({"length": 1}, "length must be"),
    ],
)  # fmt: skip
def test_options_outside_their_range(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_gradients_are_those_of_differences(tiny):
    """Through the whole model, with respect to what is added to one norm."""
    batch = Batch(np.asarray([[1, 5, 7, 9, 4, 8]], np.int32), np.asarray([6], np.int32))

    def loss(scale):
        model = jax.tree.map(lambda leaf: leaf, tiny.llm.model)
        model.layers[1].ff_norm.scale[...] = model.layers[1].ff_norm.scale[...] * scale
        return next_token_loss(model, batch)

    check_grads(loss, (jnp.float32(1.0),), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
