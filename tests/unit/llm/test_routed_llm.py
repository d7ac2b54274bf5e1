"""What is done with dense models is done with routed experts: one copy, two formats, drafts, refreshes, evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PASSAGES
from flax import nnx
from reference import assert_close, stepwise_logits, tiny_tokenizer

import griffin_jax as gj
from griffin_jax.evaluation import drafts, front, groups
from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.grid import DENSE, Variant, grid
from griffin_jax.evaluation.journal import Journal
from griffin_jax.extensions import jitted as jitted_extensions
from griffin_jax.extensions.drafter import drafter_of
from griffin_jax.extensions.mixed import MixedFormat, coarse, mask_mixed, prune_mixed, select_mixed
from griffin_jax.generation import jitted
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig, Routing
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.text.tokenizer import Tokenizer

EXPERTS, NEURONS, SHARED = 6, 20, 16
ROUTING = Routing(EXPERTS, 2, NEURONS, normalised=True, shared_width=SHARED, shared_gate=True, dense_layers=(1,))
CONFIG = ModelConfig("qwen2_moe", 320, 32, 48, 2, 4, 2, 8, 256, routing=ROUTING)
ITEMS = [Item("a", [5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16]), Item("b", [40, 41, 42], [50, 51, 52])]
INT4 = WeightFormat.parse("int4:16")


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> gj.LLM:
    folder = tmp_path_factory.mktemp("routed")
    tiny_tokenizer(folder, PASSAGES, 320)
    return gj.LLM(random_model(CONFIG), Tokenizer.from_folder(folder), "routed")


@pytest.mark.slow
def test_in_place(llm, rng):
    """Every neuron held once; a prompt of one token leaves experts unread, which keep their largest neurons."""
    single = gj.LLM(random_model(CONFIG), None, "routed", in_place=True)
    for density, length in (([0.25, 1.0], 30), (0.5, 1)):
        prompt = rng.integers(3, 320, length).tolist()
        options = {"density": density, "max_new_tokens": 8, "ignore_eos": True}
        expected, got = llm.generate([prompt], **options), single.generate([prompt], **options)
        assert got.tokens == expected.tokens
        for mine, theirs in zip(got.experts or (), expected.experts or (), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    tokens = rng.integers(3, 320, (1, 12)).astype(np.int32)
    assert_close(stepwise_logits(single.model, [tokens], 12), stepwise_logits(llm.model, [tokens], 12))


def as_they_stand(model: gj.Transformer, few: gj.Transformer, precise, others) -> gj.Transformer:
    """The model in float32, with the rows of each neuron as they stand in its format, and zeros for the rest."""
    found: gj.Transformer = jax.tree.map(lambda leaf: leaf, model)
    for number, (layer, rough) in enumerate(zip(found.layers, few.layers, strict=True)):
        marks, start = np.zeros(model.neurons[number], int), 0
        marks[np.asarray(precise[number])], marks[np.asarray(others[number])] = 1, 2
        for part, other in zip(layer.ff.parts(), rough.ff.parts(), strict=True):
            shape = part.down.shape[:-1]
            of = marks[start : start + part.neurons].reshape(shape)[..., None]
            start += part.neurons
            gate_up = [each.gate_up_matrix().reshape(2, *shape, -1) for each in (part, other)]
            down = [each.down_matrix().reshape(*shape, -1) for each in (part, other)]
            both = [jnp.where(of == 1, fine, jnp.where(of == 2, rough, 0)) for fine, rough in (gate_up, down)]
            part.gate_up = nnx.Param(both[0].swapaxes(0, 1) if len(shape) == 2 else both[0])
            part.down = nnx.Param(both[1])
            part.gate_up_scale = part.down_scale = part.down_row_scale = None
    return found


@pytest.mark.slow
def test_bits_by_importance(rng):
    model = random_model(CONFIG, weights=WeightFormat("int8"))
    few, mixed = coarse(model, INT4), MixedFormat(WeightFormat("int8"), INT4, 0.25)
    tokens = rng.integers(3, 320, (2, 16)).astype(np.int32)
    read = jitted.prefill(model, tokens, jnp.asarray([16, 9]), max_new_tokens=4)
    magnitudes = jitted.magnitudes_of(model)
    chosen = select_mixed(read.statistics, gj.GriffinConfig(0.5, shared=True), mixed, magnitudes=magnitudes)
    assert [experts.shares[0] for experts in chosen] == [(2,) * 6 + (2,), (8,) * 6 + (6,)]
    pruned = prune_mixed(model, few, *chosen)
    got = stepwise_logits(pruned, [tokens], 16)
    assert_close(got, stepwise_logits(as_they_stand(model, few, *chosen), [tokens], 16))
    assert_close(got, stepwise_logits(mask_mixed(model, few, *chosen), [tokens], 16))
    again = prune_mixed(model, few, *chosen, reuse=pruned)
    assert_close(stepwise_logits(again, [tokens], 16), got)


@pytest.mark.slow
def test_answers_in_two_formats_of_a_batch(rng):
    """Each sequence's answer is that of its prompt alone."""
    few = gj.LLM(random_model(CONFIG, weights=WeightFormat("int8")), None, "routed")
    prompts = [rng.integers(3, 320, length).tolist() for length in (12, 5)]
    options = {"density": 0.5, "mixed_weights": "int4:16@0.25", "max_new_tokens": 5, "ignore_eos": True}
    assert few.generate(prompts, **options).tokens == [few.generate([p], **options).tokens[0] for p in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("draft_weights", ["int4:16", None])
def test_drafts_do_not_change_the_answer(llm, rng, draft_weights):
    prompt, options = rng.integers(3, 320, 20).tolist(), {"max_new_tokens": 10, "ignore_eos": True}
    dense = llm.generate([prompt], density=1.0, **options)
    drafted = llm.generate([prompt], density=0.5, speculative=3, draft_weights=draft_weights, **options)
    assert drafted.tokens == dense.tokens
    assert int(drafted.drafting.drafted.sum()) > 0


@pytest.mark.thorough
def test_a_refresh_reads_what_a_prompt_would(llm, rng):
    prompts, width, model = [rng.integers(3, 320, length).tolist() for length in (20, 7)], 4, llm.model
    tokens, lengths = map(jnp.asarray, gj.pad(prompts, 20))
    read = jitted.prefill(model, tokens, lengths, max_new_tokens=8)
    pruned = gj.prune(model, gj.select(read.statistics, gj.GriffinConfig(0.5, shared=True), model=model))
    statistics = jax.tree.map(jnp.copy, read.statistics)
    state = jitted.decode(pruned, jitted.init_decode(read), width)
    whole = [prompt + row for prompt, row in zip(prompts, state.tokens[:, :width].tolist(), strict=True)]
    state, found, _ = jitted_extensions.refresh(model, state, statistics, width=width)
    every = jitted.prefill(model, *map(jnp.asarray, gj.pad(whole, 24)), max_new_tokens=0)
    for got, expected in zip(found.squares, every.statistics.squares, strict=True):
        assert_close(np.asarray(got), np.asarray(expected))
    assert state.tokens[:, width].tolist() == np.argmax(every.logits, axis=-1).tolist()


@pytest.mark.thorough
def test_groups_are_those_of_each_expert(llm, tmp_path):
    rules = groups.rules([0.5], [2], CONFIG.neuron_ranges)
    scores = groups.compare_groups(llm, ITEMS, rules, Journal(tmp_path, {}), new=4, size=2, seed=0)
    for item in ITEMS:
        best, found = llm.experts(item.prompt), scores[item.name]
        experts = llm.experts(item.prompt, groups=2)
        pairs = [(set(np.asarray(a).ravel()), set(np.asarray(b).ravel())) for a, b in zip(experts, best, strict=True)]
        assert found["topk, 2 groups 0.5"]["overlap"] == pytest.approx(np.mean([len(a & b) / len(b) for a, b in pairs]))
        tokens, start = [*item.prompt, *item.answer], len(item.prompt)
        logits = llm.logits([tokens], prompt_length=start, groups=2)
        scored = np.asarray(jax.nn.log_softmax(logits[0, start - 1 : -1]))
        loss = -scored[np.arange(len(item.answer)), item.answer].sum()
        assert found["topk, 2 groups 0.5"]["loss"] == [pytest.approx(loss, rel=1e-5)]


@pytest.mark.slow
def test_formats_and_bytes_of_the_front(llm, tmp_path):
    rows, mixed = grid(["topk"], [0.5], ()), MixedFormat(WeightFormat("float32"), INT4, 0.5)
    formats = [WeightFormat("float32"), mixed]
    scores = front.compare_formats(llm, ITEMS, rows, formats, Journal(tmp_path, {}), new=4, size=2, seed=0)
    assert scores["float32"]["a"][DENSE]["kl"][0] == pytest.approx(0, abs=1e-6)
    for each in formats:
        assert scores[str(each)]["a"]["topk 0.5"]["kl"][0] > 0
    # A token reads two experts, the shared one, and the dense layer.
    neurons, numbers = 2 * NEURONS + SHARED + 48, 3 * 32
    dense, pruned, both = (
        front.bytes_per_token(CONFIG, np.dtype("float32"), weights, 40, variant)
        for weights, variant in (
            (formats[0], Variant(DENSE, 1.0)), (formats[0], Variant("topk", 0.5)), (mixed, Variant("topk", 0.5)),
        )
    )  # fmt: skip
    assert dense - pruned == neurons // 2 * numbers * 4
    assert pruned - both == (2 * 5 + 4 + 12) * (numbers * 4 - 3 * (32 // 2 + 2 * 2))


@pytest.mark.slow
def test_drafters_are_compared(llm, tmp_path):
    every = drafts.drafters([None, INT4], grid(["topk"], [0.5], ()), {"dense": "-", "topk": "griffin"}, [2])
    given = {"new": 6, "extensions": gj.Extensions()}
    scores = drafts.compare_drafters(llm, ITEMS[:1], every, Journal(tmp_path, {}), **given)
    for drafter in every:
        assert scores["a"][drafter.format][drafter.name]["same"] == 6
    figures = drafts.figures(scores, every, llm, slots=40, seed=0, **given)
    own = next(entry for entry in figures if entry["weights"] == every[0].format)
    one = Sizes(CONFIG, 1, 40, Precision.of(jnp.float32), shared=True)
    kept = gj.GriffinConfig(0.5).kept(CONFIG.neuron_ranges)
    assert (own["step_bytes"], own["draft_bytes"]) == (one.step(None), one.step(kept))
    assert drafter_of(llm.model, INT4).layers[0].ff.experts.gate_up_scale.shape == (EXPERTS, 2, NEURONS, 2)


@pytest.mark.slow
def test_likelihoods_of_the_harness(llm):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from griffin_jax.evaluation.lm_eval import GriffinLM

    lm = GriffinLM(llm, density=0.5)
    context, continuation = PASSAGES[0][:60], PASSAGES[0][60:80]
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    ((got, _),) = lm.loglikelihood([request], disable_tqdm=True)
    whole, start = lm.tok_encode(context + continuation), len(lm.tok_encode(context))
    # What is scored first is the last token of the context's.
    pruned = llm.logits([whole[:-1]], prompt_length=start, density=0.5)
    scores = np.asarray(jax.nn.log_softmax(pruned[0]))
    expected = sum(scores[place - 1, whole[place]] for place in range(start, len(whole)))
    assert got == pytest.approx(expected, rel=1e-5)
