"""Prior and reconstruction where the steps are joined: `LLM`, the command line and the evaluation grid."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PASSAGES, first_and_slow
from reference import assert_close

import griffin_jax as gj
from griffin_jax.cli.main import main
from griffin_jax.evaluation import tasks
from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.forced import score_answers
from griffin_jax.evaluation.general_text import measure
from griffin_jax.evaluation.grid import Variant, grid, models
from griffin_jax.evaluation.journal import Journal
from griffin_jax.extensions import jitted as jitted_extensions
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.extensions.reconstruction import Reconstruction
from griffin_jax.generation import jitted

PROMPTS = [[5, 6, 7], list(range(3, 40)), [9, 8, 7, 60, 61, 62, 63, 64, 65, 5]]
TEXTS = [list(range(start, start + 12)) for start in range(10, 90, 11)]
STEPS = ("", "+prior", "+reconstruction", "+prior+reconstruction", "+prior+reconstruction+calibration")


@pytest.fixture(scope="module")
def prior(tiny) -> gj.Prior:
    return measure(tiny.llm.model, TEXTS, size=4, rows=20, quiet=True)


def by_hand(model: gj.Transformer, prompts: list[list[int]], prior: gj.Prior | None, rows: int, shared: bool):
    """Tokens of the four steps, one after the other."""
    tokens, lengths = map(jnp.asarray, gj.pad(prompts, 48))
    prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=12, rows=rows)
    experts = gj.select(
        prefilled.statistics, gj.GriffinConfig(0.5, shared=shared), fuse=None if prior is None else prior.fusion(0.3)
    )
    reconstruction = None
    if rows:
        reconstruction = Reconstruction(prefilled.rows, calibration=() if prior is None else prior.rows)
    pruned = gj.prune(model, experts, refit=reconstruction)
    return np.asarray(jitted.decode(pruned, jitted.init_decode(prefilled), 12).tokens).tolist()


class TestGenerate:
    OPTIONS = {"max_new_tokens": 12, "ignore_eos": True, "prior_weight": 0.3}  # noqa: RUF012

    @pytest.mark.thorough
    @pytest.mark.parametrize("shared", first_and_slow(1, False, True))
    def test_is_the_steps_by_hand(self, tiny, prior, shared):
        written = set()
        for general in (None, prior):
            for rows in (0, 6):
                got = tiny.llm.generate(PROMPTS, prior=general, refit=rows, shared=shared, **self.OPTIONS).tokens
                # Shared experts are fitted to 6 tokens of all three prompts together.
                each = rows // 3 if shared else rows
                assert got == by_hand(tiny.llm.model, PROMPTS, general, each, shared)
                written.add(str(got))
        assert len(written) == 4

    @pytest.mark.slow
    def test_a_row_of_a_batch_is_the_row_alone(self, tiny, prior):
        options = {"prior": prior, "refit": True, **self.OPTIONS}
        together = tiny.llm.generate(PROMPTS, **options).tokens
        assert together == [tiny.llm.generate([prompt], **options).tokens[0] for prompt in PROMPTS]

    def test_at_density_one_nothing_changes(self, tiny, prior):
        dense = tiny.llm.generate(PROMPTS, density=1.0, **self.OPTIONS).tokens
        assert tiny.llm.generate(PROMPTS, density=1.0, prior=prior, refit=True, **self.OPTIONS).tokens == dense

    def test_experts_are_those_of_generate(self, tiny, prior):
        out = tiny.llm.generate(PROMPTS, prior=prior, **self.OPTIONS)
        for a, b in zip(out.experts, tiny.llm.experts(PROMPTS, prior=prior, prior_weight=0.3), strict=True):
            np.testing.assert_array_equal(a, b)
        again = tiny.llm.generate(PROMPTS, experts=out.experts, prior=prior, refit=8, **self.OPTIONS)
        assert again.tokens == tiny.llm.generate(PROMPTS, prior=prior, refit=8, **self.OPTIONS).tokens

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"refit": -1}, "refit must be True, False or a whole number"),
            ({"refit": 0.5}, "refit must be True, False or a whole number"),
            ({"prior": True, "prior_weight": 2.0}, r"prior_weight must be in \[0, 1\], got 2.0"),
            ({"prior": True, "method": "random"}, "method is 'random'"),
        ],
    )
    def test_refused(self, tiny, prior, options, message):
        options = options | ({"prior": prior} if "prior" in options else {})
        with pytest.raises(ValueError, match=message):
            tiny.llm.generate(PROMPTS, **options)

    def test_a_prior_of_another_model_is_refused(self, tiny, prior):
        other = dataclasses.replace(prior, model="0" * 16)
        for use in (tiny.llm.generate, tiny.llm.experts):
            with pytest.raises(ValueError, match="this prior is of model 0000"):
                use(PROMPTS, prior=other)

    def test_one_copy_has_neither(self, tiny, prior):
        llm = gj.load(tiny.folder, "float32", in_place=True)
        for options, message in (({"refit": True}, "cannot be refitted"), ({"prior": prior}, "a prior cannot")):
            with pytest.raises(ValueError, match=message):
                llm.generate([PROMPTS[0]], **options)

    @pytest.mark.thorough
    def test_command(self, worded, tmp_path, capsys):
        measured = measure(worded.llm.model, TEXTS, size=4, rows=20, quiet=True)
        measured.save(tmp_path / "p")
        arguments = ["generate", "--model", str(worded.folder), "--prompt", PASSAGES[0], "--max-new-tokens", "9"]
        arguments += ["--prior", str(tmp_path / "p"), "--prior-weight", "0.3", "--json"]
        for flags, rows in ((["--refit"], True), (["--refit", "7"], 7), ([], False)):
            assert main([*arguments, *flags]) == 0
            expected = worded.llm.generate(PASSAGES[0], max_new_tokens=9, prior=measured, prior_weight=0.3, refit=rows)
            assert json.loads(capsys.readouterr().out)["tokens"] == expected.tokens[0]


class TestGrid:
    def test_rows_with_steps(self):
        rows = grid(["topk", "topk+prior", "random+reconstruction"], [0.5])
        assert [(row.selection, row.steps) for row in rows] == [
            ("dense", ()), ("topk", ()), ("topk", ("prior",)), ("random", ("reconstruction",)),
            ("oracle", ()), ("magnitude", ()), ("random", ()),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("best+prior", "method is 'best'"),
            (
                "topk+better",
                r"after it may be any of \+prior \+budgets \+reconstruction \+calibration \+healing \+refresh",
            ),
            ("topk+reconstruction+prior", "in this order"),
            ("topk+prior+prior", "in this order"),
            ("topk+", "in this order"),
            ("topk+calibration", "is a part of"),
            ("random+prior", 'for method "topk"'),
            ("random+refresh", "for method topk"),
            ("magnitude+budgets", "methods that look at the prompt"),
        ],
    )
    def test_refused(self, method, message):
        with pytest.raises(ValueError, match=message):
            grid([method], [0.5])

    def test_models_are_the_steps_by_hand(self, tiny, prior):
        model, extensions = (
            tiny.llm.model,
            Extensions(prior=prior, prior_weight=0.3, refit=5, ridge=0.5, calibration_weight=0.2),
        )
        tokens, lengths = map(jnp.asarray, gj.pad(PROMPTS, 48))
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=0, rows=5)
        rows = [Variant(f"topk{steps}", 0.25) for steps in STEPS] + [Variant("magnitude+reconstruction", 0.25)]
        config = gj.GriffinConfig(0.25)
        for row, pruned in models(
            model, rows, prefilled, prefilled.statistics, np.arange(3, dtype=np.int32), extensions
        ):
            if row.selection == "magnitude":
                experts = gj.select(prefilled.statistics, gj.GriffinConfig(0.25, "magnitude"), model=model)
            else:
                general = prior if "prior" in row.steps else None
                experts = gj.select(prefilled.statistics, config, fuse=None if general is None else general.fusion(0.3))
            calibration = prior.rows if "calibration" in row.steps else ()
            reconstruction = Reconstruction(prefilled.rows, 0.5, calibration, 0.2)
            if "reconstruction" not in row.steps:
                reconstruction = None
            expected = gj.prune(model, experts, refit=reconstruction)
            for a, b in zip(pruned.layers, expected.layers, strict=True):
                np.testing.assert_allclose(a.ff.down[...], b.ff.down[...], rtol=1e-5, atol=1e-5, err_msg=row.name)

    @pytest.mark.slow
    def test_refreshed_rows_are_followed_refreshed(self, tiny, prior):
        """Beside another row, whose scores stay its own."""
        model, extensions = (
            tiny.llm.model,
            Extensions(prior=prior, prior_weight=0.3, refit=8, ridge=0.5, calibration_weight=0.2, refresh_every=4),
        )
        tokens, lengths = map(jnp.asarray, gj.pad(PROMPTS, 48))
        answers, real = gj.pad([[50, 51, 52, 53, 54, 55], [60] * 3, [70, 71, 72, 73, 74]], 16)
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=16, rows=8)
        steps = "topk+prior+reconstruction+calibration"
        rows = [Variant(f"{steps}+refresh", 0.5), Variant("dense", 1.0), Variant(steps, 0.5)]
        found = score_answers(model, rows, prefilled, answers, real, np.arange(3, dtype=np.int32), [3, 16], extensions)
        dense, _ = jitted.teacher_force(model, prefilled, answers, real)
        refreshed = jitted_extensions.teacher_force_refreshed(
            model, prefilled, answers, real, Pruner.of(gj.GriffinConfig(0.5), extensions), 4,
        )  # fmt: skip
        (compared,) = jitted.compare(model, dense, (refreshed,), jnp.asarray(answers))
        for scores, kl, length in zip(found, np.asarray(compared.kl), real, strict=True):
            assert scores["dense"]["kl"] == [0.0, 0.0]
            np.testing.assert_allclose(scores[rows[0].name]["kl"], [kl[:3].sum(), kl[:length].sum()], rtol=1e-5)
        # The first four tokens are decoded before anything is read again.
        assert_close(*(np.asarray([s[row.name]["kl"][0] for s in found]) for row in (rows[0], rows[2])))
        assert found[0][rows[0].name]["kl"][1] != pytest.approx(found[0][rows[2].name]["kl"][1])

    @pytest.mark.slow
    def test_a_score_does_not_depend_on_the_batch(self, tiny, prior, tmp_path):
        items = [Item(str(number), prompt, [50, 51, 52]) for number, prompt in enumerate(PROMPTS)]
        rows = (Variant("dense", 1.0), *(Variant(f"topk{steps}", 0.5) for steps in STEPS))
        one, three = (
            tasks.divergence(
                tiny.llm, items, rows, Journal(tmp_path / str(size), {}),
                new=4, size=size, seed=0, extensions=Extensions(prior=prior, refit=8),
            )
            for size in (1, 3)
        )  # fmt: skip
        for item in items:
            found = [one[item.name]["real"][row.name]["kl"][0] for row in rows]
            assert len(set(found)) == len(rows)
            assert_close(np.asarray(found), np.asarray([three[item.name]["real"][row.name]["kl"][0] for row in rows]))


class TestCommand:
    @pytest.fixture
    def arguments(self, worded, tmp_path) -> list[str]:
        file = tmp_path / "t.jsonl"
        file.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES), encoding="utf-8")
        fixed = ["eval", "divergence", file, "--model", worded.folder, "--prompt-tokens", 40, "--new-tokens", 8]
        return [*map(str, fixed), "--output", str(tmp_path / "out")]

    @pytest.mark.slow
    def test_ablation_in_one_command(self, worded, arguments, tmp_path, capsys):
        measure(worded.llm.model, TEXTS, size=4, rows=20, quiet=True).save(tmp_path / "p")
        methods = [f"topk{steps}" for steps in STEPS]
        arguments += ["--method", ",".join(methods), "--prior", str(tmp_path / "p"), "--rows", "16"]
        assert main([*arguments, "--plot", str(tmp_path / "plot.png"), "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [f["method"] for f in result["figures"][:6]] == ["dense", *methods]
        assert result["reconstruction_rows"] == 16
        assert len({f["kl"]["value"] for f in result["figures"][:6]}) == 6
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert main([*arguments, "--ridge", "2"]) == 2
        assert "ridge was 1.0, is 2.0" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--method", "topk+prior"], "need --prior FILE"),
            (["--method", "topk+reconstruction+calibration", "--prior", "{bare}"], "has no calibration rows"),
            (["--method", "topk+prior", "--prior", "{none}"], "there is no file"),
            (["--method", "topk+prior", "--prior", "{bare}"], "this prior is of model 0000"),
            (["--method", "topk+budgets", "--prior", "{bare}"], "has no budgets: the sensitivity of neurons was not"),
            (["--rows", "0"], "--rows must be a whole number of at least 1, got 0"),
            (["--refresh-every", "0"], "--refresh-every must be a whole number of at least 1, got 0"),
            (["--ridge", "0"], "ridge must be at least 0.001"),
            (["--calibration-weight", "-1"], "weight of calibration rows must be at least 0"),
            (["--prior-weight", "2"], "prior_weight must be in [0, 1], got 2.0"),
        ],
    )
    def test_refused(self, arguments, tmp_path, capsys, options, message):
        gj.Prior((jnp.ones(3),), (), "0" * 16, 1).save(tmp_path / "bare")
        options = [option.format(bare=tmp_path / "bare", none=tmp_path / "none") for option in options]
        assert main([*arguments, *options]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
