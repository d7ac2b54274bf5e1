"""The transformer equals Hugging Face's, with and without a cache, padded and not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_and_slow
from reference import TinyLlama, assert_close, stepwise_logits, torch_intermediates, torch_logits

import griffin_jax as gj
from griffin_jax.generation import jitted
from griffin_jax.griffin.statistic import statistic
from griffin_jax.model.assembly import random_model
from griffin_jax.model.feed_forward import ACTIVATIONS

# What else there is, and all other families: tests/parity/test_family_parity.py.
VARIANTS = {
    "gqa": {},
    "mqa, biases, tied": {
        "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "yarn rope": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name.replace(" ", "_"))
def pair(request, tmp_path_factory) -> TinyLlama:
    return TinyLlama.build(tmp_path_factory.mktemp("variant"), **VARIANTS[request.param])


def test_whole_sequence(pair, rng):
    tokens = rng.integers(0, 101, (2, 70)).astype(np.int32)
    assert_close(stepwise_logits(pair.llm.model, [tokens], 70), torch_logits(pair.torch, tokens))


def test_token_by_token_through_the_cache(pair, rng):
    tokens = rng.integers(0, 101, (2, 24)).astype(np.int32)
    steps = np.split(tokens, [10, *range(20, 24)], axis=1)
    assert_close(stepwise_logits(pair.llm.model, steps, 40), torch_logits(pair.torch, tokens))


def test_padding_anywhere_changes_nothing(pair, rng):
    tokens = rng.integers(0, 101, (1, 20)).astype(np.int32)
    expected = torch_logits(pair.torch, tokens)
    gaps = np.sort(rng.permutation(33)[:20])
    padded = np.full((1, 33), -1, np.int32)
    padded[:, gaps] = tokens
    assert_close(stepwise_logits(pair.llm.model, [padded], 33)[:, gaps], expected)
    assert_close(stepwise_logits(pair.llm.model, [padded[:, :20], padded[:, 20:]], 50)[:, gaps], expected)


def test_ragged_batch(pair, rng):
    rows = [rng.integers(0, 101, n).astype(np.int32) for n in (1, 7, 30)]
    tokens, lengths = gj.pad(rows, 32)
    prefilled = jitted.prefill(pair.llm.model, tokens, lengths, max_new_tokens=4, collect=False)
    for index, row in enumerate(rows):
        assert_close(np.asarray(prefilled.logits[index]), torch_logits(pair.torch, [row])[0, -1])


@pytest.mark.thorough
def test_observers_see_the_intermediates_of_real_tokens_and_change_nothing(tiny, rng):
    model = tiny.llm.model
    tokens, lengths = rng.integers(0, 101, (2, 12)).astype(np.int32), np.array([12, 7])
    positions = np.where(np.arange(12) < lengths[:, None], np.arange(12), gj.EMPTY).astype(np.int32)

    def read(observe):
        cache = gj.empty_cache(model.config, 2, 12)
        return model(jnp.asarray(tokens), jnp.asarray(positions), cache, observe=observe)

    plain, _, nothing = read(None)
    output, _, seen = read(lambda layer, z, real: (z, real) if layer != 0 else None)
    assert nothing == ()
    assert seen[0] is None
    np.testing.assert_array_equal(output, plain)
    for row, length in enumerate(lengths):
        expected = torch_intermediates(tiny.torch, tokens[row, :length].tolist())
        z, real = seen[1]
        assert_close(np.asarray(z[row, :length]), expected[1])
        np.testing.assert_array_equal(real[row], positions[row] != gj.EMPTY)


def test_padded_queries_stay_finite(tiny):
    padded = np.full((1, 8), -1, np.int32)
    assert np.isfinite(stepwise_logits(tiny.llm.model, [padded], 8)).all()


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "xielu"])
def test_activations_are_rounded_once(activation):
    """Of all finite numbers of bfloat16, and of float64 not at all."""
    config = gj.ModelConfig("llama", 7, 2, 3, 1, 1, 1, 2, 8, activation=activation)
    layer = random_model(config, jnp.bfloat16).layers[0].ff
    numbers = jax.lax.bitcast_convert_type(jnp.arange(1 << 16, dtype=jnp.uint16), jnp.bfloat16)
    numbers = numbers[jnp.isfinite(numbers)]
    expected = layer._curved(numbers.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(layer._curved(numbers), expected)
    with jax.enable_x64(True):
        assert layer._curved(jnp.asarray([0.3], jnp.float64)).dtype == jnp.float64


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::griffin_jax.NarrowingWarning")
@pytest.mark.parametrize("dtype", first_and_slow(1, "bfloat16", "float16"))
def test_narrow_weights_compute_near_float32(tiny, rng, dtype):
    tokens = rng.integers(0, 101, (1, 20)).astype(np.int32)
    narrow = gj.load(tiny.folder, dtype).model
    assert narrow.dtype == jnp.dtype(dtype)
    cache = gj.empty_cache(narrow.config, 1, 20, narrow.dtype)
    positions = jnp.arange(20, dtype=jnp.int32)[None]
    x, cache, squares = narrow(jnp.asarray(tokens), positions, cache, observe=statistic)
    logits, expected = np.asarray(narrow.logits(x)), torch_logits(tiny.torch, tokens)
    assert logits.dtype == squares[0].dtype == np.float32
    assert np.linalg.norm(logits - expected) < 0.1 * np.linalg.norm(expected)
