"""Log-likelihoods of passages against torch models whose neurons are masked by hand, passage by passage."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import first_and_slow
from reference import TOLERANCE, pruned_log_softmax

import griffin_jax as gj
from griffin_jax.evaluation import likelihood
from griffin_jax.evaluation.general_text import measure
from griffin_jax.evaluation.likelihood import Passage, continuation, last_token, likelihoods, window
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation import jitted

CONTEXTS = [[5, 6, 7, 8, 9, 10, 11, 12], [40, 41, 42], [90, 3, 77, 3, 21], [17]]
CONTINUATIONS = [[13, 14, 15], [50], [1, 60, 61, 62, 63, 64], [70, 71]]
PAIRS = [(context, tokens) for context in CONTEXTS for tokens in CONTINUATIONS]


def oracle(model, context: list[int], tokens: list[int], dense: int, density: float) -> tuple[float, bool]:
    """Of the tokens behind a context, when the first `dense` tokens of both are read by the whole model."""
    read = [*context, *tokens][:-1]
    scores = pruned_log_softmax(model, read, dense, density)[-len(tokens) :]
    return float(sum(scores[range(len(tokens)), tokens])), scores.argmax(-1).tolist() == tokens


def scored(
    tiny, passages, config=gj.GriffinConfig(0.5), size: int = 3, seed: int = 0, **extensions
) -> list[tuple[float, bool]]:
    pruner = Pruner.of(config, Extensions(**extensions))
    found = dict(likelihoods(tiny.llm.model, passages, pruner, size=size, seed=seed))
    assert sorted(found) == list(range(len(passages)))
    return [(found[number].log, found[number].greedy) for number in range(len(passages))]


def assert_scores(got: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([log for log, _ in got], [log for log, _ in expected], rtol=TOLERANCE, atol=TOLERANCE)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("density", [1.0, 0.5])
class TestOracle:
    def test_continuations_are_read_pruned(self, tiny, density):
        got = scored(tiny, [continuation(*pair) for pair in PAIRS], gj.GriffinConfig(density))
        assert_scores(got, [oracle(tiny.torch, *pair, len(pair[0]), density) for pair in PAIRS])

    def test_only_the_last_token_of_the_input_is_read_pruned(self, tiny, density):
        got = scored(tiny, [last_token(*pair) for pair in PAIRS], gj.GriffinConfig(density))
        # Of an input of one token nothing stands before the last one: it is read whole.
        dense = [max(1, len(context) + len(tokens) - 2) for context, tokens in PAIRS]
        assert_scores(got, [oracle(tiny.torch, *pair, read, density) for pair, read in zip(PAIRS, dense, strict=True)])

    @pytest.mark.parametrize("share", [0, 0.6])
    def test_windows_are_read_whole_up_to_a_share(self, tiny, density, share):
        pairs = [([1], list(range(2, 2 + length))) for length in (1, 2, 20)] + [PAIRS[0]]
        got = scored(tiny, [window(*pair, share) for pair in pairs], gj.GriffinConfig(density))
        dense = [max(len(c), int(share * (len(c) + len(t) - 1))) for c, t in pairs]
        assert_scores(got, [oracle(tiny.torch, *pair, read, density) for pair, read in zip(pairs, dense, strict=True)])


def test_greedy_continuations_are_found(tiny):
    """The pruned model's own answer, and one that differs in its first token."""
    answer = tiny.llm.generate([CONTEXTS[0]], max_new_tokens=5, density=0.5, ignore_eos=True).tokens[0]
    other = [(answer[0] + 1) % 101, *answer[1:]]
    (_, same), (_, changed) = scored(tiny, [continuation(CONTEXTS[0], tokens) for tokens in (answer, other)])
    assert (same, changed) == (True, False)


@pytest.mark.parametrize("method", first_and_slow(2, "topk", "sample", "topk_sample", "random", "magnitude"))
@pytest.mark.parametrize("kind", [continuation, last_token])
def test_neither_batch_nor_order_matters(tiny, method, kind):
    """Also where neurons are drawn: equal contexts keep equal neurons."""
    passages, config = [kind(*pair) for pair in PAIRS], gj.GriffinConfig(0.5, method)
    expected = scored(tiny, passages, config, seed=5)
    order = np.random.default_rng(0).permutation(len(passages))
    got = scored(tiny, [passages[number] for number in order], config, size=2, seed=5)
    assert_scores(got, [expected[number] for number in order])


def test_draws_are_those_of_the_seed(tiny):
    passages, config = [continuation(*pair) for pair in PAIRS], gj.GriffinConfig(0.5, "random")
    assert scored(tiny, passages, config, seed=1) == scored(tiny, passages, config, seed=1)
    assert scored(tiny, passages, config, seed=1) != scored(tiny, passages, config, seed=2)


@pytest.fixture(scope="module")
def prior(tiny) -> gj.Prior:
    return measure(
        tiny.llm.model, [list(range(start, start + 12)) for start in range(10, 90, 11)], size=4, rows=20, quiet=True
    )


@pytest.mark.parametrize("rows", [0, 2])
def test_rows_that_fill_a_batch_do_not_choose_shared_neurons(tiny, rows):
    """Nor are these refitted to them, to so many tokens of each row."""
    passages, config = [continuation(*pair) for pair in PAIRS[:8]], gj.GriffinConfig(0.5, shared=True)
    assert_scores(scored(tiny, passages, config, 3, refit=3 * rows), scored(tiny, passages, config, 2, refit=2 * rows))


@pytest.mark.thorough
@pytest.mark.parametrize("general", first_and_slow(1, True, False))
def test_neurons_are_refitted_and_chosen_by_general_text(tiny, prior, general):
    """The steps one after the other, for each pair alone."""
    model, config, expected = tiny.llm.model, gj.GriffinConfig(0.5), []
    fuse = prior.fusion() if general else None
    for context, tokens in PAIRS:
        answers = gj.pad([tokens], 16)
        prefilled = jitted.prefill(model, *gj.pad([context], 16), max_new_tokens=16, rows=5)
        fitted = gj.Reconstruction(prefilled.rows, calibration=prior.rows if general else ())
        experts = jitted.select(prefilled.statistics, config, fuse=fuse)
        hidden, _ = jitted.teacher_force(gj.prune(model, experts, refit=fitted), prefilled, *answers)
        found = jitted.losses(model, hidden, answers[0])
        loss, greedy = (np.asarray(part)[0, : len(tokens)] for part in (found.loss, found.greedy))
        expected.append((-float(loss.sum()), bool(greedy.all())))
    assert_scores(
        scored(tiny, [continuation(*pair) for pair in PAIRS], config, refit=5, **({"prior": prior} if general else {})),
        expected,
    )
    assert not np.allclose(
        [log for log, _ in expected], [log for log, _ in scored(tiny, [continuation(*p) for p in PAIRS])]
    )


def test_weights_alone_are_not_refitted(tiny):
    with pytest.raises(ValueError, match='method "magnitude" chooses by weights alone'):
        scored(tiny, [continuation(*PAIRS[0])], gj.GriffinConfig(0.5, "magnitude"), refit=5)


def test_a_batch_of_another_length_compiles_nothing(tiny, monkeypatch):
    """Contexts and continuations of other lengths and numbers, in the same buckets."""
    calls = []

    def shapes(name: str):
        compiled = getattr(likelihood.jitted, name)

        def noted(model, *arguments, **options):
            arrays = [a.shape for a in arguments if hasattr(a, "shape")]
            calls.append((name, tuple(arrays), options.get("max_new_tokens")))
            return compiled(model, *arguments, **options)

        monkeypatch.setattr(likelihood.jitted, name, noted)

    for name in ("prefill", "teacher_force", "losses"):
        shapes(name)
    scored(tiny, [continuation(range(3, 3 + n), range(40, 46 + n)) for n in (2, 5, 9)])
    first = set(calls)
    calls.clear()
    scored(tiny, [continuation(range(4, 4 + n), range(41, 44 + n)) for n in (3, 4, 7, 11, 13)])
    assert calls
    assert set(calls) <= first


def test_passages_end_with_what_is_scored():
    assert last_token([1], [2]) == Passage((1,), (), (2,), 1)
    assert last_token([1, 2], [3]) == Passage((1,), (), (2, 3), 1)
    assert last_token([1, 2, 3], [4, 5, 6]) == Passage((1, 2), (3, 4), (5, 6), 3)
    assert window([1], [2, 3, 4, 5], 0.5) == Passage((1,), (2,), (3, 4, 5), 4)
    assert dataclasses.replace(window([1], [2], 0.9), scored=1) == continuation([1], [2])
