"""Thousands of damaged checkpoints: each gives the right model or an error of a documented type, and soon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZING = Path(__file__).parents[1] / "fuzzing.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="bounds the memory as Linux does")
@pytest.mark.parametrize(
    ("kind", "cases", "refusals"),
    [("safetensors", 1500, 1300), ("config", 700, 500), ("index", 250, 200), ("gguf", 2500, 2000)],
)
def test_damaged_checkpoints(tmp_path, kind, cases, refusals):
    done = subprocess.run(
        [sys.executable, str(FUZZING), kind, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(FUZZING.parents[1]), str(FUZZING.parent)])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found, refused = map(int, done.stdout.split())
    assert found >= cases
    assert refused >= refusals


MUTATIONS = FUZZING.with_name("mutations.py")


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="bounds the memory as Linux does")
@pytest.mark.parametrize(
    ("cases", "seed"), [(300, 0), pytest.param(10_000, 1, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_mutated_files_of_every_kind(tmp_path, cases, seed):
    done = subprocess.run(
        [sys.executable, str(MUTATIONS), str(tmp_path), str(cases), str(seed)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(FUZZING.parents[1]), str(FUZZING.parent)])},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # Rust's libraries print, too.
    found, refused, failures = map(int, done.stdout.splitlines()[-1].split())
    assert failures == 0, done.stderr[-4000:]
    assert found == cases
    assert refused > cases // 2
