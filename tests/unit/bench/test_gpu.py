"""The proof for an accelerator, in small on this machine: every part runs, and what they write is what people read."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from reference import load_torch

import griffin_jax as gj
from benchmarks import gpu, gpu_checks, gpu_profile
from griffin_jax.aot.hlo import Module
from griffin_jax.model.assembly import random_model
from griffin_jax.model.named import named

ROOT = Path(__file__).parents[3]
BROKEN = "SmolLM2-135M-int8-batch-1"
TORCH = importlib.util.find_spec("torch") is not None


def options(folder: Path, **changes: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return argparse.Namespace(**(vars(parser.parse_args(["--small", "--output", str(folder)])) | changes))


@pytest.mark.slow
def test_the_whole_command_and_its_json(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--small", "--minutes", "25"]
    command += ["--output", str(tmp_path / "found")]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == (0 if TORCH else 1), done.stderr
    result = json.loads((tmp_path / "found" / "results.json").read_text())
    assert result["format"] == gpu.FORMAT
    assert result["missing"] == ([] if TORCH else ["SmolLM2-135M-torch-batch-1"])
    checks = result["parts"]["correctness"]["rows"]
    assert len(checks) == 10
    assert all(row["passed"] for row in checks)
    profiled = result["parts"]["SmolLM2-135M-int8-profile"]["densities"]
    assert [each["density"] for each in profiled] == [1, 0.5]
    assert all(each["kernels"] and each["busy_us"] > 0 for each in profiled)
    int8, floating = (result["parts"][f"SmolLM2-135M-{kind}-batch-1"]["rows"] for kind in ("int8", "bfloat16"))
    assert [(row["format"], row["density"]) for row in int8] == [(None, 1), (None, 0.5), ("int8+int4", 0.5)]
    assert int8[0]["weights_bytes"] < 0.6 * floating[0]["weights_bytes"]
    assert result["parts"]["SmolLM2-135M-in-place"]["in_place"]
    if TORCH:
        systems = [row["system"] for row in result["parts"]["SmolLM2-135M-torch-batch-1"]["rows"]]
        assert systems == ["transformers, compiled", "transformers", "published GRIFFIN"]
    assert (tmp_path / "found" / "results.txt").read_text() == gpu.table(result) + "\n"
    assert "checks" in done.stdout


class TestParts:
    def test_what_is_worth_most_comes_first(self):
        names = [part.name for part in gpu.parts(gpu.FULL)]
        assert names[:5] == [
            "correctness", "Llama-2-13B-bfloat16-batch-1", "Gemma-7B-bfloat16-batch-1", "Llama-2-13B-int8-batch-1",
            "Gemma-7B-int8-batch-1",
        ]  # fmt: skip
        assert len(set(names)) == len(names) == 27
        assert names.index("correctness-gemv") < names.index("Llama-2-13B-int8-batch-1-gemv")

    def test_flags_are_those_of_a_part(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XLA_FLAGS", "--mine")
        seen: list[dict[str, str]] = []

        def pretend(command: Any, env: dict[str, str], **rest: Any) -> Any:
            seen.append(env)
            return argparse.Namespace(returncode=1)

        monkeypatch.setattr(gpu.subprocess, "run", pretend)
        kinds = {"xla_flags": "--its"}, {"in_torch": True}, {"gemv": True}
        for part in (gpu.Part("a", ()), *(gpu.Part("b", (), **kind) for kind in kinds)):
            gpu._run(part, tmp_path, 1.0)
        assert [env["XLA_FLAGS"] for env in seen] == ["--mine", "--mine --its", "--mine", "--mine"]
        assert seen[2]["JAX_PLATFORMS"] == "cpu"
        assert [env.get("GRIFFIN_JAX_GEMV") for env in seen if env is not seen[2]] == ["", "", "1"]
        assert [part.xla_flags for part in gpu.parts(gpu.FULL)].count("--xla_gpu_enable_command_buffer=+WHILE") == 2

    @pytest.mark.thorough
    def test_only_what_is_missing_runs(self, tmp_path, monkeypatch, capsys):
        ran: list[str] = []

        def pretend(part: gpu.Part, folder: Path, seconds: float) -> str | None:
            ran.append(part.name)
            if part.name == BROKEN:
                return "it broke"
            rows = [gpu_checks._row("F", "error", 2.0, 1.0)] if part.name == "correctness" else []
            (folder / f"{part.name}.json").write_text(json.dumps({"rows": rows}))
            return None

        monkeypatch.setattr(gpu, "_run", pretend)
        assert gpu.run(options(tmp_path)) == 1
        first, said = list(ran), capsys.readouterr()
        assert len(first) == 8
        assert f"{BROKEN} failed: it broke" in said.err
        assert "0 of 1 checks\n  WRONG F, error: 2, allowed 1" in said.out
        assert f"not there yet: {BROKEN}" in said.out
        ran.clear()
        gpu.run(options(tmp_path))
        assert ran == [BROKEN]
        gpu.run(options(tmp_path, list=True))
        assert capsys.readouterr().out.count("done") == 7

    def test_no_part_begins_that_there_is_no_time_for(self, tmp_path, monkeypatch, capsys):
        clock = iter(range(0, 10_000, 100))
        monkeypatch.setattr(gpu.time, "monotonic", lambda: float(next(clock)))
        monkeypatch.setattr(gpu, "_run", lambda part, folder, seconds: None)
        gpu.run(options(tmp_path, minutes=5.0))
        assert "no time is left for another part; run this again to go on" in capsys.readouterr().err

    def test_results_of_another_machine(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu, "_run", lambda part, folder, seconds: None)
        gpu.run(options(tmp_path))
        machine = tmp_path / "machine.json"
        machine.write_text(json.dumps(json.loads(machine.read_text()) | {"device": "another"}))
        with pytest.raises(FileExistsError, match="results of another device, version or size"):
            gpu.run(options(tmp_path))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"part": "none"}, "no part has 'none'"),
            ({"minutes": 0.0}, "must be more than 0"),
            ({"density": "half"}, "--density"),
        ],
    )
    def test_values(self, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            gpu.run(options(tmp_path / "never", **changes))
        assert not (tmp_path / "never").exists()

    @pytest.mark.thorough
    def test_a_part_that_fails_says_its_last_line(self, tmp_path):
        reason = gpu._run(gpu.Part("a", ("benchmarks", "run", "--model", "no thing")), tmp_path, 100.0)
        assert "there is no model 'no thing'" in (reason or "")
        assert "longer than there was time" in (gpu._run(gpu.Part("b", ("this",)), tmp_path, 0.001) or "")


class TestChecks:
    def test_a_wrong_row_is_found(self, rng):
        config = dataclasses.replace(gpu_checks.tiny("Llama-3-8B"), num_layers=1)
        model = random_model(config, jnp.bfloat16, seed=0)
        indices = np.stack([np.sort(rng.permutation(512)[:256]) for _ in range(2)]).astype(np.int32)
        experts = gj.ExpertNeurons((jnp.asarray(indices),), model.neurons)
        pruned = gj.prune(model, experts)
        assert gpu_checks._gathered(model, (indices,), pruned) == 0
        indices[1, 7] = (indices[1, 7] + 1) % 512
        assert gpu_checks._gathered(model, (indices,), pruned) == 1

    def test_limits(self):
        assert gpu_checks._row("F", "c", 1.0, 1.0)["passed"]
        assert not gpu_checks._row("F", "c", 1.01, 1.0)["passed"]
        assert gpu_checks._error(np.array([1.0, 3.0]), np.array([2.0, 4.0])) == 0.25

    def test_tiny_models_are_what_their_families_are(self):
        gemma, opt = gpu_checks.tiny("Gemma-2-9B"), gpu_checks.tiny("OPT-6.7B")
        assert (gemma.windows, gemma.attention_softcap, gemma.embedding_scale) == ((16, 0), 50.0, 16.0)
        assert (opt.num_kv_heads, opt.gated, opt.learned_positions) == (4, False, True)
        assert gpu_checks.tiny("Llama-3-8B").num_kv_heads == 2


class TestProfile:
    HLO = """HloModule jit_decode, is_scheduled=true

%body (p: (f32[8])) -> (f32[8]) {
  %p = (f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=0
  %product.3 = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%inner
  ROOT %again = (f32[8]) tuple(%x)
}

ENTRY %main (a: f32[8]) -> (f32[8]) {
  %a = f32[8]{0} parameter(0)
  %start = (f32[8]) tuple(%a)
  ROOT %while.1 = (f32[8]) while(%start), condition=%cond, body=%body
}
"""

    def test_kernels_that_are_alike_are_one_row(self):
        """A CUDA graph's events name the graph, others the instruction; the loop itself is no kernel."""
        event = gpu_profile.Event
        found = [
            event("while.1", "while.1", 0, 9_000), event("command_buffer", "product_3", 0, 2_000),
            event("product.3", "product_3", 3_000, 4_000), event("command_buffer", "decode_attention", 8_000, 1_000),
        ]  # fmt: skip
        product, attention = gpu_profile.kernels(found, Module.parse(self.HLO), tokens=2)
        assert (product["kernel"], product["makes"], product["bytes"]) == ("product", "[8, 4]", (8 + 32) * 4)
        assert (product["per_token"], product["us"], product["us_per_token"]) == (1, 3, 3)
        assert (attention["kernel"], attention["bytes"], attention["us_per_token"]) == ("decode_attention", 0, 0.5)

    def test_a_table(self):
        kernel = {"kernel": "k", "makes": "[1]", "per_token": 2.0, "us": 1.0, "us_per_token": 2.0, "bytes": 2_000_000}
        small = {"kernel": "s", "makes": "", "per_token": 1.0, "us": 0.001, "us_per_token": 0.001, "bytes": 0}
        each = {"density": 0.5, "busy_us": 2.001, "span_us": 4.002, "kernels": [kernel, small]}
        shown = {"profiled": "M", "layers": 4, "stored_as": "int8", "slots": 9, "densities": [each]}
        lines = gpu_profile.table(shown).splitlines()
        assert lines[1] == "density 0.5: 2 us a token in 3.0 kernels, idle between them 50% of the time"
        assert lines[3].split() == ["2.0", "2.0", "1.0", "2.0", "2,000", "k", "->", "[1]"]
        assert lines[4].split() == ["0.0", "1.0", "all", "others"]


@pytest.mark.thorough
@pytest.mark.skipif(not TORCH, reason="needs torch")
@pytest.mark.parametrize("name", ["Llama-2-7B", "Gemma-7B"])
def test_the_step_in_torch_writes_the_same_tokens_compiled_or_not(name, rng):
    torch, peers = load_torch(), importlib.import_module("benchmarks.gpu_torch")
    small = {"vocab_size": 101, "width": 64, "ff_width": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = dataclasses.replace(named(name, layers=2), **small)
    model = peers.build(config, torch.float32, torch.device("cpu"))
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.size for p in _leaves(random_model(config, seed=0))
    )  # fmt: skip
    prompts = rng.integers(0, 101, (2, 20))
    # Another way to run the same step stands for its compiled form, which takes long to make.
    tokens, prefill, token = peers.greedy(model, prompts, 8, model.forward)
    assert tokens == peers.greedy(model, prompts, 8)[0]
    assert prefill > 0
    assert token > 0


def _leaves(model: gj.Transformer) -> list[Any]:
    import jax

    return jax.tree.leaves(model)


def test_other_architectures_have_no_peer_in_torch():
    pytest.importorskip("torch")
    peers = importlib.import_module("benchmarks.gpu_torch")
    with pytest.raises(ValueError, match="are Llama and Gemma, not opt"):
        peers.build(named("OPT-6.7B"), None, None)
