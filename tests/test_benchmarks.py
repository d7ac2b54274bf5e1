"""The benchmark commands run, and the PyTorch peer computes what griffin_jax computes. No timing here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from reference import TinyLlama, torch_greedy

from benchmarks import memory, peers, quality, speed
from benchmarks.__main__ import main


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


def test_peer_is_the_same_model(plain):
    peer = peers.from_jax(plain.llm.model)
    prompt = [5, 6, 7, 8, 9]
    assert peers.greedy(peer, prompt, 12)[0] == torch_greedy(plain.torch, prompt, 12)


@pytest.mark.parametrize("density", [0.5, 0.25])
def test_published_griffin_is_ours(plain, density):
    prompt = [5, 6, 7, 8, 9, 10, 11]
    with peers.pruned(peers.from_jax(plain.llm.model), density) as model:
        tokens, _, _ = peers.greedy(model, prompt, 12)
    assert tokens == plain.llm.generate([prompt], max_new_tokens=12, density=density, ignore_eos=True).tokens[0]


def test_speed_prints_a_table_and_json(plain, monkeypatch, capsys):
    code, out, _ = run(
        monkeypatch, capsys, "speed", "--model", str(plain.folder), "--prompt-tokens", "9", "--new-tokens", "3",
        "--repeats", "1", "--peers",
    )  # fmt: skip
    assert code == 0
    result = json.loads(out[-1])
    assert [(row["system"], row["density"]) for row in result["rows"]] == [
        ("griffin_jax", 1.0), ("griffin_jax", 0.5), ("PyTorch", 1.0), ("PyTorch", 0.5),
    ]  # fmt: skip
    assert any("select and prune together" in line for line in out)


def test_step_bytes_are_the_models(tiny):
    """Weights in use and the cache; the embedding of an untied model is not read."""
    model = tiny.llm.model
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    weights = 3 * layer + 32 + 101 * 32
    assert speed._step_bytes(model, 1.0, 10) == 4 * (weights + 2 * 3 * 16 * 10)
    assert speed._step_bytes(model, 0.5, 10) == 4 * (weights - 3 * 24 * 3 * 32 + 2 * 3 * 16 * 10)


def test_quality_on_hand_computed_logits():
    dense, pruned = np.zeros((1, 3, 2), np.float32), np.zeros((1, 3, 2), np.float32)
    dense[0, 0] = np.log([0.75, 0.25])
    pruned[0, 0] = np.log([0.25, 0.75])
    dense[0, 1] = pruned[0, 1] = np.log([0.5, 0.5])
    tokens = np.array([[1, 0, 1]], np.int32)
    loss, kl, agree = quality._score(dense, pruned, tokens, 1)
    np.testing.assert_allclose(loss, -(np.log(0.25) + np.log(0.5)) / 2, rtol=1e-6)
    np.testing.assert_allclose(kl, (0.75 * np.log(3) - 0.25 * np.log(3)) / 2, rtol=1e-6)
    assert agree == 0.5


def test_quality_order_on_the_demo_model(demo_gguf, monkeypatch, capsys, tmp_path):
    from conftest import PASSAGES

    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": passage}) for passage in [*PASSAGES, "short"]), encoding="utf-8")
    code, out, _ = run(
        monkeypatch, capsys, "quality", str(file), "--field", "text", "--model", str(demo_gguf),
        "--prompt-tokens", "30", "--new-tokens", "14",
    )  # fmt: skip
    assert code == 0
    result = json.loads(out[-1])
    assert result["texts"] == len(PASSAGES)
    kl = {name: scores["kl"] for name, scores in result["results"].items()}
    assert 0 == kl["dense"] < kl["oracle"] < kl["topk"] < min(kl["random"], kl["magnitude"])


@pytest.mark.parametrize("options", [(), ("--dtype", "float32"), ("--stored", "float32")])
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
        (["speed", "--new-tokens", "1"], "--new-tokens at least 2"),
        (["quality", "no such file"], "no such file"),
        (["nothing"], "invalid choice"),
    ],
)
def test_bad_input(monkeypatch, capsys, arguments, message):
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_quality_names_the_bad_line(monkeypatch, capsys, tmp_path, tiny):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"article": "x"}\n{"other": "y"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: no JSON object with a field 'article'"):
        list(quality._texts(file, "article", "a", "b"))
