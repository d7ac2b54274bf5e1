"""Refreshes: what the pruned model wrote is read again by the full one, as if it had been part of the prompt."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PASSAGES, first_and_slow
from reference import TinyLlama, assert_close, oracle_positions, pruned_log_softmax

import griffin_jax as gj
from griffin_jax.cli.main import main
from griffin_jax.evaluation.general_text import measure
from griffin_jax.extensions import jitted as jitted_extensions
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.extensions.reconstruction import Reconstruction
from griffin_jax.generation import jitted
from griffin_jax.generation.sampling import sampler

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], list(range(3, 40))]
NEW = 14


def answer(llm: gj.LLM, prompts, **options) -> list[list[int]]:
    return llm.generate(prompts, **({"max_new_tokens": NEW, "ignore_eos": True} | options)).tokens


def oracle(tiny: TinyLlama, prompt: list[int], every: int, density: float = 0.5) -> list[int]:
    """Each token from torch's model of everything before it, without a cache: read whole up to the last refresh, and
    behind it with the neurons that all before it choose."""
    written: list[int] = []
    while len(written) < NEW:
        whole = len(prompt) + len(written) // every * every
        written.append(int(pruned_log_softmax(tiny.torch, prompt + written, whole, density)[-1].argmax()))
    return written


def written(model: gj.Transformer, prompts: list[list[int]], width: int, rows: int = 0):
    """Answers of `width` tokens of a pruned model, before their refresh."""
    tokens, lengths = map(jnp.asarray, gj.pad(prompts, 40))
    prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=16, rows=rows)
    pruned = gj.prune(model, jitted.select(prefilled.statistics, gj.GriffinConfig(0.5)))
    state = jitted.init_decode(prefilled)
    return prefilled, jitted.decode(pruned, state, width)


class TestRefresh:
    @pytest.mark.thorough
    def test_cache_statistics_and_rows_are_those_of_longer_prompts(self, tiny):
        model, width = tiny.llm.model, 6
        prefilled, state = written(model, PROMPTS, width, rows=48)
        whole = [prompt + row for prompt, row in zip(PROMPTS, state.tokens[:, :width].tolist(), strict=True)]
        expected = jitted.prefill(model, *map(jnp.asarray, gj.pad(whole, 48)), max_new_tokens=0, rows=48)
        stale = np.asarray(state.cache.keys[1])
        state, statistics, rows = jitted_extensions.refresh(
            model, state, prefilled.statistics, width=width, rows=prefilled.rows
        )
        assert state.tokens[:, width].tolist() == np.argmax(expected.logits, axis=-1).tolist()
        assert int(state.count) == width + 1
        assert int(state.cache.cursor) == 40 + width
        assert statistics.tokens.tolist() == [len(row) for row in whole]
        for row, tokens in enumerate(whole):
            used = np.nonzero(np.asarray(state.cache.positions[row]) != gj.EMPTY)[0]
            np.testing.assert_array_equal(state.cache.positions[row][used], np.arange(len(tokens)))
            for layer in range(2):
                for name, axis in (("keys", 2), ("values", 1)):
                    got, right = (np.asarray(getattr(c, name)[layer])[row] for c in (state.cache, expected.cache))
                    assert_close(np.take(got, used, axis), np.take(right, np.arange(len(tokens)), axis))
                assert_close(
                    np.asarray(statistics.squares[layer][row]), np.asarray(expected.statistics.squares[layer][row])
                )
                assert_close(np.asarray(rows[layer][row]), np.asarray(expected.rows[layer][row]))
        # The pruned model had left something else there.
        assert np.abs(stale - np.asarray(state.cache.keys[1]))[..., 41:45].max() > 0.01

    @pytest.mark.parametrize("width", [2, 5, 9])
    def test_the_newest_rows_are_kept(self, tiny, width):
        """Of few places: prompts shorter and longer than these, and more new tokens than there are places."""
        model, places = tiny.llm.model, 7
        prefilled, state = written(model, PROMPTS, width, rows=places)
        whole = [prompt + row for prompt, row in zip(PROMPTS, state.tokens[:, :width].tolist(), strict=True)]
        every = jitted.prefill(model, *map(jnp.asarray, gj.pad(whole, 48)), max_new_tokens=0, rows=48).rows
        _, _, rows = jitted_extensions.refresh(model, state, prefilled.statistics, width=width, rows=prefilled.rows)
        for row, prompt in enumerate(PROMPTS):
            queue = oracle_positions(len(prompt), places) + list(range(len(prompt), len(prompt) + width))
            newest = queue[-places:]
            for layer in range(2):
                expected = np.zeros((places, 48), np.float32)
                expected[: len(newest)] = np.asarray(every[layer])[row, newest]
                assert_close(np.asarray(rows[layer][row]), expected)

    def test_a_row_that_ended_is_left_alone(self, tiny):
        model, width = tiny.llm.model, 6
        prefilled, state = written(model, PROMPTS, width)
        ended = int(state.tokens[1, 1])
        assert ended not in state.tokens[0].tolist() + state.tokens[2].tolist() + state.tokens[1, :1].tolist()
        tokens, lengths = map(jnp.asarray, gj.pad(PROMPTS, 40))
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=16)
        pruned = gj.prune(model, jitted.select(prefilled.statistics, gj.GriffinConfig(0.5)))
        before = jitted.decode(pruned, jitted.init_decode(prefilled, eos=(ended,)), width, eos=(ended,))
        after, statistics, _ = jitted_extensions.refresh(model, before, prefilled.statistics, width=width, eos=(ended,))
        free, all_statistics, _ = jitted_extensions.refresh(
            model, state, jitted.prefill(model, tokens, lengths, max_new_tokens=16).statistics, width=width
        )
        assert after.tokens[1].tolist() == free.tokens[1, :2].tolist() + [gj.EMPTY] * 14
        for row in (0, 2):
            np.testing.assert_array_equal(after.tokens[row], free.tokens[row])
            for got, expected in zip(statistics.squares, all_statistics.squares, strict=True):
                assert_close(np.asarray(got[row]), np.asarray(expected[row]))
        assert statistics.tokens.tolist() == [7, 9, 43]


class TestGenerate:
    @pytest.mark.parametrize("every", first_and_slow(2, 3, 13, 1, 5, 14))
    def test_is_torch_without_a_cache(self, tiny, every):
        out = tiny.llm.generate(PROMPTS, max_new_tokens=NEW, ignore_eos=True, refresh_every=every)
        assert out.tokens == [oracle(tiny, prompt, every) for prompt in PROMPTS]
        assert out.refreshes == (NEW - 1) // every
        assert ("refresh" in out.seconds) == (every < NEW)

    @pytest.mark.thorough
    def test_another_length_compiles_nothing(self, tiny, compiled):
        options = {"refit": True, "refresh_every": 2, "ignore_eos": True}
        tiny.llm.generate([[5, 6, 7]], max_new_tokens=9, **options)
        del compiled[:]
        tiny.llm.generate([[5, 6, 7]], max_new_tokens=11, **options)
        assert not compiled

    def test_it_matters(self, tiny):
        texts = {str(answer(tiny.llm, PROMPTS, refresh_every=every)) for every in (None, 1, 3, 5)}
        assert len(texts) == 4
        assert answer(tiny.llm, PROMPTS, refresh_every=1) == answer(tiny.llm, PROMPTS, density=1.0)

    @pytest.mark.slow
    def test_a_row_of_a_batch_is_the_row_alone(self, tiny):
        options = {"refresh_every": 4, "refit": 9}
        together = answer(tiny.llm, PROMPTS, **options)
        assert together == [answer(tiny.llm, [prompt], **options)[0] for prompt in PROMPTS]

    @pytest.mark.thorough
    @pytest.mark.parametrize(
        "options", first_and_slow(1, {"temperature": 0.9, "top_k": 30, "seed": 5}, {}), ids=["sampled", "greedy"]
    )
    def test_with_all_neurons_it_is_dense(self, tiny, everything, options):
        dense = answer(tiny.llm, PROMPTS, density=1.0, **options)
        assert answer(tiny.llm, PROMPTS, density=1.0, refresh_every=4, **options) == dense
        assert answer(tiny.llm, PROMPTS, experts=everything, refresh_every=4, **options) == dense
        assert answer(tiny.llm, PROMPTS, experts=everything, refresh_every=3, refit=8, **options) == dense

    @pytest.mark.thorough
    @pytest.mark.parametrize("shared", first_and_slow(1, False, True))
    def test_is_the_steps_by_hand(self, tiny, shared):
        model, config = tiny.llm.model, gj.GriffinConfig(0.5, shared=shared)
        prior = measure(model, [list(range(10, 60))], size=1, rows=9, quiet=True)
        tokens, lengths = map(jnp.asarray, gj.pad(PROMPTS, 40))
        draw, rows = sampler(0.9), 4
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=16, rows=rows)
        statistics, read = prefilled.statistics, prefilled.rows
        state, experts = jitted.init_decode(prefilled, sampler=draw), []
        for until in (3, 6, 9, 12, 14):
            experts.append(jitted.select(statistics, config, fuse=None if prior is None else prior.fusion(0.3)))
            fit = Reconstruction(read, calibration=prior.rows)
            state = jitted.decode(gj.prune(model, experts[-1], refit=fit), state, until, sampler=draw)
            if until < NEW:
                state, statistics, read = jitted_extensions.refresh(
                    model, state, statistics, width=3, rows=read, sampler=draw
                )
        out = tiny.llm.generate(
            PROMPTS, max_new_tokens=NEW, ignore_eos=True, temperature=0.9, shared=shared, prior=prior, prior_weight=0.3,
            refit=12 if shared else 4, refresh_every=3,
        )  # fmt: skip
        assert out.tokens == state.tokens[:, :NEW].tolist()
        for got, last in zip(out.experts, experts[-1], strict=True):
            np.testing.assert_array_equal(got, last)

    def test_given_experts_stay(self, tiny):
        experts = tiny.llm.experts(PROMPTS, density=0.4)
        out = tiny.llm.generate(PROMPTS, max_new_tokens=NEW, experts=experts, refresh_every=3, ignore_eos=True)
        assert out.experts is experts
        assert out.tokens != answer(tiny.llm, PROMPTS, experts=experts)

    @pytest.mark.thorough
    def test_the_second_answer_compiles_nothing(self, tiny, compiled):
        llm = gj.LLM(tiny.llm.model)
        options = {"refresh_every": 3, "refit": 8}
        answer(llm, PROMPTS[2:], **options)
        del compiled[:]
        answer(llm, [list(range(50, 90))], **options)
        assert not compiled

    def test_streamed_text_is_the_text(self, worded):
        options = {"max_new_tokens": 25, "refresh_every": 6, "ignore_eos": True, "temperature": 0.7}
        expected = worded.llm.generate(PASSAGES[:2], **options)
        assert ["".join(row) for row in zip(*worded.llm.stream(PASSAGES[:2], **options), strict=True)] == expected.texts
        stop = expected.texts[0][6:9]
        stopped = worded.llm.generate(PASSAGES[:2], stop=stop, **options)
        assert stopped.texts[0] == expected.texts[0][: expected.texts[0].index(stop)]
        pieces = zip(*worded.llm.stream(PASSAGES[:2], stop=stop, **options), strict=True)
        assert ["".join(row) for row in pieces] == stopped.texts

    @pytest.mark.parametrize("every", [0, -3, 2.5, True])
    def test_refused(self, tiny, every):
        with pytest.raises(ValueError, match="refresh_every must be a whole number of tokens of at least 1"):
            tiny.llm.generate(PROMPTS, refresh_every=every)

    def test_one_copy_is_not_refreshed(self, tiny):
        llm = gj.load(tiny.folder, "float32", in_place=True)
        with pytest.raises(ValueError, match="regrouped at every refresh"):
            llm.generate(PROMPTS[:1], refresh_every=4)

    @pytest.mark.slow
    def test_command(self, worded, capsys):
        arguments = ["generate", "--model", str(worded.folder), "--prompt", PASSAGES[0], "--max-new-tokens", "12"]
        assert main([*arguments, "--refresh-every", "5", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (
            found["tokens"] == answer(worded.llm, PASSAGES[:1], max_new_tokens=12, refresh_every=5, ignore_eos=False)[0]
        )
        assert found["refreshes"] == 2
        assert main([*arguments, "--refresh-every", "0"]) == 2
        assert "refresh_every must be a whole number" in capsys.readouterr().err


class TestFollow:
    ANSWERS = ([13, 14, 15, 90, 91, 92, 93], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59], [1, 60])

    @pytest.mark.parametrize("width", first_and_slow(1, 3, 12, 1, 5))
    def test_is_torch_without_a_cache(self, tiny, width):
        model = tiny.llm.model
        tokens, lengths = map(jnp.asarray, gj.pad(PROMPTS, 40))
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=10)
        answers, answered = map(jnp.asarray, gj.pad(self.ANSWERS, 10))
        hidden = jitted_extensions.teacher_force_refreshed(
            model, prefilled, answers, answered, Pruner(gj.GriffinConfig(0.5)), width=width
        )
        found = np.asarray(model.logits(hidden))
        for row, (prompt, tail) in enumerate(zip(PROMPTS, self.ANSWERS, strict=True)):
            for at in range(len(tail)):
                whole = len(prompt) + at // width * width
                expected = pruned_log_softmax(tiny.torch, prompt + tail[:at], whole, 0.5)[-1]
                logits = found[row, at].astype(np.float64)
                got = logits - np.log(np.exp(logits).sum())
                np.testing.assert_allclose(got, expected, atol=1e-4)

    @pytest.mark.thorough
    @pytest.mark.parametrize("shared", first_and_slow(1, False, True))
    def test_scores_of_what_was_written_choose_it(self, tiny, shared):
        model = tiny.llm.model
        prior = measure(model, [list(range(10, 60))], size=1, rows=9, quiet=True)
        out = answer(tiny.llm, PROMPTS, refresh_every=3, shared=shared, prior=prior, refit=12 if shared else 4)
        tokens, lengths = map(jnp.asarray, gj.pad(PROMPTS, 40))
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=NEW, rows=4)
        hidden = jitted_extensions.teacher_force_refreshed(
            model, prefilled, jnp.asarray(out), jnp.full(3, NEW),
            Pruner.of(gj.GriffinConfig(0.5, shared=shared), Extensions(prior=prior, refit=12 if shared else 4)),
            width=3,
        )  # fmt: skip
        assert np.argmax(model.logits(hidden), axis=-1).tolist() == out
