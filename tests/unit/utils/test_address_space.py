"""Commands under a limit of the address space, `ulimit -v`."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import first_and_slow

resource = pytest.importorskip("resource")


@pytest.mark.parametrize("megabytes", first_and_slow(2, 40, 700, 300, 1200))
def test_too_little_for_jax_is_one_line(megabytes):
    """Where libraries, OpenBLAS, or XLA's threads would end the process by a signal, or say what misleads."""
    most = megabytes << 20
    ran = subprocess.run(
        [sys.executable, "-m", "griffin_jax.cli.main", "info", "--model", "nothing"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2, ran.stderr
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"griffin-jax info: JAX cannot start in the {most / 1e6:,.0f} MB of address space")
