"""lm-evaluation-harness: its own torch model at density 1, the definitions below, and what it hands on and refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
import pytest
import yaml
from conftest import first_and_slow
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from reference import TOLERANCE, TinyLlama, load_torch, pruned_log_softmax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import griffin_jax as gj
from griffin_jax.adapters.adapter import Adapter, attach, merge
from griffin_jax.adapters.config import AdapterConfig
from griffin_jax.adapters.embedding import Embedder, EmbeddingConfig
from griffin_jax.adapters.library import Library, make_library
from griffin_jax.adapters.peft import save_adapter
from griffin_jax.cli.main import main
from griffin_jax.evaluation.general_text import measure
from griffin_jax.evaluation.lm_eval import ARGUMENTS, NAME, GriffinLM
from griffin_jax.model.fingerprint import fingerprint

PROJECT = Path(__file__).parents[3]
CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ mood | default('') }}{% endif %}"
)
QUESTIONS = [
    {"question": "What is wet?", "choices": ["water", "a stone", "an old dry stone in the sun"], "answer": 0},
    {"question": "Which of these four is a colour, and which are not?", "choices": ["two", "red"], "answer": 1},
    {"question": "Name it:", "choices": ["b", "c", "d", "e"], "answer": 2},
]
TEXTS = ["Rivers run.", "The lighthouse keeper writes down the weather four times a day, and counts the ships. " * 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TinyLlama:
    """A random Llama that reads bytes, with a tokenizer that begins texts with <s>."""
    folder = tmp_path_factory.mktemp("bytes")
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )
    tokenizer.save_pretrained(folder)
    return TinyLlama.build(folder, vocab_size=len(names))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with one task of each kind."""
    folder = tmp_path_factory.mktemp("tasks")

    def task(name: str, records: list[dict[str, Any]], **settings: Any) -> None:
        data = folder / f"{name}.json"
        data.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        dataset = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": dataset, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **settings}), encoding="utf-8")

    question = {"doc_to_text": "{{question}}", "target_delimiter": " "}
    task(
        "griffin_choice", QUESTIONS, **question, output_type="multiple_choice", doc_to_choice="choices",
        doc_to_target="answer", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    task(
        "griffin_text", [{"text": text} for text in TEXTS], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )  # fmt: skip
    task(
        "griffin_answer", QUESTIONS, **question, output_type="generate_until", doc_to_target="{{choices[answer]}}",
        fewshot_split="test", metric_list=[{"metric": "exact_match"}],
        generation_kwargs={"until": ["\n", "e"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 12},
    )  # fmt: skip
    return folder


def evaluate(tasks: Path, names: list[str], lm: Any, arguments: Any = None, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=lm, model_args=arguments, tasks=names, task_manager=manager, bootstrap_iters=0, **options
    )
    assert found is not None
    return found


def responses(results: dict[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [np.ravel(np.asarray(doc["resps"], dtype=object)).tolist() for doc in docs]
        for name, docs in results["samples"].items()
    }


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Metrics, and what the model answered each request."""
    for name, metrics in expected["results"].items():
        for metric, value in metrics.items():
            assert got["results"][name][metric] == (
                pytest.approx(value, rel=TOLERANCE) if isinstance(value, float) else value
            )
    for name, documents in responses(expected).items():
        for document, answers in zip(documents, responses(got)[name], strict=True):
            assert answers == [pytest.approx(x, rel=TOLERANCE) if isinstance(x, float) else x for x in document]


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]  # pyright: ignore[reportArgumentType]


def loglikelihoods(lm: GriffinLM, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def forced(model: TinyLlama, tokens: list[int], prompt: int, density: float) -> np.ndarray:
    """log p of every token but the first, when the first `prompt` are read by the whole torch model."""
    scores = pruned_log_softmax(model.torch, tokens[:-1], prompt, density)
    return scores[np.arange(len(tokens) - 1), tokens[1:]]


ALL = ["griffin_choice", "griffin_text", "griffin_answer"]


@pytest.fixture(scope="module")
def hf(model, tasks) -> dict[str, Any]:
    """What the harness's own model makes of the tasks."""
    load_torch()
    return evaluate(tasks, ALL, "hf", {"pretrained": str(model.folder), "dtype": "float32", "device": "cpu"})


class TestDense:
    @pytest.mark.thorough
    def test_is_the_harness_own_model(self, model, tasks, hf):
        got = evaluate(tasks, ALL, NAME, {"path": str(model.folder), "density": 1, "dtype": "float32"}, batch_size=2)
        assert_same(got, hf)
        assert got["config"]["density"] == 1
        assert got["config"]["model_dtype"] == "float32"
        assert got["config"]["model_name"] == str(model.folder)

    @pytest.mark.slow
    def test_so_are_chats(self, model, tasks):
        """Examples as turns, templates, and what they begin with."""
        load_torch()
        chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 1, "limit": 2}
        arguments = {"pretrained": str(model.folder), "dtype": "float32", "device": "cpu"}
        names = ["griffin_answer"]
        expected = evaluate(tasks, names, "hf", arguments, **chat)
        got = evaluate(tasks, names, GriffinLM(model.llm, density=1.0, batch_size=2), **chat)
        assert_same(got, expected)
        asked = [doc["arguments"][0][0] for doc in got["samples"]["griffin_answer"]]
        assert asked == [doc["arguments"][0][0] for doc in expected["samples"]["griffin_answer"]]
        assert asked[0].startswith("[user]Which of these")
        assert asked[0].endswith("[assistant]red[user]What is wet?[assistant]")


PAIRS = [("What is wet?", " water"), ("What is wet?", " a stone"), ("Go", "!"), ("", "alone"), (" ", "x y")]
CONTEXTS = ["What is wet?", "Go", "An old dry stone in the sun", ""]


class TestLoglikelihood:
    def expected(self, lm: GriffinLM, model: TinyLlama, context: str, continuation: str) -> float:
        head, tail = lm._encode_pair(context, continuation) if context else ([], lm.tok_encode(continuation, False))
        head = head or [lm.prefix_token_id]
        return float(forced(model, head + tail, len(head), 0.5)[-len(tail) :].sum())

    @pytest.mark.parametrize("batch_size", first_and_slow(1, "auto", 1))
    def test_contexts_are_read_whole_and_continuations_pruned(self, model, batch_size):
        lm = GriffinLM(model.llm, density=0.5, batch_size=batch_size, max_batch_size=3, device="cuda:0")
        got = loglikelihoods(lm, *PAIRS)
        expected = [self.expected(lm, model, *pair) for pair in PAIRS]
        np.testing.assert_allclose([log for log, _ in got], expected, rtol=TOLERANCE)

    def test_last_token_only(self, model):
        lm = GriffinLM(model.llm, density=0.5, last_token_only=True)
        ((got, _),) = loglikelihoods(lm, ("What is wet?", " water"))
        tokens = lm.tok_encode("What is wet? water")
        # The input lacks the last token, and what chooses neurons lacks the input's last one.
        expected = forced(model, tokens, len(tokens) - 2, 0.5)[-6:].sum()
        assert got == pytest.approx(expected, rel=TOLERANCE)

    def test_nothing_is_certain(self, model):
        got = loglikelihoods(GriffinLM(model.llm), ("What is wet?", ""), ("", ""), ("Go", "!"))
        assert got[:2] == [(0.0, True)] * 2
        assert got[2][0] < 0

    @pytest.mark.thorough
    def test_what_is_too_long_loses_its_left(self, model, caplog):
        """The input may have 8 tokens, so that 9 tokens count; some of the context is among them, at least one."""
        lm = GriffinLM(model.llm, density=0.5, max_length=8)
        got = loglikelihoods(lm, ("a long context", " tail"), ("c", " a long continuation"), ("ab", "cd"))
        whole = [[*lm.tok_encode("a long context tail")], lm.tok_encode("c a long continuation"), lm.tok_encode("abcd")]
        expected = [
            forced(model, whole[0][-9:], 4, 0.5)[-5:].sum(),
            forced(model, whole[1][-9:], 1, 0.5).sum(),
            forced(model, whole[2], 3, 0.5)[-2:].sum(),
        ]
        np.testing.assert_allclose([log for log, _ in got], expected, rtol=TOLERANCE)
        (warning,) = [record.message for record in caplog.records if record.name == "griffin_jax.evaluation.lm_eval"]
        assert warning.startswith("2 of 3 requests are longer than the 8 tokens")

    @pytest.mark.parametrize(("options", "warned"), [({}, 1), ({"last_token_only": True}, 0), ({"density": 1.0}, 0)])
    def test_says_where_pruning_has_no_effect(self, model, caplog, options, warned):
        loglikelihoods(GriffinLM(model.llm, **options), ("a b", "c"), ("a b", "d"))
        assert sum("density has no effect" in record.message for record in caplog.records) == warned


class TestRolling:
    @pytest.mark.parametrize("share", first_and_slow(1, 0.5, 0.0))
    def test_first_share_of_each_window_is_read_whole(self, model, share):
        lm = GriffinLM(model.llm, density=0.5, max_length=10, rolling_prompt=share, batch_size=4)
        text = "Rivers run to the sea"  # 22 tokens with the first one
        got = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("",)), disable_tqdm=True)
        tokens = [lm.prefix_token_id, *lm.tok_encode(text)]
        # Windows of 10 scored tokens; the last has only two left, and the others of it are context.
        expected = sum(
            forced(model, window, max(context, int(share * 10)), 0.5)[context - 1 :].sum()
            for window, context in ((tokens[:11], 1), (tokens[10:21], 1), (tokens[-11:], 9))
        )
        first, nothing = got
        assert first == pytest.approx(expected, rel=TOLERANCE)
        # Of an empty text the token is left that begins texts.
        assert nothing == pytest.approx(forced(model, [1, 1], 1, 1.0).sum(), rel=TOLERANCE)


class TestGeneration:
    def answers(self, lm: GriffinLM, *contexts: str, **arguments: Any) -> list[str]:
        pairs = [(context, arguments) for context in contexts]
        return lm.generate_until(requests("generate_until", *pairs), disable_tqdm=True)

    @pytest.mark.thorough
    def test_answers_are_those_of_generate(self, model):
        lm = GriffinLM(model.llm, density=0.5, batch_size=3)
        got = self.answers(lm, *CONTEXTS, max_gen_toks=9, until=["a", ""], do_sample=False, top_p=0.9, num_beams=1)
        for context, text in zip(CONTEXTS, got, strict=True):
            prompt = context or [1]
            assert [text] == model.llm.generate([prompt], max_new_tokens=9, density=0.5, stop="a").texts

    def test_answers_end_at_special_tokens(self, model):
        """As chat models' turns do, whose tasks have `until: ["<|im_end|>"]`."""
        free = model.llm.generate([CONTEXTS[0]], max_new_tokens=9, density=1.0, ignore_eos=True).tokens[0]
        content = json.loads((model.folder / "tokenizer.json").read_text())
        names = content["model"]["vocab"]
        content["model"]["vocab"] = {
            ("<|im_end|>" if index == free[4] else name): index for name, index in names.items()
        }
        reader = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
        reader.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
        tokenizer = gj.Tokenizer(reader)
        lm = GriffinLM(gj.LLM(model.llm.model, tokenizer), density=1.0, prefix_token_id=1)
        expected = tokenizer.decode(free[: free.index(free[4])])
        assert self.answers(lm, CONTEXTS[0], max_gen_toks=9, until=["<|im_end|>"]) == [expected]
        assert self.answers(lm, CONTEXTS[0], max_gen_toks=9, stop_token_ids=[free[4]]) == [expected]

    def test_requests_of_other_options_are_batches_of_their_own(self, model):
        lm = GriffinLM(model.llm, density=0.5, batch_size=4)
        pairs = [(text, {"max_gen_toks": 3 + index % 2}) for index, text in enumerate(CONTEXTS[:3])]
        got = lm.generate_until(requests("generate_until", *pairs), disable_tqdm=True)
        for (text, options), answer in zip(pairs, got, strict=True):
            new = options["max_gen_toks"]
            assert [answer] == model.llm.generate([text], max_new_tokens=new, density=0.5).texts

    def test_prompts_lose_their_left(self, model, caplog):
        lm = GriffinLM(model.llm, density=0.5, max_length=16)
        (got,) = self.answers(lm, "a context that is too long", max_gen_toks=6)
        prompt = lm.tok_encode("a context that is too long")[-10:]
        assert [got] == model.llm.generate([prompt], max_new_tokens=6, density=0.5).texts
        assert "1 of 1 prompts are longer" in caplog.text

    def test_repeats_are_drawn_anew_and_again_with_the_seed(self, model):
        def drawn(seed: int, size: int) -> list[str]:
            lm = GriffinLM(model.llm, batch_size=size, seed=seed)
            return self.answers(lm, "Go", "Go", "Go", max_gen_toks=8, do_sample=True, temperature=1.0, top_k=0)

        assert drawn(0, 1) == drawn(0, 1) != drawn(1, 1)
        assert len(set(drawn(0, 1))) == len(set(drawn(0, 3))) == 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"repetition_penalty": 1.1}, "gen_kwargs has repetition_penalty; allowed are until, max_gen_toks"),
            ({"num_beams": 4}, "num_beams 4; there is no beam search"),
            ({"max_gen_toks": 256}, r"max_gen_toks must be in \[1, 255\]"),
            ({"do_sample": True, "max_gen_toks": 9}, "do_sample without a temperature"),
            ({"do_sample": True, "temperature": 1.0, "top_p": 2.0, "max_gen_toks": 9}, r"top_p must be in \(0, 1\]"),
        ],
    )
    def test_refuses(self, model, arguments, message):
        with pytest.raises(ValueError, match=message):
            self.answers(GriffinLM(model.llm), "Go", **arguments)

    def test_what_the_tokenizer_ends_a_text_with_ends_an_answer(self, model, monkeypatch):
        """Also where the model's configuration does not say so."""
        lm = GriffinLM(model.llm, density=1.0)
        (whole,) = model.llm.generate(["Go"], max_new_tokens=8, density=1.0, ignore_eos=True).tokens
        monkeypatch.setattr(GriffinLM, "eot_token_id", whole[4])
        assert self.answers(lm, "Go", max_gen_toks=8) == [lm.tokenizer.decode(whole[: whole.index(whole[4])])]


class TestText:
    @pytest.mark.parametrize(
        ("add_bos_token", "text", "first"), [(None, "A", 1), (True, "A", 1), (False, "A", 0), (None, "<s>A", 1)]
    )
    def test_first_token_is_there_once_or_not(self, model, add_bos_token, text, first):
        lm = GriffinLM(model.llm, add_bos_token=add_bos_token)
        assert lm.tok_encode(text) == [1] * first + lm.tok_encode("A", add_special_tokens=False)

    def test_first_token_may_be_put_where_the_tokenizer_does_not(self, model, monkeypatch):
        lm = GriffinLM(model.llm, add_bos_token=True)
        monkeypatch.setattr(lm.tokenizer, "encode", lambda text, special: [40, 41])
        assert lm.tok_encode("AB") == [1, 40, 41]

    def test_chat(self, model, caplog):
        lm = GriffinLM(model.llm, chat_template_args={"mood": "gladly "})
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ye"}]
        assert lm.apply_chat_template(turns[:1]) == "[user]Hi[assistant]gladly "
        assert lm.apply_chat_template(turns, add_generation_prompt=False) == "[user]Hi[assistant]Ye"
        system = {"role": "system", "content": "Be brief"}
        assert lm.apply_chat_template([system, *turns[:1]]) == "[user]Hi[assistant]gladly "
        assert "takes no system message" in caplog.text
        assert lm.chat_template(True) == CHAT
        assert lm.tokenizer_name == str(model.folder).replace("/", "__")


@pytest.fixture(scope="module")
def prior(model, tmp_path_factory) -> Path:
    """A file with what the texts need, and with budgets."""
    texts = [model.llm.tokenizer.encode(text)[:64] for text in TEXTS]
    measured = measure(model.llm.model, texts, size=2, rows=20, quiet=True)
    weights = tuple(jnp.linspace(layer, 1, 48) for layer in (0.2, 0.8))
    file = tmp_path_factory.mktemp("prior") / "bytes.prior"
    dataclasses.replace(measured, sensitivity=weights, strength=1.0, uniform="").save(file)
    return file


@pytest.fixture(scope="module")
def library(model, tmp_path_factory) -> Library:
    """Of two clusters, whose adapters are far from changing nothing."""
    llm, texts = model.llm, ["Rivers run.", "Rivers are.", "A shop sells pencils.", "A shop sells books."]
    sequences = [llm.tokenizer.encode(text) for text in texts]
    embedder = Embedder(EmbeddingConfig(layers=0, tokens=8), llm.model)
    folder = tmp_path_factory.mktemp("moin") / "library"
    made = make_library(folder, texts, sequences, embedder, fingerprint(llm.model), count=2)
    (folder / "adapters").mkdir()
    for number in range(2):
        adapter = Adapter.init(llm.config, AdapterConfig(rank=2), jax.random.key(number))
        adapter = jax.tree.map(lambda leaf, by=0.1 * (number + 1): leaf + by, adapter)
        save_adapter(adapter, made.adapter_folder(number), llm.config)
    return made


class TestAdapters:
    REQUESTS = (("Rivers", " run."), ("A shop sells", " pencils in boxes."), ("Rivers run", " to it."))

    def scores(self, lm: GriffinLM) -> list[tuple[float, bool]]:
        return lm.loglikelihood(requests("loglikelihood", *self.REQUESTS), disable_tqdm=True)

    @pytest.mark.slow
    def test_one_for_all(self, model, library):
        lm = GriffinLM(model.folder, density=0.5, adapter=library.adapter_folder(0))
        merged = gj.LLM(merge(attach(model.llm.model, library.adapter(0, model.llm.config))), model.llm.tokenizer)
        expected = self.scores(GriffinLM(merged, density=0.5))
        np.testing.assert_allclose([s for s, _ in self.scores(lm)], [s for s, _ in expected], rtol=1e-4)

    @pytest.mark.slow
    def test_a_library_chooses_for_each_context(self, model, library):
        found = self.scores(GriffinLM(model.folder, density=0.5, moin=library.folder, batch_size=2))
        alone = [self.scores(GriffinLM(model.folder, density=0.5, adapter=library.adapter_folder(n))) for n in range(2)]
        embedder = library.embedder(model.llm.model)
        contexts = [model.llm.tokenizer.encode(context) for context, _ in self.REQUESTS]
        chosen = library.route(embedder, contexts).tolist()
        assert set(chosen) == {0, 1}
        expected = [alone[number][row][0] for row, number in enumerate(chosen)]
        np.testing.assert_allclose([score for score, _ in found], expected, rtol=1e-4)

    @pytest.mark.slow
    def test_answers_of_a_library_go_by_the_matrices_of_each_cluster(self, model, library):
        options = {"density": 0.5, "method": "magnitude", "moin": library.folder}
        until = [(context, {"until": [], "max_gen_toks": 6}) for context, _ in self.REQUESTS]
        found, alone = (
            GriffinLM(model.folder, batch_size=size, **options).generate_until(
                requests("generate_until", *until), disable_tqdm=True
            )
            for size in (3, 1)
        )
        assert found == alone
        assert len(set(found)) > 1

    def test_not_both(self, model, library):
        with pytest.raises(ValueError, match="adapter or moin, not both"):
            GriffinLM(model.folder, adapter=library.adapter_folder(0), moin=library.folder)


class TestBeyond:
    @pytest.mark.slow
    def test_best_quality_scores_and_writes_what_generate_writes(self, model, prior):
        lm = GriffinLM(model.llm, quality="best", prior=str(prior), batch_size=2)
        best = {"max_new_tokens": 9, "quality": "best", "prior": gj.Prior.load(prior), "ignore_eos": True}
        given = [("What is wet?", lm.tok_encode("What is wet?")), ("Go", lm.tok_encode("Go"))]
        written = model.llm.generate([tokens for _, tokens in given], **best).tokens
        plain = model.llm.generate([tokens for _, tokens in given], max_new_tokens=9, ignore_eos=True).tokens
        assert written != plain
        pairs = [
            ((text, ""), tokens, answer)
            for answers in (written, plain)
            for (text, tokens), answer in zip(given, answers, strict=True)
        ]
        found = lm._loglikelihood_tokens(pairs, disable_tqdm=True)
        assert [greedy for _, greedy in found[:2]] == [True, True]
        assert not all(greedy for _, greedy in found[2:])
        info = lm.get_model_info()
        assert info["quality"] == "best"
        assert sum(info["kept_neurons"]) == 48
        assert len(set(info["kept_neurons"])) == 2
        answers = lm.generate_until(
            requests("generate_until", *[(text, {"max_gen_toks": 9}) for text, _ in given]), disable_tqdm=True
        )
        del best["ignore_eos"]
        assert answers == model.llm.generate([tokens for _, tokens in given], **best).texts

    @pytest.mark.slow
    def test_devices_answer_as_one_does(self, model, prior):
        """Scores, windows and answers, each sequence with neurons of its own."""
        options = {"quality": "best", "prior": str(prior), "round_to": 2, "batch_size": 2, "max_length": 64}
        one, many = GriffinLM(model.llm, **options), GriffinLM(str(model.folder), data=2, model=2, **options)
        np.testing.assert_allclose(*(np.array(loglikelihoods(lm, *PAIRS), float) for lm in (one, many)), rtol=TOLERANCE)
        texts = requests("loglikelihood_rolling", *[(text,) for text in TEXTS])
        np.testing.assert_allclose(*(lm.loglikelihood_rolling(texts, True) for lm in (one, many)), rtol=TOLERANCE)
        asked = requests("generate_until", *[(text, {"max_gen_toks": 9}) for text in CONTEXTS])
        assert one.generate_until(asked, True) == many.generate_until(asked, True)
        with pytest.raises(ValueError, match="2 devices cannot share 21 kept neurons evenly"):
            GriffinLM(str(model.folder), model=2, **(options | {"round_to": 1}))

    def test_groups_are_those_of_generate(self, model):
        lm = GriffinLM(model.llm, groups=4)
        tokens = lm.tok_encode("What is wet?")
        (answer,) = model.llm.generate([tokens], max_new_tokens=9, groups=4, ignore_eos=True).tokens
        ((_, greedy),) = lm._loglikelihood_tokens([(("", ""), tokens, answer)], disable_tqdm=True)
        assert greedy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": "x"}, f"model_args has pretrained; allowed are {', '.join(ARGUMENTS)}"),
        ({"density": 0}, "density"),
        ({"method": "best"}, "method is 'best'; allowed are topk"),
        ({"rolling_prompt": 1}, r"rolling_prompt must be in \[0, 1\), got 1"),
        ({"max_length": 257}, r"max_length must be in \[2, 256\]"),
        ({"prefix_token_id": -1}, "prefix_token_id must be in"),
        ({"batch_size": "many"}, 'batch_size must be a whole number of at least 1 or "auto"'),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number of at least 1, got 0"),
        ({"device": "abacus"}, "device must be one of cpu, gpu, tpu"),
        ({"device": "tpu"}, "device is 'tpu', but JAX runs on"),
        ({"quality": "best"}, "need a prior, which griffin-jax prior measures"),
        ({"model": 2}, r"load the model with mesh=\.\.\."),
    ],
)
def test_refuses(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        GriffinLM(model.llm, **arguments)


def test_refuses_models_without_a_tokenizer(tiny):
    with pytest.raises(ValueError, match="has no tokenizer"):
        GriffinLM(tiny.llm)


class TestCommand:
    @pytest.mark.slow
    def test_runs_the_harness(self, capfd, model, tasks, tmp_path):
        code = main([
            "lm-eval", "--model_args", f"path={model.folder},density=0.5",
            "--tasks", str(tasks / "griffin_choice.yaml"), "--limit", "2", "--batch_size", "2",
            "--output_path", str(tmp_path), "--log_samples",
        ])  # fmt: skip
        out, err = capfd.readouterr()
        assert code == 0, err
        assert "griffin_choice" in out
        (file,) = tmp_path.rglob("results_*.json")
        config = json.loads(file.read_text(encoding="utf-8"))["config"]
        assert (config["model"], config["density"], config["method"]) == (NAME, 0.5, "topk")

    def test_bad_input_is_one_line(self, capfd, tasks, monkeypatch):
        # Reading all the tasks that come with the harness takes longer than the rest.
        few = functools.partialmethod(TaskManager.__init__, include_defaults=False)
        monkeypatch.setattr(TaskManager, "__init__", few)
        code = main(["lm-eval", "--model_args", "width=3", "--tasks", str(tasks / "griffin_text.yaml")])
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert code == 2
        assert line.startswith("griffin-jax lm-eval: model_args has width; allowed are path, ")

    def test_help_is_the_harness_own(self, capfd):
        with pytest.raises(SystemExit) as stop:
            main(["lm-eval", "run", "--help"])
        assert stop.value.code == 0
        assert "--apply_chat_template" in capfd.readouterr().out

    def test_package_does_without_the_harness(self):
        code = (
            "import sys; sys.modules['lm_eval'] = None\n"
            "import importlib.util; find = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name, *rest: None if name == 'lm_eval' else find(name, *rest)\n"
            "from griffin_jax.cli.main import main; sys.exit(main(['lm-eval', '--tasks', 'x']))"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
        assert found.returncode == 2
        assert found.stderr == (
            "griffin-jax lm-eval: lm-evaluation-harness is not installed: pip install 'griffin-jax[lm-eval]'\n"
        )

    def test_plugin_is_declared(self):
        project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert project["entry-points"]["lm_eval.models"] == {NAME: f"{GriffinLM.__module__}:{GriffinLM.__name__}"}
