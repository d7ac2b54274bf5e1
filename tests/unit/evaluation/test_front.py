"""`griffin-jax eval front`: scores and bytes of quantised, pruned models against plain definitions of both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PASSAGES, first_and_slow
from reference import oracle_topk, step_logits

import griffin_jax as gj
from griffin_jax.adapters.adapter import Adapter
from griffin_jax.adapters.config import AdapterConfig
from griffin_jax.adapters.healing import Healing
from griffin_jax.cli import main as cli
from griffin_jax.evaluation import drafts, front, front_report
from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.drafts import Drafter
from griffin_jax.evaluation.grid import DEFAULTS, HEALING, Variant, grid
from griffin_jax.evaluation.journal import FILE, Journal
from griffin_jax.extensions.mixed import MixedFormat, coarse
from griffin_jax.generation import jitted
from griffin_jax.model.assembly import assemble, disassemble, parameter_shapes
from griffin_jax.model.weights import WeightFormat
from griffin_jax.parallel.mesh import make_mesh

ROWS = grid(["topk"], [0.5], ())
ITEMS = [
    Item("a", [5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17]),
    Item("b", [40, 41, 42], [50, 51, 52]),
    Item("c", [90, 3, 77, 3, 21, 8], [8, 9, 10, 11]),
]
FORMATS = [WeightFormat.parse(name) for name in ("float32", "int8", "int4:16")]


@pytest.fixture(scope="module")
def scores(primed, tmp_path_factory) -> dict[str, dict]:
    journal = Journal(tmp_path_factory.mktemp("scores"), {})
    return front.compare_formats(primed.llm, ITEMS, ROWS, FORMATS, journal, new=5, size=2, seed=0)


def dequantised(model: gj.Transformer) -> gj.Transformer:
    """The same model with its integers and scales multiplied out by NumPy."""
    arrays = {path: np.asarray(array) for path, array in disassemble(model)}

    def plain(path: str) -> np.ndarray:
        array = arrays[path].astype(np.float32)
        for name in (f"{path}_scale", f"{path}_row_scale"):
            if name in arrays:
                scale = arrays[name].astype(np.float32)
                if name.endswith(("down_scale", "out_scale")):
                    return array * scale
                groups = array.reshape(*array.shape[:-1], scale.shape[-1], -1)
                return (groups * scale[..., None]).reshape(array.shape)
        return array

    return assemble(model.config, ((path, plain(path)) for path in parameter_shapes(model.config)), jnp.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def predictions(model: gj.Transformer, item: Item, density: float, change=None) -> np.ndarray:
    """log p of every token of the answer, of copies of the kept rows of a model of floating numbers; or of what
    `change` makes of each layer's neurons, the best first."""
    prompt, answer = jnp.asarray([item.prompt]), jnp.asarray([item.answer])
    read = jitted.prefill(model, prompt, jnp.asarray([prompt.shape[1]]), max_new_tokens=answer.shape[1])
    if density < 1:
        kept = [oracle_topk(np.asarray(squares)[0], int(48 * density)) for squares in read.statistics.squares]
        model = gj.prune(model, gj.ExpertNeurons.from_indices(kept, model.neurons))
    if change is not None:
        model = change([np.argsort(-np.asarray(squares)[0], kind="stable") for squares in read.statistics.squares])
    positions = prompt.shape[1] + jnp.arange(answer.shape[1])[None]
    logits, _ = step_logits(model, answer, positions, read.cache)
    return log_softmax(np.concatenate([read.logits, logits[0, :-1]]))


class TestScores:
    @pytest.mark.slow
    @pytest.mark.parametrize("weights", FORMATS, ids=str)
    def test_against_dequantised_copies(self, primed, scores, weights):
        reference = primed.llm.model
        plain = dequantised(front.stored_as(reference, weights))
        for item in ITEMS:
            p = predictions(reference, item, 1.0)
            for variant in ROWS:
                q = predictions(plain, item, variant.density)
                found = scores[str(weights)][item.name][variant.name]
                assert found["kl"] == [pytest.approx((np.exp(p) * (p - q)).sum(), abs=1e-5, rel=1e-5)]
                loss = -sum(q[at, token] for at, token in enumerate(item.answer))
                assert found["loss"] == [pytest.approx(loss, rel=1e-5)]
                assert found["agree"] == [(p.argmax(-1) == q.argmax(-1)).sum()]

    @pytest.mark.thorough
    def test_the_dense_row_in_the_models_own_format_is_the_reference(self, scores):
        for item in ITEMS:
            own = scores["float32"][item.name]["dense"]
            assert (own["kl"], own["agree"]) == ([0.0], [len(item.answer)])
            assert scores["int8"][item.name]["dense"]["kl"][0] > 0

    def test_interrupted_it_goes_on(self, primed, scores, tmp_path):
        def run() -> dict:
            return front.compare_formats(primed.llm, ITEMS, ROWS, FORMATS, Journal(tmp_path, {}), new=5, size=2, seed=0)

        assert run() == scores
        lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
        assert len(lines) == 1 + len(FORMATS) * len(ITEMS)
        (tmp_path / FILE).write_text("".join(lines[:6]))
        again = run()
        for weights in scores:
            for item in ITEMS:
                for name in ("dense", "topk 0.5"):
                    expected = scores[weights][item.name][name]["kl"]
                    assert again[weights][item.name][name]["kl"] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.slow
    def test_on_a_mesh(self, primed, scores, tmp_path):
        llm = gj.load(primed.folder, "float32", mesh=make_mesh(data=2, model=2))
        found = front.compare_formats(llm, ITEMS, ROWS, FORMATS, Journal(tmp_path, {}), new=5, size=2, seed=0)
        for weights in scores:
            for item in ITEMS:
                for name in ("dense", "topk 0.5"):
                    expected = scores[weights][item.name][name]["kl"]
                    assert found[weights][item.name][name]["kl"] == pytest.approx(expected, abs=1e-5)


class TestTwoFormats:
    @pytest.mark.thorough
    @pytest.mark.parametrize("share", first_and_slow(1, 0.25, 0))
    def test_against_rows_chosen_by_numpy(self, primed, tmp_path, share):
        weights = MixedFormat.parse(f"int8+int4:16@{share}")
        scores = front.compare_formats(primed.llm, ITEMS, ROWS, [weights], Journal(tmp_path, {}), new=5, size=2, seed=0)
        reference = primed.llm.model
        stored = front.stored_as(reference, weights.fine)
        fine, few = dequantised(stored), dequantised(coarse(stored, weights.coarse))
        for item in ITEMS:
            p = predictions(reference, item, 1.0)
            for variant in ROWS:
                kept = int(48 * variant.density)
                q = predictions(fine, item, 1.0, lambda ranks: chosen(fine, few, ranks, kept, int(share * kept)))  # noqa: B023
                found = scores[str(weights)][item.name][variant.name]
                assert found["kl"] == [pytest.approx((np.exp(p) * (p - q)).sum(), abs=1e-5, rel=1e-5)]

    def test_rows_in_two_formats_are_not_refitted(self, primed, tmp_path, capsys):
        arguments = ("--model", primed.folder, "--quality", "best", "--weights", "int8+int4:16@0.5")
        code, _, err = run(capsys, texts(tmp_path), *arguments, "--output", tmp_path / "out")
        assert code == 2
        assert "int8+int4:16@0.5 has rows in two formats, which are not refitted" in err.splitlines()[-1]

    def test_they_are_not_healed(self, primed):
        for weights in ("int8+int4:16", "int8+int4:16@0.5"):
            with pytest.raises(ValueError, match="which are not healed"):
                front.check_variants(
                    primed.llm.config, grid(["topk+healing"], [0.5], ()), [MixedFormat.parse(weights)], DEFAULTS
                )

    def test_a_density_of_bytes(self, primed, tmp_path):
        """What it stands for is compared, and the dense model is the one of the first format, which is not again."""
        by_bytes, given = (MixedFormat.parse(f"int8+int4:16{part}") for part in ("", "@0.33"))
        variants, others = grid(["topk"], [0.75], ()), grid(["topk"], [], ())
        arguments = {"new": 5, "size": 2, "seed": 0}
        found = front.compare_formats(primed.llm, ITEMS, variants, [by_bytes], Journal(tmp_path / "a", {}), **arguments)
        same = front.compare_formats(primed.llm, ITEMS, others, [given], Journal(tmp_path / "b", {}), **arguments)
        for item in ITEMS:
            here, there = found[str(by_bytes)][item.name], same[str(given)][item.name]
            assert here["topk 0.75"] == there["dense"]
            assert "dense" not in here
        sizes = {
            (str(each), variant): front.bytes_per_token(primed.llm.config, np.dtype("float32"), each, 20, variant)
            for each, variant in front.compared([by_bytes], variants)
        }
        (entry,) = front.figures(found, variants, {"dense": "-", "topk": "griffin"}, sizes, 0)
        assert (entry["weights"], entry["density"], entry["quality"]) == ("int8+int4:16", 0.75, "griffin")

    @pytest.mark.slow
    def test_with_a_density_of_bytes_best_is_compared_too(self, primed, tmp_path, capsys):
        arguments = (
            "--model", primed.folder, "--quality", "best", "--weights", "int8+int4:16", "--density", "0.5",
            "--prompt-tokens", 40, "--new-tokens", 12, "--limit", 1, "--batch", 1, "--output", tmp_path / "out",
        )  # fmt: skip
        code, out, err = run(capsys, texts(tmp_path), *arguments)
        assert code == 0, err
        rows = [line.split()[:3] for line in out.splitlines() if line.startswith("int8")]
        assert rows == [["int8+int4:16", "best", "0.5"]]


def chosen(fine: gj.Transformer, few: gj.Transformer, ranks, kept: int, precise: int) -> gj.Transformer:
    """The first model with the rows of its best neurons, those of the second one for the next, and zeros else."""
    arrays, others = ({path: np.array(a) for path, a in disassemble(model)} for model in (fine, few))
    for layer, order in enumerate(ranks):
        for name in ("gate", "up", "down"):
            path = f"layers.{layer}.ff.{name}"
            arrays[path][order[precise:kept]] = others[path][order[precise:kept]]
            arrays[path][order[kept:]] = 0
    return assemble(fine.config, arrays.items(), jnp.float32)


class TestBytes:
    """Of 2 layers of width 32 with 48 neurons, 4 heads of 8 numbers, 2 of them for keys, and 320 tokens."""

    @pytest.mark.parametrize(
        ("weights", "number", "scales"),
        # Bytes of a number of layers and of the vocabulary, and of the scales: of a row, of an output, of a neuron.
        [("float32", (4, 4), (0, 0)), ("int8", (1, 1), (4, 4)), ("int4:16", (0.5, 1), (4, 0))],
    )
    @pytest.mark.parametrize("density", [1.0, 0.5])
    def test_by_hand(self, primed, weights, number, scales, density):
        wide, vocabulary = number
        row, output = scales
        kept, slots = int(48 * density), 20
        qkv = 64 * (32 * wide + row)
        # Scales of groups lie along the rows of `down` and of `out` too, which have 48 and 32 of them.
        by_groups = row if output == 0 else 0
        out = 32 * (32 * wide + by_groups) + 32 * output
        ff = kept * (2 * (32 * wide + row) + 32 * wide + by_groups) + 32 * output
        norms = 2 * 32 * 4
        head = 321 * (32 * vocabulary + row)
        expected = 2 * (qkv + out + ff + norms) + head + 32 * 4 + 2 * 2 * 2 * 8 * slots * 4
        variant = Variant("dense", 1.0) if density == 1 else Variant("topk", density)
        found = front.bytes_per_token(
            primed.llm.config, np.dtype(np.float32), WeightFormat.parse(weights), slots, variant
        )
        assert found == expected

    @pytest.mark.parametrize(
        ("weights", "targets", "more"),
        [
            # Of each kind of matrix: rows of `left`, and the adapter's directions of width 32.
            ("float32", "feed_forward", 0),
            ("float32", "attention", 2 * 4 * ((64 * 9 + 9 * 32) + (32 * 3 + 3 * 32))),
            ("int8", "feed_forward", 2 * 4 * ((2 * 24 * 6 + 6 * 32) + (24 * 3 + 3 * 32))),
        ],
    )
    def test_of_a_healing_that_lies_next_to_the_model(self, primed, weights, targets, more):
        config = primed.llm.config
        adapter = Adapter.init(config, AdapterConfig(rank=3, targets=targets), jax.random.key(0))
        extensions = dataclasses.replace(DEFAULTS, healing=Healing(adapter))

        def read(*steps: str) -> int:
            given = WeightFormat.parse(weights), 20, Variant("+".join(("topk", *steps)), 0.5), extensions
            return front.bytes_per_token(config, np.dtype(np.float32), *given)

        assert read(HEALING) - read() == more

    @pytest.mark.parametrize("density", [1.0, 0.5])
    @pytest.mark.parametrize("share", [0, 0.25])
    def test_of_two_formats(self, primed, density, share):
        variant = Variant("dense", 1.0) if density == 1 else Variant("topk", density)
        kept = int(48 * density)
        precise = int(share * kept)

        def read(weights: str) -> int:
            parsed = MixedFormat.parse(weights)
            return front.bytes_per_token(primed.llm.config, np.dtype(np.float32), parsed, 20, variant)

        # Of each neuron that is not precise: three rows in 4 bits with two float16 scales, instead of three in 8 bits
        # of which two have a float32 scale.
        saved = (3 * 32 + 2 * 4) - 3 * (16 + 2 * 2)
        assert read("int8") - read(f"int8+int4:16@{share}") == 2 * (kept - precise) * saved


class TestFront:
    def test_the_mark(self):
        costs = [(1, 9.0), (2, 9.0), (2, 5.0), (3, 6.0), (4, 1.0), (4, 1.0), (5, 0.0), (6, 0.0), (7, np.inf)]
        assert front.on_front(costs) == [True, False, True, False, True, True, True, False, False]

    def test_figures_are_sorted_and_marked(self, scores):
        bytes_of = {(w, v): n for n, (w, v) in enumerate((w, v) for w in reversed(scores) for v in reversed(ROWS))}
        found = front.figures(scores, ROWS, {"dense": "-", "topk": "griffin"}, bytes_of, 0)
        assert [(entry["weights"], entry["quality"], entry["bytes_per_token"]) for entry in found] == [
            ("int4:16", "griffin", 0), ("int4:16", "-", 1), ("int8", "griffin", 2), ("int8", "-", 3),
            ("float32", "griffin", 4), ("float32", "-", 5),
        ]  # fmt: skip
        lowest = np.minimum.accumulate([entry["kl"]["value"] for entry in found])
        assert [entry["front"] for entry in found] == [True, *(lowest[1:] < lowest[:-1])]
        lines = front_report.table(found).splitlines()
        assert [line.endswith("*") for line in lines[2:]] == [entry["front"] for entry in found]


class TestDrafters:
    def test_only_formats_of_more_bits_have_them(self):
        drafters = [Drafter.parse("int4:16@0.5"), Drafter.parse("int8@1")]
        formats = [*FORMATS, MixedFormat.parse("int8+int4:16@0.5")]
        assert [(str(weights), drafter.name) for weights, drafter in front.pairs(formats, drafters)] == [
            ("float32", "int4:16 topk 0.5, auto drafts"),
            ("float32", "int8 dense, auto drafts"),
            ("int8", "int4:16 topk 0.5, auto drafts"),
        ]

    @pytest.mark.slow
    def test_bytes_are_those_of_the_passes_and_drafts_of_answers(self, primed, tmp_path):
        new, slots = 12, 30
        (pair,) = front.pairs([WeightFormat.parse("int8")], [Drafter.parse("int4:16@0.5")])
        found = front.compare_drafted(primed.llm, ITEMS[:2], [pair], Journal(tmp_path, {}), new=new)
        stored = gj.LLM(front.stored_as(primed.llm.model, pair[0]))
        read = 0
        full = front.bytes_per_token(primed.llm.config, np.dtype(np.float32), pair[0], slots, Variant("dense", 1.0))
        draft, step = drafts.read_bytes(stored, pair[1], slots, gj.Extensions())
        assert step == full
        for item in ITEMS[:2]:
            out = stored.generate(
                [list(item.prompt)], density=0.5, speculative=True, draft_weights="int4:16", max_new_tokens=new,
                ignore_eos=True,
            )  # fmt: skip
            dense = stored.generate([list(item.prompt)], density=1.0, max_new_tokens=new, ignore_eos=True)
            assert out.tokens == dense.tokens
            read += int(out.drafting.passes) * full + int(out.drafting.drafted.sum()) * draft
        needed = list(found["int8 with int4:16 topk 0.5, auto drafts"].values())
        measured = front.drafted_bytes(primed.llm.config, np.dtype(np.float32), *pair, slots, 2 * (new - 1), needed)
        assert measured == pytest.approx(read / (2 * (new - 1)))

    def test_they_predict_what_the_dense_model_does(self, scores):
        bytes_of = {(w, v): 10 * n for n, (w, v) in enumerate((w, v) for w in reversed(scores) for v in reversed(ROWS))}
        pair = WeightFormat.parse("int8"), Drafter.parse("int4:16@0.5")
        found = front.figures(scores, ROWS, {"dense": "-", "topk": "griffin"}, bytes_of, 0, {pair: 15.0})
        by_name = {(entry["weights"], entry["quality"]): entry for entry in found}
        drafted, dense = by_name["int8 (int4:16 drafts)", "drafted"], by_name["int8", "-"]
        assert drafted["kl"] == dense["kl"]
        assert (drafted["bytes_per_token"], drafted["density"]) == (15.0, 0.5)
        # It reads less than the dense model, and is as near.
        assert (drafted["front"], dense["front"]) == (True, False)


def texts(folder: Path) -> Path:
    file = folder / "FILE"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES), encoding="utf-8")
    return file


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main(["eval", "front", *map(str, arguments)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


class TestCommand:
    @pytest.mark.slow
    def test_all_of_it(self, primed, tmp_path, capsys):
        arguments = (
            texts(tmp_path), "--model", primed.folder, "--dtype", "float32", "--prompt-tokens", 40, "--new-tokens", 12,
            "--density", "1,0.5", "--limit", 3, "--output", tmp_path / "out", "--plot", tmp_path / "plot.png",
            "--json-file", tmp_path / "found.json", "--drafters", "int4:16@0.5",
        )  # fmt: skip
        code, out, err = run(capsys, *arguments)
        assert code == 0, err
        result = json.loads((tmp_path / "found.json").read_text())
        assert result == json.loads((tmp_path / "out" / "results.json").read_text())
        assert result["weights"] == ["float32", "int8", "int4"]
        # The prior next to the model is found; it has neither budgets nor is it of another format.
        rows = {(entry["weights"], entry["quality"], entry["density"]) for entry in result["figures"]}
        kinds = [("-", 1.0), ("griffin", 0.5), ("best", 0.5)]
        drafted = {(f"{weights} (int4:16 drafts)", "drafted", 0.5) for weights in ("float32", "int8")}
        assert rows == {(weights, *kind) for weights in result["weights"] for kind in kinds} | drafted
        assert {entry["method"] for entry in result["figures"]} == {
            "dense", "topk", "topk+prior+reconstruction+calibration", "drafted",
        }  # fmt: skip
        own = [entry for entry in result["figures"] if (entry["weights"], entry["quality"]) == ("float32", "-")]
        assert (own[0]["kl"]["value"], own[0]["front"]) == (0.0, True)
        # The first line has the path of the model.
        assert max(map(len, out.splitlines()[1:])) <= 120
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert run(capsys, *arguments)[1] == out
        code, _, err = run(capsys, *arguments, "--weights", "int8")
        assert code == 2
        assert "holds scores of other settings" in err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--weights", "int3"], "weights are 'int3'; allowed are"),
            (["--weights", "int8,"], "weights are ''; allowed are"),
            (["--weights", "int8+int4@"], "weights are 'int8+int4@'; two formats go with the part, in [0, 1), of"),
            (["--weights", "int4:16+int8"], "weights are 'int4:16+int8'; int8 takes 8 bits and int4:16 5: the second"),
            (["--weights", "int8+int4@1"], "weights are 'int8+int4@1'; two formats go with the part"),
            (
                ["--quality", "griffin", "--weights", "int8+int4:16@0.01"],
                "of int8+int4:16@0.01 the precise neurons at dense: density 0.01 keeps 0 of 48 neurons",
            ),
            (["--weights", "int8+bfloat16@0.5"], "the second format is one of integers, such as int4"),
            (["--weights", "int8+int3@0.5"], "weights are 'int3'; allowed are"),
            (["--weights", "int8+int4:24@0.5"], "groups of 24 do not divide rows of 32 weights"),
            (["--weights", "int4:24"], "groups of 24 do not divide rows of 32 weights"),
            (["--drafters", "int4"], "a drafter is a format with a density, such as int4@0.5, also int4@0.5+lookup"),
            (["--drafters", "int4@0.5+copies"], "or lookup; got 'int4@0.5+copies'"),
            (["--drafters", "float32@0.5"], "draft_weights are 'float32'; allowed are int8 and int4"),
            (["--drafters", "int4@0"], "density must be in (0, 1], got 0.0"),
            (["--drafters", "int4:24@0.5"], "groups of 24 do not divide rows of 32 weights"),
            (["--drafters", "int8@0.5", "--weights", "int8"], "--drafters have fewer bits than the model they draft"),
            (
                ["--drafters", "int4@0.5", "--prompt-tokens", "40", "--new-tokens", "1"],
                "--new-tokens must be 2 at least, so that something is drafted, got 1",
            ),
            (["--density", "1,1.5"], "density must be in (0, 1], got 1.5"),
            (["--quality", "good"], "quality must be one of griffin, best, got 'good'"),
            (["--quality", "best", "--prior", "none"], "--quality best needs a prior, and there is no file none"),
            (["--plot", "x.pdf"], "--plot writes PNG files"),
            (["--json-file", "no/such"], "--json-file: there is no folder"),
            (["--prompt-tokens", "250"], "more than the model's context of 256"),
        ],
    )
    def test_refusals(self, primed, tmp_path, capsys, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        code, out, err = run(capsys, texts(tmp_path), "--model", primed.folder, *arguments)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]
        assert not (tmp_path / "eval-front").exists()

    def test_a_model_of_integers_is_no_reference(self, primed, tmp_path, capsys):
        gj.convert(primed.folder, tmp_path / "int8", weights="int8")
        code, _, err = run(capsys, texts(tmp_path), "--model", tmp_path / "int8", "--output", tmp_path / "out")
        assert code == 2
        assert "formats are compared with floating weights" in err.splitlines()[-1]
