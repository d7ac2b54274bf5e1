"""Memory that an answer does not need, or does not need any more, is not held."""

from __future__ import annotations

import dataclasses
import gc

import jax
import pytest
from conftest import drawn_adapter

import griffin_jax as gj
from griffin_jax.extensions import pruner
from griffin_jax.llm.memory import Needs
from griffin_jax.llm.request import Request
from griffin_jax.model.assembly import random_model
from griffin_jax.model.weights import Precision
from griffin_jax.utils import memory

CONFIG = gj.ModelConfig(
    family="llama", vocab_size=64, width=16, ff_width=40, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    max_positions=4096,
)  # fmt: skip
PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture
def llm() -> gj.LLM:
    return gj.LLM(random_model(CONFIG))


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.slow
def test_only_one_set_of_kept_rows_is_spared(llm):
    before = live_bytes()
    llm.generate(PROMPTS, max_new_tokens=2)
    assert live_bytes() == before
    llm.generate(PROMPTS, max_new_tokens=2, shared=True)
    llm.generate(PROMPTS[0], max_new_tokens=2)
    one_set = sum(array.nbytes for array in jax.tree.leaves(llm.model.layers[0].ff)) // 2
    assert live_bytes() == before + one_set
    with pytest.raises(MemoryError):
        llm.generate([[5] * 4000] * 4096, density=0.25, max_new_tokens=2)
    assert live_bytes() == before


class TestSparedRows:
    """The memory of an earlier answer's rows is what the next one's get, and nobody has to ask for it."""

    CONFIG = dataclasses.replace(CONFIG, width=256, ff_width=4096)
    ONE_SET = 4 * 3 * 256 * 2048

    @pytest.fixture
    def llm(self) -> gj.LLM:
        return gj.LLM(random_model(self.CONFIG))

    @pytest.fixture
    def adapters(self) -> list[gj.Adapter]:
        """Of the same ranks, of another one, and of attention alone."""
        of = [(0, {}), (1, {}), (2, {"rank": 5}), (3, {"targets": "attention"})]
        return [drawn_adapter(self.CONFIG, seed, **options) for seed, options in of]

    @pytest.fixture
    def asked(self, monkeypatch) -> list[tuple[int, int]]:
        """Of each answer, the bytes of kept rows that were asked for, and by how much more there are after pruning."""
        found: list[tuple[int, int]] = []
        before: list[tuple[int, int]] = []
        prune = pruner.prune

        def measured(*arguments, **options):
            made = prune(*arguments, **options)
            neurons, live = before.pop()
            found.append((neurons, live_bytes() - live))
            return made

        monkeypatch.setattr(pruner, "prune", measured)
        monkeypatch.setattr(
            memory, "check", lambda parts, *_: before.append((parts.get("kept neurons", 0), live_bytes()))
        )
        return found

    @pytest.mark.thorough
    @pytest.mark.parametrize(
        ("order", "kept"),
        [
            pytest.param((None, None), True, marks=pytest.mark.slow),
            ((None, 0, 1, 2, None), True),
            pytest.param((0, 3, None, 3, 0), True, marks=pytest.mark.slow),
            ((None, (0, 1), (0, 1), 0), False),
        ],
        ids=["none", "of neurons", "of attention", "of each prompt"],
    )
    def test_are_dropped_where_they_do_not_fit(self, llm, adapters, asked, order, kept):
        for which in order:
            several = isinstance(which, tuple)
            adapter = [adapters[one] for one in which] if several else None if which is None else adapters[which]
            llm.generate(PROMPTS, adapter=adapter, max_new_tokens=2, shared=True, ignore_eos=True)
        # An adapter's own rows are counted with the adapter.
        small = self.ONE_SET // 2
        (first, came), *later = asked
        assert first == self.ONE_SET
        assert came < first + small
        for neurons, came in later:
            assert neurons == 0
            assert came < small


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"refit": 4000}, 16),
        ({"refit": 4000, "refresh_every": 2}, 32),
        ({"refit": 3}, 3),
        ({"refit": 40, "shared": True}, 16),
    ],
)
def test_rows_of_a_refit_are_those_that_a_prompt_has(llm, options, rows):
    request = Request.of("generate", max_new_tokens=4, **options)
    assert llm._plan(PROMPTS, request, stream=False).rows == rows


@pytest.mark.parametrize(("drafts", "new", "expected"), [(400, 4, 3), (10**6, 4, 3), (2, 4, 2), (5, 1, 0)])
def test_no_more_is_drafted_than_an_answer_can_have(llm, drafts, new, expected):
    request = Request.of("generate", max_new_tokens=new, speculative=drafts)
    assert llm._plan(PROMPTS, request, stream=False).drafts == expected


def test_the_bound_changes_no_token(llm):
    def tokens(drafts: int, new: int) -> list[list[int]]:
        options = {"max_new_tokens": new, "temperature": 1.0, "seed": 3}
        return llm.generate(PROMPTS, speculative=drafts, **options).tokens

    assert tokens(10**6, 5) == tokens(4, 5)
    assert tokens(10**6, 1) == tokens(1, 1)


def test_the_memory_of_drafts_is_predicted():
    needs = Needs(dataclasses.replace(CONFIG, vocab_size=50_000), Precision.of("float32"))
    few, many = (needs.generation(1, 16, 2048, [20], drafts=drafts)["decoding"] for drafts in (100, 1000))
    assert many - few >= 900 * 4 * 50_000 * 2
