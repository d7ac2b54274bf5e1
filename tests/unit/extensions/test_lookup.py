"""Drafts that are copied: where the last tokens stood before, and that answers are the full model's all the same."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PASSAGES, first_and_slow

import griffin_jax as gj
from griffin_jax.cli.main import main
from griffin_jax.extensions import speculative
from griffin_jax.extensions.lookup import LONGEST, left_padded, look_up
from griffin_jax.model.cache import EMPTY

AGAIN = [*range(3, 23), *range(3, 9)]
"""A prompt that has begun to repeat itself."""

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13, 7, 8, 9], AGAIN]


def plain(context: list[int], count: int) -> tuple[list[int], int]:
    """The same by the definition: of the places where the most last tokens stood before, the last one."""
    best, place = 0, -1
    for end in range(1, len(context)):
        agree = 0
        while agree < min(end, LONGEST) and context[end - 1 - agree] == context[-1 - agree]:
            agree += 1
        if agree and agree >= best:
            best, place = agree, end
    longer = list(context)
    for number in range(count if best else 0):
        longer.append(longer[place + number])
    return longer[len(context) :], best


class TestLookUp:
    def test_as_by_the_definition(self, rng):
        found = jax.jit(look_up, static_argnums=2)
        for _ in range(100):
            words = int(rng.integers(2, 8))
            prompts = [rng.integers(0, words, rng.integers(1, 30)).tolist() for _ in range(2)]
            answers, known = rng.integers(0, words, (2, 6)), int(rng.integers(0, 7))
            padded = left_padded(prompts)
            # What is not known yet is there, and does not matter.
            context = np.concatenate([padded, answers, np.zeros((2, 3), int)], axis=1).astype(np.int32)
            tokens, matched = found(context, jnp.int32(padded.shape[1] + known), 4)
            for row, prompt in enumerate(prompts):
                expected, agree = plain(prompt + answers[row, :known].tolist(), 4)
                assert matched[row] == agree
                assert not agree or tokens[row].tolist() == expected

    @pytest.mark.parametrize(
        ("context", "expected", "agree"),
        [
            ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2], 3),
            # The last of the places.
            ([1, 5, 1, 6, 1], [6, 1, 6], 1),
            # A repetition goes on.
            ([4, 4, 4], [4, 4, 4], 2),
            ([7, 8] * 6, [7, 8, 7], LONGEST),
        ],
    )
    def test_by_hand(self, context, expected, agree):
        tokens, matched = look_up(jnp.asarray([context]), jnp.int32(len(context)), 3)
        assert (tokens[0].tolist(), int(matched[0])) == (expected, agree)

    def test_nothing_agrees_with_padding(self):
        context = jnp.asarray(left_padded([[3], [3, 4, 5]]))
        assert context[0].tolist() == [EMPTY] * 15 + [3]
        _, matched = look_up(context, jnp.int32(16), 2)
        assert matched.tolist() == [0, 0]


class TestAnswers:
    @pytest.mark.thorough
    @pytest.mark.parametrize(
        "options",
        first_and_slow(
            1,
            {"density": 0.8, "speculative": True},
            {"density": 1.0, "speculative": True},
            {"density": 0.8, "speculative": 3},
            {"density": 1.0, "speculative": 5, "draft_weights": "int8"},
        ),
    )
    def test_tokens_are_the_dense_models(self, tiny, options):
        """In a batch and alone, with a model that drafts and without."""
        for prompts in (PROMPTS, [AGAIN]):
            given = {"max_new_tokens": 40, "ignore_eos": True}
            out = tiny.llm.generate(prompts, lookup=True, **options, **given)
            assert out.tokens == tiny.llm.generate(prompts, density=1.0, **given).tokens
        found = out.drafting
        if options["speculative"] is True:
            # A tiny model repeats itself, which is easy to copy. Few drafts are all accepted here: nothing is better.
            assert 0 < found.copies_accepted.sum() < found.copied.sum()
        alone = options["density"] == 1 and "draft_weights" not in options
        assert (found.steps == 0) == alone
        assert int(found.passes) + int((found.accepted + found.copies_accepted)[0]) >= 39

    @pytest.mark.parametrize(("drafts", "most"), [(True, speculative.MOST_WITH_COPIES), (3, 3)])
    def test_a_round_has_as_many_as_there_is_room_for(self, tiny, drafts, most):
        """One begins with a token that the first copies are for; what the last one may write is more than asked for."""
        options = {"density": 1.0, "speculative": drafts, "lookup": True, "ignore_eos": True}
        found = tiny.llm.generate([AGAIN], max_new_tokens=80, **options).drafting
        assert found.copied[0] % most == 0
        assert most < found.copied[0] <= most * found.passes

    def test_less_is_drafted_for_the_same_answer(self, tiny):
        given = {"density": 0.8, "speculative": True, "max_new_tokens": 40, "ignore_eos": True}
        without, copying = (tiny.llm.generate([AGAIN], lookup=lookup, **given) for lookup in (False, True))
        assert copying.drafting.steps < without.drafting.steps
        assert without.drafting.copied.sum() == without.drafting.copies_accepted.sum() == 0

    def test_ends_as_in_the_dense_model(self, tiny):
        free = tiny.llm.generate([AGAIN], density=1.0, max_new_tokens=20, ignore_eos=True).tokens[0]
        llm = gj.LLM(jax.tree.map(lambda x: x, tiny.llm.model))
        llm.model.config = gj.ModelConfig.from_json(tiny.llm.config.to_json() | {"eos_token_ids": (free[9],)})
        out = llm.generate([AGAIN], max_new_tokens=20, density=1.0, speculative=True, lookup=True)
        assert out.finished == ["eos"]
        assert out.tokens[0] == free[: free.index(free[9]) + 1]

    @pytest.mark.slow
    def test_a_copy_is_preferred_where_it_is_as_likely(self, tiny):
        """Chances by hand, of copies after so many tokens that agree, and of drafts."""
        prefilled = gj.prefill(tiny.llm.model, *map(jnp.asarray, gj.pad([AGAIN], 32)), max_new_tokens=8)
        state = gj.init_decode(prefilled)
        assert state.tokens[0, 0] not in AGAIN
        context = jnp.asarray(left_padded([[*AGAIN[:-6], int(state.tokens[0, 0]), *AGAIN[-6:]]]))
        none = speculative.Drafting.none(1)
        np.testing.assert_allclose(none.chances()[speculative.CLASSES :][:3], [0.5, 0.75, 1 - 1 / 6])
        first = speculative.CLASSES
        for tried, held, copies in ((0, 0, False), (4, 1, True)):
            # Of one token that agrees, half are expected to be accepted: fewer than of drafts, until these fail.
            known = dataclasses.replace(none, tried=none.tried.at[0].set(tried), held=none.held.at[0].set(held))
            copying = speculative._Copying(context, state, 4, known)
            drafted = jnp.asarray([[60, 61, 62, 63]]), jnp.zeros((1, 4, 128)), jnp.zeros((1, 4), jnp.int32)
            assert bool(copying.are_better(drafted[0], jnp.int32(0))) == copies
            number, tokens, q, classes = copying.fill(jnp.int32(0), *drafted)
            assert (int(number), tokens[0].tolist()) == (4, AGAIN[-6:-2])
            assert jnp.argmax(q, axis=-1).tolist() == tokens.tolist()
            assert classes[0].tolist() == [first, first + 1, first + 2, first + 3]
        # Nothing stands twice before these.
        number, tokens, *_ = copying.fill(jnp.int32(2), *drafted)
        assert (int(number), tokens.tolist()) == (2, drafted[0].tolist())

    def test_streamed_text_is_the_text(self, worded):
        options = {"density": 1.0, "speculative": True, "lookup": True, "max_new_tokens": 20, "ignore_eos": True}
        streamed = worded.llm.stream(PASSAGES[:1], **options)
        assert ["".join(row) for row in zip(*streamed, strict=True)] == worded.llm.generate(
            PASSAGES[:1], **options
        ).texts

    @pytest.mark.thorough
    def test_refused(self, tiny):
        with pytest.raises(ValueError, match="lookup is for drafts, and nothing is drafted"):
            tiny.llm.generate(PROMPTS, lookup=True)
        state = gj.init_decode(gj.prefill(tiny.llm.model, *map(jnp.asarray, gj.pad([[5]], 8)), max_new_tokens=8))
        with pytest.raises(ValueError, match="nothing drafts: give a pruned model, or prompts"):
            gj.decode_speculative(tiny.llm.model, None, state, 4)

    def test_command(self, worded, capsys):
        arguments = ["generate", "--model", str(worded.folder), "--prompt", PASSAGES[0], "--max-new-tokens", "20"]
        arguments += ["--density", "1", "--ignore-eos", "--speculative", "--lookup"]
        assert main([*arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["drafting"]
        assert found["drafted"] == found["accepted"] == 0
        assert 0 <= found["copies_accepted"] < found["copied"]
        assert main(arguments) == 0
        assert f"; {found['copies_accepted']:,} of {found['copied']:,} copies accepted in" in capsys.readouterr().err
