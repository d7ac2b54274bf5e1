"""Lossless answers: the full model's tokens, or tokens of its distribution, whatever the pruned model drafts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import PASSAGES, first_and_slow
from flax import nnx
from reference import TinyLlama, assert_close, unchecked

import griffin_jax as gj
from griffin_jax.cli.main import main
from griffin_jax.extensions import jitted as jitted_extensions
from griffin_jax.extensions import speculative
from griffin_jax.extensions.lookup import left_padded
from griffin_jax.generation import jitted

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], list(range(3, 40))]
NEW = 20


def generate(llm: gj.LLM, prompts=PROMPTS, **options) -> gj.Generation:
    return llm.generate(prompts, **({"max_new_tokens": NEW, "ignore_eos": True} | options))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> gj.Transformer:
    """With few answers, so that all can be counted."""
    return TinyLlama.build(tmp_path_factory.mktemp("five"), vocab_size=5).llm.model


class TestGreedy:
    @pytest.mark.thorough
    @pytest.mark.parametrize(
        ("drafts", "density"),
        [
            pytest.param(2, 0.9, marks=pytest.mark.slow),
            pytest.param(5, 0.25, marks=pytest.mark.slow),
            (True, 0.7),
            pytest.param(1, 0.5, marks=pytest.mark.slow),
        ],
    )
    def test_tokens_are_the_dense_models(self, tiny, drafts, density):
        out = generate(tiny.llm, density=density, speculative=drafts)
        assert out.tokens == generate(tiny.llm, density=1.0).tokens
        assert out.tokens != generate(tiny.llm, density=density).tokens
        passes, drafted, accepted = (np.asarray(getattr(out.drafting, x)) for x in ("passes", "drafted", "accepted"))
        assert drafted.tolist() == [out.drafting.steps] * 3
        least, most = (1, speculative.MOST_DRAFTS) if drafts is True else (drafts, drafts)
        assert least * passes <= out.drafting.steps <= most * passes
        # In each pass, a row gets its accepted drafts and at most one more token.
        assert (accepted > 0).all()
        assert (accepted + passes >= NEW - 1).all()

    @pytest.mark.slow
    def test_rows_end_as_in_the_dense_model(self, tiny):
        """At an end-of-text token among the accepted drafts, in place of a draft, or not at all."""
        free = generate(tiny.llm, density=1.0).tokens
        ends = {token for row in free[:2] for token in row[2:12]} - set(free[2])
        llm = gj.LLM(jax.tree.map(lambda x: x, tiny.llm.model))
        for eos in sorted(ends)[:2]:
            llm.model.config = gj.ModelConfig.from_json(tiny.llm.config.to_json() | {"eos_token_ids": (eos,)})
            out = llm.generate(PROMPTS, max_new_tokens=NEW, density=0.8, speculative=3)
            dense = llm.generate(PROMPTS, max_new_tokens=NEW, density=1.0)
            assert (out.tokens, out.finished) == (dense.tokens, dense.finished)
            assert "eos" in out.finished

    def test_drafts_of_the_full_model_are_all_accepted(self, tiny, everything):
        out = generate(tiny.llm, experts=everything, speculative=4)
        assert out.tokens == generate(tiny.llm, density=1.0).tokens
        # 19 tokens behind the first, 5 in each pass; the last pass writes one that is not asked for.
        assert out.drafting.passes == 4
        assert out.drafting.accepted.tolist() == out.drafting.drafted.tolist() == [16] * 3

    @pytest.mark.thorough
    def test_cache_is_that_of_the_dense_model(self, tiny):
        model = tiny.llm.model
        tokens, lengths = map(jnp.asarray, gj.pad(PROMPTS, 40))
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=16)
        pruned = gj.prune(model, jitted.select(prefilled.statistics, gj.GriffinConfig(0.8)))
        state, drafting = jitted_extensions.decode_speculative(
            model, pruned, jitted.init_decode(prefilled), 9, drafts=3
        )
        count = int(state.count)
        assert 9 <= count <= 12
        assert drafting.passes > 1
        assert int(state.cache.cursor) == 40 + count - 1
        whole = [prompt + row[: count - 1] for prompt, row in zip(PROMPTS, state.tokens.tolist(), strict=True)]
        expected = jitted.prefill(model, *map(jnp.asarray, gj.pad(whole, 64)), max_new_tokens=0).cache
        for row, tokens in enumerate(whole):
            (used,) = np.nonzero(np.asarray(state.cache.positions[row]) != gj.EMPTY)
            np.testing.assert_array_equal(state.cache.positions[row][used], np.arange(len(tokens)))
            for layer in range(2):
                for name, axis in (("keys", 2), ("values", 1)):
                    got, right = (np.asarray(getattr(c, name)[layer])[row] for c in (state.cache, expected))
                    assert_close(np.take(got, used, axis), np.take(right, np.arange(len(tokens)), axis))

    def test_without_room_it_ends_early(self, tiny):
        model = tiny.llm.model
        prefilled = jitted.prefill(model, *map(jnp.asarray, gj.pad(PROMPTS, 40)), max_new_tokens=12)
        state, _ = jitted_extensions.decode_speculative(model, model, jitted.init_decode(prefilled), 12, drafts=3)
        assert 9 <= int(state.count) <= 12
        dense = generate(tiny.llm, density=1.0).tokens
        assert state.tokens[:, : int(state.count)].tolist() == [row[: int(state.count)] for row in dense]


class TestDistribution:
    """Against the exact probabilities of all answers of four tokens, of a model with a vocabulary of five."""

    VOCABULARY, LENGTH, DRAWS = 5, 4, 8000
    PROMPTS = ((3,), (1, 4, 2, 0))
    """Both in one batch, so that the rows hold each other up."""

    def exact(self, model: gj.Transformer, prompt: tuple[int, ...], sampler: gj.Sample) -> np.ndarray:
        """Probability of every answer, by the dense model's logits and the definition of sampling."""
        answers = np.asarray(list(itertools.product(range(self.VOCABULARY), repeat=self.LENGTH)))
        tokens = np.concatenate([np.tile(prompt, (len(answers), 1)), answers], axis=1)
        logits = gj.LLM(model).logits(tokens, prompt_length=tokens.shape[1], density=1.0)[:, len(prompt) - 1 : -1]
        kept = np.asarray(sampler.filter(logits.reshape(-1, self.VOCABULARY)), np.float64).reshape(logits.shape)
        weights = np.exp(kept - kept.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.take_along_axis(weights, answers[..., None], axis=-1)[..., 0].prod(axis=1)

    def fits(
        self, model: gj.Transformer, sampler: gj.Sample, drafts: int, cost: float | None = None, copies: bool = False
    ) -> tuple[list[float], float]:
        """For each row the p-value of a chi-square test of its answers; and how many drafts are accepted."""
        prefilled = jitted.prefill(
            model, *map(jnp.asarray, gj.pad(self.PROMPTS, 4)), max_new_tokens=self.LENGTH + drafts
        )
        pruned = gj.prune(model, jitted.select(prefilled.statistics, gj.GriffinConfig(0.5)))
        prompts = jnp.asarray(left_padded(self.PROMPTS)) if copies else None

        @jax.jit
        @jax.vmap
        def draw(seed: jax.Array) -> tuple[jax.Array, ...]:
            state = gj.init_decode(prefilled, sampler=sampler, seed=seed)
            state, drafting = gj.decode_speculative(
                model, pruned, state, self.LENGTH, drafts=drafts, cost=cost, sampler=sampler, prompts=prompts
            )
            accepted, drafted = drafting.accepted, drafting.drafted
            if copies:
                accepted, drafted = drafting.copies_accepted, drafting.copied
            return state.tokens[:, : self.LENGTH], accepted, drafted

        drawn, accepted, drafted = draw(jnp.arange(self.DRAWS))
        values = []
        for row, prompt in enumerate(self.PROMPTS):
            numbers = np.asarray(drawn[:, row]) @ self.VOCABULARY ** np.arange(self.LENGTH)[::-1]
            found = np.bincount(numbers, minlength=self.VOCABULARY**self.LENGTH)
            expected = self.exact(model, prompt, sampler) * self.DRAWS
            assert found[expected == 0].sum() == 0
            rare = expected < 5
            cells = [np.append(x[~rare], x[rare].sum()) for x in (found, expected)]
            # Without rare answers there is one cell less.
            cells = [x[cells[1] > 0] for x in cells]
            values.append(float(scipy.stats.chisquare(*cells).pvalue))
        return values, float(accepted.sum() / drafted.sum())

    @pytest.mark.thorough
    @pytest.mark.parametrize(
        ("sampler", "drafts", "cost"),
        [
            pytest.param(gj.Sample(1.5, top_k=4), 3, 0.2, id="as many as are worth it"),
            pytest.param(gj.Sample(1.5, top_k=4), 3, None, id="top-k", marks=pytest.mark.slow),
            pytest.param(gj.Sample(), 1, None, id="plain", marks=pytest.mark.slow),
            pytest.param(gj.Sample(0.8, top_p=0.9, min_p=0.05), 2, None, id="top-p", marks=pytest.mark.slow),
        ],
    )
    def test_is_the_dense_models(self, model, sampler, drafts, cost):
        values, accepted = self.fits(model, sampler, drafts, cost)
        assert min(values) > 1e-3
        # There are many drafts of both kinds.
        assert 0.1 < accepted < 0.9

    @pytest.mark.slow
    @pytest.mark.parametrize("sampler", [gj.Sample(1.5, top_k=4)])
    def test_with_copies_it_is_too(self, model, sampler):
        values, accepted = self.fits(model, sampler, 3, 0.2, copies=True)
        assert min(values) > 1e-3
        assert 0.05 < accepted < 0.9

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "wrong"),
        [
            pytest.param("correction", lambda p, q: p, id="drawing again from p"),
            pytest.param("accept", lambda chance, *_: jnp.ones_like(chance, bool), id="accepting always"),
            pytest.param("accept", lambda chance, p, _: chance < p, id="accepting with p"),
        ],
    )
    def test_a_wrong_rule_would_be_found(self, model, monkeypatch, name, wrong):
        monkeypatch.setattr(speculative, name, wrong)
        values, _ = self.fits(model, gj.Sample(), 3)
        assert max(values) < 1e-9

    def test_where_both_agree_something_can_be_drawn(self):
        p = jnp.asarray([0.25, 0.75])
        np.testing.assert_array_equal(speculative.correction(p, p), p)
        np.testing.assert_allclose(speculative.correction(p, jnp.asarray([0.5, 0.5])), [0, 0.25])


class TestWorth:
    """Rounds end where the next draft would probably be in vain."""

    LOGITS = jnp.log(jnp.asarray([[0.3, 0.6, 0.1], [0.004, 0.99, 0.006]]))

    def test_classes_are_by_how_sure_the_drafter_is(self):
        found = [speculative._class_of(self.LOGITS, jnp.asarray(tokens)).tolist() for tokens in ((0, 1), (1, 0))]
        assert found == [[0, 6], [1, 0]]
        certain = speculative._class_of(jnp.asarray([[0.0, -200.0]]), jnp.asarray([0]))
        assert certain.tolist() == [speculative.CLASSES - 1]

    def test_what_is_known_at_first_and_later(self):
        none = speculative.Drafting.none(1)
        np.testing.assert_allclose(none.chances()[:3], [0.25, 0.625, 0.8125])
        assert none.chance() == 1
        tried, held = (none.tried.at[1].set(number) for number in (16, 4))
        later = dataclasses.replace(none, tried=tried, held=held)
        np.testing.assert_allclose(later.chances()[:2], [0.25, (4 + 2 * 0.625) / 18])
        np.testing.assert_allclose(later.chance(), (4 + 2) / 18)

    @pytest.mark.parametrize(("cost", "expected"), [(0.04, True), (0.06, False)])
    def test_by_hand(self, tiny, cost, expected):
        """A token costs 3 passes and 10 drafts for 8 tokens, and 1 as if before them."""
        prefilled = jitted.prefill(tiny.llm.model, *map(jnp.asarray, gj.pad(PROMPTS[:2], 8)), max_new_tokens=4)
        state = dataclasses.replace(jitted.init_decode(prefilled), count=jnp.int32(8))
        known = dataclasses.replace(speculative.Drafting.none(2), passes=jnp.int32(3), steps=jnp.int32(10))
        known = dataclasses.replace(known, tried=known.tried.at[0].set(4), held=known.held.at[0].set(1))
        classes = speculative._class_of(self.LOGITS, jnp.asarray([1, 1]))
        chance, another = speculative._worth(known, state, cost)(classes, jnp.float32(0.5))
        sure = 0.5 * 0.625 * (1 - 0.75 / 64)
        np.testing.assert_allclose(chance, sure, rtol=1e-6)
        price, both = (1 + 3 + 10 * cost) / 8, ((1 + 2) / (4 + 2)) ** 2
        assert bool(another) == (sure * both * price > cost) == expected
        # A row that has ended asks for nothing.
        ended = dataclasses.replace(state, done=jnp.asarray([True, False]))
        chance, _ = speculative._worth(known, ended, cost)(classes, jnp.float32(0.5))
        np.testing.assert_allclose(chance, 0.5 * (1 - 0.75 / 64), rtol=1e-6)

    @pytest.mark.slow
    def test_what_is_never_accepted_is_not_drafted(self, tiny, everything):
        """Free drafts are as many as can be; a drafter that is always wrong drafts one in each round before long."""
        dense = generate(tiny.llm, PROMPTS[1:2], density=1.0, max_new_tokens=60).tokens[0]
        prompt = tuple(map(jnp.asarray, gj.pad(PROMPTS[1:2], 8)))
        wrong = jax.tree.map(lambda leaf: leaf, tiny.llm.model)
        wrong.head = nnx.Param(-3 * tiny.llm.model.head[...])
        right = gj.prune(tiny.llm.model, everything)
        counts = {}
        for name, drafter, cost in (("right", right, 0.3), ("free", right, 0.0), ("wrong", wrong, 0.3)):
            state, drafting = jitted_extensions.decode_speculative(
                tiny.llm.model,
                drafter,
                jitted.init_decode(jitted.prefill(tiny.llm.model, *prompt, max_new_tokens=80)),
                60,
                drafts=8,
                cost=jnp.float32(cost),
            )
            counts[name] = int(drafting.steps) / int(drafting.passes)
            assert state.tokens[0, :60].tolist() == dense
        assert counts["free"] == 8
        assert counts["right"] > 3
        assert counts["wrong"] < 1.5


class TestGenerate:
    def test_seed_repeats_the_answer(self, tiny):
        first, again, other = (
            generate(tiny.llm, temperature=1.0, top_k=40, speculative=3, density=0.8, seed=seed).tokens
            for seed in (1, 1, 2)
        )
        assert first == again != other

    def test_equal_prompts_in_a_batch_differ(self, tiny):
        rows = generate(tiny.llm, [PROMPTS[1]] * 4, temperature=1.0, speculative=2).tokens
        assert len({tuple(row) for row in rows}) == 4

    @pytest.mark.parametrize("temperature", first_and_slow(1, 0.7, 0.0))
    def test_streamed_text_is_the_text(self, worded, temperature):
        options = {"speculative": True, "density": 0.8, "temperature": temperature}
        expected = generate(worded.llm, PASSAGES[:2], **options)
        streamed = worded.llm.stream(PASSAGES[:2], max_new_tokens=NEW, ignore_eos=True, **options)
        assert ["".join(row) for row in zip(*streamed, strict=True)] == expected.texts
        assert [len(row) for row in expected.tokens] == [NEW, NEW]
        stop = expected.texts[0][6:9]
        stopped = generate(worded.llm, PASSAGES[:2], stop=stop, **options)
        assert stopped.texts[0] == expected.texts[0][: expected.texts[0].index(stop)]
        assert stopped.finished[0] == "stop"

    @pytest.mark.parametrize("options", first_and_slow(1, {"refit": 8, "shared": True}, {"method": "random"}))
    def test_whatever_drafts(self, tiny, options):
        assert generate(tiny.llm, speculative=2, **options).tokens == generate(tiny.llm, density=1.0).tokens

    @pytest.mark.slow
    def test_one_copy_drafts_with_a_part_of_itself(self, tiny):
        llm = gj.load(tiny.folder, "float32", in_place=True)
        for prompts in (PROMPTS, PROMPTS[:2]):
            out = generate(llm, prompts, speculative=3, shared=True, density=0.8)
            assert out.tokens == generate(tiny.llm, prompts, density=1.0).tokens
            assert out.drafting.accepted.sum() > 0

    def test_the_dense_model_needs_no_drafts(self, tiny):
        out = generate(tiny.llm, density=1.0, speculative=True)
        assert out.drafting is None

    @pytest.mark.thorough
    def test_the_second_answer_compiles_nothing(self, tiny, compiled):
        llm = gj.LLM(tiny.llm.model)
        for _ in range(2):  # The second answer is the first one that is pruned into memory of another.
            generate(llm, PROMPTS[2:], speculative=3)
        del compiled[:]
        generate(llm, [list(range(50, 90))], speculative=3)
        assert not compiled

    @pytest.mark.parametrize("copies", first_and_slow(1, True, False))
    def test_the_cache_is_written_in_place(self, tiny, copies):
        model = tiny.llm.model
        prefilled = jitted.prefill(model, *map(jnp.asarray, gj.pad([[5, 6, 7]], 16)), max_new_tokens=24)
        pruned = gj.prune(model, jitted.select(prefilled.statistics, gj.GriffinConfig(0.5)))
        state = jitted.init_decode(prefilled)
        given = {"drafts": 2} | ({"prompts": left_padded([[5, 6, 7]])} if copies else {})
        with unchecked():
            text = jitted_extensions.decode_speculative.lower(model, pruned, state, 20, **given).compile().as_text()
        cache = r"f32\[(1,2,8,40|1,2,40,8)\]"
        assert len(re.findall(rf"{cache}\S* parameter\(", text)) >= 4
        assert not re.search(rf"= {cache}\S* copy\(", text)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"speculative": -1}, "speculative must be True, False or a whole number of drafts"),
            ({"speculative": 1.5}, "speculative must be True, False or a whole number of drafts"),
            ({"speculative": True, "refresh_every": 4}, "speculative decoding needs no refresh"),
        ],
    )
    def test_refused(self, tiny, options, message):
        with pytest.raises(ValueError, match=message):
            tiny.llm.generate(PROMPTS, **options)

    @pytest.mark.slow
    def test_command(self, worded, capsys):
        arguments = ["generate", "--model", str(worded.folder), "--prompt", PASSAGES[0], "--max-new-tokens", "12"]
        expected = worded.llm.generate(PASSAGES[0], max_new_tokens=12, density=1.0)
        for flags, least, most in ((["--speculative"], 1, speculative.MOST_DRAFTS), (["--speculative", "2"], 2, 2)):
            assert main([*arguments, *flags, "--density", "0.8", "--json"]) == 0
            found = json.loads(capsys.readouterr().out)
            assert found["tokens"] == expected.tokens[0]
            drafting = found["drafting"]
            assert least * drafting["passes"] <= drafting["drafted"] <= most * drafting["passes"]
        assert main([*arguments, "--speculative"]) == 0
        assert "drafts accepted in" in capsys.readouterr().err
        assert main([*arguments, "--speculative", "--refresh-every", "3"]) == 2
        assert "needs no refresh" in capsys.readouterr().err
