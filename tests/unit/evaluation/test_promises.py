"""`griffin-jax eval promise`: figures follow from divergences, which are those of trials and answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import PASSAGES
from reference import assert_close

from griffin_jax.cli.main import main
from griffin_jax.evaluation import promise
from griffin_jax.evaluation.grid import grid
from griffin_jax.evaluation.journal import FILE

LONG = [" ".join([*PASSAGES[at:], *PASSAGES[:at]]) for at in range(3)]


def run(capsys, long, folder, *arguments: object) -> tuple[int, str, str]:
    for name, texts in (("a.jsonl", LONG[:2]), ("b.jsonl", [*LONG[2:], "short"])):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    fixed = ["eval", "promise", folder / "a.jsonl", folder / "b.jsonl", "--model", long.folder, "--output"]
    code = main([*map(str, [*fixed, folder / "out", "--new-tokens", 10, "--batch", 2, *arguments])])
    return code, *capsys.readouterr()


@pytest.mark.thorough
def test_command(long, tmp_path, capsys):
    options = ["--prompt-tokens", 260, "--max-divergence", "1e-6,0.5,1e3", "--plot", tmp_path / "p.png"]
    code, out, err = run(capsys, long, tmp_path, *options)
    assert code == 0
    assert "shorter than 260 + 10 tokens: b.jsonl, line 2" in err
    assert "with its Wilson interval" in out
    assert (tmp_path / "p.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["figures"]
    assert [(entry["most"], entry["kind"], entry["texts"]) for entry in figures[:3]] == [
        (1e-6, "a.jsonl", 2), (1e-6, "b.jsonl", 1), (1e-6, "all texts", 3),
    ]  # fmt: skip
    tight, loose = (next(e for e in figures if (e["most"], e["kind"]) == (most, "all texts")) for most in (1e-6, 1e3))
    assert (tight["dense"], tight["density"]["value"], tight["own"]["value"], tight["own_holds"]["value"]) == (
        1,
        1,
        0,
        1,
    )
    assert (loose["dense"], loose["density"]["value"], loose["real_holds"]["value"]) == (0, 0.5, 1)
    # Of the least density, whatever a trial says, all figures are the same.
    same = next(e for e in figures if (e["most"], e["kind"]) == (1e3, "all texts at 0.5"))
    assert same | {"kind": "all texts"} == loose
    # The Wilson interval of 3 in 3.
    assert loose["real_holds"]["low"] == pytest.approx(3 / (3 + 1.959964**2), abs=1e-4)

    lines = [json.loads(line) for line in (tmp_path / "out" / FILE).read_text().splitlines()[1:]]
    scores = {line["text"]: line["scores"] for line in lines}
    variants = grid(["topk"], [0.5, 0.65, 0.8, 0.9], ())
    kls = [s["real"]["topk 0.5"]["kl"][0] / s["real"]["tokens"][0] for s in scores.values()]
    assert loose["real"]["value"] == pytest.approx(np.mean(kls))
    for index, text in enumerate(LONG):
        name = f"{'ab'[index // 2]}.jsonl, line {index % 2 + 1}"
        tokens = long.llm.tokenizer.encode(text)[:260]
        for most in (0.2, 1e3):
            expected = long.llm.generate([tokens], max_divergence=most, max_new_tokens=1).promised
            found = promise.promised(scores[name], variants[1:], most)
            assert (found.density, [*found.tried]) == (expected.density, [*expected.tried])
            for density, outcome in found.tried.items():
                assert_close(np.asarray(outcome.bound), np.asarray(expected.tried[density].bound))


@pytest.mark.slow
def test_densities_of_bytes(long, tmp_path, capsys):
    options = ["--prompt-tokens", 260, "--max-divergence", "1e3", "--mixed-weights", "int4:16", "--density", 0.8]
    code, _, err = run(capsys, long, tmp_path, *options)
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "out" / FILE).read_text().splitlines()[1:]]
    scores = {line["text"]: line["scores"] for line in lines}
    variants = grid(["topk"], [0.8, 0.9], ())
    for name, text in zip(scores, LONG, strict=True):
        tokens = long.llm.tokenizer.encode(text)[:260]
        expected = long.llm.generate(
            [tokens], max_divergence=1e3, density=0.8, mixed_weights="int4:16", max_new_tokens=10
        )
        found = promise.promised(scores[name], variants[1:], 1e3)
        assert found.density == expected.promised.density == 0.8
        for density, outcome in found.tried.items():
            # These are hundredths of what pruning loses, and logarithms in float32 are known to 1e-6.
            bound = expected.promised.tried[density].bound
            np.testing.assert_allclose(outcome.bound, bound, rtol=1e-5, atol=1e-6)
        kl = [scores[name]["real"][f"topk {at}"]["kl"][0] for at in (0.8, 0.9)]
        assert 0 < kl[1] < kl[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixed-weights", "int4@0.5"], "give them without a part, as int4"),
        (["--mixed-weights", "int4:24"], "groups of 24 do not divide rows of 32 weights"),
        (["--max-divergence", "0"], "max_divergence must be above 0"),
        (["--margin", "-1"], "--margin must be at least 0"),
        (["--density", "1"], "--density 1 is the dense model"),
        (["--density", "0.5,0.25"], "--density is the least one that may be taken"),
        (["--prompt-tokens", "255"], "too short for a trial: --prompt-tokens 256 or more"),
    ],
)
def test_refused(long, tmp_path, capsys, options, message):
    code, _, err = run(capsys, long, tmp_path, *options)
    assert code == 2
    assert message in err.splitlines()[-1]
