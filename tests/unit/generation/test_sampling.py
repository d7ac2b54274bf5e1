"""Samplers: which tokens a filter leaves, and which numbers they take."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import griffin_jax as gj
from griffin_jax.generation import jitted
from griffin_jax.generation.config import GenerationConfig
from griffin_jax.generation.decode import column_keys
from griffin_jax.generation.sampling import Sample, first_largest, sampler
from griffin_jax.llm.request import Request

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 256, 299, 300, 301, 2**40])
@pytest.mark.parametrize("values", ["different", "tied"])
def test_top_k_keeps_what_is_at_least_the_kth_largest(k, values):
    logits = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    if values == "tied":
        logits = np.round(logits)
    smallest = np.sort(logits, axis=-1)[:, ::-1][:, [min(k, 300) - 1]]
    kept = np.isfinite(Sample(top_k=k).filter(jnp.asarray(logits)))
    np.testing.assert_array_equal(kept, logits >= smallest)


def test_a_top_k_that_is_known_only_under_jit():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 300)), jnp.float32)
    found = jax.jit(lambda k: Sample(top_k=k).filter(logits))(70)
    np.testing.assert_array_equal(found, jax.jit(lambda s: s.filter(logits))(Sample(top_k=70)))
    assert jax.tree.map(lambda x: 2 * x, Sample(0.5, top_k=3)) == Sample(1.0, top_k=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": np.float32("nan")}, "temperature must be a finite number of at least 0, got"),
        ({"temperature": NAN}, "temperature must be"),
        ({"temperature": INFINITE}, "temperature must be"),
        ({"temperature": np.float64(-1)}, "temperature must be"),
        ({"temperature": jnp.float32(-0.5)}, "temperature must be"),
        ({"temperature": "1"}, "temperature must be"),
        ({"temperature": True}, "temperature must be"),
        ({"temperature": 1, "top_p": np.float32(1.5)}, r"top_p must be in \(0, 1\], got"),
        ({"temperature": 1, "top_p": jnp.float32("nan")}, "top_p must be"),
        ({"temperature": 1, "min_p": np.float16(-0.5)}, r"min_p must be in \[0, 1\], got"),
        ({"temperature": 1, "min_p": jnp.bfloat16(2)}, "min_p must be"),
        ({"temperature": 1, "top_k": np.int64(0)}, "top_k must be a whole number of at least 1, got"),
        ({"temperature": 1, "top_k": jnp.float32(3)}, "top_k must be"),
        ({"max_new_tokens": np.float32(4)}, "max_new_tokens must be"),
        ({"max_new_tokens": np.int64(0)}, "max_new_tokens must be"),
        ({"max_new_tokens": np.bool_(True)}, "max_new_tokens must be"),
        ({"seed": jnp.float32(1)}, "seed must be"),
        ({"seed": b"7"}, "seed must be"),
        ({"density": jnp.float32("nan")}, r"density must be in \(0, 1\], got"),
        ({"density": np.array([0.5, 2])}, "density must be"),
        ({"round_to": np.float64(2)}, "round_to must be"),
        ({"shared": "yes"}, "shared must be True or False, got 'yes'"),
        ({"chat": 1}, "chat must be True or False"),
        ({"ridge": np.float32("nan")}, "ridge must be"),
        ({"ridge": jnp.float32(0)}, "ridge must be"),
        ({"calibration_weight": np.float64("inf")}, "weight of calibration rows must be"),
        ({"prior_weight": np.float32(2)}, "prior_weight must be in"),
        ({"refit": np.int64(-1)}, "refit must be True, False or a whole number of rows of at least 0, got"),
        ({"speculative": np.float32(1)}, "speculative must be"),
        ({"refresh_every": jnp.int32(0)}, "refresh_every must be"),
    ],
)
def test_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Request.of("generate", **options)
    assert "\n" not in str(caught.value)


def test_scalars_of_numpy_and_jax_are_numbers():
    request = Request.of(
        "generate",
        density=np.float64(0.25),
        round_to=jnp.int32(2),
        shared=np.bool_(True),
        refit=np.int64(7),
        ridge=np.float32(2),
        max_new_tokens=np.int64(4),
        temperature=jnp.float32(0.5),
        top_k=np.int8(5),
        top_p=np.float32(0.5),
        min_p=jnp.float32(0.25),
        seed=np.arange(3),
    )
    assert request.griffin == gj.GriffinConfig(0.25, shared=True, round_to=2)
    assert request.generation == GenerationConfig(4, 0.5, 5, 0.5, 0.25, seed=(0, 1, 2))
    assert (type(request.extensions.refit), type(request.extensions.ridge)) == (int, float)
    assert type(request.generation.max_new_tokens) is int
    assert sampler(np.float32(0)) == gj.Greedy()


def test_answers_take_such_numbers(tiny):
    plain = tiny.llm.generate([5, 6], max_new_tokens=4, temperature=0.5, top_k=5, seed=3).tokens
    numpy = {"max_new_tokens": np.int64(4), "temperature": np.float32(0.5), "top_k": np.int64(5), "seed": jnp.int32(3)}
    assert tiny.llm.generate(np.array([5, 6]), **numpy).tokens == plain
    with pytest.raises(ValueError, match="prompt 0 is b'hello'; give text"):
        tiny.llm.generate(b"hello")
    for prompts in ([b"hello"], [bytearray(b"he")], [[5], b"a"]):
        with pytest.raises(ValueError, match="give text, token ids"):
            tiny.llm.generate(prompts)


def test_the_lowest_temperatures_leave_the_most_probable_token():
    """Also those that are zero in float32."""
    logits = jnp.asarray([[0.5, 2.0, -1.0]])
    for temperature in (1e-38, 1e-46):
        np.testing.assert_array_equal(gj.Sample(temperature).distribution(logits), [[0, 1, 0]])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_first_of_the_largest_is_found(rng, dtype):
    logits = np.asarray(rng.integers(-3, 4, (5, 7, 40)), dtype)
    logits[0, 0], logits[0, 1], logits[0, 2, 1:] = -np.inf, np.inf, -np.inf
    found = jax.jit(first_largest)(logits)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argmax(logits.astype(np.float32), axis=-1))


def test_what_is_no_number_gives_a_token_all_the_same():
    assert 0 <= int(first_largest(jnp.asarray([0.0, np.nan, 1.0]))) < 3


def test_tokens_are_drawn_independently_of_neurons(tiny):
    """With the seed of a sequence neurons are drawn, too, and its tokens may not have their random numbers."""
    prefilled = jitted.prefill(tiny.llm.model, jnp.asarray([[5, 6, 7]]), jnp.asarray([3]), max_new_tokens=4)
    seeds = jnp.asarray([7])
    state = gj.init_decode(prefilled, seed=seeds)
    experts = gj.select(prefilled.statistics, gj.GriffinConfig(0.5, "random"), seed=seeds)
    for column in range(2):
        noise = jax.random.gumbel(column_keys(state, column)[0], (1, experts.neurons[column]))
        best = np.sort(np.argsort(-np.asarray(noise)[0])[: experts.kept[column]])
        assert list(best) != sorted(np.asarray(experts[column])[0].tolist())
