"""The prior against NumPy: how it is fused, measured, kept in a file and refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PASSAGES
from reference import oracle_positions, oracle_squares, oracle_topk, torch_intermediates

import griffin_jax as gj
from griffin_jax.cli import prior as prior_command
from griffin_jax.cli.main import main
from griffin_jax.evaluation import general_text
from griffin_jax.evaluation.general_text import measure, self_generated, windows
from griffin_jax.evaluation.journal import Journal
from griffin_jax.extensions.prior import PRIOR_FORMAT, prior_path
from griffin_jax.generation import jitted
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.utils.arrayfile import save_arrays

TEXTS = [[5, 6, 7], list(range(3, 40)), [9], [60, 61, 62, 63, 64], [70, 5, 71, 6, 72, 7, 73]]


@pytest.fixture(scope="module")
def prior(tiny) -> gj.Prior:
    return measure(tiny.llm.model, TEXTS, size=2, rows=16, quiet=True)


def oracle_rank(scores: np.ndarray) -> np.ndarray:
    """How many are smaller."""
    return np.sum(scores[None] < scores[:, None], axis=1)


def prior_of(*squares: np.ndarray) -> gj.Prior:
    return gj.Prior(tuple(jnp.asarray(s, jnp.float32) for s in squares), (), "0" * 16, 1)


class TestFusion:
    @pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
    @pytest.mark.parametrize("shared", [False, True])
    def test_select_is_the_oracle(self, rng, weight, shared):
        """Few different values, so that there are many ties."""
        squares = rng.integers(0, 9, (3, 40)).astype(np.float32)
        tokens, general = np.array([4, 9, 25]), rng.integers(0, 9, 40).astype(np.float32)
        got = gj.select(
            gj.Statistics((jnp.asarray(squares),), jnp.asarray(tokens, jnp.int32)),
            gj.GriffinConfig(0.4, shared=shared),
            fuse=prior_of(general).fusion(weight),
        )
        scores = np.sqrt(squares) if not shared else (np.sqrt(squares) / np.sqrt(tokens)[:, None]).sum(axis=0)[None]
        if shared:
            # Sums that are equal as numbers need not be so once rounded.
            scores = np.asarray(scores, np.float32)
        fused = [(1 - weight) * oracle_rank(row) + weight * oracle_rank(general) for row in scores]
        expected = np.array([oracle_topk(row, 16) for row in fused])
        np.testing.assert_array_equal(got[0], expected[0] if shared else expected)

    @pytest.mark.thorough
    def test_a_weight_of_nothing_is_plain_griffin(self, tiny, prior):
        plain = tiny.llm.experts(TEXTS)
        tokens, lengths = map(jnp.asarray, gj.pad(TEXTS, 48))
        statistics = jitted.prefill(tiny.llm.model, tokens, lengths, max_new_tokens=0).statistics
        for weight, equal in ((0.0, True), (1.0, False)):
            fused = gj.select(statistics, gj.GriffinConfig(0.5), fuse=prior.fusion(weight))
            assert all(np.array_equal(a, b) for a, b in zip(fused, plain, strict=True)) == equal

    def test_ranks(self):
        (got,) = prior_of(np.zeros(5)).fusion(0.0)((jnp.asarray([3.0, 1.0, 3.0, 0.0, 2.0]),))
        np.testing.assert_array_equal(got, [3, 1, 3, 0, 2])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "sample"}, "method is 'sample'"),
            ({"weight": 1.5}, r"prior_weight must be in \[0, 1\], got 1.5"),
            ({"weight": float("nan")}, r"prior_weight must be in \[0, 1\], got nan"),
            ({"widths": (5, 5)}, r"prior is of 2 layers with \[5\] neurons, the statistics are of 1 with \[4\]"),
        ],
    )
    def test_refused(self, options, message):
        statistics = gj.Statistics((jnp.ones((1, 4)),), jnp.asarray([1]))
        config = gj.GriffinConfig(0.5, options.get("method", "topk"))
        general = prior_of(*[np.ones(width) for width in options.get("widths", (4,))])
        with pytest.raises(ValueError, match=message):
            gj.select(statistics, config, fuse=general.fusion(options.get("weight", 0.5)))


class TestMeasuring:
    def test_is_the_statistic_of_all_texts(self, tiny, prior):
        z = [torch_intermediates(tiny.torch, text) for text in TEXTS]
        for layer, squares in enumerate(prior.squares):
            expected = sum(oracle_squares(text[layer]) for text in z)
            np.testing.assert_allclose(squares, expected, rtol=1e-4, atol=1e-5)
        assert prior.tokens == sum(map(len, TEXTS))
        assert prior.model == fingerprint(tiny.llm.model)

    def test_rows_have_the_second_moments_of_all_texts(self, tiny):
        """As many as neurons have them exactly, fewer nearly those that would be best."""
        z = [torch_intermediates(tiny.torch, text) for text in TEXTS]
        for rows, worse in ((48, None), (16, 1.25)):
            found = measure(tiny.llm.model, TEXTS, size=2, rows=rows, quiet=True).rows
            for layer, leading in enumerate(found):
                tokens = np.concatenate([text[layer] for text in z]).astype(np.float64)
                tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
                moments = tokens.T @ tokens / len(tokens)
                assert leading.dtype == jnp.float16
                left = moments - np.asarray(leading, np.float64).T @ np.asarray(leading, np.float64)
                if worse is None:
                    np.testing.assert_allclose(left, 0, atol=2e-4)
                else:
                    best = np.linalg.eigvalsh(moments)[:-rows]
                    assert np.linalg.norm(left) < worse * np.linalg.norm(best)

    def test_of_long_texts_a_few_tokens_are_sketched(self, tiny, monkeypatch):
        monkeypatch.setattr(general_text, "MOST_SKETCHED", 4)
        cut = measure(tiny.llm.model, TEXTS, size=2, rows=48, quiet=True).rows
        z = [torch_intermediates(tiny.torch, text) for text in TEXTS]
        chosen = [text[0][oracle_positions(len(text[0]), 4)] for text in z]
        tokens = np.concatenate(chosen).astype(np.float64)
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        leading = np.asarray(cut[0], np.float64)
        np.testing.assert_allclose(leading.T @ leading, tokens.T @ tokens / len(tokens), atol=2e-4)

    @pytest.mark.parametrize(("rows", "count"), [(0, None), (5, 5), (100, 48)])
    def test_as_many_rows_as_there_are(self, tiny, rows, count):
        found = measure(tiny.llm.model, TEXTS, size=2, rows=rows, quiet=True).rows
        assert [layer.shape for layer in found] == ([(count, 48)] * 2 if count else [])

    @pytest.mark.parametrize("size", [1, 5])
    def test_the_batch_does_not_matter(self, tiny, prior, size):
        other = measure(tiny.llm.model, TEXTS, size=size, rows=16, quiet=True)
        for a, b in zip(prior.squares, other.squares, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        for a, b in zip(prior.rows, other.rows, strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-3)

    def test_self_generated_texts_do_not_depend_on_the_batch(self, tiny):
        one, three = (self_generated(tiny.llm.model, 5, 12, size=size, seed=3, quiet=True) for size in (1, 3))
        assert one == three
        assert len({tuple(text) for text in one}) == 5
        for text in one:
            assert text[0] == 1
            assert len(text) == 12 or text[-1] == 2
            assert 2 not in text[:-1]
        assert self_generated(tiny.llm.model, 5, 12, size=3, seed=4, quiet=True) != one

    def test_without_a_first_token_texts_begin_with_a_random_one(self, tiny):
        import jax

        model = jax.tree.map(lambda leaf: leaf, tiny.llm.model)
        model.config = dataclasses.replace(model.config, bos_token_id=None)
        texts = self_generated(model, 8, 3, size=8, quiet=True)
        assert len({text[0] for text in texts}) > 4

    @pytest.mark.parametrize("length", [1, 257])
    def test_texts_fit_the_context(self, tiny, length):
        with pytest.raises(ValueError, match="context of 256"):
            self_generated(tiny.llm.model, 1, length, size=1)

    @pytest.mark.parametrize("first", [[], [1, 1]])
    def test_windows_hold_the_whole_text(self, first):
        class Words:
            beginning = first

            def encode(self, text: str, special: bool = True) -> list[int]:
                return [*(first if special else []), *map(int, text.split())]

        found = list(windows(Words(), " ".join(map(str, range(10, 33))), 9))  # pyright: ignore[reportArgumentType]
        assert all(window[: len(first)] == first for window in found)
        assert [token for window in found for token in window[len(first) :]] == list(range(10, 33))
        assert [len(window) for window in found[:-1]] == [9] * (len(found) - 1)
        with pytest.raises(ValueError, match="no room"):
            next(windows(Words(), "3", len(first)))  # pyright: ignore[reportArgumentType]


class TestFile:
    def test_saved_and_loaded(self, prior, tmp_path):
        prior.save(tmp_path / "p")
        again = gj.Prior.load(tmp_path / "p")
        assert (again.model, again.tokens) == (prior.model, prior.tokens)
        for a, b in zip(prior.squares + prior.rows, again.squares + again.rows, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        dataclasses.replace(prior, rows=()).save(tmp_path / "p")
        assert gj.Prior.load(tmp_path / "p").rows == ()

    def test_of_another_model(self, tiny, prior):
        prior.check(fingerprint(tiny.llm.model))
        with pytest.raises(ValueError, match=f"prior is of model {prior.model}, the model is 0000"):
            prior.check("0" * 16)

    @pytest.mark.parametrize(
        ("arrays", "metadata", "message"),
        [
            ({}, {"layers": "1"}, "damaged: 'layers.0.squares'"),
            ({}, {}, "damaged: 'layers'"),
            ({"layers.0.squares": np.ones(3, np.float64)}, {"layers": "1"}, "damaged: an array is float64"),
            ({"layers.0.squares": np.array([np.nan], np.float32)}, {"layers": "1"}, "not finite"),
            (
                {"layers.0.squares": np.ones(3, np.float32), "layers.0.rows": np.ones((2, 4), np.float16)},
                {"layers": "1"},
                "different widths",
            ),
        ],
    )
    def test_damaged(self, tmp_path, arrays, metadata, message):
        save_arrays(
            tmp_path / "p", PRIOR_FORMAT, arrays, {"model": "0" * 16, "tokens": "1", "strength": "0.0", **metadata}
        )
        with pytest.raises(ValueError, match=message):
            gj.Prior.load(tmp_path / "p")

    def test_of_another_kind(self, tmp_path):
        gj.ExpertNeurons.from_indices([[1]], [2]).save(tmp_path / "e")
        with pytest.raises(ValueError, match="its format is 'griffin_jax experts 1'"):
            gj.Prior.load(tmp_path / "e")


class TestCommand:
    def run(self, capsys, *arguments: object) -> tuple[int, str, str]:
        try:
            code = main(["prior", *map(str, arguments)])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    @pytest.mark.thorough
    def test_of_files(self, worded, tmp_path, capsys, monkeypatch):
        def scored(_model, rows, _prefilled, answers, *rest):
            return [{row.name: {"kl": [1 - rest[-1].prior.strength]} for row in rows}] * len(answers)

        # The scores of the trial are made up here; the tests of budgets have a prior that comes of a true one.
        monkeypatch.setattr("griffin_jax.evaluation.general_text.score_answers", scored)
        files = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "empty.txt"]
        for file, text in zip(files, [" ".join(PASSAGES[:2]), PASSAGES[2], " "], strict=True):
            file.write_text(text, encoding="utf-8")
        code, out, err = self.run(
            capsys, "--model", worded.folder, "--text", *files, "--window", 40, "--rows", 12, "--output", tmp_path / "p"
        )
        assert code == 0, err
        assert "left out, empty" in err
        encode = worded.llm.tokenizer.encode
        tokens = [encode(file.read_text(encoding="utf-8")) for file in files[:2]]
        cut = [text[start : start + 40] for text in tokens for start in range(0, len(text), 40)]
        # Every fifth is held out, to try budgets on.
        cut = [text for number, text in enumerate(cut) if number not in (4, 9)]
        first, second, *_ = out.splitlines()
        total = sum(map(len, cut))
        assert first == f"{tmp_path / 'p'}: {total:,} tokens in {len(cut)} texts, 12 calibration rows of each layer"
        assert second == "layers keep shares of their own, 1 of the way to those with the least loss"
        found, expected = gj.Prior.load(tmp_path / "p"), measure(worded.llm.model, cut, size=4, rows=12, quiet=True)
        assert len(found.sensitivity) == len(found.squares)
        found.check(fingerprint(worded.llm.model))
        for a, b in zip(found.squares, expected.squares, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)

    def test_of_what_the_model_writes(self, tiny, tmp_path, capsys):
        arguments = ["--model", tiny.folder, "--self-generated", 3, "--window", 9, "--rows", 0]
        assert self.run(capsys, *arguments, "--output", tmp_path / "p")[0] == 0
        found = gj.Prior.load(tmp_path / "p")
        expected = measure(tiny.llm.model, self_generated(tiny.llm.model, 3, 9, size=4), size=4, rows=0)
        assert (found.rows, found.tokens) == ((), expected.tokens)
        assert found.uniform == "fewer than 5 texts are too few to try budgets on"

    def test_one_that_is_there_is_kept(self, tiny, tmp_path, capsys):
        arguments = ["--model", tiny.folder, "--self-generated", 2, "--window", 9, "--rows", 0]
        (tmp_path / "p").write_bytes(b"measured for hours")
        code, out, err = self.run(capsys, *arguments, "--output", tmp_path / "p")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "exists already: give another --output, or --overwrite to measure it anew" in err
        assert (tmp_path / "p").read_bytes() == b"measured for hours"
        assert self.run(capsys, *arguments, "--output", tmp_path / "p", "--overwrite")[0] == 0
        assert gj.Prior.load(tmp_path / "p").tokens > 2

    @pytest.mark.thorough
    def test_is_measured_when_it_is_first_needed(self, worded, tmp_path, capsys, monkeypatch):
        """What is asked for is measured over what the model writes by itself, once, and said on stderr."""
        shutil.copytree(worded.folder, tmp_path / "model")
        monkeypatch.setitem(prior_command.QUICK, "self_generated", 3)
        monkeypatch.setitem(prior_command.QUICK, "window", 9)
        answer = ["generate", "--model", str(tmp_path / "model"), "--quality", "best", "--prompt", "The river"]
        answer += ["--max-new-tokens", "4"]
        printed = []
        for said in ("there is no", "tokens/s"):
            assert main(answer) == 0
            out, err = capsys.readouterr()
            assert said in err
            printed.append(out)
        assert "there is no" not in err
        assert printed[0] == printed[1]
        assert [file.name for file in tmp_path.iterdir() if "prior" in file.name] == ["model.prior.safetensors"]
        model = worded.llm.model
        expected = measure(model, self_generated(model, 3, 9, size=4, quiet=True), size=4, quiet=True)
        found = gj.Prior.load(tmp_path / "model.prior.safetensors")
        np.testing.assert_array_equal(found.squares, expected.squares)
        best = worded.llm.generate("The river", quality="best", prior=found, max_new_tokens=4)
        assert printed[0] == f"{best.texts[0]}\n"

    def test_texts_go_on_after_an_interruption(self, tiny, tmp_path):
        class Interrupted(Journal):
            def add(self, scores):
                super().add(scores)
                raise KeyboardInterrupt

        settings = {"seed": 3}
        with pytest.raises(KeyboardInterrupt):
            self_generated(tiny.llm.model, 5, 12, size=2, seed=3, quiet=True, journal=Interrupted(tmp_path, settings))
        journal = Journal.going_on(tmp_path, settings)
        assert sorted(journal.scores) == ["0", "1"]
        journal.scores["0"] = [1, 5]
        found = self_generated(tiny.llm.model, 5, 12, size=2, seed=3, quiet=True, journal=journal)
        assert found == [[1, 5], *self_generated(tiny.llm.model, 5, 12, size=2, seed=3, quiet=True)[1:]]
        assert not Journal.going_on(tmp_path, {"seed": 4}).scores
        journal.remove()
        assert not tmp_path.exists()

    def test_lies_beside_the_model(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("model").mkdir()
        for name, file in (
            (str(tmp_path / "model"), tmp_path / "model.prior.safetensors"),
            ("model/", tmp_path / "model.prior.safetensors"),
            ("owner/name", tmp_path / "name.prior.safetensors"),
        ):
            assert prior_path(name) == file

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--text", "none.txt"), "there is no file none.txt"),
            (("--self-generated", 0), "--self-generated must be at least 1, got 0"),
            (("--self-generated", 1, "--window", 1), "--window must be at least 2, got 1"),
            (("--self-generated", 1, "--rows", -1), "--rows must be at least 0, got -1"),
            (("--self-generated", 1, "--budget-texts", -1), "--budget-texts must be at least 0, got -1"),
            (("--self-generated", 1, "--seed", 2**31), "--seed must be less than 2**31, got 2147483648"),
            (("--self-generated", 1, "--output", "/nowhere/p"), "there is no folder /nowhere"),
        ],
    )
    def test_refused_before_a_model_is_loaded(self, capsys, monkeypatch, arguments, message):
        monkeypatch.setattr("griffin_jax.cli.options.load", None)
        code, _, err = self.run(capsys, "--model", "x", *arguments)
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1

    def test_files_need_a_tokenizer(self, tiny, tmp_path, capsys):
        (tmp_path / "a.txt").write_text("text")
        code, _, err = self.run(
            capsys, "--model", tiny.folder, "--text", tmp_path / "a.txt", "--output", tmp_path / "p"
        )
        assert code == 2
        assert "give --self-generated" in err
