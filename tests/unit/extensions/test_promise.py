"""The density that a promise takes is the one that a loop over rows and densities finds, without a trial of each."""

from __future__ import annotations

import functools
import json
import re

import jax
import numpy as np
import pytest
from conftest import PASSAGES, first_and_slow
from flax import nnx
from reference import assert_close, oracle_topk

import griffin_jax as gj
from griffin_jax.cli.main import main
from griffin_jax.extensions.mixed import MixedFormat, coarse
from griffin_jax.extensions.promise import Outcome, allowed_densities, between, choose, ends_of, trial_tokens
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation import jitted
from griffin_jax.llm import llm
from griffin_jax.llm.memory import Needs, needs_of
from griffin_jax.model.assembly import random_model
from griffin_jax.model.sharding import model_shardings
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.parallel.mesh import make_mesh

OPTIONS = {"max_new_tokens": 6, "ignore_eos": True}
LONG = " ".join(PASSAGES)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 320, length).tolist() for length in (260, 300, 277)]


def without(model: gj.Transformer, dropped: list[np.ndarray]) -> gj.Transformer:
    """The model with zeros for the rows of neurons."""
    zeroed = jax.tree.map(lambda leaf: leaf, model)
    for layer, neurons in zip(zeroed.layers, dropped, strict=True):
        layer.ff.down = nnx.Param(layer.ff.down[...].at[neurons].set(0))
    return zeroed


def log_p(model: gj.Transformer, prefilled: gj.Prefilled, prompt: list[int]) -> np.ndarray:
    """What a model expects after each of the last eight tokens, by teacher forcing; a ninth one is not read."""
    last, real = np.asarray([[*prompt[-8:], 0]], np.int32), np.asarray([9], np.int32)
    hidden, _ = jitted.teacher_force(model, prefilled, last, real)
    logits = np.asarray(model.logits(hidden[:, 1:])[0], np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def by_hand(model: gj.Transformer, prompt: list[int], densities: tuple[float, ...]) -> list[np.ndarray]:
    """The divergences of one prompt alone at the densities: softmax, KL and the choice of neurons in NumPy."""
    tokens, lengths = gj.pad([prompt[:-8]], 384)
    prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=16)
    p = log_p(model, prefilled, prompt)
    found = []
    for density in densities:
        k = int(48 * density)
        kept = [oracle_topk(np.asarray(squares[0]), k) for squares in prefilled.statistics.squares]
        pruned = without(model, [np.setdiff1d(np.arange(48), neurons) for neurons in kept])
        q = log_p(pruned, prefilled, prompt)
        found.append((np.exp(p) * (p - q)).sum(axis=-1))
    return found


def power(densities: tuple[float, ...], first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """a (1 - d)^b at the densities, where it is known for the first and the last of them."""
    pruned = 1 - np.asarray(densities)[:, None]
    b = np.log(last / first) / np.log(pruned[-1] / pruned[0])
    return first * (pruned / pruned[0]) ** b


@pytest.mark.thorough
def test_is_what_a_loop_over_rows_and_densities_finds(long, prompts, monkeypatch):
    # With a margin of one standard error more of the densities are taken.
    monkeypatch.setattr(llm, "choose", functools.partial(choose, margin=1.0))
    densities = allowed_densities(0.5)
    assert densities == (0.5, 0.65, 0.8, 0.9)
    divergences = np.asarray([by_hand(long.llm.model, prompt, (0.5, 0.9)) for prompt in prompts])
    mean = divergences.mean(axis=-1)
    bound = mean + divergences.std(axis=-1, ddof=1) / np.sqrt(8)
    means, bounds = power(densities, *mean.T), power(densities, *bound.T)
    worst = bounds.max(axis=1)
    assert (np.diff(worst) < 0).all()
    taken = set()
    for most in [worst[0] + 0.01, *(worst[:-1] + worst[1:]) / 2, worst[-1] - 0.01]:
        out = long.llm.generate(prompts, max_divergence=float(most), **OPTIONS)
        expected = next((d for d, b in zip(densities, worst, strict=True) if b <= most), 1.0)
        assert out.promised.density == expected
        # As the most demanding row would alone.
        of_rows = [next((d for d, b in zip(densities, row, strict=True) if b <= most), 1.0) for row in bounds.T]
        assert expected == max(of_rows)
        assert out.kept == (int(48 * expected),) * 2
        assert (out.promised.tokens, [*out.promised.tried]) == (8, [0.5, 0.9])
        for at, outcome in enumerate(out.promised.tried.values()):
            assert_close(np.asarray(outcome.divergence), mean[:, at])
            assert_close(np.asarray(outcome.bound), bound[:, at])
        of_taken = means[densities.index(expected)] if expected < 1 else np.zeros(1)
        assert_close(np.asarray(out.promised.divergence), of_taken.max())
        taken.add(expected)
    assert taken == {*densities, 1.0}


def test_answers_are_those_of_the_density(long, prompts):
    generate = long.llm.generate
    loose = generate(prompts, max_divergence=1e3, density=0.25, **OPTIONS)
    assert loose.tokens == generate(prompts, density=0.25, **OPTIONS).tokens
    assert loose.promised.density == 0.25
    # The neurons are those of the whole prompts, not those that were tried.
    for found, expected in zip(loose.experts, long.llm.experts(prompts, density=0.25), strict=True):
        np.testing.assert_array_equal(found, expected)
    tight = generate(prompts, max_divergence=1e-6, refresh_every=2, **OPTIONS)
    assert tight.tokens == generate(prompts, density=1.0, **OPTIONS).tokens
    assert (tight.promised.density, tight.experts, tight.kept, tight.refreshes) == (1.0, None, (48, 48), 0)


@pytest.mark.thorough
@pytest.mark.parametrize("density", first_and_slow(1, 0.5, 0.1))
def test_a_density_of_bytes(long, prompts, density):
    """What is tried is what the answer's model would be at the end of the prompts, and the density is one of bytes."""
    model, formats = long.llm.model, {"mixed_weights": "int4:16"}
    options = {"density": density, "refit": 32, **formats, **OPTIONS}
    loose = long.llm.generate(prompts[:1], max_divergence=1e3, **options)
    expected = long.llm.generate(prompts[:1], **options)
    assert (loose.tokens, loose.kept) == (expected.tokens, expected.kept)
    assert loose.kept == ((48 if density == 0.5 else 30),) * 2
    assert [*loose.promised.tried] == [density, 0.9]
    tokens, lengths = gj.pad([prompts[0][:-8]], 256)
    prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=16, rows=32)
    p, few = log_p(model, prefilled, prompts[0]), coarse(model, WeightFormat.parse("int4:16"))
    for at, outcome in loose.promised.tried.items():
        mixed, kept = MixedFormat.parse("float32+int4:16").at(at)
        pruner = Pruner(gj.GriffinConfig(kept), rows=32)
        pruned = pruner.mix(model, few, mixed, prefilled.statistics, prefilled.rows, masked=True)
        q = log_p(pruned, prefilled, prompts[0])
        assert_close(np.asarray(outcome.divergence), (np.exp(p) * (p - q)).sum(axis=-1).mean())
    tight = long.llm.generate(prompts, max_divergence=1e-9, **formats, **OPTIONS)
    assert tight.tokens == long.llm.generate(prompts, density=1.0, **OPTIONS).tokens
    assert (tight.promised.density, tight.kept) == (1.0, (48, 48))
    short = long.llm.generate(prompts[0][:100], max_divergence=1e3, **formats, **OPTIONS)
    assert short.tokens == long.llm.generate(prompts[0][:100], density=1.0, **OPTIONS).tokens


@pytest.mark.slow
def test_answers_of_shared_and_refreshed_neurons(long, prompts):
    options = {"shared": True, "refresh_every": 3, **OPTIONS}
    found = long.llm.generate(prompts, max_divergence=1e3, **options)
    expected = long.llm.generate(prompts, **options)
    assert (found.tokens, found.refreshes) == (expected.tokens, expected.refreshes)


@pytest.mark.slow
def test_what_is_tried_is_refitted_as_the_answer_is(long, prompts):
    tokens, lengths = gj.pad([prompts[0][:-8]], 256)
    prefilled = jitted.prefill(long.llm.model, tokens, lengths, max_new_tokens=16, rows=32)
    experts = gj.select(prefilled.statistics, gj.GriffinConfig(0.5))
    pruned = gj.prune(long.llm.model, experts, refit=gj.Reconstruction(prefilled.rows))
    p, q = (log_p(model, prefilled, prompts[0]) for model in (long.llm.model, pruned))
    out = long.llm.generate(prompts[:1], max_divergence=1e3, refit=32, **OPTIONS)
    (found,) = out.promised.tried[0.5].divergence
    assert_close(np.asarray(found), (np.exp(p) * (p - q)).sum(axis=-1).mean())
    assert out.tokens == long.llm.generate(prompts[:1], refit=32, **OPTIONS).tokens


@pytest.mark.parametrize(("prompt", "least"), [(slice(255), 0.5), (slice(300), 1.0)], ids=["short", "dense"])
def test_dense_without_a_trial(long, prompts, prompt, least):
    asked = [prompts[1], prompts[1][prompt]]
    out = long.llm.generate(asked, max_divergence=1e3, density=least, **OPTIONS)
    assert (out.promised.density, out.promised.tokens, out.promised.tried) == (1.0, 0, {})
    assert out.tokens == long.llm.generate(asked, density=1.0, **OPTIONS).tokens


@pytest.mark.thorough
def test_a_chat_tries_what_is_new(long):
    chat, options = long.llm.chat(**OPTIONS), {"max_divergence": 1e3, **OPTIONS}
    first = chat.say(LONG[:500], **options)
    assert first.tokens == long.llm.generate([[{"role": "user", "content": LONG[:500]}]], **options).tokens
    assert (first.promised.density, first.promised.tokens) == (0.5, 8)
    messages = [*chat.messages, {"role": "user", "content": "And the bridge?"}]
    expected = long.llm.generate([messages], **options)
    second = chat.say("And the bridge?", **options)
    # The same tokens of the same conversation, of which only what is new was read.
    assert second.tokens == expected.tokens
    assert_close(*(np.asarray(out.promised.tried[0.5].divergence) for out in (second, expected)))
    assert chat.turns[1].read < 100


class TestChoose:
    DENSITIES = (0.3, 0.5, 0.7)

    @pytest.mark.parametrize(("most", "density"), [(0.5, 0.3), (0.3, 0.5), (0.2, 0.7), (0.05, 1.0)])
    def test_between_what_is_tried_divergence_is_a_power(self, most, density):
        # a (1 - d)^2 with a = 1: 0.49, 0.25 and 0.09; the other prompt loses less.
        found = {d: np.asarray([[(1 - d) ** 2] * 4, [0.01] * 4]) for d in ends_of(self.DENSITIES)}
        promised = choose(self.DENSITIES, found, most)
        assert (promised.density, promised.tokens, [*promised.tried]) == (density, 4, [0.3, 0.7])
        assert promised.divergence == pytest.approx((1 - density) ** 2)
        if density < 1:
            assert promised.outcome.bound == pytest.approx([(1 - density) ** 2, 0.01])

    def test_what_rises_with_density(self):
        # The least that keeps to it is taken, whatever the largest does.
        def promised(first, last):
            return choose(self.DENSITIES, {0.3: np.full((1, 4), first), 0.7: np.full((1, 4), last)}, 0.2)

        assert promised(0.1, 0.5).density == 0.3
        assert promised(0.3, 0.5).density == promised(np.nan, np.nan).density == 1.0
        # Nothing is lost, or less than nothing by rounding.
        assert promised(0.0, -1e-9).density == 0.3

    def test_a_single_density(self):
        assert ends_of([0.9]) == (0.9,)
        assert choose([0.9], {0.9: np.full((1, 4), 0.1)}, 0.2).density == 0.9

    def test_of_what_is_tried_it_is_what_was_found(self):
        tried = {0.3: Outcome((0.4, 0.2), (0.5, 0.3)), 0.7: Outcome((0.1, 0.2), (0.2, 0.3))}
        for density, outcome in tried.items():
            assert_close(*(np.asarray([o.divergence, o.bound]) for o in (between(density, tried), outcome)))

    def test_the_margin_is_of_single_tokens(self):
        values = np.asarray([[0.0, 0.0, 0.0, 0.4], [0.1, 0.1, 0.1, 0.1]])
        outcome = Outcome.of(values, margin=2.0)
        assert_close(np.asarray(outcome.divergence), np.asarray([0.1, 0.1]))
        assert_close(np.asarray(outcome.bound), np.asarray([0.1 + 2 * 0.2 / 2, 0.1]))
        assert outcome.keeps(0.31)
        assert not outcome.keeps(0.29)

    def test_tokens_of_a_trial(self):
        assert [trial_tokens(length) for length in (255, 256, 2047, 2048, 4095, 4096)] == [0, 8, 8, 16, 16, 32]
        assert [trial_tokens(4096, new) for new in (7, 8, 31, 32)] == [0, 8, 16, 32]
        assert allowed_densities(0.7) == (0.7, 0.8, 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_divergence": 0}, "max_divergence must be above 0 nats per token, got 0"),
        ({"max_divergence": float("inf")}, "max_divergence must be above 0"),
        ({"max_divergence": "a"}, "max_divergence must be above 0"),
        ({"speculative": True}, "speculative answers are the dense model's"),
        ({"mixed_weights": "int4@0.5"}, "give them without a part, as int4"),
        ({"density": (0.5, 0.5)}, "max_divergence takes one density as the least"),
        ({"experts": True}, "experts are kept whatever they lose"),
    ],
)
def test_refused(long, prompts, options, message):
    if "experts" in options:
        options = {"experts": gj.ExpertNeurons.from_indices([range(24)] * 2, (48, 48))}
    with pytest.raises(ValueError, match=message):
        long.llm.generate(prompts, **{"max_divergence": 0.1, **options})


def test_refused_where_nothing_can_be_tried(long, prompts):
    with pytest.raises(ValueError, match="experts are chosen at the density that is given"):
        long.llm.experts(prompts, max_divergence=0.1)
    with pytest.raises(ValueError, match="with in_place rows of weights move, and nothing is tried"):
        gj.load(long.folder, "float32", in_place=True).generate(prompts[:1], max_divergence=0.1)


def test_densities_that_a_mesh_cannot_divide_are_refused_before_anything_is_read(prompts, monkeypatch):
    """Any of those that the trial may take, not only the largest."""
    model = random_model(gj.ModelConfig("llama", 320, 16, 60, 2, 2, 2, 8, 1024))
    divided = gj.LLM(jax.device_put(model, model_shardings(model, make_mesh(model=2))))
    monkeypatch.setattr(jitted, "prefill", None)
    assert [60 * density % 2 for density in (0.5, 0.9)] == [0, 0]
    with pytest.raises(ValueError, match="2 devices cannot share 39 kept neurons evenly"):
        divided.generate(prompts[:1], density=0.5, groups=1, max_divergence=0.1)


def test_memory_of_a_trial_in_two_formats():
    """All neurons in the second format are there during the trial, which takes most where the vocabulary is large."""
    config = gj.ModelConfig("llama", 50_000, 16, 48, 2, 2, 2, 8, 1024)
    needs = Needs(config, Precision.of("float32"))
    mixed = (MixedFormat(WeightFormat("float32"), WeightFormat("int8"), 0.25), gj.GriffinConfig(0.5))
    there, made = (
        needs.generation(8, 512, 8, [24, 24], trial=32, mixed=mixed, mixed_is_there=is_there)
        for is_there in (True, False)
    )
    assert sum(made.values()) - sum(there.values()) >= made["neurons in fewer bits"] > 0


def test_memory_counts_the_trial(long):
    needs, kept = needs_of(long.llm.model), [24, 24]
    for rows in (0, 64):
        without, tried = (
            sum(needs.generation(8, 1024, 16, kept, shared=True, rows=rows, trial=trial).values()) for trial in (0, 32)
        )
        assert tried > without


@pytest.mark.thorough
def test_command(long, tmp_path, capsys):
    file = tmp_path / "prompt"
    file.write_text(LONG[:900])
    arguments = ["generate", "--model", long.folder, "--prompt-file", file, "--max-new-tokens", 6, "--max-divergence"]
    arguments = [*map(str, arguments)]
    expected = long.llm.generate(LONG[:900], max_divergence=1e3, max_new_tokens=6)
    assert main([*arguments, "1000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["density"]) == (expected.tokens[0], 0.5)
    assert found["promised"]["divergence"] == pytest.approx(expected.promised.divergence)
    assert [tried["density"] for tried in found["promised"]["tried"]] == [*expected.promised.tried]
    assert main([*arguments, "1000"]) == 0
    err = capsys.readouterr().err
    assert re.search(r"48 of 96 neurons kept; density 0\.5, \d\.\d{3} nats/token of 1000 promised; load", err)
    assert main([*arguments, "1e-6", "--save-experts", str(tmp_path / "e")]) == 0
    err = capsys.readouterr().err
    assert "96 of 96 neurons kept; dense, since no density kept to 1e-06 nats/token; load" in err
    assert "there are no experts to save" in err
