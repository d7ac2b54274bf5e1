"""Runs programs that a model wrote, each in a separate process with limits.

The limits are those of the benchmarks' own packages and a little more. They keep a clumsy program from doing harm, but
they do not stop a program that is written to break out. If you expect one, run the whole evaluation in a container.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

from griffin_jax.evaluation import sandboxed
from griffin_jax.utils.options import whole

WAIT = 6
"""Seconds of wall-clock time for each second of processor time, so that a busy machine changes no verdict, and a
program that sleeps is ended."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: processor time, in seconds.
        megabytes: address space, in megabytes.

    Raises:
        ValueError: a limit is less than 1.
    """

    seconds: int = 10
    megabytes: int = 1024

    def __post_init__(self) -> None:
        for name in ("seconds", "megabytes"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))


def passes(program: str, limits: Limits = Limits()) -> bool:
    """Whether a Python program comes to its end within the limits, with the standard library but no packages.

    Args:
        program: source of the program.
        limits: what the program may use.
    """
    with tempfile.TemporaryDirectory(prefix="griffin-jax-") as folder:
        file = Path(folder) / "program.py"
        file.write_text(program, encoding="utf-8")
        command = [
            sys.executable, "-P", "-s", "-S", sandboxed.__file__,
            file.name, str(limits.seconds), str(limits.megabytes << 20),
        ]  # fmt: skip
        nothing = subprocess.DEVNULL
        try:
            ended = subprocess.run(
                command,
                cwd=folder,
                # A fixed order of sets, so that the verdict is the same each time.
                env={"PYTHONHASHSEED": "0"},
                stdin=nothing,
                stdout=nothing,
                stderr=nothing,
                timeout=WAIT * limits.seconds,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return ended.returncode == sandboxed.PASSED


def check_sandbox(limits: Limits = Limits()) -> None:
    """Raise `ValueError` unless programs can be run within these limits."""
    if not passes("import math, re, typing", limits):
        raise ValueError(
            f"no program runs in {limits.seconds} s and {limits.megabytes} MB, not even one that does nothing; allow"
            " more, or take a system where Python's module resource can set such limits"
        )
