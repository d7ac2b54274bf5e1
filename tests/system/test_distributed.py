"""Two processes on this machine: the same answers and scores as one, and an end where one is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PASSAGES
from reference import TinyLlama, tiny_tokenizer

from griffin_jax.checkpoints.loading import convert
from griffin_jax.cli.main import main
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.parallel import distributed
from griffin_jax.parallel.distributed import HEARTBEAT_SECONDS, parse

ROOT = Path(__file__).parents[2]
DIES = """
import os, signal, sys, jax
from griffin_jax.parallel.distributed import joined
with joined(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer(folder, PASSAGES, 320)
    TinyLlama.build(folder, vocab_size=320, num_hidden_layers=1)
    convert(folder, folder / "native", progress=False)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    return folder


def start(coordinator: str, process: int, *command: str) -> subprocess.Popen[str]:
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command, f"{coordinator},{process},2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def coordinator() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def together(*arguments: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of both processes of a command."""
    at = coordinator()
    both = [start(at, number, "-m", "griffin_jax.cli.main", *arguments, "--distributed") for number in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    return [(process.returncode, *output) for process, output in zip(both, outputs, strict=True)]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mesh", "source"), [("model=2", "native"), pytest.param("data=2", ".", marks=pytest.mark.slow)]
)
def test_generate(capfd, folder, mesh, source):
    arguments = ["generate", "--model", str(folder / source), "--prompt", "A river", "--prompt", "The lamp is older"]
    arguments += ["--max-new-tokens", "6", "--ignore-eos", "--mesh", mesh]
    experts = folder / f"{mesh}.experts"
    (code, out, err), (other_code, other_out, other_err) = together(*arguments, "--save-experts", str(experts))
    assert (code, other_code) == (0, 0), err + other_err
    assert other_out == ""
    assert {line.split()[0] for line in other_err.splitlines()} <= {"[Gloo]"}
    assert main([*arguments, "--save-experts", f"{experts}.one"]) == 0
    assert out == capfd.readouterr()[0]
    two, one = ExpertNeurons.load(experts), ExpertNeurons.load(f"{experts}.one")
    assert two.neurons == one.neurons
    for found, expected in zip(two, one, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_evaluation(capfd, folder):
    arguments = ["eval", "divergence", str(folder / "texts.jsonl"), "--model", str(folder), "--mesh", "data=2"]
    arguments += ["--prompt-tokens", "12", "--new-tokens", "8"]
    (code, out, err), (other_code, other_out, other_err) = together(*arguments, "--output", str(folder / "two"))
    assert (code, other_code) == (0, 0), err + other_err
    assert other_out == ""
    assert main([*arguments, "--output", str(folder / "one")]) == 0
    assert out == capfd.readouterr()[0]
    for file in ("results.json", "scores.jsonl", "table.txt"):
        assert (folder / "two" / file).read_text() == (folder / "one" / file).read_text()
    # Scores of other settings are refused by all processes, though only the first looks at the folder.
    for code, _, err in together(*arguments, "--seed", "1", "--output", str(folder / "two")):
        assert code == 2
        assert "holds scores of other settings (seed was 0, is 1)" in err


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_other(folder, killed):
    at = coordinator()
    dies = start(at, killed, "-c", DIES)
    command = ["generate", "--model", str(folder), "--prompt", "A river", "--mesh", "data=2", "--distributed"]
    lives = start(at, 1 - killed, "-m", "griffin_jax.cli.main", *command)
    assert dies.wait(timeout=300) == -signal.SIGKILL
    # The limit is wide for machines that are busy with other things.
    out, err = lives.communicate(timeout=3 * HEARTBEAT_SECONDS)
    dies.communicate()
    assert lives.returncode != 0
    assert out == ""
    assert "another task died" in err or "onnection" in err or "peer" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("host", "must be HOST:PORT,PROCESS,COUNT, .* got 'host'"),
        ("host:1,0", "must be HOST:PORT"),
        ("host:1,x,2", "must be HOST:PORT"),
        ("host:1,2,2", "of 2 processes the last one is 1, got 2"),
    ],
)
def test_malformed(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_well_formed():
    expected = {"coordinator_address": "host0:1234", "process_id": 1, "num_processes": 2}
    assert parse("host0:1234,1,2") == expected
    assert parse("auto") == {}


def test_a_mesh_is_needed(capfd, monkeypatch, folder):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(distributed.jax.distributed, "shutdown", lambda: None)
    assert main(["generate", "--model", str(folder), "--prompt", "a", "--distributed", "auto"]) == 2
    assert "--distributed needs --mesh over all devices" in capfd.readouterr().err
