"""Rows in two formats: what is pruned, what is masked, and what the rows stand for in float32 compute the same."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_and_slow
from flax import nnx
from reference import assert_close, oracle_topk

import griffin_jax as gj
from griffin_jax.extensions.mixed import MixedFormat, coarse, mask_mixed, prune_mixed, select_mixed
from griffin_jax.generation import jitted
from griffin_jax.generation.scoring import teacher_force
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.weights import WeightFormat
from griffin_jax.parallel.mesh import make_mesh

GATED = ModelConfig(
    family="llama", vocab_size=101, width=32, ff_width=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=256,
)  # fmt: skip
PLAIN = dataclasses.replace(GATED, gated=False, ff_bias=True, activation="xielu")
MIXED = MixedFormat.parse("int8+int4:16@0.25")


@pytest.fixture(scope="module", params=first_and_slow(1, GATED, PLAIN), ids=["gated", "biases"])
def model(request) -> gj.Transformer:
    found = random_model(request.param, weights=MIXED.fine)
    for layer in found.layers:
        if layer.ff.down_bias is not None:
            layer.ff.down_bias[...] = jnp.linspace(-1, 1, 32)
    return found


@pytest.fixture(scope="module")
def prefilled(model) -> gj.Prefilled:
    prompts = jnp.asarray(np.random.default_rng(0).integers(3, 101, (2, 16)), jnp.int32)
    return jitted.prefill(model, prompts, jnp.asarray([16, 9]), max_new_tokens=8)


@pytest.mark.parametrize("shared", [True, False])
def test_the_best_are_precise_and_the_next_are_not(prefilled, shared):
    config = gj.GriffinConfig(0.5, shared=shared)
    precise, others = select_mixed(prefilled.statistics, config, MIXED)
    assert precise is not None
    assert others is not None
    assert (precise.kept, others.kept) == ((6,) * 3, (18,) * 3)
    assert precise.shared == others.shared == shared
    kept = gj.select(prefilled.statistics, config)
    best = gj.select(prefilled.statistics, gj.GriffinConfig(0.125, shared=shared))
    for layer in range(3):
        both = np.concatenate([precise[layer], others[layer]], axis=-1)
        np.testing.assert_array_equal(np.sort(both, axis=-1), kept[layer])
        np.testing.assert_array_equal(precise[layer], best[layer])
    squares = np.asarray(prefilled.statistics.squares[0])
    if not shared:
        np.testing.assert_array_equal(precise[0][1], oracle_topk(squares[1], 6))


def wide(model: gj.Transformer, few: gj.Transformer, precise, others, row: int | None) -> gj.Transformer:
    """The model in float32, with the rows of each neuron as they stand in its format, and zeros for the rest."""
    found: gj.Transformer = jax.tree.map(lambda leaf: leaf, model)
    for number, (layer, rough) in enumerate(zip(found.layers, few.layers, strict=True)):
        ff, chosen = layer.ff, np.zeros(48, int)
        for experts, mark in ((precise, 1), (others, 2)):
            if experts is not None:
                indices = np.asarray(experts[number])
                chosen[indices if indices.ndim == 1 else indices[row]] = mark

        def pick(mine: jax.Array, other: jax.Array) -> jax.Array:
            of = chosen[:, None]  # noqa: B023
            return jnp.where(of == 1, mine, jnp.where(of == 2, other, 0))

        gate_up, down = (
            pick(ff.gate_up_matrix(), rough.ff.gate_up_matrix()),
            pick(ff.down_matrix(), rough.ff.down_matrix()),
        )
        ff.gate_up, ff.gate_up_scale, ff.down = nnx.Param(gate_up), None, nnx.Param(down)
        ff.down_scale = ff.down_row_scale = None
    return found


@pytest.mark.parametrize("share", first_and_slow(1, 0.25, 0))
@pytest.mark.parametrize("density", first_and_slow(1, 0.5, 1.0))
@pytest.mark.parametrize("shared", first_and_slow(1, False, True))
def test_pruned_and_masked_are_what_the_rows_stand_for(model, prefilled, shared, density, share):
    few, mixed = coarse(model, MIXED.coarse), dataclasses.replace(MIXED, share=share)
    chosen = select_mixed(prefilled.statistics, gj.GriffinConfig(density, shared=shared), mixed)
    assert (chosen[0] is None) == (share == 0)
    answers = jnp.asarray(np.random.default_rng(1).integers(3, 101, (2, 5)), jnp.int32)
    lengths = jnp.asarray([5, 5])

    def hidden(of: gj.Transformer) -> np.ndarray:
        return np.asarray(teacher_force(of, prefilled, answers, lengths)[0])

    pruned = hidden(prune_mixed(model, few, *chosen))
    assert_close(hidden(mask_mixed(model, few, *chosen)), pruned)
    for row in range(2):
        assert_close(pruned[row], hidden(wide(model, few, *chosen, row))[row])


def test_it_decodes_and_its_memory_is_used_again(model, prefilled):
    few = coarse(model, MIXED.coarse)
    precise, others = select_mixed(prefilled.statistics, gj.GriffinConfig(0.5, shared=True), MIXED)

    def answer(pruned: gj.Transformer) -> list:
        read = jax.tree.map(jnp.copy, prefilled)
        return np.asarray(jitted.decode(pruned, jitted.init_decode(read), np.int32(8)).tokens).tolist()

    first = prune_mixed(model, few, precise, others)
    assert first.neurons == (24,) * 3
    tokens, old = answer(first), first.layers[0].ff.rest.down[...]
    second = prune_mixed(model, few, precise, others, reuse=first)
    assert old.is_deleted()
    assert answer(second) == tokens


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_on_a_mesh(shared):
    mesh = make_mesh(data=2, model=2)
    here, there = (random_model(GATED, weights=MIXED.fine, mesh=each) for each in (None, mesh))
    prompts = jnp.asarray(np.random.default_rng(0).integers(3, 101, (2, 16)), jnp.int32)
    config, found = gj.GriffinConfig(0.5, shared=shared, groups=2), []
    for model in (here, there):
        read = jitted.prefill(model, prompts, jnp.asarray([16, 9]), max_new_tokens=8)
        chosen, few = select_mixed(read.statistics, config, MIXED), coarse(model, MIXED.coarse)
        answers = prompts[:, :5], jnp.asarray([5, 5])
        for make in (prune_mixed, mask_mixed):
            found.append(np.asarray(teacher_force(make(model, few, *chosen), read, *answers)[0]))
    for other in found[1:]:
        assert_close(other, found[0])


def test_all_but_the_feed_forward_rows_are_the_models_own(model):
    few = coarse(model, WeightFormat.parse("int4"))
    assert np.abs(few.layers[0].ff.gate_up[...]).max() == 8
    assert few.layers[1].attention.out[...] is model.layers[1].attention.out[...]
    assert few.embedding[...] is model.embedding[...]
    assert model.layers[0].ff.gate_up[...].dtype == jnp.int8


def test_what_cannot_be_mixed(model, prefilled):
    few = coarse(model, MIXED.coarse)
    with pytest.raises(ValueError, match='by their rank, which method "topk" gives; method is'):
        select_mixed(prefilled.statistics, gj.GriffinConfig(0.5, "random"), MIXED)
    with pytest.raises(ValueError, match="at least one neuron"):
        prune_mixed(model, few, None, None)
    with pytest.raises(ValueError, match="groups of 24 do not divide"):
        coarse(model, WeightFormat.parse("int4:24"))
    chosen = select_mixed(prefilled.statistics, gj.GriffinConfig(0.5, shared=True), MIXED)
    pruned = prune_mixed(model, few, *chosen)
    with pytest.raises(ValueError, match="holds its neurons in two groups"):
        coarse(pruned)


def test_names():
    assert str(MIXED) == "int8+int4:16@0.25"
    assert MixedFormat.parse("int8") == WeightFormat.parse("int8")
    assert MIXED.precise(gj.GriffinConfig((0.5, 0.25))).density == (0.125, 0.0625)
    # 35 of 1,000 neurons, although a tenth of 0.35 is less in float64.
    tenth = dataclasses.replace(MIXED, share=0.1).precise(gj.GriffinConfig(0.35))
    assert 0.1 * 0.35 < 0.035
    assert tenth.kept([1000]) == (35,)
