"""Given answers are scored as decoding them would have, whatever the padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_and_slow
from reference import assert_close

import griffin_jax as gj
from griffin_jax.generation import jitted, scoring

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [40, 41, 42], [90, 3, 77, 3, 21]]
ANSWERS = [[13, 14, 15], [50, 51, 52, 53, 54, 55], [1]]


@pytest.fixture
def followed(tiny):
    """Residual streams of dense and pruned passes over ragged prompts and answers."""
    model = tiny.llm.model
    tokens, lengths = map(jnp.asarray, gj.pad(PROMPTS, 16))
    answers, answered = map(jnp.asarray, gj.pad(ANSWERS, 8))
    prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=8)
    experts = gj.select(prefilled.statistics, gj.GriffinConfig(0.5))
    dense, statistics = jitted.teacher_force(model, prefilled, answers, answered, collect=True)
    pruned, _ = jitted.teacher_force(gj.prune(model, experts), prefilled, answers, answered)
    return model, dense, pruned, answers, statistics


def alone(model, prompt: list[int], answer: list[int], density: float) -> np.ndarray:
    """Logits that score the answer's tokens, of one sequence without padding."""
    tokens = jnp.asarray([[*prompt, *answer]])
    logits = jitted.teacher_forced(model, tokens, len(prompt), gj.GriffinConfig(density))
    return np.asarray(logits[0, len(prompt) - 1 : -1])


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_follow_is_teacher_forcing_of_each_row_alone(followed, density):
    model, dense, pruned, *_ = followed
    logits = np.asarray(model.logits(dense if density == 1 else pruned))
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        assert_close(logits[row, : len(answer)], alone(model, prompt, answer, density))


@pytest.mark.thorough
def test_statistics_of_answers_are_what_the_prompts_lack(followed):
    model, *_, statistics = followed
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        whole, head = (
            jitted.prefill(
                model, jnp.asarray([tokens]), jnp.asarray([len(tokens)]), max_new_tokens=0
            ).statistics.squares
            for tokens in (prompt + answer, prompt)
        )
        for layer, squares in enumerate(statistics.squares):
            assert_close(np.asarray(squares[row]), np.asarray(whole[layer] - head[layer])[0])
    assert statistics.tokens.tolist() == [len(answer) for answer in ANSWERS]


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", first_and_slow(1, 4, 1024))
def test_extended_prompts_are_longer_prompts(tiny, monkeypatch, chunk):
    """Whether they are read at once or in chunks; a row may have nothing more, or end before the last chunk."""
    model = tiny.llm.model
    more, behind = [[13, 14, 15, 16, 17, 18], [], [1, 2]], [[19], [43, 44], []]
    tokens, lengths = map(jnp.asarray, gj.pad(PROMPTS, 16))
    rest, rest_lengths = map(jnp.asarray, gj.pad(more, 8))
    both = [first + second for first, second in zip(more, behind, strict=True)]
    prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=10)
    expected, _ = jitted.teacher_force(model, prefilled, *map(jnp.asarray, gj.pad(both, 10)))
    whole = [prompt + tail for prompt, tail in zip(PROMPTS, more, strict=True)]
    prefilled_whole = jitted.prefill(model, *gj.pad(whole, 16), max_new_tokens=2)

    monkeypatch.setattr(scoring, "DEFAULT_CHUNK", chunk)
    hidden, longer = scoring.extend(model, prefilled, rest, rest_lengths)
    following, _ = jitted.teacher_force(model, longer, *map(jnp.asarray, gj.pad(behind, 2)))
    for row, (tail, last) in enumerate(zip(more, behind, strict=True)):
        got = np.concatenate([hidden[row, : len(tail)], following[row, : len(last)]])
        assert_close(got, np.asarray(expected[row, : len(tail + last)]))
    assert longer.max_new_tokens == prefilled_whole.max_new_tokens
    assert longer.statistics.tokens.tolist() == prefilled_whole.statistics.tokens.tolist()
    for name in ("logits", "hidden"):
        assert_close(np.asarray(getattr(longer, name)), np.asarray(getattr(prefilled_whole, name)))
    for got, squares in zip(longer.statistics.squares, prefilled_whole.statistics.squares, strict=True):
        assert_close(np.asarray(got), np.asarray(squares))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("columns", [None, 1, 3])
def test_scores_are_those_of_the_definitions(followed, monkeypatch, columns):
    """Whether logits are made at once or a few columns at a time."""
    model, dense, pruned, answers, _ = followed
    if columns:
        monkeypatch.setattr(scoring, "LOGITS_BYTES", columns * 4 * len(PROMPTS) * model.config.vocab_size)
    p, q = log_softmax(np.asarray(model.logits(dense))), log_softmax(np.asarray(model.logits(pruned)))
    loss = scoring.losses(model, dense, answers)
    first, second = scoring.compare(model, dense, (pruned, dense), answers)
    at = np.asarray(answers)[..., None]
    assert_close(np.asarray(loss.loss), -np.take_along_axis(p, at, -1)[..., 0])
    np.testing.assert_array_equal(loss.greedy, p.argmax(-1) == np.asarray(answers))
    assert_close(np.asarray(first.loss), -np.take_along_axis(q, at, -1)[..., 0])
    np.testing.assert_allclose(first.kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(first.agree, p.argmax(-1) == q.argmax(-1))
    np.testing.assert_array_equal(second.kl, np.zeros_like(second.kl))
    assert second.agree.all()


def test_logits_are_not_all_there_at_once(tiny, monkeypatch):
    model = tiny.llm.model
    shape = (2, 4096, model.config.width)
    hidden, answers = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:2], jnp.int32)

    def temporary_bytes() -> int:
        # A function of its own, because jax would remember the program with the other limit.
        compiled = jax.jit(lambda *arguments: scoring.losses(*arguments)).lower(model, hidden, answers).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    everything = 4 * 2 * 4096 * model.config.vocab_size
    assert temporary_bytes() >= everything
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 1 << 16)
    assert temporary_bytes() < 0.8 * everything
