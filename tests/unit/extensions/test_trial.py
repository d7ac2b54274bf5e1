"""What several densities do on prompts' last tokens in one pass is what pruned models do there, one after the other."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close

import griffin_jax as gj
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.extensions.trial import try_pruners
from griffin_jax.generation import jitted
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig, Routing
from griffin_jax.model.weights import WeightFormat
from griffin_jax.parallel.mesh import make_mesh

DENSE = ModelConfig("llama", 101, 32, 48, 2, 4, 2, 8, 128)
ROUTING = Routing(6, 2, 20, normalised=True, shared_width=16, shared_gate=True, dense_layers=(1,))
ROUTED = ModelConfig("qwen2_moe", 101, 32, 48, 2, 4, 2, 8, 128, routing=ROUTING)
TRIAL, DENSITIES = 4, (0.5, 0.75)


@pytest.fixture
def prompts(rng) -> list[list[int]]:
    # The second ends where it is padded, within as many tokens as a trial has.
    return [rng.integers(3, 101, length).tolist() for length in (24, 22, 9, 17)]


def log_p(model: gj.Transformer, prefilled: gj.Prefilled, tokens: list[int]) -> np.ndarray:
    answers, lengths = np.asarray([[*tokens, 0]], np.int32), np.asarray([TRIAL + 1], np.int32)
    hidden, _ = jitted.teacher_force(model, prefilled, answers, lengths)
    return np.asarray(jax.nn.log_softmax(model.logits(hidden[:, 1:]))[0], np.float64)


def one_by_one(model: gj.Transformer, prompt: list[int], config: gj.GriffinConfig, seed: int = 0) -> np.ndarray:
    """The divergences of a prompt alone, of which the model reads nothing but what comes before."""
    tokens, lengths = gj.pad([prompt[:-TRIAL]], 24)
    prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=TRIAL + 1)
    experts = jitted.select(
        prefilled.statistics, config, seed=np.asarray([seed]), magnitudes=jitted.magnitudes_of(model)
    )
    p, q = (log_p(each, prefilled, prompt[-TRIAL:]) for each in (model, gj.prune(model, experts)))
    return (np.exp(p) * (p - q)).sum(axis=-1)


def together(model: gj.Transformer, prompts: list[list[int]], pruners: list[Pruner], seed=0, **options) -> np.ndarray:
    tokens, lengths = gj.pad(prompts, 24)
    prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=2, last=TRIAL, **options)
    return try_pruners(model, prefilled, np.asarray([p[-TRIAL:] for p in prompts], np.int32), pruners, seed)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("config", "weights", "mesh", "chunk"),
    [
        pytest.param(DENSE, "float32", None, 8, id="read-in-parts"),
        pytest.param(DENSE, "int8", None, 1024, id="int8", marks=pytest.mark.slow),
        pytest.param(DENSE, "float32", (2, 2), 1024, id="mesh", marks=pytest.mark.slow),
        pytest.param(ROUTED, "float32", None, 1024, id="routed", marks=pytest.mark.slow),
        pytest.param(ROUTED, "float32", (2, 2), 1024, id="routed-mesh", marks=pytest.mark.slow),
        pytest.param(ROUTED, "int4:16", None, 8, id="routed-int4", marks=pytest.mark.slow),
    ],
)
def test_is_what_pruned_models_do_one_by_one(prompts, config, weights, mesh, chunk):
    here = random_model(config, weights=WeightFormat.parse(weights))
    model = here if mesh is None else random_model(config, mesh=make_mesh(*mesh))
    options = {} if mesh is None else {"groups": mesh[1], "round_to": mesh[1]}
    of_density = [gj.GriffinConfig(density, **options) for density in DENSITIES]
    found = together(model, prompts, [Pruner(each) for each in of_density], chunk=chunk)
    assert found.shape == (4, 2, TRIAL)
    expected = np.asarray([[one_by_one(here, prompt, each) for each in of_density] for prompt in prompts])
    assert expected.min() > 1e-5
    assert_close(found, expected)


def test_neurons_that_are_drawn(prompts):
    model = random_model(DENSE)
    drawing = [gj.GriffinConfig(density, "sample") for density in DENSITIES]
    seeds = jnp.arange(4, dtype=jnp.int32)
    found = together(model, prompts, [Pruner(each) for each in drawing], seeds)
    assert_close(found[1, 1], one_by_one(model, prompts[1], drawing[1], seed=1))


def test_what_was_recorded_on_the_way_is_what_two_prompts_give(prompts):
    """Of the whole prompts and of what comes before, statistics and rows; and the residual stream between."""
    model = random_model(DENSE)
    reads = {}
    for name, cut, last in (("both", 0, TRIAL), ("whole", 0, 0), ("before", TRIAL, 0)):
        tokens, lengths = gj.pad([prompt[: len(prompt) - cut] for prompt in prompts], 24)
        reads[name] = jitted.prefill(model, tokens, lengths, max_new_tokens=2, rows=6, chunk=8, last=last)
    both, whole, before = reads["both"], reads["whole"], reads["before"]
    assert whole.last is None
    for found, expected in ((both, whole), (both.last, before)):
        np.testing.assert_array_equal(found.statistics.tokens, expected.statistics.tokens)
        jax.tree.map(assert_close, (found.statistics.squares, found.rows), (expected.statistics.squares, expected.rows))
    assert_close(both.last.hidden[:, -1], whole.hidden)
    last = np.asarray([prompt[-TRIAL:] for prompt in prompts], np.int32)
    hidden, _ = jitted.teacher_force(model, dataclasses.replace(before, max_new_tokens=4), last[:, :2], np.full(4, 2))
    assert_close(both.last.hidden[:, 0], hidden[:, 1])


def test_a_conversation(prompts):
    """The last tokens of what is new, after tokens that were read before."""
    model, (prompt, *_) = random_model(DENSE), prompts
    state = jitted.start(model, 40, rows=6)
    for part, last in ((prompt[:10], 0), (prompt[10:], TRIAL)):
        tokens, _ = gj.pad([part], 16)
        state = jitted.read_more(model, state, tokens, np.int32(len(part)), last=last)
    pruners = [Pruner(gj.GriffinConfig(density)) for density in DENSITIES]
    found = try_pruners(model, state, np.asarray([prompt[-TRIAL:]], np.int32), pruners)
    expected = [one_by_one(model, prompt, each.config) for each in pruners]
    assert_close(found[0], np.asarray(expected))
    (alone,) = jitted.read_more(model, jitted.start(model, 40, rows=6), gj.pad([prompt[:-TRIAL]], 24)[0], 20).rows[:1]
    assert_close(state.last.rows[0], alone)


@pytest.mark.thorough
def test_an_adapter_for_each_sequence(prompts):
    from griffin_jax.adapters.adapter import Adapter, Factors, attach, stack
    from griffin_jax.adapters.config import AdapterConfig

    model, pair = random_model(DENSE), []
    for seed in range(2):
        blank = Adapter.init(DENSE, AdapterConfig(rank=2, alpha=4.0), jax.random.key(seed))
        draw = jax.random.key(10 + seed)
        factors = {name: Factors(each.a, jax.random.normal(draw, each.b.shape)) for name, each in blank.factors.items()}
        pair.append(dataclasses.replace(blank, factors=factors))
    pruners = [Pruner(gj.GriffinConfig(density)) for density in DENSITIES]
    found = together(attach(model, stack(pair), [0, 1, 0, 1]), prompts, pruners)
    expected = [one_by_one(attach(model, pair[1]), prompts[1], each.config) for each in pruners]
    assert_close(found[1], np.asarray(expected))


def test_nothing_was_recorded(prompts):
    model = random_model(DENSE)
    tokens, lengths = gj.pad(prompts, 24)
    for last in (0, 2):
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=2, last=last)
        with pytest.raises(ValueError, match="nothing was recorded of the last 4 tokens: prefill with last"):
            try_pruners(model, prefilled, np.zeros((4, TRIAL), np.int32), [Pruner(gj.GriffinConfig(0.5))])
