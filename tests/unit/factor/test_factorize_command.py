"""griffin-jax factorize, and factored models in griffin-jax eval."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import griffin_jax as gj
from griffin_jax.cli.main import main
from griffin_jax.factor.training import load_curve

PASSAGES = ["The river has three bridges. ", "To bake bread without a scale, take a bowl. "]


@pytest.fixture(scope="module")
def folder(primed, tmp_path_factory):
    """A dense model and texts."""
    folder = tmp_path_factory.mktemp("factored")
    gj.save(primed.llm.model, folder / "dense", primed.llm.tokenizer)
    lines = [json.dumps({"text": text * 20}) + "\n" for text in PASSAGES]
    (folder / "texts.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def made(folder):
    """The folder with a factored model in it, whose training is as short as can be."""
    arguments = [
        "factorize", str(folder / "small"), "--model", str(folder / "dense"), "--text", str(folder / "texts.jsonl"),
        "--length", "16", "--batch", "2", "--grouping", "coactivation", "--router-steps", "3", "--steps", "2",
        "--warmup", "1", "--plot", str(folder / "curve.png"),
    ]  # fmt: skip
    assert main(arguments) == 0
    return folder


@pytest.mark.slow
def test_what_it_writes_is_a_model(made):
    llm = gj.load(made / "small")
    routing = llm.config.routing
    assert (routing.experts, routing.active, routing.width * 4) == (4, 2, llm.config.ff_width)
    assert len(llm.generate("The river", max_new_tokens=2).tokens[0]) <= 2
    stages = [line["stage"] for line in load_curve(made / "small.training" / "curve.jsonl")]
    assert stages == ["routers"] * 3 + ["together"] * 2
    assert (made / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_it_is_compared_with_the_dense_model(made, capsys, monkeypatch):
    """On the same tokens: its rows are those of the table, and all experts are the dense model."""
    arguments = [
        "eval", "divergence", str(made / "texts.jsonl"), "--model", str(made / "dense"), "--prompt-tokens", "24",
        "--new-tokens", "8", "--batch", "2", "--factored", str(made / "small"), "--inside", "0.5",
        "--oracle-routing", "joint", "--no-baselines", "--output", str(made / "eval"), "--json",
    ]  # fmt: skip
    assert main(arguments) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert [entry["method"] for entry in figures[:5]] == ["dense", "topk", "small", "small+topk", "small, oracle joint"]
    densities = [entry["density"] for entry in figures[:5]]
    np.testing.assert_allclose(densities, [1, 0.5, 0.5, 0.25, 0.5])
    assert all(np.isfinite(entry["kl"]["value"]) for entry in figures)
    assert figures[2]["kl"]["value"] > 0
    shutil.copytree(made / "small", made / "topk")
    (arguments[arguments.index("--factored") + 1], arguments[arguments.index("--output") + 1]) = "topk", "other"
    monkeypatch.chdir(made)
    assert main(arguments) == 2
    assert "two rows of the table would be called 'topk 0.5'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--experts", "7"], "7 experts cannot share 48 neurons evenly"),
        (["--active", "5"], "active must be a whole number from 1 to the 4 experts, got 5"),
        (["--grouping", "colour"], "invalid choice: 'colour'"),
        (["--steps", "2", "--weights", "int8", "--warmup", "1"], "only floating weights are trained: give --steps 0"),
        (["--length", "100000"], "--length 100000 is more than the context"),
        (["--text", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--save-every", "0"], "--save-every must be at least 1"),
    ],
)
def test_errors_are_one_line(folder, more, message, capsys):
    base = ["factorize", str(folder / "other"), "--model", str(folder / "dense"), "--text", str(folder / "texts.jsonl")]
    try:
        code = main([*base, *more])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not (folder / "other").exists()


def test_other_models_are_not_compared(folder, capsys):
    arguments = ["eval", "divergence", str(folder / "texts.jsonl"), "--model", str(folder / "dense"), "--output"]
    arguments += [str(folder / "x"), "--prompt-tokens", "24", "--new-tokens", "8"]
    assert main([*arguments, "--factored", str(folder / "dense")]) == 2
    assert "is not divided into experts" in capsys.readouterr().err
