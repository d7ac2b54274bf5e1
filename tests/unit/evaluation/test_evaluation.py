"""`griffin-jax eval`: its scores against definitions, its reading of users' files, and going on where it stopped."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import PASSAGES, first_and_slow
from reference import assert_close, oracle_topk
from transformers import PreTrainedTokenizerFast

import griffin_jax as gj
from griffin_jax.cli import main as cli
from griffin_jax.cli.evaluate import perplexity
from griffin_jax.cli.evaluate.texts import divided
from griffin_jax.evaluation import batches, general_text, groups, intervals, report, tasks
from griffin_jax.evaluation.batches import Item, batch_of
from griffin_jax.evaluation.forced import score_answers
from griffin_jax.evaluation.grid import Variant, grid, models, seed_of
from griffin_jax.evaluation.journal import FILE, Journal
from griffin_jax.evaluation.prompts import summarization_prompt
from griffin_jax.evaluation.samples import SHOWN, Skipped, excerpt, read_jsonl, read_texts
from griffin_jax.generation import jitted
from griffin_jax.text.tokenizer import Tokenizer

ROWS = grid(["topk"], [0.5])
ITEMS = [
    Item("a", [5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17]),
    Item("b", [40, 41, 42], [50, 51, 52]),
    Item("c", [90, 3, 77, 3, 21], [8, 9, 10, 11]),
]


def jsonl(file: Path, *records: object) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main(["eval", *map(str, arguments)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


class TestSamples:
    def test_what_cannot_be_used_is_named_by_line(self, tmp_path):
        file = tmp_path / "x.jsonl"
        lines = [
            b'{"t": "one", "r": "two"}', b"", b"{", b'["t"]', b'{"r": "x"}', b'{"t": 1, "r": "x"}',
            b'{"t": " ", "r": ""}', b'{"t": "\xff", "r": "x"}', b'{"t": "\\ud800", "r": "x"}', b"[" * 100_000,
            b'{"t": "\xc3\xa9", "r": "last"}',
        ]  # fmt: skip
        file.write_bytes(b"\n".join(lines))
        skipped = Skipped()
        found = list(read_jsonl(file, ["t", "r"], skipped))
        assert [(record.line, record.texts) for record in found] == [(1, ("one", "two")), (11, ("é", "last"))]
        assert skipped.places == {
            "not JSON": ["x.jsonl, line 3", "x.jsonl, line 10"],
            "no JSON object": ["x.jsonl, line 4"],
            "no column 't'": ["x.jsonl, line 5"],
            "column 't' is no text": ["x.jsonl, line 6"],
            "column 't' is empty": ["x.jsonl, line 7"],
            "not UTF-8": ["x.jsonl, line 8"],
            "column 't' is not Unicode": ["x.jsonl, line 9"],
        }
        assert len(skipped) == 8

    def test_files(self, tmp_path):
        (tmp_path / "good").write_text("text", encoding="utf-8")
        (tmp_path / "blank").write_text(" \n", encoding="utf-8")
        (tmp_path / "bytes").write_bytes(b"ab\xff")
        skipped = Skipped()
        found = list(read_texts([tmp_path / name for name in ("good", "blank", "bytes")], skipped))
        assert found == [(str(tmp_path / "good"), "text")]
        assert skipped.places == {"empty": [str(tmp_path / "blank")], "not UTF-8": [f"{tmp_path / 'bytes'}, byte 2"]}

    def test_many_places_are_counted(self):
        skipped, out = Skipped(), io.StringIO()
        for line in range(SHOWN + 3):
            skipped.add("not JSON", f"line {line}")
        skipped.report(out)
        assert out.getvalue().startswith("left out, not JSON: line 0; line 1; ")
        assert out.getvalue().endswith(f"line {SHOWN - 1}, and 3 more\n")

    def test_excerpt(self):
        text = "A: one\nEND two A: three\nEND four"
        assert excerpt("A: ", "\nEND")(text) == "three"
        assert excerpt("", "\nEND")(text) == "A: one"
        assert excerpt("A: ", "")(text) == "three\nEND four"
        assert excerpt("none", "none")(text) == text


class TestIntervals:
    def test_against_numpy(self, rng):
        """Percentiles of means of drawn texts, by the same draws."""
        above, below = rng.normal(3, 1, 30), rng.uniform(1, 2, 30)
        found = intervals.ratio_of_sums(above, below, seed=5, resamples=4000)
        drawn = np.random.default_rng(0).integers(0, 30, (4000, 30))
        low, high = np.quantile(above[drawn].sum(1) / below[drawn].sum(1), [0.025, 0.975])
        assert found.value == pytest.approx(above.sum() / below.sum())
        assert found.low == pytest.approx(low, abs=0.1 * (high - low))
        assert found.high == pytest.approx(high, abs=0.1 * (high - low))
        assert found == intervals.ratio_of_sums(above, below, seed=5, resamples=4000)

    def test_alike_and_alone(self):
        assert intervals.mean([2.0, 2.0, 2.0], seed=0) == intervals.Interval(2.0, 2.0, 2.0)
        alone = intervals.mean([2.0], seed=0)
        assert alone.value == 2
        assert math.isnan(alone.low)
        assert math.isnan(alone.high)

    def test_perplexity(self):
        assert intervals.exponential(intervals.Interval(math.log(8), 0.0, 1e4)) == intervals.Interval(
            pytest.approx(8), 1.0, math.inf
        )


class TestReference:
    @pytest.fixture
    def tokenizer(self) -> Tokenizer:
        """Bytes, and words with the space before them."""
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(["A: Paris is big.\n\nA: Paris is big."] * 9, trainer)
        return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))

    @pytest.mark.parametrize(
        ("text", "reference", "prompt"),
        [
            ("A:", " Paris is big.", "A:"),
            ("A: ", "Paris is big.", "A:"),
            ("A: Paris is big.\n", "\nA:", "A: Paris is big."),
            ("A: Pa", "ris is", "A:"),
            (" ", "A", ""),
        ],
    )
    def test_nothing_between_a_text_and_its_reference_is_lost_or_read_twice(self, tokenizer, text, reference, prompt):
        tokens, following = divided(tokenizer, text, reference)
        assert [*tokens, *following] == tokenizer.encode(text + reference)
        assert tokenizer.decode(tokens) == prompt


class TestJournal:
    def test_cut_off_anywhere_it_goes_on(self, tmp_path):
        journal = Journal(tmp_path / "whole", {"seed": 1})
        journal.add({"é": [1.5, 2], "b": {"x": None}})
        journal.add({"c": 3})
        content = (tmp_path / "whole" / FILE).read_bytes()
        ends = [index + 1 for index, byte in enumerate(content) if byte == 10]
        for size in range(len(content) + 1):
            folder = tmp_path / str(size)
            folder.mkdir()
            (folder / FILE).write_bytes(content[:size])
            again = Journal(folder, {"seed": 1})
            complete = sum(end <= size for end in ends)
            assert list(again.scores) == ["é", "b", "c"][: max(0, complete - 1)]
            again.add({"d": 4})
            assert Journal(folder, {"seed": 1}).scores == again.scores
            assert again.scores["d"] == 4

    def test_other_settings(self, tmp_path):
        Journal(tmp_path, {"seed": 1, "rows": ["dense"]}).add({"a": 1})
        with pytest.raises(ValueError, match=r"other settings \(seed was 1, is 2\); give another --output"):
            Journal(tmp_path, {"seed": 2, "rows": ("dense",)})
        assert Journal(tmp_path, {"seed": 1, "rows": ("dense",)}).scores == {"a": 1}
        # What is of the same settings stays.
        assert Journal(tmp_path, {"seed": 1, "rows": ["dense"]}, overwrite=True).scores == {"a": 1}
        assert Journal(tmp_path, {"seed": 2}, overwrite=True).scores == {}
        assert Journal(tmp_path, {"seed": 2}).scores == {}

    def test_settings_that_nothing_depended_on_so_far(self, tmp_path):
        def scores(**settings: object) -> dict:
            return Journal(tmp_path, settings, unused=("prior", "rows")).scores

        Journal(tmp_path, {"seed": 1, "prior": None, "rows": ["dense"]}).add({"a": 1})
        assert scores(seed=1, prior="x") == {"a": 1}
        assert scores(seed=1, prior=None) == {"a": 1}
        with pytest.raises(ValueError, match=r"\(prior was 'x', is 'y'\)"):
            scores(seed=1, prior="y")
        with pytest.raises(ValueError, match=r"\(seed was 1, is None\)"):
            scores(prior="x")
        with pytest.raises(ValueError, match="prior was 'x', is None"):
            Journal(tmp_path, {"seed": 1, "prior": None, "rows": ["dense"]})

    @pytest.mark.parametrize("content", ['{"a": 1}\n', "x\n", '{"settings": {}}\n{"text": "a"}\n', "[]\n", "\xff\n"])
    def test_another_file(self, tmp_path, content):
        (tmp_path / FILE).write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match="is damaged"):
            Journal(tmp_path, {})
        assert Journal(tmp_path, {}, overwrite=True).scores == {}


class TestGrid:
    def test_rows(self):
        names = [row.name for row in grid(["sample", "random"], [0.25, 1, 0.5, 0.5])]
        every = ["sample", "random", "oracle", "magnitude"]
        assert names == ["dense", *(f"{name} 0.5" for name in every), *(f"{name} 0.25" for name in every)]
        assert [row.name for row in grid(["topk"], [0.5], ())] == ["dense", "topk 0.5"]

    @pytest.mark.parametrize(
        ("methods", "densities", "message"),
        [
            (["best"], [0.5], "method is 'best'; allowed are topk"),
            (["topk"], [0], "density must be in"),
            (["topk"], [1.5], "density must be in"),
        ],
    )
    def test_refused(self, methods, densities, message):
        with pytest.raises(ValueError, match=message):
            grid(methods, densities)

    def test_models_keep_what_their_method_says(self, tiny):
        """Each sequence the neurons that it would keep alone."""
        model = tiny.llm.model
        tokens, lengths = map(jnp.asarray, gj.pad([item.prompt for item in ITEMS], 16))
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=0)
        prompts = prefilled.statistics
        answers = jax.tree.map(lambda x: x[::-1] if x.ndim == 2 else x, prompts)
        seeds = np.array([7, 8, 9], np.int32)
        rows = grid(["topk", "sample"], [0.25])
        for row, pruned in models(model, rows, prefilled, answers, seeds):
            kept = [np.asarray(layer.ff.down[...]) for layer in pruned.layers]
            for layer, full in enumerate(np.asarray(layer.ff.down[...]) for layer in model.layers):
                for sequence in range(3):
                    squares = {"oracle": answers}.get(row.method, prompts).squares[layer][sequence]
                    if row.method == "dense":
                        expected = full
                    elif row.method == "magnitude":
                        expected = full[oracle_topk(np.asarray(gj.magnitude(model)[layer]), 12)]
                    elif row.method in ("topk", "oracle"):
                        expected = full[oracle_topk(np.asarray(squares), 12)]
                    else:
                        alone = gj.Statistics(tuple(s[sequence : sequence + 1] for s in prompts.squares), lengths[:1])
                        config = gj.GriffinConfig(0.25, row.method)
                        expected = full[np.asarray(jitted.select(alone, config, seed=int(seeds[sequence]))[layer][0])]
                    got = kept[layer] if kept[layer].ndim == 2 else kept[layer][sequence]
                    np.testing.assert_array_equal(got, expected, err_msg=row.name)

    def test_seeds_differ_by_text(self):
        seeds = {seed_of(seed, text) for seed in (0, 1) for text in ("a", "b", "c")}
        assert len(seeds) == 6
        assert all(0 <= seed < 2**31 for seed in seeds)


def by_hand(model, item: Item, density: float, answer=None) -> dict[str, np.ndarray]:
    """Loss, KL and agreement of every token of an answer, from logits of one sequence alone, in float64."""
    answer = list(item.answer if answer is None else answer)
    tokens = jnp.asarray([[*item.prompt, *answer]])

    def log_p(density: float) -> np.ndarray:
        logits = jitted.teacher_forced(model, tokens, len(item.prompt), gj.GriffinConfig(density))
        logits = np.asarray(logits[0, len(item.prompt) - 1 : -1], np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    p, q = log_p(1.0), log_p(density)
    return {
        "loss": -q[np.arange(len(answer)), answer],
        "kl": (np.exp(p) * (p - q)).sum(axis=-1),
        "agree": p.argmax(axis=-1) == q.argmax(axis=-1),
    }


def memory(folder: Path) -> Journal:
    return Journal(folder, {})


class TestTasks:
    """Mostly with batches of 2, prompts of at most 16 tokens and room for 16, so that programs are compiled once."""

    @pytest.mark.thorough
    def test_scores_are_sums_of_definitions(self, worded):
        model, batch = worded.llm.model, batch_of(ITEMS[:2], 2, 0)
        prefilled = batch.prefill(model, 16)
        found = score_answers(
            model, ROWS, prefilled, batch.answers, batch.answer_lengths, batch.seeds, upto=[2, 4, 100]
        )
        for item, scores in zip(ITEMS, found, strict=False):
            assert scores["tokens"] == [min(n, len(item.answer)) for n in (2, 4, 100)]
            for row, density in (("dense", 1.0), ("topk 0.5", 0.5)):
                for name, expected in by_hand(model, item, density).items():
                    sums = [expected[:n].sum() for n in (2, 4, 100)]
                    np.testing.assert_allclose(scores[row][name], sums, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_divergence_of_own_continuations(self, worded, tmp_path):
        llm = worded.llm
        found = tasks.divergence(llm, ITEMS, ROWS, memory(tmp_path), new=6, size=2, seed=0)
        for item in ITEMS:
            own = llm.generate([list(item.prompt)], max_new_tokens=6, density=1.0).tokens[0]
            expected = by_hand(llm.model, item, 0.5, own)
            assert found[item.name]["own"]["tokens"] == [len(own)]
            for name, values in expected.items():
                np.testing.assert_allclose(
                    found[item.name]["own"]["topk 0.5"][name], [values.sum()], rtol=1e-4, atol=1e-5
                )
            assert found[item.name]["own"]["dense"]["agree"] == [len(own)]
            assert found[item.name]["real"]["tokens"] == [len(item.answer)]

    @pytest.mark.thorough
    def test_a_score_does_not_depend_on_the_batch(self, worded, tmp_path):
        one, two = (
            tasks.divergence(worded.llm, ITEMS, ROWS, memory(tmp_path / str(size)), new=6, size=size, seed=0)
            for size in (1, 2)
        )
        assert jax.tree.structure(one) == jax.tree.structure(two)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            assert_close(np.asarray(a, np.float64), np.asarray(b, np.float64))

    @pytest.mark.thorough
    def test_perplexity_scores_the_same_tokens_behind_every_prompt(self, worded, tmp_path):
        item = Item("a", list(range(5, 25)), [50, 51, 52, 53])
        found = tasks.perplexity(
            worded.llm, [item], ROWS, memory(tmp_path), prompts=[3, 20], news=[1, 4], size=2, seed=0
        )
        for length in (3, 20):
            expected = by_hand(worded.llm.model, Item("a", item.prompt[-length:], item.answer), 0.5)["loss"]
            got = found["a"][str(length)]
            assert got["tokens"] == [1, 4]
            np.testing.assert_allclose(
                got["topk 0.5"]["loss"], [expected[:1].sum(), expected.sum()], rtol=1e-4, atol=1e-5
            )

    @pytest.mark.thorough
    def test_shorter_prompts_begin_as_every_text_does(self, worded, tmp_path):
        item = Item("a", [1, 2, *range(5, 25)], [50, 51])
        options = {"prompts": [5, 22], "news": [2], "size": 1, "seed": 0}
        found = tasks.perplexity(worded.llm, [item], ROWS, memory(tmp_path), **options, lead=2)
        for length, prompt in ((5, [1, 2, 22, 23, 24]), (22, item.prompt)):
            expected = by_hand(worded.llm.model, Item("a", prompt, item.answer), 0.5)["loss"]
            got = found["a"][str(length)]["topk 0.5"]["loss"]
            np.testing.assert_allclose(got, [expected.sum()], rtol=1e-4, atol=1e-5)

    def test_every_window_begins_as_a_text_does(self, worded, tmp_path):
        """A tokenizer that puts a token in front of a text puts it in front of each of its windows."""
        backend = tokenizers.Tokenizer.from_file(str(worded.folder / "tokenizer.json"))
        backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path / "with-bos")
        llm = gj.LLM(worded.llm.model, Tokenizer.from_folder(tmp_path / "with-bos"))
        (tmp_path / "t.txt").write_text(PASSAGES[0], encoding="utf-8")
        plain = worded.llm.tokenizer.encode(PASSAGES[0])
        items = list(perplexity._windows([tmp_path / "t.txt"], llm, 9, 3, Skipped()))
        assert len(items) == len(plain) // 11 > 2
        for number, item in enumerate(items):
            assert [*item.prompt, *item.answer] == [1, *plain[11 * number : 11 * number + 11]]
        assert llm.tokenizer.beginning == [1]
        assert worded.llm.tokenizer.beginning == []

    @pytest.mark.parametrize(("template", "first"), [("<s> $A </s>", (1,)), ("$A </s>", ())])
    def test_a_token_that_ends_a_text_is_in_no_window(self, worded, tmp_path, template, first):
        backend = tokenizers.Tokenizer.from_file(str(worded.folder / "tokenizer.json"))
        special = [("<s>", 1), ("</s>", 2)]
        backend.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=special)
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
        tokenizer = Tokenizer.from_folder(tmp_path)
        plain = worded.llm.tokenizer.encode(PASSAGES[0])
        assert tokenizer._tokenizer.encode(PASSAGES[0]) == [*first, *plain, 2]
        assert tokenizer.beginning == [*first]
        assert tokenizer.encode(PASSAGES[0]) == [*first, *plain]
        assert tokenizer.encode(PASSAGES[0], special=False) == plain
        (window,) = general_text.windows(tokenizer, PASSAGES[0], 1000)
        assert window == [*first, *plain]

    @pytest.mark.slow
    def test_summaries_are_what_generate_writes(self, worded, tmp_path):
        from rouge_score.rouge_scorer import RougeScorer

        llm = worded.llm
        items = [
            Item(str(number), llm.tokenizer.encode(text[:60]), reference=text[60:100])
            for number, text in enumerate(PASSAGES[:3])
        ]
        found = tasks.summarize(
            llm, items, ROWS, memory(tmp_path), new=12, stop=["o", "zz"], stem=False, size=2, seed=0
        )
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
        for item in items:
            for name, density in (("dense", 1.0), ("topk 0.5", 0.5)):
                written = llm.generate([list(item.prompt)], max_new_tokens=12, density=density, stop=["o", "zz"])
                assert found[item.name][name]["text"] == written.texts[0]
                expected = scorer.score(item.reference, written.texts[0])
                got = [found[item.name][name][key] for key in ("rouge1", "rouge2", "rougeL")]
                assert got == [expected[key].fmeasure for key in ("rouge1", "rouge2", "rougeL")]

    @pytest.mark.thorough
    def test_the_summaries_oracle_knows_the_dense_answer(self, worded, tmp_path):
        llm = worded.llm
        prompt = llm.tokenizer.encode(PASSAGES[0][:60])
        rows = (Variant("dense", 1.0), Variant("oracle", 0.5))
        found = tasks.summarize(
            llm, [Item("a", prompt, reference="x")], rows, memory(tmp_path), new=12, stop=[], stem=False, size=1, seed=0
        )
        dense = llm.generate([prompt], max_new_tokens=12, density=1.0).tokens[0]
        whole, head = (
            jitted.prefill(llm.model, jnp.asarray([t]), jnp.asarray([len(t)]), max_new_tokens=0).statistics.squares
            for t in (prompt + dense, prompt)
        )
        experts = gj.ExpertNeurons.from_indices(
            [oracle_topk(np.asarray(w - h)[0], 24) for w, h in zip(whole, head, strict=True)], llm.model.neurons
        )
        assert found["a"]["oracle 0.5"]["text"] == llm.generate([prompt], max_new_tokens=12, experts=experts).texts[0]

    @pytest.mark.slow
    def test_the_oracle_of_summaries_does_not_depend_on_the_batch(self, worded, tmp_path):
        """An answer ends before that of its neighbour, which goes on."""
        llm = worded.llm
        items = [Item(str(n), llm.tokenizer.encode(text[:60]), reference="x") for n, text in enumerate(PASSAGES[:2])]
        rows = (Variant("dense", 1.0), Variant("oracle", 0.5))
        dense = llm.generate([list(items[0].prompt)], max_new_tokens=40, density=1.0).texts[0]
        options = {"new": 40, "stop": [dense[3:5]], "stem": False, "seed": 0}
        alone, together = (
            tasks.summarize(llm, items, rows, memory(tmp_path / str(size)), size=size, **options) for size in (1, 2)
        )
        assert alone == together
        assert len(alone["0"]["dense"]["text"]) <= 3

    @pytest.mark.thorough
    def test_nothing_is_compiled_for_a_single_text(self, worded, tmp_path, compiled):
        items = [Item(str(n), list(range(5, 8 + n)), list(range(9, 11 + n))) for n in range(9)]

        def evaluate(items: list[Item], folder: str, new: int) -> None:
            tasks.divergence(worded.llm, items, ROWS, memory(tmp_path / folder), new=new, size=2, seed=0)

        evaluate(items[:3], "first", 6)
        warm = len(compiled)
        evaluate(items[3:], "second", 6)
        assert len(compiled) == warm
        evaluate(items[:1], "larger", 17)
        assert len(compiled) > warm

    def test_interrupted_it_goes_on(self, worded, tmp_path, monkeypatch):
        def evaluate(folder: str) -> dict:
            return tasks.divergence(worded.llm, ITEMS, ROWS, memory(tmp_path / folder), new=6, size=1, seed=0)

        whole = evaluate("whole")
        real, calls = tasks.score_answers, []

        def interrupted(*arguments):
            calls.append(arguments)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(tasks, "score_answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate("interrupted")
        assert len(memory(tmp_path / "interrupted").scores) == 1
        assert evaluate("interrupted") == whole
        assert len(calls) == 4 + 2 * 2


class TestFigures:
    SCORES = (
        {"tokens": [1, 2], "dense": {"loss": [0.0, 1.0], "kl": [0.0, 0.0], "agree": [1, 2]}},
        {"tokens": [1, 6], "dense": {"loss": [0.0, 3.0], "kl": [0.0, 4.0], "agree": [0, 3]}},
    )

    def test_over_tokens_of_all_texts(self):
        figures = report.forced_figures(self.SCORES, Variant("dense", 1.0), 1, seed=0)
        assert figures["tokens"] == 8
        assert figures["perplexity"]["value"] == pytest.approx(math.exp(4 / 8))
        assert figures["perplexity"]["low"] == pytest.approx(math.exp(1 / 2))
        assert figures["kl"] == {"value": 0.5, "low": 0.0, "high": pytest.approx(4 / 6)}
        assert figures["top1"]["value"] == pytest.approx(5 / 8)

    def test_rouge_in_percent(self):
        scores = {
            "a": {"dense": {"rouge1": 0.5, "rouge2": 0.0, "rougeL": 0.25}},
            "b": {"dense": dict.fromkeys(report.ROUGE, 0.1)},
        }
        (figures,) = report.summarize_figures(scores, [Variant("dense", 1.0)], seed=0)
        assert figures["rouge1"]["value"] == pytest.approx(30)
        assert figures["rouge1"]["low"] == pytest.approx(10)
        assert figures["rougeL"]["high"] == pytest.approx(25)


def test_the_papers_prompt():
    assert summarization_prompt("B", [("A", "S.")], "xsum") == (
        "###\nArticle: A\n\nSummarize the above article in 1 sentence.\nS.\n\n"
        "###\nArticle: B\n\nSummarize the above article in 1 sentence.\n"
    )
    assert "in 3 sentences.\n" in summarization_prompt("B", [], "cnn")


class TestCommands:
    @pytest.mark.thorough
    def test_divergence(self, worded, tmp_path, capsys):
        file = jsonl(
            tmp_path / "t.jsonl", *({"body": f"drop A: {passage} END x"} for passage in PASSAGES), {"body": "short"}
        )
        arguments = (
            "divergence", file, "--model", worded.folder, "--column", "body", "--after", "A: ", "--before", " END",
            "--prompt-tokens", 40, "--new-tokens", 12, "--density", "0.5,0.25", "--method", "topk,sample", "--batch", 2,
            "--output", tmp_path / "out", "--plot", tmp_path / "plot.png", "--json",
        )  # fmt: skip
        code, out, err = run(capsys, *arguments)
        assert code == 0
        assert "left out, shorter than 40 + 12 tokens: t.jsonl, line 6" in err
        result = json.loads((tmp_path / "out" / "results.json").read_text())
        assert result == json.loads(out.splitlines()[-1])
        assert (tmp_path / "out" / "table.txt").read_text() in out
        assert max(map(len, out.splitlines()[:-1])) <= 120
        assert (result["used"], result["left_out"]["count"]) == (5, 1)
        assert len(result["figures"]) == 2 * (1 + 2 * 5)
        assert {(f["method"], f["density"]) for f in result["figures"]} >= {
            ("oracle", 0.25),
            ("sample", 0.5),
            ("dense", 1),
        }
        assert all(f["kl"]["low"] <= f["kl"]["value"] <= f["kl"]["high"] for f in result["figures"])
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert run(capsys, *arguments)[1] == out
        code, _, err = run(capsys, *arguments, "--seed", 3)
        assert code == 2
        assert "holds scores of other settings (seed was 0, is 3)" in err
        assert run(capsys, *arguments, "--seed", 3, "--overwrite")[0] == 0

    @pytest.mark.slow
    def test_divergence_from_a_reference(self, worded, tmp_path, capsys):
        records = [{"text": passage[:80], "next": passage[80:120]} for passage in PASSAGES]
        file = jsonl(tmp_path / "t.jsonl", *records, {"text": "x" * 300, "next": "x"}, {"text": "x", "next": " "})
        code, out, err = run(
            capsys, "divergence", file, "--model", worded.folder, "--reference", "next", "--new-tokens", 5,
            "--output", tmp_path / "out", "--json",
        )  # fmt: skip
        assert code == 0
        assert "longer than the model's context of 256 tokens: t.jsonl, line 6" in err
        assert "column 'next' is empty: t.jsonl, line 7" in err
        encode = worded.llm.tokenizer.encode
        following = sum(len(encode(r["text"] + r["next"])) - len(encode(r["text"])) for r in records)
        assert json.loads(out.splitlines()[-1])["figures"][0]["tokens"] == following

    @pytest.mark.thorough
    def test_perplexity(self, worded, tmp_path, capsys):
        (tmp_path / "long.txt").write_text(" ".join(PASSAGES), encoding="utf-8")
        (tmp_path / "short.txt").write_text("short", encoding="utf-8")
        code, out, err = run(
            capsys, "perplexity", tmp_path / "short.txt", tmp_path / "long.txt", "--model", worded.folder,
            "--prompt-tokens", "8,40", "--new-tokens", "4,16", "--limit", 3, "--output", tmp_path / "out",
            "--plot", tmp_path / "p.png", "--json",
        )  # fmt: skip
        assert code == 0
        assert "shorter than a window of 40 + 16 tokens" in err
        result = json.loads(out.splitlines()[-1])
        assert [(f["prompt"], f["new"], f["tokens"]) for f in result["figures"] if f["method"] == "dense"] == [
            (8, 4, 12), (40, 4, 12), (8, 16, 48), (40, 16, 48),
        ]  # fmt: skip
        assert (tmp_path / "p.png").stat().st_size > 10_000

    @pytest.mark.parametrize(
        "options",
        first_and_slow(2, ("--format", "xsum", "--shots", "1"), ("--chat", "--stem", "--no-baselines"), ()),
    )
    def test_summarize(self, worded, tmp_path, capsys, options):
        records = [{"doc": passage[:60], "sum": passage[60:90]} for passage in PASSAGES]
        file = jsonl(tmp_path / "t.jsonl", *records, {"doc": "x" * 300, "sum": "x"})
        code, out, err = run(
            capsys, "summarize", file, "--model", worded.folder, "--column", "doc", "--reference", "sum",
            "--new-tokens", 8, "--output", tmp_path / "out", "--plot", tmp_path / "p.png", "--json", *options,
        )  # fmt: skip
        assert code == 0
        assert "t.jsonl, line 6" in err
        result = json.loads(out.splitlines()[-1])
        assert result["used"] == 5 - (options[:1] == ("--format",))
        assert all(0 <= f["rouge1"]["value"] <= 100 for f in result["figures"])
        assert ("oracle" in {f["method"] for f in result["figures"]}) == ("--no-baselines" not in options)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["divergence", "none.jsonl"], "there is no file none.jsonl"),
            (["perplexity", "none.txt"], "there is no file none.txt"),
            (["divergence", "FILE", "--density", "2"], "density must be in (0, 1]"),
            (["divergence", "FILE", "--density", "x"], "--density: 'x' is no list of numbers"),
            (["divergence", "FILE", "--method", "best"], "method is 'best'; allowed are"),
            (["divergence", "FILE", "--limit", "0"], "--limit must be at least 1, got 0"),
            (["divergence", "FILE", "--batch", "0"], "--batch must be at least 1, got 0"),
            (["divergence", "FILE", "--plot", "x.pdf"], "--plot writes PNG files"),
            (["divergence", "FILE", "--output", "no/such"], "--output: there is no folder"),
            (["divergence", "FILE", "--prompt-tokens", "0"], "must be at least 1, got 0 and 128"),
            (["divergence", "FILE", "--prompt-tokens", "250"], "more than the model's context of 256"),
            (["divergence", "FILE", "--column", "none"], "no text can be used (1 x no column 'none')"),
            (["divergence", "FILE"], "no text can be used (1 x shorter than"),
            (["perplexity", "FILE", "--prompt-tokens", "1,x"], "--prompt-tokens: '1,x' is no list of numbers"),
            (["perplexity", "FILE", "--new-tokens", "0"], "lengths are at least 1 token, got 0"),
            (["summarize", "FILE", "--stop", ""], "--stop must not be empty"),
            (["summarize", "FILE", "--new-tokens", "0"], "--new-tokens must be at least 1, got 0"),
            (["summarize", "FILE"], "no text can be used (1 x no column 'prompt')"),
            (["summarize", "FILE", "--format", "xsum", "--shots", "-1"], "--shots must be at least 0, got -1"),
            (["guess"], "invalid choice: 'guess'"),
        ],
    )
    def test_bad_input(self, worded, tmp_path, capsys, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        jsonl(tmp_path / "FILE", {"text": "some words"})
        defaults = ["--model", str(worded.folder)] if arguments[0] != "guess" else []
        if arguments[0] == "divergence" and "--prompt-tokens" not in arguments:
            defaults += ["--prompt-tokens", "20", "--new-tokens", "20"]
        if arguments[0] == "perplexity" and "--prompt-tokens" not in arguments:
            defaults += ["--prompt-tokens", "20"]
        code, out, err = run(capsys, *arguments, *defaults)
        assert code == 2
        assert out == ""
        assert message in err.splitlines()[-1]
        assert not (tmp_path / f"eval-{arguments[0]}").exists()

    def test_a_model_without_tokenizer(self, tiny, tmp_path, capsys):
        code, _, err = run(capsys, "divergence", jsonl(tmp_path / "x", {"text": "x"}), "--model", tiny.folder)
        assert code == 2
        assert "has no tokenizer" in err


def test_batches_repeat_the_last_row():
    batch = batch_of(ITEMS[:2], 4, seed=0)
    assert batch.prompts.shape == (4, 16)
    assert batch.prompt_lengths.tolist() == [8, 3, 3, 3]
    assert batch.answer_lengths.tolist() == [5, 3, 3, 3]
    assert len(batch.items) == 2
    sizes = [[item.name for item in b.items] for b in batches.batches([*ITEMS, Item("d", [1] * 20)], 2, 0)]
    assert sizes == [["a", "b"], ["c"], ["d"]]


class TestShards:
    """`griffin-jax eval groups`."""

    @pytest.mark.slow
    def test_scores_are_those_of_the_rules(self, worded, tmp_path):
        llm = worded.llm
        rules = groups.rules([0.5], [1, 2, 4], llm.model.neurons)
        assert [(row.name, config.groups) for row, config in rules.items()] == [
            ("topk 0.5", 1), ("topk, 2 groups 0.5", 2), ("topk, 4 groups 0.5", 4),
        ]  # fmt: skip
        scores = groups.compare_groups(llm, ITEMS[:2], rules, Journal(tmp_path, {}), new=5, size=2, seed=0)
        for item in ITEMS[:2]:
            found = scores[item.name]
            best = llm.experts(item.prompt)
            for row, config in rules.items():
                experts = llm.experts(item.prompt, groups=config.groups)
                shares = [
                    len(set(map(int, a[0])) & set(map(int, b[0]))) / 24 for a, b in zip(experts, best, strict=True)
                ]
                assert found[row.name]["overlap"] == pytest.approx(np.mean(shares))
                tokens = [*item.prompt, *item.answer]
                logits = llm.logits([tokens], prompt_length=len(item.prompt), groups=config.groups)
                rest = jax.nn.log_softmax(logits[0, len(item.prompt) - 1 : -1])
                loss = -sum(float(rest[at, token]) for at, token in enumerate(item.answer))
                assert found[row.name]["loss"] == [pytest.approx(loss, rel=1e-5)]
            assert found["topk 0.5"]["overlap"] == 1
            assert found["topk, 4 groups 0.5"]["overlap"] < 1

    def test_command(self, worded, capsys, tmp_path):
        texts = jsonl(tmp_path / "texts.jsonl", *({"text": text} for text in PASSAGES))
        arguments = ["groups", texts, "--model", worded.folder, "--prompt-tokens", "12", "--new-tokens", "8"]
        code, out, err = run(capsys, *arguments, "--groups", "2", "--output", tmp_path / "found", "--json")
        assert code == 0, err
        results = json.loads(out.splitlines()[-1])
        assert results["rows"] == ["topk 0.5", "topk, 2 groups 0.5"]
        assert [figure["groups"] for figure in results["figures"]] == [1, 2]
        assert results["figures"][0]["overlap"] == {"value": 1.0, "low": 1.0, "high": 1.0}
        assert "overlap" in out
        code, _, err = run(capsys, *arguments, "--groups", "5", "--output", tmp_path / "five")
        assert (code, "5 groups cannot have equally many of 48 neurons" in err) == (2, True)
        code, _, err = run(capsys, *arguments, "--method", "random", "--output", tmp_path / "random")
        assert (code, "unrecognized arguments: --method random" in err) == (2, True)
