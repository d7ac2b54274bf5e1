"""Every neuron held once: the same experts, the same tokens, and no second copy."""

from __future__ import annotations

import gc
import sys
from types import FrameType
from typing import Any

import jax
import numpy as np
import pytest
from reference import TinyLlama

import griffin_jax as gj
from griffin_jax.extensions import in_place
from griffin_jax.llm.request import Request


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return TinyLlama.build(tmp_path_factory.mktemp("tiny"), mlp_bias=True).folder


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.slow
def test_answers_are_those_of_pruning_beside_the_model(folder, rng):
    usual, single = gj.load(folder, "float32"), gj.load(folder, "float32", in_place=True)
    for density in (0.5, [0.25, 1.0], 1.0, 0.5):
        prompt = rng.integers(3, 101, 30).tolist()
        options = {"density": density, "max_new_tokens": 12, "ignore_eos": True}
        expected, got = usual.generate([prompt], **options), single.generate([prompt], **options)
        assert got.tokens == expected.tokens
        assert got.kept == expected.kept
        for mine, theirs in zip(got.experts or (), expected.experts or (), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(single.experts([prompt])[1], usual.experts([prompt])[1])


@pytest.mark.thorough
def test_a_batch_shares_its_experts(folder, rng):
    usual, single = gj.load(folder, "float32"), gj.load(folder, "float32", in_place=True)
    prompts = [rng.integers(3, 101, n).tolist() for n in (9, 30)]
    options = {"shared": True, "max_new_tokens": 12, "ignore_eos": True}
    assert single.generate(prompts, **options).tokens == usual.generate(prompts, **options).tokens
    with pytest.raises(ValueError, match="give shared=True for 2 prompts"):
        single.generate(prompts)
    experts = usual.experts(prompts)
    with pytest.raises(ValueError, match="these are for each of 2 prompts"):
        single.generate(prompts, experts=experts)


@pytest.mark.slow
def test_drafts_of_one_answer_after_the_other(tiny):
    """Rows have moved before the full model decides about drafts."""
    llm, options = gj.load(tiny.folder, "float32", in_place=True), {"max_new_tokens": 8, "ignore_eos": True}
    for prompt in ([5, 6, 7, 8, 9], [40, 41, 42]):
        drafted = llm.generate([prompt], density=0.5, speculative=2, **options)
        assert drafted.tokens == tiny.llm.generate([prompt], density=1.0, **options).tokens


@pytest.mark.thorough
def test_pruning_takes_no_memory_beside_the_model(folder, rng):
    before = live_bytes()
    llm = gj.load(folder, "float32", in_place=True)
    weights = live_bytes() - before
    for _ in range(2):
        llm.generate([rng.integers(3, 101, 30).tolist()], max_new_tokens=12)
        assert live_bytes() - before < 1.05 * weights
    usual = gj.load(folder, "float32")
    experts = usual.experts([[5, 6, 7]])
    pruned = gj.prune(usual.model, experts)
    assert live_bytes() - before > 2.2 * weights, "the way of counting would not see a second copy"
    del pruned


def test_rows_keep_their_values_however_often_they_move(folder, rng):
    full = gj.load(folder, "float32").model
    single = gj.InPlace(gj.load(folder, "float32").model)
    for k in (20, 48, 1, 20):
        experts = gj.ExpertNeurons.from_indices([rng.permutation(48)[:k] for _ in full.layers], full.neurons)
        mine, usual = single.prune(experts), gj.prune(full, experts)
        assert mine.neurons == usual.neurons
        assert single.model.neurons == full.neurons
        for left, right in zip(mine.layers, usual.layers, strict=True):
            np.testing.assert_array_equal(left.ff.gate_up[...], right.ff.gate_up[...])
            np.testing.assert_array_equal(left.ff.down[...], right.ff.down[...])
            np.testing.assert_array_equal(left.ff.gate_up_bias[...], right.ff.gate_up_bias[...])
            assert left.ff.down_bias is not None


def test_what_cannot_be_done_with_one_copy(folder):
    llm = gj.load(folder, "float32", in_place=True)
    with pytest.raises(ValueError, match="load it without in_place"):
        llm.logits([[5, 6, 7]], prompt_length=2)
    with pytest.raises(ValueError, match="magnitude"):
        llm.generate([[5, 6, 7]], method="magnitude")
    llm.generate([[5, 6, 7]], max_new_tokens=2)
    with pytest.raises(ValueError, match="two groups"):
        gj.prune(llm.model, llm.experts([[5, 6, 7]]))
    first = llm._run([[5, 6, 7]], Request(), stream=True)
    next(first)
    with pytest.raises(RuntimeError, match="must be complete"):
        llm.generate([[5, 6, 7]])
    first.close()
    assert llm.generate([[5, 6, 7]], max_new_tokens=2).tokens[0]


def run(llm: gj.LLM, density: float) -> Any:
    return llm.generate([5, 6, 7], density=density, max_new_tokens=4, ignore_eos=True).tokens


def interrupted(llm: gj.LLM, density: float, line: int, error: type[BaseException]) -> bool:
    """An answer in which this error comes before the line with this number that `in_place` runs; whether it came."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != in_place.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run(llm, density)
    except error:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.slow
def test_a_prune_may_end_early_anywhere(tmp_path):
    folder = TinyLlama.build(tmp_path).folder
    usual, single = gj.load(folder, "float32"), gj.load(folder, "float32", in_place=True)
    expected = {density: run(usual, density) for density in (0.25, 0.5, 1.0)}
    assert {density: run(single, density) for density in expected} == expected
    weights = live_bytes()
    errors, line = (KeyboardInterrupt, MemoryError), 0
    while interrupted(single, 0.5 if line % 2 else 0.25, line, errors[line % 2]):
        line += 3
        density = (0.25, 0.5, 1.0)[line // 3 % 3]
        assert run(single, density) == expected[density], line
    assert line > 60
    gc.collect()
    assert live_bytes() <= 1.02 * weights


@pytest.mark.thorough
def test_what_cannot_be_finished_is_refused(tmp_path, monkeypatch):
    single = gj.load(TinyLlama.build(tmp_path).folder, "float32", in_place=True)
    expected, regroup, calls = run(single, 0.5), in_place._regroup, 0

    def out_of_memory(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise MemoryError("no memory\nat all")
        return regroup(*arguments)

    monkeypatch.setattr(in_place, "_regroup", out_of_memory)
    with pytest.raises(MemoryError):
        run(single, 0.25)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"ended early, and cannot be finished now \(no memory\); free memory"):
            run(single, 0.5)
    monkeypatch.undo()
    assert run(single, 0.5) == expected
