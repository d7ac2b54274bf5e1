"""The benchmark commands run and add up, and their peers compute what griffin_jax computes. No timing here."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import math
import re
import sys
import types
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_and_slow
from reference import TinyLlama, load_torch, torch_greedy

import griffin_jax as gj
from benchmarks import memory, peers
from benchmarks.__main__ import main
from griffin_jax.bench import report, runner
from griffin_jax.cli import bench
from griffin_jax.cli import main as cli
from griffin_jax.evaluation.front import bytes_per_token
from griffin_jax.evaluation.grid import DENSE, Variant
from griffin_jax.extensions.mixed import MixedFormat
from griffin_jax.generation import jitted
from griffin_jax.model.assembly import random_model
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.named import named
from griffin_jax.model.weights import WeightFormat
from griffin_jax.utils.timing import Stopwatch

FLOAT32 = WeightFormat("float32")


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, list[str], str]:
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    try:
        code = main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> TinyLlama:
    return TinyLlama.build(tmp_path_factory.mktemp("plain"), num_key_value_heads=4)


@pytest.fixture
def torchpeers():
    load_torch()
    return importlib.import_module("benchmarks.torchpeers")


def test_peer_is_the_same_model(plain, torchpeers):
    peer = torchpeers.from_jax(plain.llm.model)
    prompt = [5, 6, 7, 8, 9]
    assert torchpeers.greedy(peer, prompt, 12)[0] == torch_greedy(plain.torch, prompt, 12)


@pytest.mark.parametrize("density", [0.5, 0.25])
def test_published_griffin_is_ours(plain, torchpeers, density):
    prompt = [5, 6, 7, 8, 9, 10, 11]
    with torchpeers.pruned(torchpeers.from_jax(plain.llm.model), density) as model:
        tokens, _, _ = torchpeers.greedy(model, prompt, 12)
    assert tokens == plain.llm.generate([prompt], max_new_tokens=12, density=density, ignore_eos=True).tokens[0]


@pytest.fixture(scope="module")
def measured(plain, tmp_path_factory) -> tuple[list[str], dict]:
    """What a small sweep printed, and its JSON file."""
    load_torch()
    file = tmp_path_factory.mktemp("bench") / "result.json"
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(runner, "BANDWIDTH_BYTES", 1 << 16)
        patch.setattr(runner, "PAUSE", 0.0)
        patch.setattr("sys.argv", [
            "benchmarks", "run", "--model", str(plain.folder), "--lengths", "9+3", "--batch", "1,2", "--density", "0.5",
            "--repeats", "1", "--peers", "--json", "--json-file", str(file),
        ])  # fmt: skip
        assert main() == 0
    return out.getvalue().splitlines(), json.loads(file.read_text())


@pytest.mark.thorough
def test_run_measures_every_system_density_batch_and_sharing(measured):
    _, result = measured
    assert [(r["system"], r["batch"], r["experts"], r["density"]) for r in result["rows"]] == [
        ("griffin_jax", 1, None, 1.0), ("griffin_jax", 1, None, 0.5),
        ("transformers", 1, None, 1.0), ("published GRIFFIN", 1, None, 0.5),
        ("griffin_jax", 2, None, 1.0), ("griffin_jax", 2, "shared", 0.5), ("griffin_jax", 2, "per-sequence", 0.5),
    ]  # fmt: skip
    assert [peer["name"] for peer in result["peers"]] == ["transformers", "published GRIFFIN"]
    assert "torch" in result["peers"][0]["version"]
    assert list(result["skipped"]) == ["llama.cpp F32", "llama.cpp"]


def test_run_prints_finite_numbers_in_120_columns(measured):
    out, result = measured
    assert json.loads(out[-1]) == result
    assert max(map(len, out[:-1])) <= 120
    numbers = [v for row in result["rows"] for v in row.values() if isinstance(v, float | int)]
    assert all(math.isfinite(number) for number in [*numbers, result["bandwidth"]])
    shown = [line for line in out if line.startswith(("griffin_jax ", "transformers ", "published "))]
    assert not any(word in line for line in shown for word in ("nan", "inf", "None"))
    assert sum(line.startswith("griffin_jax per-sequence") for line in out) == 2
    assert any("llama.cpp F32 is skipped: " in line for line in out)


def test_bytes_are_the_models(measured):
    """Weights in use and the cache as it is allocated; of an untied model's embedding only rows are read."""
    rows = measured[1]["rows"]
    layer = 4 * 32 * 32 + 3 * 48 * 32 + 2 * 32
    weights, half = 2 * layer + 32 + 101 * 32, 2 * 24 * 3 * 32
    token, slots = 2 * 2 * 4 * 8, 16 + 16
    assert [row["weights_bytes"] for row in rows] == [
        4 * (weights + 32), 4 * (weights - half + 32), 4 * (weights + 32), 4 * (weights - half + 32),
        4 * (weights + 64), 4 * (weights - half + 64), 4 * (weights + 64),
    ]  # fmt: skip
    # Two sequences that each keep half read all rows once, and copy none.
    assert [row["masked"] for row in rows] == [*[False] * 6, True]
    # A peer's grows with the text: half of the answer is there on average.
    assert [row["cache_bytes"] // (4 * token) for row in rows] == [slots, slots, 10, 10, *[2 * slots] * 3]
    assert [row["prune_bytes"] for row in rows] == [
        None, 2 * 4 * half, None, None, None, 2 * 4 * half, None,
    ]  # fmt: skip
    assert all(row["step_bytes"] == row["weights_bytes"] + row["cache_bytes"] for row in rows)


def test_weights_are_those_of_the_arrays(plain):
    llm = plain.llm
    options = bench_options("--model", str(plain.folder), "--lengths", "9+3", "--density", "0.5")
    plan = bench.check(options)
    experts = llm.experts([[5, 6, 7]], density=0.5)
    for model, density in ((llm.model, 1.0), (gj.prune(llm.model, experts), 0.5)):
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        assert plan.sizes(plan.cases[0]).weights(plan.kept(runner.Variant(density))) == held


def test_ratios_are_those_of_the_rows(measured):
    result = measured[1]
    dense = {("griffin_jax", 1): 0, ("published GRIFFIN", 1): 2, ("transformers", 1): 2, ("griffin_jax", 2): 4}
    for row in result["rows"]:
        base = result["rows"][dense[row["system"], row["batch"]]]
        assert row["speedup"] == pytest.approx(base["decode_ms"] / row["decode_ms"])
        assert row["speedup_ceiling"] == pytest.approx(base["step_bytes"] / row["step_bytes"])
        assert row["fraction_of_speedup"] == pytest.approx(row["speedup"] / row["speedup_ceiling"])
        assert row["ceiling_ms"] == pytest.approx(row["step_bytes"] / result["bandwidth"] * 1e3)
        assert row["fraction_of_ceiling"] == pytest.approx(row["ceiling_ms"] / row["decode_ms"])
        assert row["read_speed"] == pytest.approx(row["step_bytes"] / row["decode_ms"] * 1e3)
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 1e3 / row["decode_ms"])
        assert row["total_ms"] >= row["first_token_ms"] >= row["prefill_ms"]
        low, high = row["decode_ms_range"]
        assert low <= row["decode_ms"] <= high


@pytest.fixture(scope="module")
def prior(plain, tmp_path_factory) -> Path:
    """A file with some prior of the model, whose budgets are not uniform."""
    draw, layers = np.random.default_rng(1), range(2)
    squares, weights = ([jnp.asarray(draw.random(48) * 4**n, jnp.float32) for n in layers] for _ in range(2))
    rows = [jnp.asarray(draw.standard_normal((8, 48)) / 7, jnp.float16) for _ in layers]
    model = fingerprint(plain.llm.model)
    file = tmp_path_factory.mktemp("prior") / "some.prior"
    gj.Prior(tuple(squares), tuple(rows), model, 8, tuple(weights), 1.0, "").save(file)
    return file


@pytest.fixture(scope="module")
def both(plain, prior) -> tuple[list[str], dict]:
    """What a sweep over both qualities printed."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(runner, "BANDWIDTH_BYTES", 1 << 16)
        assert cli.main([
            "bench", "--model", str(plain.folder), "--lengths", "9+3", "--batch", "1,2", "--density", "0.5",
            "--quality", "best,griffin", "--prior", str(prior), "--repeats", "1", "--json",
        ]) == 0  # fmt: skip
    lines = out.getvalue().splitlines()
    return lines, json.loads(lines[-1])


@pytest.mark.slow
def test_best_quality_stands_beside_plain_griffin(both):
    lines, result = both
    assert [(r["batch"], r["quality"], r["experts"], r["density"]) for r in result["rows"]] == [
        (1, None, None, 1.0), (1, None, None, 0.5), (1, "best", None, 0.5), (2, None, None, 1.0),
        (2, None, "shared", 0.5), (2, None, "per-sequence", 0.5), (2, "best", "shared", 0.5),
        (2, "best", "per-sequence", 0.5),
    ]  # fmt: skip
    for row in (row for row in result["rows"] if row["quality"]):
        plain = next(
            r for r in result["rows"]
            if not r["quality"] and all(r[n] == row[n] for n in ("batch", "experts", "density"))
        )  # fmt: skip
        assert sum(row["kept"]) == sum(plain["kept"])
        assert row["kept"] != plain["kept"]
        assert row["step_bytes"] == plain["step_bytes"]
        assert row["prune_bytes"] is None
        assert row["overhead_share"] > 0
    assert max(map(len, lines[:-1])) <= 120
    assert sum(line.startswith("best per-sequence ") for line in lines) == 2
    assert re.search(r"select and prune, of prefill: griffin_jax: .* at 0.5; best: .*% at 0.5", " ".join(lines))
    assert list(report._lines(result["rows"]))[:2] == ["griffin_jax, batch 1", "griffin_jax best, batch 1"]


@pytest.mark.slow
def test_best_quality_is_compared_with_its_own(both):
    _, result = both
    before = json.loads(json.dumps(result))
    for row in before["rows"]:
        row["decode_ms"] *= 2 if row["quality"] else 1
        # As versions wrote it that did not have them.
        if not row["quality"]:
            del row["quality"]
    rows = [r.split() for r in report.comparison(result, before, "x").splitlines() if r.startswith("best ")]
    assert len(rows) == 3
    assert {row[-7] for row in rows} == {"0.50"}


@pytest.mark.slow
def test_best_quality_prunes_as_generate_does(plain, prior):
    options = ("--lengths", "9+3", "--quality", "best", "--density", "0.5", "--prior", str(prior))
    plan = bench.check(bench_options("--model", str(plain.folder), *options))
    variant = runner.Variant(0.5, quality="best")
    tokens = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    rows = plan.rows(plan.cases[0], variant)
    prefilled = jitted.prefill(plain.llm.model, *gj.pad([tokens], 16), max_new_tokens=3, rows=rows)
    pruned = runner._Subject(plain.llm.model, None).prune(plain.llm.model, prefilled, plan.pruner(variant), Stopwatch())
    expected = plain.llm.generate([tokens], max_new_tokens=3, quality="best", prior=plan.prior, ignore_eos=True)
    assert pruned.neurons == expected.kept
    answer = jitted.decode(pruned, jitted.init_decode(prefilled), 3)
    assert np.asarray(answer.tokens).tolist() == expected.tokens


def test_random_weights_have_a_random_prior_of_the_usual_size():
    options = ("--model", "Llama-2-7B", "--layers", "2", "--density", "0.5")
    plan = bench.check(bench_options(*options, "--quality", "griffin,best"))
    assert plan.prior is not None
    assert [rows.shape for rows in plan.prior.rows] == [(384, 11008)] * 2
    best = plan.kept(runner.Variant(0.5, quality="best"))
    assert best is not None
    assert sum(best) == 11008
    assert plan.kept(runner.Variant(0.5)) == (5504, 5504)
    assert plan.rows(runner.Case(9, 3, 3), runner.Variant(0.5, True, "best")) == 86


@pytest.mark.parametrize(("arguments", "message"), [
    (("--quality", "better"), "quality must be one of griffin, best, got 'better'"),
    (("--prior", "some"), "--prior is for --quality best"),
    (("--quality", "best", "--in-place", "--density", "0.5"), "--in-place moves the model's own rows"),
    (("--quality", "best"), "there is no file"),
    (("--quality", "best", "--model", "Llama-2-7B", "--prior", "x"), "random weights have a random prior"),
])  # fmt: skip
def test_impossible_qualities_are_refused(plain, capsys, arguments, message):
    model = () if "--model" in arguments else ("--model", str(plain.folder))
    assert cli.main(["bench", "--lengths", "9+3", *model, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_prior_of_another_model_is_refused(tiny, prior, capsys):
    options = ("--lengths", "9+3", "--quality", "best", "--prior", str(prior))
    assert cli.main(["bench", "--model", str(tiny.folder), *options]) == 2
    assert "this prior is of model" in capsys.readouterr().err


def bench_options(*arguments: str):
    return cli.parser_of("bench").parse_args(arguments)


@pytest.mark.parametrize("given", [("0.75,", "0.5"), ("0.75, 0.5",), ("0.75", "0.5"), ("0.75,0.5",)], ids=" ".join)
def test_densities_are_separated_by_commas_or_spaces(given):
    options = bench_options("--model", "SmolLM2-135M", "--lengths", "9+3", "--density", *given)
    assert bench.check(options).densities == (1.0, 0.75, 0.5)


def test_medians_of_made_up_samples():
    options = bench_options("--model", "SmolLM2-135M", "--lengths", "100+11", "--batch", "2", "--density", "0.5")
    plan = bench.check(options)
    dense = runner.Measured("griffin_jax", "griffin_jax", runner.Variant(), compile=3.0)
    pruned = runner.Measured("griffin_jax", "griffin_jax", runner.Variant(0.5, True), compile=4.0)
    for second in (1.0, 7.0, 2.0):
        dense.samples.append({"prefill": second, "init_decode": 0.5, "decode": 10 * second})
        pruned.samples.append({
            "prefill": 1.25 * second, "prefill_without": second, "select": 0.5, "prune": 0.25, "init_decode": 0.5,
            "decode": 5 * second,
        })  # fmt: skip
    full, half = runner.summarise(plan, plan.cases[0], [dense, pruned], bandwidth=1e9)
    assert full["prefill_ms"] == 2000
    assert full["statistic_share"] is full["select_ms"] is full["prune_speed"] is None
    assert half["statistic_share"] == pytest.approx(0.25)
    assert half["overhead_share"] == pytest.approx(0.75 / 2.5)
    assert half["decode_ms"] == pytest.approx(1000)
    assert half["decode_ms_range"] == pytest.approx([500, 3500])
    assert half["tokens_per_second"] == pytest.approx(2)
    assert half["first_token_ms"] == pytest.approx(3750)
    assert half["total_ms"] == pytest.approx(13750)
    assert half["speedup"] == pytest.approx(2)
    assert half["prune_speed"] == pytest.approx(2 * 4 * 30 * 768 * 3 * 576 / 0.25)
    assert half["prune_fraction"] == pytest.approx(half["prune_speed"] / 1e9)
    assert half["slots"] == 128 + 16


@pytest.mark.parametrize("formats", ["int8,float32", "float32,int8"])
def test_peers_in_pytorch_read_the_model_in_float32(formats):
    options = ("--model", "SmolLM2-135M", "--lengths", "100+11", "--density", "0.5", "--weights", formats)
    plan = bench.check(bench_options(*options))
    peer = runner.Peer("torch", "2", prunes=True, baseline="torch", measure=lambda *_: {})
    ours, theirs = (runner.Variant(0.5, weights=weights) for weights in (FLOAT32, peer.format))
    sample = {"prefill": 1.0, "decode": 1.0}
    rows = [
        runner.Measured("griffin_jax", "griffin_jax", ours, [sample]),
        runner.Measured("torch", "torch", theirs, [sample]),
    ]
    mine, other = runner.summarise(plan, plan.cases[0], rows, 1e9, {"torch": peer})
    assert other["weights_bytes"] == mine["weights_bytes"]
    assert dataclasses.replace(peer, weights_bytes=1).format is None


def test_statistic_share_weighs_both_orders_alike():
    samples = [{"prefill": ratio, "prefill_without": 1.0} for ratio in (1.2, 0.9, 1.2)]
    assert runner._statistic_share(samples) == pytest.approx((1.2 * 0.9) ** 0.5 - 1)
    assert runner._statistic_share(samples[:1]) == pytest.approx(0.2)


def test_compare_with_an_earlier_run(measured, tmp_path):
    out, result = measured
    file = tmp_path / "printed.txt"
    file.write_text("\n".join(out))
    before = report.read(file)
    same = report.comparison(result, before, file).splitlines()
    assert not any(line.startswith("warning") for line in same)
    assert max(map(len, same[1:])) <= 120
    assert sum(line.startswith("griffin_jax per-sequence") for line in same) == 1
    before |= {"dtype": "bfloat16", "threads": 999, "model": "another"}
    before["rows"][0]["decode_ms"] *= 4
    before["rows"][1]["new"] = 5
    del before["rows"][2]
    text = report.comparison(result, before, file)
    assert "warning: dtype was bfloat16, is float32" in text
    assert "warning: threads was 999" in text
    assert "warning: model was another" in text
    assert "warning: lengths of griffin_jax at 0.5, 9+3, batch 1 were 9+5" in text
    assert "warning: transformers at 1, 9+3, batch 1 was not measured before" in text
    row = next(line for line in text.splitlines() if line.startswith("griffin_jax "))
    assert row.split()[2:] == ["1.00", "1.00", "-", "-", "1.00", "0.25", *["1.00"] * 6]


def test_plot_is_a_png(measured, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(measured[1], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_lines_of_a_plot_begin_at_the_dense_row(measured):
    lines = report._lines(measured[1]["rows"])
    assert list(lines) == [
        "griffin_jax, batch 1", "published GRIFFIN, batch 1", "griffin_jax, batch 2 shared",
        "griffin_jax, batch 2 per-sequence",
    ]  # fmt: skip
    assert all([row["density"] for row in line] == [1.0, 0.5] for line in lines.values())


def test_plot_without_matplotlib_is_refused_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run(monkeypatch, capsys, "run", "--plot", str(tmp_path / "x.png"))
    assert (code, "pip install 'griffin-jax[plot]'" in err) == (2, True)


def test_bench_is_a_command_of_the_package(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--lengths P+N" in shown
    assert "A step gives one token to every sequence" in " ".join(shown.split())
    for command in ("run", "speed"):
        code, out, _ = run(monkeypatch, capsys, command, "--help")
        assert code == 0
        assert any("--lengths P+N" in line for line in out)
    assert cli.main(["bench", "--peers"]) == 2
    assert "--peers needs a checkout of the project" in capsys.readouterr().err


def test_too_little_memory_is_an_error_before_anything_is_allocated(monkeypatch, capsys):
    monkeypatch.setattr(runner, "free_memory", lambda: 10**9)
    monkeypatch.setattr(bench, "random_model", lambda *_: pytest.fail("allocated"))
    code, _, err = run(monkeypatch, capsys, "run", "--model", "Llama-2-7B", "--dtype", "bfloat16", "--layers", "16")
    assert code == 2
    assert "(weights 7.0, kept neurons 3.2, " in err
    assert "1.0 GB are free; take" in err


def test_needed_memory_counts_the_largest_case(monkeypatch):
    monkeypatch.setattr(runner, "free_memory", lambda: None)
    arguments = ("--model", "Llama-2-7B", "--dtype", "bfloat16", "--lengths", "100+20,2000+40", "--batch", "1,8")
    shared, own = (
        runner.needed_memory(bench.check(bench_options(*arguments, "--experts", experts))) for experts in runner.EXPERTS
    )
    assert shared["peers"] == 0
    assert shared["cache"] == 2 * 2 * 32 * 8 * 32 * 128 * (2048 + 48) * 2
    assert shared["kept neurons"] == 32 * 8256 * 3 * 4096 * 2
    # Eight sequences that keep a quarter or more read all neurons, with masks.
    assert "kept neurons" not in own
    assert own["masks"] == 8 * 32 * 11008
    few = bench.check(bench_options(*arguments, "--experts", "per-sequence", "--density", "0.1"))
    assert runner.needed_memory(few)["kept neurons"] == 8 * 32 * 1100 * 3 * 4096 * 2


@pytest.mark.parametrize("name", ["SmolLM2-135M", "OPT-6.7B", "Gemma-7B"])
def test_random_weights_are_scaled_and_finite(name):
    sizes = {"width": 64, "ff_width": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 300}
    config = dataclasses.replace(named(name, 2), max_positions=64, **sizes)
    model = random_model(config, jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"bfloat16"}
    first, second = (layer.ff for layer in model.layers)
    assert float(jnp.std(first.gate_up[...].astype(jnp.float32))) == pytest.approx(64**-0.5, rel=0.05)
    assert float(jnp.std(first.down[...].astype(jnp.float32))) == pytest.approx(96**-0.5, rel=0.05)
    assert abs(float(jnp.mean(first.down[...].astype(jnp.float32)))) < 0.01
    assert not np.array_equal(first.down[...], second.down[...])
    prefilled = jitted.prefill(model, np.arange(16, dtype=np.int32)[None], np.array([16], np.int32), max_new_tokens=0)
    assert np.isfinite(prefilled.logits).all()
    assert float(jnp.std(prefilled.logits)) > 0


def test_absent_peers_are_skipped_with_a_reason(plain, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with contextlib.ExitStack() as stack:
        found, skipped = peers.find({FLOAT32: plain.llm.model}, "x", list(runner.PEERS), stack)
    assert found == []
    assert skipped == {
        name: f"{'llama-cpp-python' if 'llama' in name else 'torch'} is not installed" for name in runner.PEERS
    }


def test_peers_of_other_formats_and_families_are_skipped(tiny):
    load_torch()
    config, names = dataclasses.replace(tiny.llm.config, attention_bias=True), ["transformers", "published GRIFFIN"]
    with contextlib.ExitStack() as stack:
        half = {WeightFormat("bfloat16"): random_model(config, jnp.bfloat16)}
        _, skipped = peers.find(half, "x", names, stack)
        assert list(skipped) == names
        assert all("a model in float32, which is not measured" in reason for reason in skipped.values())
        _, skipped = peers.find({FLOAT32: random_model(config)}, "x", names, stack)
    assert skipped["transformers"] == "the PyTorch peer takes models without biases"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((), ()),
        (("--peers",), ("transformers", "published GRIFFIN", "llama.cpp F32", "llama.cpp")),
        (("--peers", "--weights", "int8,bfloat16"), ("llama.cpp F16", "llama.cpp Q8_0", "llama.cpp")),
        (("--peers", "llama.cpp Q8_0, transformers", "--weights", "int4"), ("llama.cpp Q8_0", "transformers")),
    ],
)
def test_peers_are_those_of_the_formats_or_those_that_are_named(arguments, names):
    plan = bench.check(bench_options("--model", "SmolLM2-135M", *arguments))
    assert plan.peers == names
    held = runner.needed_memory(plan)["peers"]
    assert held == int(sum(runner.PEERS[name] for name in names) * plan.sizes(plan.cases[0]).parameters)


@pytest.mark.thorough
def test_several_formats_are_measured_in_one_run(plain, monkeypatch, capsys):
    monkeypatch.setattr(runner, "BANDWIDTH_BYTES", 1 << 16)
    options = ("--lengths", "9+3", "--density", "0.5", "--repeats", "1", "--weights", "float32,int8:16", "--json")
    assert cli.main(["bench", "--model", str(plain.folder), *options]) == 0
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert max(map(len, out[:-1])) <= 120
    rows = result["rows"]
    assert [(row["format"], row["density"]) for row in rows] == [
        ("float32", 1.0), ("float32", 0.5), ("int8:16", 1.0), ("int8:16", 0.5)
    ]  # fmt: skip
    assert sum(line.startswith("griffin_jax int8:16 ") for line in out) == 4
    assert "weights float32,int8:16 in float32" in out[0]
    # Matrices are a byte and an eighth for each number where they were four.
    layer = 4 * 32 * 32 + 3 * 48 * 32
    matrices, vectors = 2 * layer + 101 * 32, (2 * 2 + 1) * 32
    read = [4 * (matrices + vectors + 32), matrices * 9 // 8 + 4 * vectors + 32 * 9 // 8]
    assert [row["weights_bytes"] for row in rows[::2]] == read
    # All rows are compared with the dense one in the first format.
    assert [row["speedup_ceiling"] for row in rows] == [rows[0]["step_bytes"] / row["step_bytes"] for row in rows]
    assert all(row["speedup"] == pytest.approx(rows[0]["decode_ms"] / row["decode_ms"]) for row in rows)


MIXED = ("--lengths", "9+3", "--weights", "int8", "--mixed-weights", "int4:16")


@pytest.mark.slow
def test_rows_in_two_formats(plain, monkeypatch, capsys):
    monkeypatch.setattr(runner, "BANDWIDTH_BYTES", 1 << 16)
    options = (*MIXED, "--density", "0.75,0.5", "--repeats", "1", "--batch", "1,5", "--json")
    assert cli.main(["bench", "--model", str(plain.folder), *options, "--experts", "per-sequence"]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = json.loads(out[-1])["rows"]
    mixed = MixedFormat.parse("int8+int4:16")
    expected = [(None, 1), (None, 0.75), (None, 0.5), (str(mixed), 0.75), (str(mixed), 0.5)]
    assert [(row["format"], row["density"]) for row in rows] == expected * 2
    config = plain.llm.config
    for row in rows[:5]:
        variant = Variant("topk" if row["density"] < 1 else DENSE, row["density"])
        weights = MixedFormat.parse(row["format"] or "int8")
        read = bytes_per_token(config, np.dtype(np.float32), weights, row["slots"], variant)
        assert row["step_bytes"] == read
        assert not row["masked"]
    # A neuron takes 3 * 32 bytes in int8 and two scales in float32, or 5 bits for each number. Where all are read in 4
    # bits, there is nothing to copy; where some are precise, five sequences read all rows in both formats instead.
    fine, few, layers = 3 * 32 + 2 * 4, 3 * 32 * 5 // 8, 2
    rest = rows[0]["weights_bytes"] - layers * 48 * fine
    assert rows[3]["kept"] == [48, 48]
    assert rows[4]["kept"] == [38, 38]
    assert rows[3]["prune_bytes"] == 2 * layers * (15 * fine + 33 * few)
    assert [row["masked"] for row in rows[5:]] == [False, True, True, True, True]
    embeddings = rows[5]["weights_bytes"] - rows[0]["weights_bytes"]
    assert rows[8]["weights_bytes"] == rest + layers * 48 * (fine + few) + embeddings
    assert rows[9]["weights_bytes"] == rest + layers * 48 * few + embeddings


def test_lines_of_two_formats_begin_at_the_dense_row(plain):
    row = {"system": "a", "baseline": "a", "batch": 1, "quality": None, "experts": None}
    for own in (None, "int8"):
        dense = row | {"density": 1, "format": own}
        mixed = row | {"density": 0.5, "format": "int8+int4"}
        assert report._lines([row | {"density": 1, "format": "float32"}, dense, mixed]) == {
            "a int8+int4, batch 1": [dense, mixed]
        }


def test_formats_of_fewer_bits_are_measured_without_the_second_one(plain, monkeypatch, capsys):
    monkeypatch.setattr(runner, "free_memory", lambda: None)
    options = ("--weights", "int8,int4:16", "--density", "0.5", "--mixed-weights", "int4:16", "--lengths", "9+3")
    plan = bench.check(bench_options("--model", str(plain.folder), *options))
    found = [(str(variant.weights), variant.density, variant.mixed) for variant in plan.variants(plan.cases[0])]
    assert found == [
        ("int8", 1, False), ("int8", 0.5, False), ("int8", 0.5, True), ("int4:16", 1, False), ("int4:16", 0.5, False)
    ]  # fmt: skip


def test_needed_memory_holds_the_rows_in_fewer_bits(monkeypatch):
    monkeypatch.setattr(runner, "free_memory", lambda: None)
    arguments = ("--model", "SmolLM2-135M", "--lengths", "9+3", "--weights", "int8", "--density", "0.5")
    found = runner.needed_memory(bench.check(bench_options(*arguments, "--mixed-weights", "int4")))
    # On CPUs a number of 4 bits takes a byte, and twice as much as in a file is reserved for the scales of 32, too.
    assert found["neurons in fewer bits"] == 30 * (1536 * 576 * 3) * (1 + 2 / 16)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--mixed-weights", "int8"), "--mixed-weights int8 has no fewer bits than --weights int8"),
    (("--mixed-weights", "int4:24"), "24"),
    (("--mixed-weights", "int4:16", "--in-place", "--density", "0.5"), "--in-place moves the model's rows"),
    (("--mixed-weights", "int4:16@0.25", "--quality", "best"), "--quality best refits rows"),
    (("--mixed-weights", "int4:16@0.001", "--density", "0.5"), "0.0005"),
])  # fmt: skip
def test_impossible_formats_of_neurons_are_refused(plain, capsys, arguments, message):
    model = ("--model", str(plain.folder), "--lengths", "9+3", "--weights", "int8")
    assert cli.main(["bench", *model, *arguments]) == 2
    assert message in capsys.readouterr().err


DRAFTING = ("--lengths", "9+12", "--density", "0.5", "--weights", "int8", "--speculative", "--draft-weights", "int4")


@pytest.fixture(scope="module")
def drafted(plain) -> tuple[list[str], dict]:
    """What a run with speculative rows printed."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(runner, "BANDWIDTH_BYTES", 1 << 16)
        options = ("--model", str(plain.folder), *DRAFTING, "--batch", "1,2", "--experts", "shared", "--repeats", "1")
        assert cli.main(["bench", *options, "--json"]) == 0
    lines = out.getvalue().splitlines()
    return lines, json.loads(lines[-1])


@pytest.mark.slow
def test_speculative_rows_are_those_of_single_requests(drafted):
    lines, result = drafted
    assert [(row["batch"], row["density"], row["drafts"], row["draft_weights"]) for row in result["rows"]] == [
        (1, 1.0, None, None), (1, 0.5, None, None), (1, 1.0, "auto", "int4"), (1, 0.5, "auto", "int4"),
        (2, 1.0, None, None), (2, 0.5, None, None),
    ]  # fmt: skip
    # A last round of eight drafts may go beyond the answer.
    assert [row["slots"] for row in result["rows"]] == [16 + 24] * 4 + [16 + 16] * 2
    assert max(map(len, lines[:-1])) <= 120
    # The blocks of requests, of decoding and of drafts.
    assert sum(line.startswith("griffin_jax speculative ") for line in lines) == 6
    assert list(report._lines(result["rows"])) == [
        "griffin_jax, batch 1", "griffin_jax speculative, batch 1", "griffin_jax, batch 2 shared",
    ]  # fmt: skip


@pytest.mark.slow
def test_bytes_of_a_token_are_those_of_drafts_and_passes(plain, drafted):
    """As many drafts are accepted as `generate` accepts, and what they read is spread over the answer's tokens."""
    rows = drafted[1]["rows"]
    prompt = np.random.default_rng(0).integers(0, 101, (1, 9)).tolist()
    llm = gj.load(str(plain.folder), weights="int8")
    for dense, row in ((rows[0], rows[2]), (rows[0], rows[3])):
        drafts = {"speculative": True, "draft_weights": "int4"}
        out = llm.generate(prompt, density=row["density"], max_new_tokens=12, ignore_eos=True, **drafts)
        assert out.drafting is not None
        passes, steps, accepted = (
            int(jnp.sum(x)) for x in (out.drafting.passes, out.drafting.steps, out.drafting.accepted)
        )
        assert steps > 0
        assert row["accepted"] == pytest.approx(accepted / steps)
        assert row["tokens_per_pass"] == pytest.approx(11 / passes)
        read = (passes * dense["step_bytes"] + steps * row["draft_bytes"]) / 11
        assert row["step_bytes"] == pytest.approx(read, abs=1)
        assert row["cache_bytes"] == pytest.approx((passes + steps) * dense["cache_bytes"] / 11, abs=1)
        assert row["bytes_share"] == pytest.approx(read / dense["step_bytes"])
        assert row["draft_share"] == pytest.approx(row["draft_bytes"] / dense["step_bytes"])
        assert row["speedup_ceiling"] == pytest.approx(dense["step_bytes"] / row["step_bytes"])
        assert row["speedup"] == pytest.approx(dense["decode_ms"] / row["decode_ms"])
    assert rows[3]["draft_bytes"] < rows[2]["draft_bytes"] < rows[0]["step_bytes"]


@pytest.mark.slow
def test_speculative_rows_are_compared_with_their_own(drafted):
    result = drafted[1]
    before = json.loads(json.dumps(result))
    for row in before["rows"]:
        row["decode_ms"] *= 2 if row["drafts"] else 1
        # As versions wrote it that did not have them.
        if not row["drafts"]:
            del row["drafts"], row["draft_weights"]
    lines = [line.split() for line in report.comparison(result, before, "x").splitlines()]
    assert [line[-7] for line in lines if line[:2] == ["griffin_jax", "speculative"]] == ["0.50", "0.50"]
    assert [line[-7] for line in lines if line[:1] == ["griffin_jax"] and line[1] != "speculative"] == ["1.00"] * 4


@pytest.mark.slow
def test_drafts_of_one_copy_of_the_weights(plain, monkeypatch, capsys):
    monkeypatch.setattr(runner, "BANDWIDTH_BYTES", 1 << 16)
    options = ("--lengths", "9+12", "--density", "0.5", "--repeats", "1", "--in-place", "--speculative", "3", "--json")
    assert cli.main(["bench", "--model", str(plain.folder), *options]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][-1]
    assert (row["drafts"], row["draft_weights"], row["draft_share"] < 1) == (3, None, True)
    prompt = np.random.default_rng(0).integers(0, 101, (1, 9)).tolist()
    out = plain.llm.generate(prompt, density=0.5, max_new_tokens=12, ignore_eos=True, speculative=3)
    assert row["tokens_per_pass"] == pytest.approx(11 / int(out.drafting.passes))


def test_needed_memory_holds_the_drafting_model(monkeypatch):
    monkeypatch.setattr(runner, "free_memory", lambda: None)
    arguments = ("--model", "SmolLM2-135M", *DRAFTING[:6])
    plain, drafts = (runner.needed_memory(bench.check(bench_options(*arguments, *more))) for more in ((), DRAFTING[6:]))
    assert "drafting model" not in plain
    # On CPUs a number of 4 bits takes a byte, and the scales of 32 a float16.
    assert drafts["drafting model"] > 30 * (1536 * 576 * 3) * (1 + 1 / 16)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--draft-weights", "int4"), "draft_weights are for drafts, and nothing is drafted"),
    (("--speculative", "--density", "1"), "--speculative needs something that drafts"),
    (("--speculative", "--batch", "2"), "--speculative is for single requests"),
    (("--speculative", "--mesh", "data=1"), "--mesh does not go with --speculative"),
    (("--speculative", "--draft-weights", "int3"), "draft_weights are 'int3'"),
    (("--speculative", "--draft-weights", "int8:48"), "48"),
    (("--speculative", "--draft-weights", "int4", "--in-place", "--density", "0.5"), "--in-place moves the model's"),
])  # fmt: skip
def test_impossible_drafts_are_refused(plain, capsys, arguments, message):
    assert cli.main(["bench", "--model", str(plain.folder), "--lengths", "9+3", *arguments]) == 2
    assert message in capsys.readouterr().err


class FakeLlama:
    """What of llama_cpp.Llama is used, with its rules: a cache of `n_ctx`, greedy sampling behind what was read."""

    opened: list = []  # noqa: RUF012

    def __init__(self, model_path, *, n_ctx, n_batch, n_threads, n_threads_batch, logits_all, verbose, type_k, type_v):
        stored = gguf.GGUFReader(model_path).tensors[0].tensor_type
        cache = 0 if stored == gguf.GGMLQuantizationType.F32 else 1
        assert (type_k, type_v) == (cache, cache)
        self.n_ctx, self.n_tokens = n_ctx, 0
        self.opened.append(self)

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        self.n_tokens += len(tokens)
        assert self.n_tokens <= self.n_ctx

    def sample(self, temp):
        assert temp == 0
        return self.n_tokens

    def close(self):
        self.n_ctx = 0


MATRICES, DOWN, VECTORS = 2 * (4 * 32 * 32 + 2 * 48 * 32) + 101 * 32, 2 * 48 * 32, (2 * 2 + 1) * 32
"""Numbers that a step of the tiny model reads. Its embedding makes no logits, so that it is not among them."""

Q8_0 = MATRICES * 34 // 32 + 2 * DOWN + 4 * VECTORS
"""Bytes of that in a GGUF file: rows of 48 are no blocks of 32, and are stored as float16."""


def test_llama_cpp_reads_the_same_weights(plain, monkeypatch, tmp_path):
    import checkpoints_gguf

    file = checkpoints_gguf.write_twin(plain.folder, tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)
    written = peers.write_float32(file, tmp_path / "f32.gguf")
    (ours, _), (theirs, _) = gj.load_model(file, "float32"), gj.load_model(written, "float32")
    assert ours.config == theirs.config
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(mine, other)

    module = types.ModuleType("llama_cpp")
    module.Llama = FakeLlama  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(peers, "_version", lambda package: f"{package} 1.2.3")
    with contextlib.ExitStack() as stack:
        names = ["llama.cpp F32", "llama.cpp"]
        found, skipped = peers.find({FLOAT32: ours}, str(file), names, stack)
        assert skipped == {}
        peer, as_it_is = found
        assert [each.name for each in found] == names
        assert (peer.version, peer.prunes) == ("llama-cpp-python 1.2.3", False)
        assert peer.weights == "q8.gguf, dequantised to float32"
        assert as_it_is.weights is not None
        assert as_it_is.weights.startswith("q8.gguf as it is (")
        assert peer.weights_bytes == 4 * (MATRICES + DOWN + VECTORS)
        assert as_it_is.weights_bytes == Q8_0
        assert (peer.cache_itemsize, as_it_is.cache_itemsize) == (4, 2)
        as_it_is.measure([5, 6], 3, 1.0)
        FakeLlama.opened.clear()
        for prompt in ([5, 6, 7], [5, 6, 7], [5] * 9):
            assert peer.measure(prompt, 4, 1.0).keys() == {"prefill", "token"}
        assert [llama.n_ctx for llama in FakeLlama.opened] == [0, 13]
    assert FakeLlama.opened[-1].n_ctx == 0
    assert peers.LlamaCpp(Path(written)).greedy([5, 6, 7], 4)[0] == [3, 4, 5, 6]
    with contextlib.ExitStack() as stack:
        _, skipped = peers.find({FLOAT32: ours}, str(plain.folder), ["llama.cpp"], stack)
    assert skipped["llama.cpp"].startswith("it reads GGUF files")


def test_llama_cpp_makes_the_other_formats(plain, tmp_path):
    pytest.importorskip("llama_cpp")
    import checkpoints_gguf

    file = checkpoints_gguf.write_twin(plain.folder, tmp_path / "f32.gguf")
    with contextlib.ExitStack() as stack:
        found, skipped = peers.find({}, str(file), list(peers.MADE), stack)
        assert skipped == {}
        assert [peer.weights for peer in found] == [
            f"f32.gguf, dequantised to float32, then {kind}" for kind in ("F16", "Q8_0")
        ]
        sizes = [peer.weights_bytes for peer in found]
    assert sizes == [2 * (MATRICES + DOWN) + 4 * VECTORS, Q8_0]


@pytest.mark.parametrize("options", first_and_slow(0, (), ("--dtype", "float32"), ("--stored", "float32")))
def test_memory_of_a_conversion(monkeypatch, capsys, tmp_path, options):
    arguments = ("--gigabytes", "0.002", "--shards", "3", "--folder", str(tmp_path), *options)
    code, out, _ = run(monkeypatch, capsys, "memory", *arguments)
    result = json.loads(out[-1])
    assert code == 0
    assert result["holds"]
    assert result["bytes"] >= 0.002e9
    assert result["shards"] == 3
    assert 0 < result["memory_before"] < result["peak_memory"] < result["limit"]
    assert "the limit holds" in out[-2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_beyond_the_limit_is_an_exit_code(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "GIB", -(10**9))
    arguments = ("memory", "--gigabytes", "0.001", "--folder", str(tmp_path))
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 1
    assert "DOES NOT HOLD" in out[-2]
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: memory.shutil._ntuple_diskusage(10, 9, 1))
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "0.0 GB are free; see --folder" in err


@pytest.mark.parametrize(("size", "itemsize"), [(8e9, 2), (4.3e9, 2), (1e9, 4), (1e6, 2)])
def test_memory_has_a_model_of_every_size(size, itemsize):
    config, shapes = memory.model_of(size, itemsize)
    total = sum(itemsize * math.prod(shape) for shape in shapes.values())
    assert size <= total < 1.3 * size
    assert config["num_hidden_layers"] == sum("q_proj" in name for name in shapes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory", "--gigabytes", "0"], "--gigabytes must be above 0"),
        (["memory", "--folder", "no such folder"], "there is no folder no such folder"),
        (["speed", "--density", "2"], "density must be in (0, 1]"),
        (["run", "--density", "x"], "--density: 'x' is no list of numbers"),
        (["run", "--prompt-tokens", "9", "--new-tokens", "1"], "an answer 2, got 9+1"),
        (["run", "--prompt", "9"], "--prompt and --new belong together"),
        (["run", "--prompt", "9", "--new", "3", "--lengths", "9+3"], "give either --lengths or --prompt and --new"),
        (["run", "--lengths", "9-3"], "'9-3' is no list such as"),
        (["run", "--lengths", "1+3", "--peers"], "--peers needs prompts of 2 tokens"),
        (["run", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["run", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["run", "--experts", "some"], "--experts: 'some' is neither of shared, per-sequence"),
        (["run", "--model", "no-such-model"], "or for random weights one of Llama-2-7B, "),
        (["run", "--model", "SmolLM2-135M", "--layers", "31"], "layers must be a whole number in [1, 30]"),
        (["run", "--layers", "2"], "--layers is for random weights"),
        (["run", "--model", "smollm2-135m", "--lengths", "8000+193"], "more than the model's context of 8192"),
        (["run", "--model", "SmolLM2-135M", "--density", "1e-5"], "keeps 0 of 1536 neurons"),
        (["run", "--json-file", "no such folder/x"], "--json-file: there is no folder"),
        (["run", "--json-file", "."], "--json-file: . cannot be written"),
        (["run", "--plot", "x.pdf"], "--plot writes PNG files"),
        (["run", "--compare", "no such file"], "there is no earlier result no such file"),
        (["run", "--compare", "README.md"], "its last line is no JSON object of a benchmark"),
        (["nothing"], "invalid choice"),
    ],
)
def test_bad_input(monkeypatch, capsys, arguments, message):
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
