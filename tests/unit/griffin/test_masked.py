"""Masked models against pruned ones: the same scores of given tokens, without a copy of any weight."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_and_slow
from reference import assert_close, unchecked

import griffin_jax as gj
from griffin_jax.generation import jitted
from griffin_jax.griffin.masked import mask
from griffin_jax.model.assembly import random_model
from griffin_jax.model.sharding import model_shardings
from griffin_jax.parallel.mesh import make_mesh

PROMPTS = [[5, 6, 7], list(range(3, 40)), [9, 8, 7, 60, 61, 62, 63, 64, 65, 5]]
ANSWERS = [[8, 9, 10, 11], [41, 42], [66, 67, 68, 69, 70]]
GATED = gj.ModelConfig(
    family="llama", vocab_size=101, width=32, ff_width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    norm="rms", gated=True, activation="silu", max_positions=256, rotary=gj.Rotary(),
)  # fmt: skip
PLAIN = dataclasses.replace(
    GATED, family="gpt_neox", gated=False, activation="gelu", norm="layer", ff_bias=True, parallel=True
)


def model_of(config: gj.ModelConfig) -> gj.Transformer:
    """Random weights, biases among them."""
    model = random_model(config, seed=3)
    keys = iter(jax.random.split(jax.random.key(1), 4 * len(model.layers)))
    for layer in model.layers:
        for bias in (layer.ff.gate_up_bias, layer.ff.down_bias):
            if bias is not None:
                bias[...] = 0.3 * jax.random.normal(next(keys), bias.shape)
    return model


@pytest.fixture(scope="module", params=[GATED, PLAIN], ids=["gated", "plain with biases"])
def model(request) -> gj.Transformer:
    return model_of(request.param)


def prefilled(model: gj.Transformer, rows: int = 16) -> gj.Prefilled:
    tokens, lengths = map(jnp.asarray, gj.pad(PROMPTS, 48))
    return jitted.prefill(model, tokens, lengths, max_new_tokens=8, rows=rows)


def calibration(model: gj.Transformer) -> tuple[jax.Array, ...]:
    drawn = np.random.default_rng(0).normal(size=(len(model.layers), 20, 48))
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    return tuple(jnp.asarray(layer, jnp.float16) for layer in drawn)


def refits(model: gj.Transformer, state: gj.Prefilled) -> dict[str, gj.Reconstruction | None]:
    return {
        "none": None,
        "rows": gj.Reconstruction(state.rows, 0.5),
        "calibration": gj.Reconstruction(state.rows, 0.5, calibration(model), weight=30.0),
    }


def forced(model: gj.Transformer, state: gj.Prefilled, collect: bool = False) -> tuple[np.ndarray, gj.Statistics]:
    """Logits of the answers, zero where they are padded, and their statistics."""
    tokens, lengths = map(jnp.asarray, gj.pad(ANSWERS, 8))
    hidden, statistics = jitted.teacher_force(model, state, tokens, lengths, collect=collect)
    real = np.arange(8) < np.asarray(lengths)[:, None]
    return np.where(real[..., None], model.logits(hidden), 0), statistics


@pytest.mark.parametrize("refit", first_and_slow(2, "none", "rows", "calibration"))
@pytest.mark.parametrize("shared", first_and_slow(1, False, True))
def test_scores_are_those_of_the_pruned_model(model, shared, refit):
    state = prefilled(model)
    experts = gj.select(state.statistics, gj.GriffinConfig((0.25, 0.5), shared=shared))
    change = refits(model, state)[refit]
    pruned, statistics = forced(gj.prune(model, experts, refit=change), state, collect=True)
    masked, more = forced(mask(model, experts, refit=change), state, collect=True)
    assert_close(masked, pruned)
    assert np.abs(pruned - forced(model, state)[0]).max() > 1e-2 * np.abs(pruned).max()
    if change is not None:
        assert np.abs(pruned - forced(gj.prune(model, experts), state)[0]).max() > 1e-3 * np.abs(pruned).max()
    for few, every, indices in zip(statistics.squares, more.squares, experts, strict=True):
        chosen = np.broadcast_to(indices, (3, indices.shape[-1]))
        np.testing.assert_allclose(np.take_along_axis(np.asarray(every), chosen, axis=1), few, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.sum(every, axis=1), np.sum(few, axis=1), rtol=1e-5)


def test_one_set_for_three_sequences():
    model = model_of(GATED)
    state = prefilled(model)
    shared = gj.select(state.statistics, gj.GriffinConfig(0.5, shared=True))
    alone = gj.ExpertNeurons(tuple(indices[None] for indices in shared), shared.neurons)
    change = refits(model, state)["calibration"]
    assert_close(
        forced(mask(model, alone, refit=change), state)[0], forced(gj.prune(model, shared, refit=change), state)[0]
    )


def test_every_neuron_is_the_full_model(model):
    state = prefilled(model)
    everything = gj.select(state.statistics, gj.GriffinConfig(1.0))
    assert_close(forced(mask(model, everything, refit=refits(model, state)["rows"]), state)[0], forced(model, state)[0])


@pytest.mark.thorough
def test_bfloat16():
    """As far from float32 as the pruned model is."""
    full = model_of(GATED)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), full)
    state, exact = prefilled(narrow), prefilled(full)
    experts = gj.select(exact.statistics, gj.GriffinConfig(0.5))
    expected = forced(gj.prune(full, experts, refit=refits(full, exact)["calibration"]), exact)[0]
    found = [
        np.abs(forced(make(narrow, experts, refit=refits(narrow, state)["calibration"]), state)[0] - expected).max()
        for make in (gj.prune, mask)
    ]
    assert found[1] < 2 * found[0] < 0.1 * np.abs(expected).max()


def test_weights_are_the_models_own(model):
    state = prefilled(model)
    experts = gj.select(state.statistics, gj.GriffinConfig(0.5))
    masked = mask(model, experts, refit=refits(model, state)["rows"])
    assert masked.neurons == model.neurons
    for layer, own, rows in zip(masked.layers, model.layers, state.rows, strict=True):
        assert layer.ff.down[...] is own.ff.down[...]
        assert layer.ff.gate_up[...] is own.ff.gate_up[...]
        assert layer.ff.mask is not None
        assert layer.ff.mask.changes[0].left is rows
        assert own.ff.mask is None


@pytest.mark.usefixtures("shapes_for_arrays")
@pytest.mark.parametrize("refit", ["none", "calibration"])
def test_memory_has_no_copy_of_weights(refit):
    """What the program needs beside its inputs is a fraction of what the kept rows of one layer are."""
    batch, config = 8, dataclasses.replace(GATED, width=64, ff_width=2048)
    model = random_model(config)
    tokens, lengths = jnp.ones((batch, 16), jnp.int32), jnp.full((batch,), 16)
    state = jitted.prefill(model, tokens, lengths, max_new_tokens=4, rows=4)
    experts = gj.select(state.statistics, gj.GriffinConfig(0.5))
    change = None if refit == "none" else gj.Reconstruction(state.rows, calibration=tuple(r[0] for r in state.rows))
    answers, length = jnp.ones((batch, 4), jnp.int32), jnp.full((batch,), 4)

    def temporary(one: gj.Transformer) -> int:
        with unchecked():
            analysis = jitted.teacher_force.lower(one, state, answers, length).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    kept_rows_of_a_layer = 4 * batch * 3 * 1024 * 64
    assert temporary(mask(model, experts, refit=change)) < temporary(model) + kept_rows_of_a_layer / 4


def test_under_jit():
    model = model_of(GATED)
    state = prefilled(model)
    experts = gj.select(state.statistics, gj.GriffinConfig(0.5))
    change = refits(model, state)["calibration"]

    @jax.jit
    def masked(model: gj.Transformer, experts: gj.ExpertNeurons, change: gj.Reconstruction) -> gj.Transformer:
        return mask(model, experts, refit=change)

    assert_close(
        forced(masked(model, experts, change), state)[0], forced(gj.prune(model, experts, refit=change), state)[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_on_a_mesh(shared):
    """Masks are divided as neurons and batches are, and the scores are those of one device."""
    model, mesh = model_of(GATED), make_mesh(data=2, model=2)
    divided = jax.device_put(model, model_shardings(model, mesh))
    config = gj.GriffinConfig(0.5, shared=shared)

    def scores(one: gj.Transformer) -> tuple[gj.Transformer, np.ndarray]:
        tokens, lengths = map(jnp.asarray, gj.pad([*PROMPTS, PROMPTS[0]], 48))
        state = jitted.prefill(one, tokens, lengths, max_new_tokens=8, rows=16)
        masked = mask(one, gj.select(state.statistics, config), refit=refits(one, state)["calibration"])
        answers, lengths = map(jnp.asarray, gj.pad([*ANSWERS, ANSWERS[0]], 8))
        hidden, _ = jitted.teacher_force(masked, state, answers, lengths)
        real = np.arange(8) < np.asarray(lengths)[:, None]
        return masked, np.where(real[..., None], masked.logits(hidden), 0)

    (_, expected), (masked, found) = scores(model), scores(divided)
    assert_close(found, expected)
    found = masked.layers[0].ff.mask
    assert found is not None
    kept = found.kept
    assert kept.sharding.shard_shape(kept.shape) == ((24,) if shared else (2, 24))


def test_refusals():
    model = model_of(GATED)
    state = prefilled(model)
    experts = gj.select(state.statistics, gj.GriffinConfig(0.5))
    masked = mask(model, experts)
    for make in (gj.prune, mask):
        with pytest.raises(ValueError, match="this model is masked; prune or mask the full model instead"):
            make(masked, experts)
    with pytest.raises(ValueError, match="prune the full model instead"):
        mask(gj.prune(model, experts), experts)
    with pytest.raises(ValueError, match="these experts are for a model of 1 layers"):
        mask(model, gj.ExpertNeurons(experts.indices[:1], experts.neurons[:1]))
    with pytest.raises(ValueError, match="prefill with rows=N"):
        mask(model, experts, refit=gj.Reconstruction(()))
