"""Clusters, jobs that know nothing of each other, and the choice of an adapter for each prompt."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PASSAGES

import griffin_jax as gj
from griffin_jax.adapters import jobs
from griffin_jax.adapters.adapter import attach
from griffin_jax.adapters.config import AdapterConfig
from griffin_jax.adapters.embedding import Embedder, EmbeddingConfig, embed
from griffin_jax.adapters.jobs import Job, train_clusters
from griffin_jax.adapters.library import LIBRARY, Library, find_clusters, make_library
from griffin_jax.cli.main import main
from griffin_jax.evaluation.general_text import measure
from griffin_jax.evaluation.moin import BASE, compare, compare_priors, table
from griffin_jax.extensions.prior import combined
from griffin_jax.generation import jitted
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.training.config import TrainingConfig
from griffin_jax.training.data import Batch
from griffin_jax.training.loss import next_token_losses

CODE = [f"def f{n}(values):\n    total = {n}\n    return total + values[{n}]\n" for n in range(6)]
PROSE = [f"The keeper of lamp {n} writes down the weather, and the ships that came by it." for n in range(5)]
EMBEDDING = EmbeddingConfig(layers=1, tokens=32)
JOB = Job(
    AdapterConfig(rank=2, alpha=4.0), TrainingConfig(steps=4, batch=2, length=24, learning_rate=0.01, warmup=1, seed=3)
)


@pytest.fixture(scope="module")
def library(worded, tmp_path_factory) -> Library:
    llm, texts = worded.llm, [*CODE, *PROSE]
    sequences = [llm.tokenizer.encode(text) for text in texts]
    folder = tmp_path_factory.mktemp("moin") / "library"
    given = Embedder(EMBEDDING, llm.model), fingerprint(llm.model)
    return make_library(folder, texts, sequences, *given, count=2)


@pytest.fixture(scope="module")
def trained(worded, library) -> Library:
    copied = dataclasses.replace(library, folder=library.folder.with_name("trained"))
    shutil.copytree(library.folder, copied.folder)
    assert train_clusters(worded.llm.model, worded.llm.tokenizer, copied, [0, 1], JOB, quiet=True) == [0, 1]
    return copied


def fresh(library: Library, folder) -> Library:
    shutil.copytree(library.folder, folder)
    return dataclasses.replace(library, folder=folder)


def factors(library: Library, number: int, config) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(library.adapter(number, config))]


class TestEmbedding:
    def test_it_is_the_mean_of_unit_vectors(self, worded):
        model = worded.llm.model
        tokens = np.asarray([[5, 9, 30, 7, 0, 0]], np.int32)
        found = embed(model, tokens, np.asarray([4], np.int32), 0)[0]
        rows = np.asarray(model.embed(jnp.asarray(tokens), jnp.zeros((1, 6), jnp.int32)), np.float64)[0, :4]
        mean = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).sum(0)
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)

    def test_padding_and_later_tokens_do_not_count(self, worded):
        embedder = Embedder(EmbeddingConfig(layers=2, tokens=4), worded.llm.model)
        alone = embedder([[5, 9, 30, 7]])
        np.testing.assert_allclose(embedder([[5, 9, 30, 7, 8, 8], [3] * 20])[0], alone[0], rtol=1e-5, atol=1e-6)
        assert (
            np.abs(Embedder(EmbeddingConfig(layers=1, tokens=4), worded.llm.model)([[5, 9, 30, 7]]) - alone).max()
            > 1e-3
        )

    def test_sentences_are_embedded_as_they_read(self, worded, monkeypatch):
        class Sentences:
            def __init__(self, name: str):
                assert name == "letters"

            def encode(self, texts, **options):
                return np.asarray([[text.count(letter) for letter in "aeiou"] for text in texts], np.float64)

        monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Sentences))
        config, llm = EmbeddingConfig(model="letters"), worded.llm
        tokens = [llm.tokenizer.encode(text) for text in PROSE]
        embedder = Embedder(config, llm.model, llm.tokenizer)
        np.testing.assert_array_equal(embedder(tokens), embedder.of_texts(PROSE))
        with pytest.raises(ValueError, match="no tokenizer to make these of tokens"):
            Embedder(config, llm.model)(tokens)

    @pytest.mark.thorough
    def test_what_cannot_be(self, worded, trained):
        model = worded.llm.model
        with pytest.raises(ValueError, match="by 9 layers, and the model has 2"):
            Embedder(EmbeddingConfig(layers=9), model)
        with pytest.raises(ValueError, match="embedded by the base"):
            embed(attach(model, trained.adapter(0, model.config)), np.ones((1, 2), np.int32), np.ones(1, np.int32), 1)


class TestClusters:
    def test_kinds_are_found_without_labels(self, library):
        assert [library.texts(number) for number in range(2)] == [CODE, PROSE]
        assert [cluster.count for cluster in library.clusters] == [6, 5]
        assert library.clusters[0].typical[0].startswith("def f")

    def test_prompts_go_where_their_kind_is(self, worded, library):
        prompts = [
            worded.llm.tokenizer.encode(text) for text in ("The keeper of lamp 9 writes", "def f9(values):\n    t")
        ]
        assert library.route(library.embedder(worded.llm.model), prompts).tolist() == [1, 0]

    def test_a_folder_is_what_was_made(self, library):
        again = Library.load(library.folder)
        np.testing.assert_array_equal(again.centroids, library.centroids)
        assert (again.clusters, again.embedding, again.model) == (library.clusters, EMBEDDING, library.model)

    def test_the_largest_cluster_comes_first(self, rng):
        points = np.concatenate([rng.normal(0, 0.01, (3, 4)) + 1, rng.normal(0, 0.01, (7, 4)) - 1])
        centroids, labels = find_clusters(points, 2)
        assert labels.tolist() == [1] * 3 + [0] * 7
        np.testing.assert_allclose(centroids[0], points[3:].mean(0), rtol=1e-5)
        with pytest.raises(ValueError, match="10 texts cannot be in 11 clusters"):
            find_clusters(points, 11)

    def test_dealt_out_by_chance(self, worded, tmp_path):
        llm, texts = worded.llm, [*CODE, *PROSE]
        sequences = [llm.tokenizer.encode(text) for text in texts]
        given = Embedder(EMBEDDING, llm.model), fingerprint(llm.model)
        made = make_library(tmp_path / "random", texts, sequences, *given, count=2, method="random")
        chosen = made.route(made.embedder(llm.model), sequences)
        assert 0 < chosen.sum() < len(texts)
        for number in range(2):
            assert made.texts(number) == [text for text, own in zip(texts, chosen, strict=True) if own == number]

    def test_what_cannot_be(self, library, tmp_path):
        with pytest.raises(ValueError, match=r"is of model .* the model is 0123"):
            library.check("0123")
        with pytest.raises(ValueError, match="cluster 2 is none of 0 to 1"):
            library.shard(2)
        with pytest.raises(FileNotFoundError):
            Library.load(tmp_path)
        broken = fresh(library, tmp_path / "broken")
        (broken.folder / LIBRARY).write_bytes((library.folder / LIBRARY).read_bytes()[:100])
        with pytest.raises(ValueError, match="damaged"):
            Library.load(broken.folder)


class TestJobs:
    @pytest.mark.thorough
    def test_it_learns(self, worded, trained):
        model = worded.llm.model
        tokens = [worded.llm.tokenizer.encode(text)[:24] for text in trained.texts(0)]
        width = max(map(len, tokens))
        rows = np.asarray([[*row, *[0] * (width - len(row))] for row in tokens], np.int32)
        batch = Batch(rows, np.asarray(list(map(len, tokens)), np.int32))
        losses = [
            float(next_token_losses(one, batch)[0].sum())
            for one in (model, attach(model, trained.adapter(0, model.config)))
        ]
        assert losses[1] < losses[0]

    def test_any_order_gives_the_same(self, worded, library, trained, tmp_path):
        other, llm = fresh(library, tmp_path / "library"), worded.llm
        for number in (1, 0):
            assert train_clusters(llm.model, llm.tokenizer, other, [number], JOB, quiet=True) == [number]
        for number in range(2):
            for one, two in zip(*(factors(each, number, llm.config) for each in (trained, other)), strict=True):
                np.testing.assert_array_equal(one, two)

    @pytest.mark.slow
    def test_two_at_once_are_those_in_turn(self, worded, library, trained, tmp_path):
        other, llm = fresh(library, tmp_path / "library"), worded.llm
        train_clusters(llm.model, llm.tokenizer, other, [0, 1], JOB, at_once=2, quiet=True)
        for number in range(2):
            for one, two in zip(*(factors(each, number, llm.config) for each in (trained, other)), strict=True):
                # Adam divides by the size of gradients, also where these are rounding.
                np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)

    def test_an_interrupted_job_goes_on(self, worded, library, trained, tmp_path, monkeypatch):
        other, llm = fresh(library, tmp_path / "library"), worded.llm
        run = {"quiet": True, "save_every": 2}
        plain = jobs.train

        def breaking(step, state, frozen, batches, steps, **options):
            def until(number: int) -> Batch:
                if number == 3:
                    raise KeyboardInterrupt
                return batches(number)

            return plain(step, state, frozen, until, steps, **options)

        monkeypatch.setattr(jobs, "train", breaking)
        with pytest.raises(KeyboardInterrupt):
            train_clusters(llm.model, llm.tokenizer, other, [0], JOB, **run)
        assert other.trained() == []
        monkeypatch.undo()
        train_clusters(llm.model, llm.tokenizer, other, [0], JOB, **run)
        for one, two in zip(*(factors(each, 0, llm.config) for each in (trained, other)), strict=True):
            np.testing.assert_array_equal(one, two)
        assert not list((other.folder / "training").iterdir())

    def test_what_is_done_is_left_alone_unless_it_was_done_otherwise(self, worded, trained):
        llm = worded.llm
        assert train_clusters(llm.model, llm.tokenizer, trained, [0, 1], JOB, quiet=True) == []
        other = dataclasses.replace(JOB, adapter=AdapterConfig(rank=3))
        with pytest.raises(ValueError, match="trained with other texts or options"):
            train_clusters(llm.model, llm.tokenizer, trained, [0], other, quiet=True)


class TestUse:
    @pytest.mark.thorough
    def test_every_prompt_has_the_adapter_of_its_cluster(self, worded, trained):
        llm, prompts = worded.llm, ["The keeper of lamp 9 writes", "def f9(values):\n    t"]
        own = [trained.adapter(number, llm.config) for number in (1, 0)]
        for density in (1.0, 0.5):
            options = {"density": density, "max_new_tokens": 5}
            found = llm.generate(prompts, adapter=trained, **options)
            assert found.clusters == [1, 0]
            assert found.tokens == llm.generate(prompts, adapter=own, **options).tokens
            assert "route" in found.seconds

    def test_not_without_adapters_or_with_another_model(self, worded, tiny, library, trained):
        with pytest.raises(FileNotFoundError, match="cluster 0 has no adapter yet"):
            worded.llm.generate("The", adapter=library, max_new_tokens=2)
        with pytest.raises(ValueError, match="is of model"):
            tiny.llm.generate([1, 5], adapter=trained, max_new_tokens=2)

    @pytest.mark.slow
    def test_a_comparison_on_held_out_texts(self, worded, trained):
        llm = worded.llm
        sequences = [llm.tokenizer.encode(text) for text in PASSAGES]
        found = compare(llm.model, [trained], sequences, prompt=8, length=24, size=2, oracle=True, quiet=True)
        base, moin, oracle = found.scores
        assert [base.name, oracle.name] == [BASE, f"{trained.folder}, oracle"]
        assert all(best <= min(own, 1e9) for best, own in zip(oracle.losses, moin.losses, strict=True))
        assert oracle.losses != moin.losses or len(set(moin.chosen)) == 1
        # One text alone, by the definition.
        tokens = np.asarray([sequences[3][:24]], np.int32)
        adapted = attach(llm.model, trained.adapter(moin.chosen[3], llm.config))
        for model, scores in ((llm.model, base), (adapted, moin)):
            losses, _ = next_token_losses(model, Batch(tokens, np.asarray([24], np.int32)))
            assert scores.losses[3] == pytest.approx(float(losses[0, 7:].sum()), rel=1e-5)
        assert found.perplexity(base).value == pytest.approx(math.exp(sum(base.losses) / sum(found.tokens)))
        assert str(trained.folder) in table(found)


@pytest.fixture(scope="module")
def measured(worded, trained) -> Library:
    (trained.folder / "priors").mkdir()
    for number in range(2):
        tokens = [worded.llm.tokenizer.encode(text) for text in trained.texts(number)]
        measure(worded.llm.model, tokens, size=2, rows=0, quiet=True).save(trained.prior_file(number))
    return trained


class TestPriors:
    def test_together_they_are_the_prior_of_all_texts(self, worded, measured):
        one = combined([measured.prior(number) for number in range(2)])
        tokens = [worded.llm.tokenizer.encode(text) for text in [*CODE, *PROSE]]
        all_texts = measure(worded.llm.model, tokens, size=2, rows=0, quiet=True)
        assert (one.tokens, one.model) == (all_texts.tokens, all_texts.model)
        for a, b in zip(one.squares, all_texts.squares, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)

    @pytest.mark.thorough
    def test_each_text_is_pruned_with_that_of_its_cluster(self, worded, measured):
        llm, prompt = worded.llm, 8
        tokens = [llm.tokenizer.encode(text)[:24] for text in PASSAGES]
        options = {"prompt": prompt, "length": 24, "size": 2, "quiet": True}
        found = compare_priors(llm.model, measured, tokens, **options)
        chosen = measured.route(measured.embedder(llm.model), [row[:prompt] for row in tokens])
        sums = 0.0
        for row, number in zip(tokens, chosen.tolist(), strict=True):
            fuse = measured.prior(number).fusion()
            prefilled = jitted.prefill(
                llm.model, np.asarray([row[:prompt]], np.int32), np.asarray([prompt]), max_new_tokens=0
            )
            experts = gj.select(prefilled.statistics, gj.GriffinConfig(density=0.5), fuse=fuse)
            given = np.asarray([row], np.int32)
            p, q = (
                jax.nn.log_softmax(llm.logits(given, prompt_length=prompt, **which)[0, prompt - 1 : -1])
                for which in ({"density": 1.0}, {"experts": experts})
            )
            sums += float((jnp.exp(p) * (p - q)).sum())
        assert found["priors of clusters"].value == pytest.approx(sums / (16 * len(tokens)), rel=1e-4)
        assert found["one prior"].value != found["no prior"].value

    def test_not_without_priors(self, library):
        with pytest.raises(FileNotFoundError, match="cluster 1 has no prior"):
            library.prior(1)


def test_texts_longer_than_the_context_are_refused(worded, library, tmp_path, capsys):
    context, model = worded.llm.config.max_positions, ["--model", str(worded.folder)]
    folder, held = str(library.folder), tmp_path / "held.txt"
    held.write_text(PASSAGES[0])
    for arguments in (["train", folder], ["eval", folder, "--text", str(held)]):
        assert main(["moin", *arguments, *model, "--length", str(context + 1)]) == 2
        assert f"--length {context + 1} is more than the context of {context} tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line(worded, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    kinds = {text: "code" if text in CODE else "prose" for text in [*CODE, *PROSE]}
    texts.write_text("".join(json.dumps({"text": text, "kind": kind}) + "\n" for text, kind in kinds.items()))
    held = tmp_path / "held.txt"
    held.write_text(PASSAGES[0])
    folder, model = str(tmp_path / "library"), ["--model", str(worded.folder)]
    training = ["--steps", "2", "--batch", "1", "--length", "24", "--warmup", "1", "--rank", "2"]
    assert (
        main(
            [
                "moin",
                "cluster",
                folder,
                "--text",
                str(texts),
                "--clusters",
                "2",
                "--layers",
                "1",
                "--kinds",
                "kind",
                *model,
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "cluster 0: 6 texts\n    def f" in printed
    assert "cluster 0: 6 code\ncluster 1: 5 prose\n11 of 11 texts (1.000)" in printed
    assert main(["moin", "train", folder, "--cluster", "1", *training, *model]) == 0
    assert "trained 1 of 1; 1 of 2 are there" in capsys.readouterr().out
    assert main(["moin", "generate", folder, "--prompt", "def f9(", *model]) == 2
    assert "cluster 0 has no adapter yet" in capsys.readouterr().err
    assert main(["moin", "train", folder, *training, *model]) == 0
    assert "trained 1 of 2; 2 of 2 are there" in capsys.readouterr().out
    assert main(["moin", "show", folder]) == 0
    assert "cluster 1: 5 texts, trained" in capsys.readouterr().out
    answer = ["--max-new-tokens", "3", "--density", "0.5", *model]
    assert main(["moin", "generate", folder, "--prompt", "def f9(", "--prompt", "The keeper", *answer]) == 0
    assert "[cluster 0]\n[cluster 1]" in capsys.readouterr().err
    output = tmp_path / "found.json"
    scoring = ["--prompt-tokens", "8", "--length", "24", "--oracle", "--batch", "1", "--output", str(output)]
    assert main(["moin", "eval", folder, "--text", str(held), *scoring, *model]) == 0
    assert f"{folder}, oracle" in capsys.readouterr().out
    assert [each["name"] for each in json.loads(output.read_text())["scores"]] == [BASE, folder, f"{folder}, oracle"]
    assert main(["moin", "prior", folder, "--window", "24", *model]) == 0
    assert "in 6 texts" in capsys.readouterr().out
    assert main(["moin", "prior", folder, "--window", "12", *model]) == 0
    assert "is there already; delete it to measure it anew" in capsys.readouterr().out
    assert main(["moin", "eval", folder, "--text", str(held), *scoring[:4], "--batch", "1", "--priors", *model]) == 0
    assert "priors of clusters+reconstruction: KL" in capsys.readouterr().out
    assert main(["moin", "generate", folder, "--prompt", "def f9(", "--priors", *answer]) == 0
    assert "[cluster 0]" in capsys.readouterr().err
    assert main(["moin", "train", folder, "--rank", "0", *model]) == 2
    assert "an adapter of rank 0 changes nothing" in capsys.readouterr().err
    assert main(["moin", "train", folder, "--rank", "3", *model]) == 2
    assert "trained with other texts or options" in capsys.readouterr().err
