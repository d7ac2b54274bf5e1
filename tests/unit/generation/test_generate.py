"""prefill -> select -> prune -> decode: what must change no token, what compiles, and what is refused."""

from __future__ import annotations

import functools
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conftest import PASSAGES, first_and_slow
from reference import assert_close, torch_greedy, unchecked

import griffin_jax as gj
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import DEFAULT_CHUNK
from griffin_jax.generation.sampling import sampler

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], list(range(3, 40))]


def answer(llm: gj.LLM, prompts, **options) -> list[list[int]]:
    return llm.generate(prompts, **({"max_new_tokens": 20, "ignore_eos": True} | options)).tokens


class TestSameTokens:
    def test_dense_is_torch(self, tiny):
        """One-token prompts among them."""
        assert answer(tiny.llm, PROMPTS, density=1.0) == [torch_greedy(tiny.torch, p, 20) for p in PROMPTS]

    def test_pruned_is_masked_torch(self, tiny):
        out = tiny.llm.generate(PROMPTS, max_new_tokens=20, density=0.5, ignore_eos=True)
        for index, prompt in enumerate(PROMPTS):
            masks = [mask[index] for mask in out.experts.masks()]
            assert out.tokens[index] == torch_greedy(tiny.torch, prompt, 20, masks)

    def test_shared_experts_are_masked_torch(self, tiny):
        out = tiny.llm.generate(PROMPTS, max_new_tokens=20, density=0.5, shared=True, ignore_eos=True)
        assert out.experts.shared
        expected = [torch_greedy(tiny.torch, prompt, 20, out.experts.masks()) for prompt in PROMPTS]
        assert out.tokens == expected

    def test_density_one_is_dense_in_every_method(self, tiny):
        dense = answer(tiny.llm, PROMPTS, density=1.0)
        for method in ("topk", "sample", "topk_sample", "random", "magnitude"):
            assert answer(tiny.llm, PROMPTS, density=1.0, method=method) == dense
        everything = gj.ExpertNeurons.from_indices([np.arange(48)] * 2, tiny.llm.model.neurons)
        assert answer(tiny.llm, PROMPTS, experts=everything) == dense

    @pytest.mark.thorough
    def test_a_row_of_a_batch_is_the_row_alone(self, tiny):
        together = answer(tiny.llm, PROMPTS)
        assert together == [answer(tiny.llm, [prompt])[0] for prompt in PROMPTS]
        assert together != answer(tiny.llm, PROMPTS, density=1.0)

    def test_experts_given_back_in(self, tiny):
        out = tiny.llm.generate(PROMPTS, max_new_tokens=20, density=0.4, ignore_eos=True)
        assert answer(tiny.llm, PROMPTS, experts=out.experts) == out.tokens
        for given, selected in zip(out.experts, tiny.llm.experts(PROMPTS, density=0.4), strict=True):
            np.testing.assert_array_equal(given, selected)

    @pytest.mark.thorough
    def test_bucket_and_padding(self, tiny):
        model, expected = tiny.llm.model, answer(tiny.llm, PROMPTS)
        for length in (37, 38, 64, 100):
            tokens, lengths = gj.pad(PROMPTS, length)
            tokens[tokens == 0] = 99
            prefilled = jitted.prefill(model, jnp.asarray(tokens), jnp.asarray(lengths), max_new_tokens=20)
            pruned = gj.prune(model, jitted.select(prefilled.statistics, gj.GriffinConfig(0.5)))
            state = jitted.init_decode(prefilled)
            assert jitted.decode(pruned, state, 20).tokens.tolist() == expected

    @pytest.mark.parametrize("chunk", first_and_slow(1, 16, 1, 5, 36))
    def test_chunked_prefill(self, tiny, chunk):
        model, expected = tiny.llm.model, answer(tiny.llm, PROMPTS)
        tokens, lengths = (jnp.asarray(a) for a in gj.pad(PROMPTS, 37))
        prefilled = gj.prefill(model, tokens, lengths, max_new_tokens=20, chunk=chunk)
        pruned = gj.prune(model, gj.select(prefilled.statistics, gj.GriffinConfig(0.5)))
        state = gj.init_decode(prefilled)
        assert gj.decode(pruned, state, 20).tokens.tolist() == expected

    def test_a_prompt_longer_than_a_chunk(self, tmp_path):
        from reference import TinyLlama

        pair = TinyLlama.build(tmp_path, max_position_embeddings=2 * DEFAULT_CHUNK)
        prompt = np.random.default_rng(1).integers(3, 101, DEFAULT_CHUNK + 70).tolist()
        assert answer(pair.llm, [prompt], density=1.0, max_new_tokens=8) == [torch_greedy(pair.torch, prompt, 8)]

    @pytest.mark.parametrize(
        "options", first_and_slow(1, {"temperature": 0.8, "seed": 3}, {}), ids=["sampled", "greedy"]
    )
    def test_decoding_in_pieces(self, tiny, options):
        model, draw = tiny.llm.model, sampler(options.get("temperature", 0))
        expected = answer(tiny.llm, PROMPTS, density=1.0, **options)
        tokens, lengths = (jnp.asarray(a) for a in gj.pad(PROMPTS, 64))
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=32)
        state = jitted.init_decode(prefilled, sampler=draw, seed=options.get("seed", 0))
        for until in (2, 3, 11, 20, 20):
            state = jitted.decode(model, state, np.int32(until), sampler=draw)
        assert state.tokens[:, :20].tolist() == expected
        assert (state.tokens[:, 20:] == gj.EMPTY).all()

    def test_answers_after_answers_in_the_same_memory(self, tiny):
        alone = [answer(gj.LLM(tiny.llm.model), [prompt]) for prompt in PROMPTS]
        llm = gj.LLM(tiny.llm.model)
        for density in (0.5, 0.25, 0.5):
            for prompt, expected in zip(PROMPTS, alone, strict=True):
                tokens = answer(llm, [prompt], density=density)
                assert density != 0.5 or tokens == expected
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda prompt: answer(llm, [prompt]), PROMPTS * 3)) == alone * 3

    def test_teacher_forced_logits_choose_the_decoded_tokens(self, tiny):
        prompt = PROMPTS[2]
        out = answer(tiny.llm, [prompt])[0]
        logits = tiny.llm.logits([prompt + out], prompt_length=len(prompt), density=0.5)
        assert np.argmax(logits[0], axis=-1)[len(prompt) - 1 : -1].tolist() == out
        dense = tiny.llm.logits([prompt + out], prompt_length=len(prompt), density=1.0)
        assert_close(dense[0, : len(prompt)], logits[0, : len(prompt)])
        assert np.abs(dense[0, len(prompt) :] - logits[0, len(prompt) :]).max() > 0.01

    def test_a_loop_asked_for_more_than_there_is_room_for(self, tiny):
        tokens, lengths = (jnp.asarray(a) for a in gj.pad(PROMPTS, 64))
        prefilled = jitted.prefill(tiny.llm.model, tokens, lengths, max_new_tokens=20)
        state = jitted.decode(tiny.llm.model, jitted.init_decode(prefilled), 30)
        assert state.tokens.tolist() == answer(tiny.llm, PROMPTS, density=1.0)
        assert state.count == 20

    def test_arrays_are_prompts(self, tiny):
        expected = answer(tiny.llm, [PROMPTS[1]])
        for prompts in (PROMPTS[1], np.array(PROMPTS[1]), jnp.array([PROMPTS[1]]), [np.array(PROMPTS[1])]):
            assert answer(tiny.llm, prompts) == expected
        rows = tiny.llm.logits(PROMPTS[1], prompt_length=3)
        np.testing.assert_array_equal(rows, tiny.llm.logits(jnp.array([PROMPTS[1]]), prompt_length=3))

    def test_what_padding_computes_never_reaches_a_token(self, tiny):
        """Not even as a NaN, which times zero is a NaN."""
        model = jax.tree.map(lambda leaf: leaf, tiny.llm.model)
        model.embedding[...] = model.embedding[...].at[0].set(jnp.inf)
        tokens, lengths = (jnp.asarray(a) for a in gj.pad(PROMPTS, 64))
        poisoned, clean = (jitted.prefill(m, tokens, lengths, max_new_tokens=20) for m in (model, tiny.llm.model))
        np.testing.assert_array_equal(poisoned.logits, clean.logits)
        for a, b in zip(poisoned.statistics.squares, clean.statistics.squares, strict=True):
            np.testing.assert_array_equal(a, b)


class TestEnding:
    def test_eos_ends_a_row_and_only_that(self, tiny):
        free = answer(tiny.llm, PROMPTS, density=1.0)
        row = next(i for i, tokens in enumerate(free) if len(set(tokens)) > 3)
        eos = free[row][3]
        config = gj.ModelConfig.from_json(tiny.llm.config.to_json() | {"eos_token_ids": (eos,)})
        llm = gj.LLM(jax.tree.map(lambda x: x, tiny.llm.model))
        llm.model.config = config
        out = llm.generate(PROMPTS, max_new_tokens=20, density=1.0)
        for got, whole, finished in zip(out.tokens, free, out.finished, strict=True):
            ended = eos in whole
            assert got == (whole[: whole.index(eos) + 1] if ended else whole)
            assert finished == ("eos" if ended else "length")
        assert out.finished[row] == "eos"

    def test_one_new_token(self, tiny):
        out = tiny.llm.generate(PROMPTS, max_new_tokens=1, ignore_eos=True)
        assert [len(tokens) for tokens in out.tokens] == [1, 1, 1]
        assert np.isnan(out.decode_tokens_per_second)

    def test_first_token_is_the_dense_models(self, tiny):
        pruned, dense = (answer(tiny.llm, PROMPTS, density=d, max_new_tokens=1) for d in (0.1, 1.0))
        assert pruned == dense


class TestSampling:
    def test_seed_repeats_the_text(self, tiny):
        options = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
        first, again, other = (answer(tiny.llm, PROMPTS, seed=seed, **options) for seed in (1, 1, 2))
        assert first == again != other

    def test_equal_prompts_in_a_batch_differ(self, tiny):
        rows = answer(tiny.llm, [PROMPTS[1]] * 4, temperature=1.0, density=1.0)
        assert len({tuple(row) for row in rows}) == 4

    def test_filters_against_plain_numpy(self, rng):
        logits = rng.normal(size=(6, 50)).astype(np.float32) * 3

        def softmax(x):
            e = np.exp(x - x.max())
            return e / e.sum()

        def kept(**options):
            return np.isfinite(np.asarray(gj.Sample(**options).filter(jnp.asarray(logits))))

        for row, top_k, top_p, min_p in zip(
            logits, kept(top_k=7), kept(top_p=0.8), kept(temperature=2.0, min_p=0.1), strict=True
        ):
            order = np.argsort(-row)
            assert set(np.nonzero(top_k)[0]) == set(order[:7])
            mass = np.cumsum(softmax(row)[order])
            assert set(np.nonzero(top_p)[0]) == set(order[: np.searchsorted(mass, 0.8) + 1])
            tempered = softmax(row / 2)
            assert set(np.nonzero(min_p)[0]) == set(np.nonzero(tempered >= 0.1 * tempered.max())[0])

    def test_draws_follow_the_distribution(self):
        logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
        keys = jax.random.split(jax.random.key(0), 4000)
        draws = np.asarray(gj.Sample()(jnp.tile(logits, (4000, 1)), keys))
        expected = 4000 * np.array([0.1, 0.2, 0.3, 0.4])
        assert ((np.bincount(draws, minlength=4) - expected) ** 2 / expected).sum() < 16.3  # p = 0.001

    def test_extremes_are_greedy(self, rng):
        logits = jnp.asarray(rng.normal(size=(5, 30)), jnp.float32)
        keys = jax.random.split(jax.random.key(0), 5)
        greedy = gj.Greedy()(logits, keys)
        for draw in (gj.Sample(top_k=1), gj.Sample(top_p=1e-6), gj.Sample(min_p=1.0), gj.Sample(temperature=1e-4)):
            np.testing.assert_array_equal(draw(logits, keys), greedy)

    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 1.0, "top_k": 0},
            {"temperature": 1.0, "top_p": 0.0}, {"temperature": 1.0, "top_p": 1.1}, {"temperature": 1.0, "min_p": -0.1},
            {"top_k": 5}, {"top_p": 0.9},
        ],
    )  # fmt: skip
    def test_bad_values(self, tiny, options):
        with pytest.raises(ValueError, match=r"must be|need a temperature"):
            tiny.llm.generate([[5]], **options)


@pytest.fixture(scope="module")
def hlo(tiny) -> dict[str, str]:
    """Optimised HLO of decoding with the dense and a pruned model, of sizes no other array has."""
    model = tiny.llm.model
    tokens, lengths = (jnp.asarray(a) for a in gj.pad([[5, 6, 7]], 16))
    prefilled = gj.prefill(model, tokens, lengths, max_new_tokens=24)
    experts = gj.select(prefilled.statistics, gj.GriffinConfig(13 / 48 + 1e-9))
    state = gj.init_decode(prefilled)
    decode = jax.jit(gj.decode, donate_argnames=("state",))
    models = {"dense": model, "pruned": gj.prune(model, experts)}
    with unchecked():
        return {name: decode.lower(m, state, 24).compile().as_text() for name, m in models.items()}


class TestCompilation:
    def test_a_second_prompt_of_the_bucket_compiles_nothing(self, tiny, compiled):
        options = {"temperature": 0.9, "top_p": 0.9, "ignore_eos": True}
        # The second answer is the first one that overwrites the rows of another one.
        for _ in range(2):
            tiny.llm.generate([[4, 5, 6]], max_new_tokens=17, **options)
        warm = len(compiled)
        assert warm > 0
        other = {"temperature": 0.5, "top_p": 0.3, "seed": 5, "ignore_eos": True}
        tiny.llm.generate([[9, 8, 7, 6, 5, 4, 3]], max_new_tokens=24, **other)
        assert len(compiled) == warm
        tiny.llm.generate([[1] * 50], max_new_tokens=24, **options)
        assert len(compiled) > warm

    @pytest.mark.parametrize(("name", "neurons"), [("dense", 48), ("pruned", 13)])
    def test_decode_neither_copies_nor_gathers_ff_weights(self, hlo, name, neurons):
        text = hlo[name]
        weight = rf"f32\[({neurons},32|32,{neurons})\]"
        assert re.search(rf"{weight}\S* get-tuple-element|{weight}\S* parameter", text), "the pattern finds no weight"
        made = re.findall(rf"= {weight}\S* (\w[\w-]*)\(", text)
        assert {op for _, op in made} <= {"parameter", "get-tuple-element", "bitcast"}

    @pytest.mark.parametrize("name", ["dense", "pruned"])
    def test_decode_is_one_loop_that_writes_its_cache_in_place(self, hlo, name):
        text = hlo[name]
        assert len(re.findall(r" while\(", text)) == 1
        assert not re.search(r"infeed|outfeed|send\(|recv\(|callback", text)
        aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
        assert aliased
        cache = {"1,2,8,40", "1,2,40,8"}
        entry = text[text.index("entry_computation_layout={(") :].split("->")[0]
        inputs = re.findall(r"(\w+)\[([\d,]*)\]", entry)
        caches = {i for i, (_, shape) in enumerate(inputs) if shape in cache}
        assert len(caches) == 4
        assert caches <= {int(i) for i in re.findall(r"\}: \((\d+),", aliased.group(1) + "}: (-1,")}
        assert not re.search(r"= f32\[(1,2,8,40|1,2,40,8)\]\S* copy\(", text)


class TestBuckets:
    def test_few_and_large_enough(self):
        lengths = [gj.bucket(n) for n in range(1, 4097)]
        assert all(b >= n for n, b in enumerate(lengths, start=1))
        assert lengths == sorted(lengths)
        assert len(set(lengths)) == 21
        assert all(b <= max(16, 1.5 * n) for n, b in enumerate(lengths, start=1))
        assert all(b <= 1.25 * n for n, b in enumerate(lengths, start=1) if n > DEFAULT_CHUNK)

    @pytest.mark.parametrize("length", [DEFAULT_CHUNK + 1, 2100, 3000])
    def test_a_bucket_is_read_without_more_padding(self, tiny, length):
        """In chunks that divide it."""
        size = gj.bucket(length)
        tokens = jax.ShapeDtypeStruct((1, size), jnp.int32)

        def slots(model, tokens, lengths):
            return gj.prefill(model, tokens, lengths, max_new_tokens=16).cache.positions

        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        assert jax.eval_shape(slots, tiny.llm.model, tokens, lengths).shape == (1, size + 16)


class TestPipeline:
    def test_the_steps_jit_and_vmap(self, tiny):
        """The flow inside a user's own jitted function, and vmapped over a stack of batches."""

        @functools.partial(jax.jit, static_argnames="new")
        def pipeline(model, tokens, lengths, new):
            prefilled = gj.prefill(model, tokens, lengths, max_new_tokens=new)
            pruned = gj.prune(model, gj.select(prefilled.statistics, gj.GriffinConfig(0.5)))
            state = gj.init_decode(prefilled)
            return gj.decode(pruned, state, new).tokens

        tokens, lengths = (jnp.asarray(a) for a in gj.pad(PROMPTS, 37))
        expected = answer(tiny.llm, PROMPTS)
        assert pipeline(tiny.llm.model, tokens, lengths, 20).tolist() == expected
        stacked = jax.vmap(lambda t, n: pipeline(tiny.llm.model, t[None], n[None], 20)[0])(tokens, lengths)
        assert stacked.tolist() == expected

    def test_seconds(self, tiny):
        seconds = tiny.llm.generate([[5, 6]], max_new_tokens=3).seconds
        assert set(seconds) == {"compile", "prefill", "select", "prune", "decode"}
        assert all(value >= 0 for value in seconds.values())


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompts", "options", "message"),
        [
            ([], {}, "no prompts"),
            ([[]], {}, "prompt 0 is empty"),
            ([[5], []], {}, "prompt 1 is empty"),
            ("text", {}, "no tokenizer"),
            ([[5, 101]], {}, r"token 101; the vocabulary is \[0, 100\]"),
            ([[-1]], {}, "token -1"),
            ([[5, 1.5]], {}, "no token id"),
            ([1.5], {}, "no token id"),
            ([None], {}, "prompt 0 is None; give text"),
            (None, {}, "prompts are None; give text"),
            ({"role": "user", "content": "x"}, {}, "a chat is a list of messages"),
            ([[5]], {"seed": 2**31}, "seed must be"),
            ([[5]], {"seed": 0.5}, "seed must be"),
            ([[5] * 200], {"max_new_tokens": 57}, "200 tokens and an answer of 57 .* context of 256"),
            ([[5]], {"max_new_tokens": 0}, "max_new_tokens must be"),
            ([[5]], {"max_new_tokens": 2.5}, "max_new_tokens must be"),
            ([[5]], {"density": 0}, r"density must be in \(0, 1\]"),
            ([[5]], {"density": 1.5}, r"density must be in \(0, 1\]"),
            ([[5]], {"density": 0.01}, "keeps 0 of 48 neurons"),
            ([[5]], {"density": [0.5]}, "1 densities for 2 layers"),
            ([[5]], {"method": "best"}, "method is 'best'; allowed are topk"),
            ([[5]], {"round_to": 0}, "round_to must be"),
            ([[5]], {"stop": ["x"]}, "need a tokenizer"),
            ([[5]], {"stop": [""]}, "stop strings must not be empty"),
            ([[5]], {"chat": True, "stop": "x"}, "need a tokenizer"),
        ],
    )
    def test_generate(self, tiny, prompts, options, message):
        with pytest.raises(ValueError, match=message):
            tiny.llm.generate(prompts, **options)

    def test_experts_that_do_not_fit(self, tiny):
        two_rows = tiny.llm.experts([[5], [6]])
        with pytest.raises(ValueError, match="for 2 sequences, there are 3 prompts"):
            tiny.llm.generate(PROMPTS, experts=two_rows)
        with pytest.raises(ValueError, match="these experts are for a model of 1 layers"):
            tiny.llm.generate(PROMPTS, experts=gj.ExpertNeurons.from_indices([[1]], (48,)))

    def test_logits(self, tiny):
        with pytest.raises(ValueError, match=r"prompt_length must be in \[1, 3\]"):
            tiny.llm.logits([[5, 6, 7]], prompt_length=4)
        with pytest.raises(ValueError, match="sequences of one length"):
            tiny.llm.logits([[5, 6, 7], [5]], prompt_length=1)
        for none in ([], np.zeros((0, 3), np.int32)):
            with pytest.raises(ValueError, match="at least one sequence of tokens, got none"):
                tiny.llm.logits(none, prompt_length=1)
        with pytest.raises(ValueError, match="token 200"):
            tiny.llm.logits([[5, 200]], prompt_length=1)

    def test_stream_refuses_at_once(self, tiny, worded):
        with pytest.raises(TypeError, match="unexpected options: densty"):
            worded.llm.stream([[5]], densty=0.5)
        with pytest.raises(ValueError, match="density must be"):
            worded.llm.stream([[5]], density=2)
        with pytest.raises(ValueError, match="no tokenizer"):
            tiny.llm.stream([[5]])

    def test_steps_that_do_not_follow(self, tiny):
        tokens, lengths = (jnp.asarray(a) for a in gj.pad(PROMPTS, 64))
        prefilled = jitted.prefill(tiny.llm.model, tokens, lengths, max_new_tokens=4, collect=False)
        with pytest.raises(ValueError, match="prefill with collect=True"):
            gj.select(prefilled.statistics, gj.GriffinConfig(0.5))
        pruned = gj.prune(tiny.llm.model, tiny.llm.experts(PROMPTS))
        with pytest.raises(ValueError, match="pruned for every sequence"):
            gj.prune(pruned, gj.ExpertNeurons.from_indices([[1]] * 2, pruned.neurons))
        with pytest.raises(ValueError, match="a sequence of 37 tokens does not fit into 32"):
            gj.pad(PROMPTS, 32)
        with pytest.raises(jaxtyping.TypeCheckError):
            gj.prefill(tiny.llm.model, tokens, jnp.ones((2,), jnp.int32), max_new_tokens=4)


class TestEnds:
    def test_stop_tokens_end_answers_as_the_models_own_do(self, tiny):
        free = tiny.llm.generate(PROMPTS, max_new_tokens=12, ignore_eos=True).tokens
        end = free[0][5]
        for options in ({"stop_token_ids": [end]}, {"stop_token_ids": end, "ignore_eos": True}):
            out = tiny.llm.generate(PROMPTS, max_new_tokens=12, **options)
            for row, whole, finished in zip(out.tokens, free, out.finished, strict=True):
                assert row == whole[: whole.index(end) + 1 if end in whole else None]
                assert finished == ("eos" if end in whole else "length")

    def test_stop_tokens_are_checked(self, tiny):
        with pytest.raises(ValueError, match=r"stop_token_ids has 999999; the vocabulary is \[0, "):
            tiny.llm.generate(PROMPTS, max_new_tokens=1, stop_token_ids=[999_999])
        with pytest.raises(ValueError, match="stop_token_ids must be a whole number of at least 0, got -1"):
            gj.GenerationConfig(stop_token_ids=[-1])


class TestText:
    def test_stop_string_cuts_text_and_tokens(self, worded):
        free = worded.llm.generate(PASSAGES[1], max_new_tokens=24, density=1.0)
        places = [free.texts[0][start : start + 3] for start in range(6, len(free.texts[0]) - 3)]
        stop = next(place for place in places if place.isascii())
        out = worded.llm.generate(PASSAGES[1], max_new_tokens=24, density=1.0, stop=[stop, "never written"])
        assert out.finished == ["stop"]
        assert out.texts[0] == free.texts[0][: free.texts[0].index(stop)]
        assert out.tokens[0] == free.tokens[0][: len(out.tokens[0])]
        decode = worded.llm.tokenizer.decode
        assert stop in decode(out.tokens[0])
        assert stop not in decode(out.tokens[0][:-1])

    def test_stream_is_the_text_of_generate(self, worded):
        options = {"max_new_tokens": 24, "density": 0.6, "temperature": 0.7, "seed": 4, "stop": ["zz", "e"]}
        whole = worded.llm.generate(PASSAGES[:2], **options)
        pieces = list(worded.llm.stream(PASSAGES[:2], **options))
        assert ["".join(row) for row in zip(*pieces, strict=True)] == whole.texts

    def test_half_characters_are_held_back(self, worded):
        """A token may end inside the bytes of a character."""
        from griffin_jax.text.growing import GrowingText

        tokens = worded.llm.tokenizer.encode("a🌋b")
        text, shown = GrowingText(worded.llm.tokenizer, 1, ()), []
        for end in range(1, len(tokens) + 1):
            text.update(np.array([tokens[:end]]), np.array([False]))
            shown += text.pieces()
        assert "".join(shown + text.pieces(last=True)) == "a🌋b"
        assert not any("\ufffd" in piece for piece in shown)

    def test_chat_puts_the_template_around_the_prompt(self, worded):
        message = [{"role": "user", "content": "Name a colour."}]
        plain = worded.llm.tokenizer.chat(message)
        by_flag = worded.llm.generate("Name a colour.", chat=True, max_new_tokens=4)
        by_messages = worded.llm.generate(message, max_new_tokens=4)
        assert by_flag.prompt_tokens == by_messages.prompt_tokens == [len(plain)]
        assert by_flag.tokens == by_messages.tokens
        text = worded.llm.tokenizer.decode(plain, skip_special=False)
        assert text == "<s>user: Name a colour.</s><s>assistant: "

    def test_empty_text(self, worded):
        with pytest.raises(ValueError, match="prompt 0 is empty"):
            worded.llm.generate("")
