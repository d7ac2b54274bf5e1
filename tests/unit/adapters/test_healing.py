"""Healing: pruned models with an adapter of their own, against the same made by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PASSAGES, drawn_adapter, first_and_slow

import griffin_jax as gj
from griffin_jax.adapters.adapter import Adapter, attach, merge
from griffin_jax.adapters.config import AdapterConfig, Course
from griffin_jax.adapters.healing import NOTES, Healing
from griffin_jax.adapters.healing_training import healing_loss, train_healing
from griffin_jax.cli import main as cli
from griffin_jax.cli import prior as prior_command
from griffin_jax.evaluation.front import stored_as
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.prior import Prior
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation import jitted
from griffin_jax.griffin.masked import mask
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.weights import WeightFormat
from griffin_jax.training.config import TrainingConfig
from griffin_jax.training.data import Batch, pack

HALF = gj.GriffinConfig(0.5)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40, 41, 42]]
COURSE = Course(
    AdapterConfig(rank=8), TrainingConfig(steps=10, batch=8, length=20, learning_rate=0.01, warmup=1), prompt=12
)


@pytest.fixture(scope="module")
def prefilled(tiny) -> gj.Prefilled:
    return jitted.prefill(tiny.llm.model, *gj.pad(PROMPTS, 8), max_new_tokens=4)


@pytest.fixture(scope="module")
def packed(primed):
    return pack([primed.llm.tokenizer.encode(text) for text in PASSAGES], 20, 0)


@pytest.fixture(scope="module")
def trained(primed, packed):
    return train_healing(primed.llm.model, packed, Pruner(HALF), COURSE, quiet=True)


@pytest.fixture(scope="module")
def healing(tiny) -> Healing:
    return Healing(drawn_adapter(tiny.llm.config, 1), fingerprint(tiny.llm.model))


def read(model: gj.Transformer, prefilled: gj.Prefilled) -> np.ndarray:
    """Logits of given answers."""
    answers, lengths = jnp.asarray([[3, 4, 5, 6], [7, 8, 9, 10]]), jnp.asarray([4, 4])
    hidden, _ = jitted.teacher_force(model, prefilled, answers, lengths)
    return np.asarray(model.logits(hidden))[:, 1:]


def close(one, other) -> None:
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


class TestHeal:
    @pytest.mark.parametrize("targets", first_and_slow(1, "attention,feed_forward", "feed_forward"))
    @pytest.mark.parametrize("shared", [False, True])
    def test_is_pruning_the_merged_model(self, tiny, prefilled, targets, shared):
        model = tiny.llm.model
        adapter = drawn_adapter(model.config, 1, targets=targets)
        experts = gj.select(prefilled.statistics, dataclasses.replace(HALF, shared=shared))
        healed = Healing(adapter).heal(gj.prune(model, experts), experts)
        expected = read(gj.prune(merge(attach(model, adapter)), experts), prefilled)
        close(read(healed, prefilled), expected)
        close(read(Healing(adapter).heal(mask(model, experts), experts), prefilled), expected)
        # Rows of neurons are added up, and attention, which is the full model's, has what is added next to it.
        assert all(layer.ff.gate_up_left is None and layer.ff.down_left is None for layer in healed.layers)
        assert healed.adapted == (targets != "feed_forward")
        assert np.abs(read(gj.prune(model, experts), prefilled) - expected).max() > 1e-2

    def test_integers_stay_what_they_are(self, tiny, prefilled):
        few = stored_as(tiny.llm.model, WeightFormat.parse("int8"))
        adapter = drawn_adapter(few.config, 1)
        experts = gj.select(prefilled.statistics, HALF)
        pruned = gj.prune(few, experts)
        healed = Healing(adapter).heal(pruned, experts)
        np.testing.assert_array_equal(healed.layers[0].ff.down[...], pruned.layers[0].ff.down[...])
        close(read(healed, prefilled), read(gj.prune(attach(few, adapter), experts), prefilled))

    def test_the_full_model_stays_what_it_is(self, tiny, prefilled):
        before = fingerprint(tiny.llm.model)
        experts = gj.select(prefilled.statistics, HALF)
        Healing(drawn_adapter(tiny.llm.config, 1)).heal(gj.prune(tiny.llm.model, experts), experts)
        assert fingerprint(tiny.llm.model) == before


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    return (
        wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    )


class TestLoss:
    @pytest.mark.slow
    def test_is_the_divergence_of_answers(self, tiny):
        model, adapter = tiny.llm.model, drawn_adapter(tiny.llm.config, 1)
        tokens = np.random.default_rng(0).integers(3, 101, (2, 14)).astype(np.int32)
        lengths, prompt = [14, 9], 6
        loss, figures = healing_loss(prompt)(adapter, (model, Pruner(HALF)), Batch(tokens, np.asarray(lengths)))
        found, agree = [], []
        for row, length in zip(tokens, lengths, strict=True):
            given = jnp.asarray(row[None, :length])
            experts = tiny.llm.experts([row[:prompt].tolist()], density=0.5)
            merged = gj.LLM(merge(attach(model, adapter)))
            # Prompts are read by the full model, so the healed one must not be asked for their keys and values.
            state = jitted.prefill(model, given[:, :prompt], jnp.asarray([prompt]), max_new_tokens=length - prompt)
            answer, real = given[:, prompt:], jnp.asarray([length - prompt])
            scores = []
            for each in (model, gj.prune(merged.model, experts)):
                hidden, _ = jitted.teacher_force(each, state, answer, real)
                scores.append(log_softmax(each.logits(hidden))[0, 1:])
            dense, healed = scores
            found += (np.exp(dense) * (dense - healed)).sum(-1).tolist()
            agree += (dense.argmax(-1) == healed.argmax(-1)).tolist()
        assert len(found) == 7 + 2
        assert float(loss) == pytest.approx(np.mean(found), rel=1e-5)
        assert float(figures["agree"]) == pytest.approx(np.mean(agree))


class TestTraining:
    @pytest.mark.slow
    def test_it_lowers_the_divergence(self, primed, packed, trained):
        healing, losses = trained
        assert len(losses) == 10
        batch = packed.batches(len(packed), seed=0)(0)
        loss = healing_loss(COURSE.prompt)
        frozen = primed.llm.model, Pruner(HALF)
        blank = Adapter.init(primed.llm.config, COURSE.adapter, jax.random.key(0))
        before, after = (float(loss(adapter, frozen, batch)[0]) for adapter in (blank, healing.adapter))
        assert after < 0.9 * before

    @pytest.mark.slow
    def test_a_run_that_was_interrupted_gives_what_it_would_have_given(self, primed, packed, trained, tmp_path):
        class Stop(Exception):
            pass

        batches = packed.batches

        def stopping(size: int, *, seed: int):
            each = batches(size, seed=seed)

            def batch(step: int) -> Batch:
                if step == 5:
                    raise Stop
                return each(step)

            return batch

        broken = dataclasses.replace(packed)
        object.__setattr__(broken, "batches", stopping)
        options = {"folder": tmp_path / "run", "save_every": 2, "quiet": True}
        with pytest.raises(Stop):
            train_healing(primed.llm.model, broken, Pruner(HALF), COURSE, **options)
        again, losses = train_healing(primed.llm.model, packed, Pruner(HALF), COURSE, **options)
        assert losses == trained[1][4:]
        jax.tree.map(np.testing.assert_array_equal, again.adapter, trained[0].adapter)
        with pytest.raises(ValueError, match="has a checkpoint of another run"):
            train_healing(primed.llm.model, packed, Pruner(gj.GriffinConfig(0.25)), COURSE, **options)

    @pytest.mark.slow
    def test_it_is_trained_for_refitted_models(self, primed, packed):
        prior = Prior.load(primed.folder.with_name("model.prior.safetensors"))
        pruner = Pruner.of(HALF, Extensions(prior=prior, refit=8))
        course = dataclasses.replace(COURSE, training=dataclasses.replace(COURSE.training, steps=1, warmup=0))
        _, (refitted,) = train_healing(primed.llm.model, packed, pruner, course, quiet=True)
        _, (plain,) = train_healing(primed.llm.model, packed, Pruner(HALF), course, quiet=True)
        # Before the first update the adapter is nothing, and these are the losses without it.
        assert 0 < refitted < plain

    @pytest.mark.thorough
    def test_a_run_goes_on_with_its_own_prior_only(self, primed, packed, tmp_path):
        prior = Prior.load(primed.folder.with_name("model.prior.safetensors"))
        another = dataclasses.replace(prior, squares=tuple(layer[::-1] for layer in prior.squares))
        course = dataclasses.replace(COURSE, training=dataclasses.replace(COURSE.training, steps=1, warmup=0))
        options = {"folder": tmp_path / "run", "quiet": True}
        train_healing(primed.llm.model, packed, Pruner.of(HALF, Extensions(prior=prior)), course, **options)
        for extensions in (Extensions(prior=another), Extensions(prior=prior, prior_weight=0.4), Extensions()):
            with pytest.raises(ValueError, match="has a checkpoint of another run"):
                train_healing(primed.llm.model, packed, Pruner.of(HALF, extensions), course, **options)

    def test_lengths(self, primed, packed):
        with pytest.raises(ValueError, match="of sequences of 20 tokens a prompt has 1 to 18, got 19"):
            dataclasses.replace(COURSE, prompt=19)
        short = pack([[1, 2, 3, 4]], 2)
        with pytest.raises(ValueError, match="sequences have 2 tokens, and are to have 20"):
            train_healing(primed.llm.model, short, Pruner(HALF), COURSE)


class TestGenerate:
    @pytest.mark.thorough
    def test_is_the_steps_by_hand(self, tiny, healing):
        llm, model = tiny.llm, tiny.llm.model
        out = llm.generate(PROMPTS[:1], density=0.5, healing=healing, max_new_tokens=6, ignore_eos=True)
        prefilled = gj.prefill(model, *gj.pad(PROMPTS[:1], 16), max_new_tokens=6)
        experts = gj.select(prefilled.statistics, HALF)
        pruned = gj.prune(merge(attach(model, healing.adapter)), experts)
        expected = gj.decode(pruned, gj.init_decode(prefilled), 6).tokens
        assert out.tokens == np.asarray(expected)[:, :6].tolist()
        # The memory of the rows of one answer is that of the next one, healed or not.
        again = llm.generate(PROMPTS[:1], density=0.5, healing=healing, max_new_tokens=6, ignore_eos=True)
        assert again.tokens == out.tokens
        plain = llm.generate(PROMPTS[:1], density=0.5, max_new_tokens=6, ignore_eos=True)
        alone = gj.LLM(model).generate(PROMPTS[:1], density=0.5, max_new_tokens=6, ignore_eos=True)
        assert plain.tokens == alone.tokens

    def test_a_row_of_a_batch_is_the_row_alone(self, tiny, healing):
        options = {"density": 0.5, "healing": healing, "max_new_tokens": 6, "ignore_eos": True, "refresh_every": 2}
        together = tiny.llm.generate(PROMPTS, **options)
        assert together.tokens == [tiny.llm.generate([prompt], **options).tokens[0] for prompt in PROMPTS]

    @pytest.mark.slow
    def test_drafts_of_a_healed_model_are_decided_about_by_the_full_one(self, tiny, healing):
        options = {"max_new_tokens": 8, "ignore_eos": True}
        out = tiny.llm.generate(PROMPTS, density=0.5, healing=healing, speculative=2, **options)
        assert out.tokens == tiny.llm.generate(PROMPTS, density=1.0, **options).tokens

    def test_what_does_not_go_together(self, tiny, healing):
        with pytest.raises(ValueError, match="trained for a model with other weights"):
            tiny.llm.generate(PROMPTS, density=0.5, healing=dataclasses.replace(healing, model="another"))
        wider = dataclasses.replace(tiny.llm.config, ff_width=64)
        with pytest.raises(ValueError, match="this adapter is of another model"):
            tiny.llm.generate(PROMPTS, density=0.5, healing=Healing(drawn_adapter(wider, 1)))
        with pytest.raises(ValueError, match="a healing is for the model without an adapter"):
            tiny.llm.generate(PROMPTS, density=0.5, healing=healing, adapter=healing.adapter)
        with pytest.raises(ValueError, match="mixed_weights do not go with healing"):
            Extensions(mixed_weights="int4@0.5", healing=healing)
        with pytest.raises(ValueError, match="a trial is of models without a healing"):
            Extensions(max_divergence=0.1, healing=healing)
        with pytest.raises(ValueError, match="with in_place rows of weights move, and those of a healing"):
            gj.load(tiny.folder, "float32", in_place=True).generate(PROMPTS[:1], density=0.5, healing=healing)


class TestFiles:
    def test_round_trip(self, tiny, tmp_path):
        healing = Healing(drawn_adapter(tiny.llm.config, 1), "abc")
        healing.save(tmp_path / "healing", tiny.llm.config, "base", {"density": 0.5})
        found = Healing.load(tmp_path / "healing", tiny.llm.config)
        assert found.model == "abc"
        jax.tree.map(np.testing.assert_array_equal, found.adapter.factors, healing.adapter.factors)
        assert json.loads((tmp_path / "healing" / NOTES).read_text())["density"] == 0.5

    def test_what_is_none(self, tiny, tmp_path):
        folder = tmp_path / "adapter"
        gj.save_adapter(drawn_adapter(tiny.llm.config, 1), folder, tiny.llm.config)
        with pytest.raises(FileNotFoundError, match=r"there is no healing\.json, so this adapter is not for pruned"):
            Healing.load(folder, tiny.llm.config)
        (folder / NOTES).write_text("[]")
        with pytest.raises(ValueError, match="does not say which model it is for"):
            Healing.load(folder, tiny.llm.config)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main([*map(str, arguments)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_the_command_line(primed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = Path("texts.jsonl")
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES), encoding="utf-8")
    model = ["--model", primed.folder, "--dtype", "float32"]
    training = ["--steps", 2, "--batch", 2, "--length", 20, "--prompt-tokens", 12, "--warmup", 1, "--rank", 2]
    heal = ["heal", "healed", *model, "--text", texts, *training]
    code, out, err = run(capsys, *heal, "--quality", "best")
    assert code == 0, err
    assert out.startswith("healed: rank 2, ")
    assert "trained on 32 tokens" in out
    assert "KL to the full model on texts that were new to it: " in out
    assert json.loads(Path("healed", NOTES).read_text())["model"] == fingerprint(primed.llm.model)
    code, _, err = run(capsys, *heal)
    assert (code, "exists" in err.splitlines()[-1]) == (2, True)
    code, _, err = run(capsys, *heal[:1], "other", *heal[2:], "--rank", 0)
    assert (code, "an adapter of rank 0 changes nothing" in err) == (2, True)
    code, _, err = run(capsys, *heal[:1], "other", *heal[2:], "--density", 1)
    assert code == 2
    assert "keeps all neurons, and there is nothing to heal" in err

    # Where there is no prior yet, `best` measures one.
    monkeypatch.setitem(prior_command.QUICK, "self_generated", 3)
    monkeypatch.setitem(prior_command.QUICK, "window", 9)
    shutil.copytree(primed.folder, "fresh")
    code, out, err = run(capsys, "heal", "first", "--model", "fresh", *heal[4:], "--quality", "best")
    assert code == 0, err
    assert "the model writes 3 short texts" in err
    assert out.startswith("first: rank 2, ")
    assert Path("fresh.prior.safetensors").is_file()

    answer = ["generate", *model, "--prompt", "the river", "--max-new-tokens", 4, "--healing"]
    code, out, err = run(capsys, *answer, "healed")
    assert code == 0, err
    healing = Healing.load("healed", primed.llm.config)
    assert out.strip() == primed.llm.generate("the river", healing=healing, max_new_tokens=4).texts[0].strip()
    code, _, err = run(capsys, *answer, "none")
    assert (code, "there is no adapter_config.json" in err) == (2, True)

    lengths = ["--prompt-tokens", 30, "--new-tokens", 6, "--limit", 2, "--json-file", "found.json"]
    code, _, err = run(
        capsys, "eval", "divergence", texts, *model, *lengths, "--density", 0.5, "--no-baselines", "--method",
        "topk,topk+healing", "--healing", "healed",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(Path("found.json").read_text())["figures"]
    kl = {entry["method"]: entry["kl"]["value"] for entry in found if entry["continuation"] == "real"}
    assert kl["topk+healing"] != kl["topk"] > 0
    code, _, err = run(capsys, "eval", "divergence", texts, *model, *lengths, "--method", "topk+healing")
    assert (code, "+healing needs --healing FOLDER" in err) == (2, True)
    code, out, err = run(
        capsys, "eval", "front", texts, *model, *lengths, "--weights", "int8", "--density", 0.5, "--quality",
        "griffin,best", "--healing", "healed",
    )  # fmt: skip
    assert code == 0, err
    rows = {entry["quality"] for entry in json.loads(Path("found.json").read_text())["figures"]}
    assert rows == {"-", "griffin", "best", "griffin+heal", "best+heal"}
    assert max(map(len, out.splitlines()[1:])) <= 120
