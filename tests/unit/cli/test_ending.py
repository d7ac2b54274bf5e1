"""How commands end: stdout that is full or closed, signals, and what was begun."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from conftest import first_and_slow
from signals import AS_IN_A_TERMINAL

ROOT = Path(__file__).parents[3]
FAMILIES = "import sys; from griffin_jax.cli.main import main; sys.exit(main(['families']))"


def run(code: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, check=False, **options
    )


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_under_stdout():
    with open("/dev/full", "w") as full:
        done = run(FAMILIES, stdout=full)
    assert (done.returncode, done.stderr) == (2, "griffin-jax families: [Errno 28] No space left on device\n")


@pytest.mark.skipif(os.name == "nt", reason="pipes as POSIX has them")
@pytest.mark.parametrize("arguments", ["['families']", "['--help']"])
def test_a_reader_that_has_enough(arguments):
    read, write = os.pipe()
    os.close(read)
    done = run(FAMILIES.replace("['families']", arguments), stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.thorough
@pytest.mark.skipif(os.name == "nt", reason="files as POSIX has them")
def test_no_stdout_at_all():
    done = run(FAMILIES, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")


CONVERSION = f"""{AS_IN_A_TERMINAL}
import sys, time
from griffin_jax.checkpoints import sources
from griffin_jax.cli.main import main
read = sources.FamilySource.read
def slow(self, path, dtype):
    if path == "layers.1.ff.up":
        print("in the middle", file=sys.stderr, flush=True)
        # Where another thread gets the signal, it is not noticed before a sleep ends.
        for _ in range(600):
            time.sleep(0.1)
    return read(self, path, dtype)
sources.FamilySource.read = slow
sys.exit(main(["convert", sys.argv[1], sys.argv[2]]))
"""


def stopped(how: int, source: Path, output: Path) -> tuple[int, str]:
    """Exit code and stderr of a conversion that gets a signal in the middle."""
    with subprocess.Popen(
        [sys.executable, "-c", CONVERSION, source, output],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "in the middle\n"
        process.send_signal(how)
        return process.wait(timeout=60), process.stderr.read()


@pytest.mark.thorough
@pytest.mark.skipif(os.name == "nt", reason="signals as POSIX has them")
@pytest.mark.parametrize("how", first_and_slow(1, signal.SIGTERM, signal.SIGHUP))
def test_signals_clean_up(tmp_path, how):
    source = checkpoints.write(tmp_path / "hf")
    assert stopped(how, source, tmp_path / "native") == (128 + how, "griffin-jax convert: terminated\n")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux does")
def test_what_is_killed_is_swept_by_the_next(tmp_path):
    from griffin_jax.checkpoints.loading import convert

    source = checkpoints.write(tmp_path / "hf")
    code, said = stopped(signal.SIGKILL, source, tmp_path / "native")
    assert (code, said) == (-signal.SIGKILL, "")
    (left,) = [path.name for path in tmp_path.iterdir() if path.name != "hf"]
    assert left.startswith(".native.partial-")
    convert(source, tmp_path / "other", progress=False)
    assert (tmp_path / left).exists()
    convert(source, tmp_path / "native", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native", "other"]


SLOWED = f"""{AS_IN_A_TERMINAL}
import sys, time
from griffin_jax.checkpoints import sources
from griffin_jax.cli.main import main
read = sources.FamilySource.read
def slow(self, path, dtype):
    print(path, flush=True)
    time.sleep(0.05)
    return read(self, path, dtype)
sources.FamilySource.read = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux does")
def test_fifty_kills_leave_nothing_after_the_next_run(tmp_path):
    from griffin_jax.checkpoints.loading import convert

    source = checkpoints.write(tmp_path / "hf")
    output = tmp_path / "native"
    random = np.random.default_rng(0)
    seen = 0
    for _ in range(50):
        with subprocess.Popen(
            [sys.executable, "-c", SLOWED, "convert", source, output],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(float(random.uniform(0, 1.5)))
            process.send_signal(
                [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP][int(random.integers(4))]
            )
        names = {path.name for path in tmp_path.iterdir()} - {"hf", "native"}
        assert all(name.startswith(".native.partial-") for name in names)
        assert len(names) <= 1
        seen += len(names)
        if output.exists():
            # It appears whole or not at all.
            convert(output, tmp_path / "copy", progress=False)
            shutil.rmtree(tmp_path / "copy")
            shutil.rmtree(output)
    convert(source, output, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]
    assert seen > 10
