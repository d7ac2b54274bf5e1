"""The command, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from reference import tiny_tokenizer

import griffin_jax as gj
from griffin_jax.analysis.experts import figures, report
from griffin_jax.cli.main import main
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig, Routing
from griffin_jax.text.tokenizer import Tokenizer

CONFIG = ModelConfig(
    family="mixtral", vocab_size=300, width=16, ff_width=24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
    max_positions=128,
)  # fmt: skip
WORDS = "The keeper writes down the weather four times a day, and the book is older than the lamp. "
TEXTS = [WORDS[shift:] * 2 for shift in (0, 20, 40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Two models with a tokenizer, one with routers, which one of its layers has not, and one without."""
    root = tmp_path_factory.mktemp("models")
    (root / "tokenizer").mkdir()
    tiny_tokenizer(root / "tokenizer", TEXTS, 280)
    tokenizer = Tokenizer.from_folder(root / "tokenizer")
    routing = Routing(3, 2, 8, shared_width=4, router_bias=True, dense_layers=(1,))
    configs = {"routed": dataclasses.replace(CONFIG, num_layers=3, routing=routing), "dense": CONFIG}
    for name, config in configs.items():
        gj.save(random_model(config, seed=1), root / name, tokenizer)
    return {name: str(root / name) for name in configs}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS, "too short"]))
    return str(file)


FEW = ["--tokens", "12", "--neurons", "4", "--pairs", "2", "--batch", "2", "--no-compilation-cache"]


@pytest.mark.slow
def test_a_model_with_routers(folders, file, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["analyze", folders["routed"], file, "--output", str(output), "--json", *FEW]) == 0
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert results == json.loads((output / "analysis.json").read_text())
    assert "shorter than 12 tokens: texts.jsonl, line 4" in err
    assert (results["kind"], results["used"], results["left_out"]["count"]) == ("routed", 3, 1)
    assert results["weights"]["layers"] == results["texts"]["layers"] == [0, 2]
    assert list(results["nulls"]) == [report.RANDOM_WEIGHTS]
    assert results["weights_null"]["gate"].keys() == results["weights"]["gate"].keys()
    assert {row["claim"] for row in results["evidence"]} == set(results["verdicts"])
    for claim in results["verdicts"]:
        assert claim in out

    page = (output / "report.html").read_text()
    for key in ("D1", "D2", "D3", "D4", "D5", "D6", "D7", "D8", "GRIFFIN", "D9"):
        assert f'id="{key}"' in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page.count("data:image/png;base64,") == len(list(output.glob("*.png"))) > 15
    assert f"{results['texts']['numbers']['similarity']['mean']['value']:.3f}" in page
    with np.load(output / "analysis.npz") as arrays:
        assert arrays["gate similarity"].shape == arrays["outputs similarity"].shape == (2, 3, 3)
        mean = arrays["down similarity"][1][np.tril_indices(3, -1)].mean()
        assert mean == pytest.approx(results["weights"]["down"]["mean_similarity"][1])
        assert arrays["outputs chosen"].shape == (2, 12, 3)
        assert arrays["outputs ranks"].sum() == 2 * 3 * 12 * 3


def test_weights_alone_do_not_load_the_model(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("griffin_jax.cli.options.load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(report, "draw", lambda *_: {})
    arguments = ["analyze", folders["routed"], "--output", str(tmp_path / "out"), "--layers", "2", *FEW]
    assert main(arguments) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert results["texts"] is None
    assert results["weights"]["layers"] == [2]
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="D4"' in page
    assert 'id="D5"' not in page


@pytest.mark.thorough
def test_a_model_without_routers(folders, file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "_figures_of_weights", lambda *_: pytest.fail("it has no experts"))
    output = tmp_path / "out"
    assert main(["analyze", folders["dense"], file, "--output", str(output), "--sets", "2", *FEW]) == 0
    results = json.loads((output / "analysis.json").read_text())
    assert results["kind"] == "sets"
    assert results["weights"] is None
    assert results["nulls"].keys() == {report.RANDOM_SETS, report.RANDOM_WEIGHTS}
    assert results["texts"]["chance"]["largest_chosen"] == 0.5
    page = (output / "report.html").read_text()
    assert "neuron sets that GRIFFIN keeps of the first halves of 2 texts" in page
    for key in ("D1", "D8"):
        assert f'id="{key}"' not in page
    with np.load(output / "analysis.npz") as arrays:
        assert arrays["outputs similarity"].shape == (2, 2, 2)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("dense", [], "has no routed experts: what its neurons have in common is a matter of texts; give some"),
        ("routed", ["--layers", "1"], "--layers: layer 1 is none of the layers with routed experts of"),
        ("routed", ["--layers", "a"], "--layers: 'a' is no list of numbers"),
        ("routed", ["--density", "0.05"], "density 0.05 keeps 0 of 8 neurons"),
        ("routed", ["--pairs", "0"], "--pairs must be at least 1, got 0"),
        ("routed", ["--limit", "1"], "--limit must be at least 2, got 1"),
        ("routed", ["FILE", "FILE"], "a file is given twice"),
        ("routed", ["no.txt"], "there is no file no.txt"),
        ("routed", ["FILE", "--tokens", "190"], "190 tokens are more than the model's context of 128"),
        ("routed", ["FILE", "--tokens", "120"], "no text can be used (4 x shorter than 120 tokens)"),
        ("routed", ["FILE", "--output", "no/such"], "--output: there is no folder"),
        ("nothing", [], "there is no model 'nothing'"),
    ],
)
def test_bad_input(folders, file, tmp_path, monkeypatch, capsys, model, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [file if argument == "FILE" else argument for argument in arguments]
    assert main(["analyze", folders.get(model, model), *given]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "analysis").exists()


class TestFigures:
    def test_of_many_layers_some_are_shown(self):
        assert figures.shown_layers(range(5)) == [0, 1, 2, 3, 4]
        shown = figures.shown_layers(range(61), 32)
        assert (len(shown), len(set(shown)), shown[0], shown[-1]) == (32, 32, 0, 60)

    def test_no_wider_than_800_pixels(self, rng):
        figure = figures.heat_maps(rng.random((3, 9, 9)), [0, 4, 8], "", own_scale=True)
        assert figure.get_size_inches()[0] * figure.dpi <= 800
        assert figures.png(figure).startswith(b"\x89PNG")

    def test_numbers_for_people(self):
        assert report.interval({"value": 0.12345, "low": 0.1, "high": 0.2}) == "0.123 [0.100, 0.200]"
        assert report.interval({"value": 1234.5, "low": None, "high": None}) == "1,234"
        assert report.interval({"value": None, "low": None, "high": None}) == report.interval(None) == ""
