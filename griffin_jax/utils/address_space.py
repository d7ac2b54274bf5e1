"""Checks whether JAX can start under a limit of the address space (`ulimit -v`), where a failure does no harm.

The threads of JAX, XLA and TensorStore reserve some GB of addresses for their stacks and for later allocations, more on
machines with more processors. If a thread cannot be created, C++ ends the process without a word to Python. So a child
process tries first.

This module imports nothing large, because the check has to run before anything large is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import sys
import threading
import time

LIBRARIES_BYTES = 384 << 20
"""Address space for what starts after JAX: tokenizers, the reading of checkpoints, and their threads."""

TRIAL_SECONDS = 120


def limit() -> int | None:
    """The limit of this process's address space, in bytes; None if there is no limit."""
    try:
        import resource
    except ImportError:
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if most == resource.RLIM_INFINITY else most


def check_start(module: str) -> None:
    """Raise unless JAX can start and a module can be imported under the limit of the address space.

    Does nothing if there is no limit, if JAX is imported already, or if the start cannot be tried because the platform
    has no `fork` or this process has several threads.

    Args:
        module: name of the module.

    Raises:
        MemoryError: the limit is too small. The message is one line.
    """
    most = limit()
    if most is None or "jax" in sys.modules or threading.active_count() > 1 or not hasattr(os, "fork"):
        return
    try:
        child = os.fork()
    except OSError:
        child = None
    if child == 0:
        _try(module)
    if child is None or not _succeeds(child):
        raise MemoryError(
            f"JAX cannot start in the {most / 1e6:,.0f} MB of address space that are allowed (ulimit -v); allow some GB"
            " next to the model's weights, which threads reserve and do not use, or limit memory by a control group"
        )


def _try(module: str) -> None:
    """Runs in the child: import the module, start JAX, compile something, and see if there is room for the rest."""
    code = 1
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        importlib.import_module(module)
        import jax
        import jax.numpy as jnp

        jax.jit(lambda x: (x @ x).sum())(jnp.ones((8, 8))).block_until_ready()
        mmap.mmap(-1, LIBRARIES_BYTES)
        code = 0
    finally:
        os._exit(code)


def _succeeds(child: int) -> bool:
    """Whether a child process ends with code 0; it is killed if it takes longer than `TRIAL_SECONDS`."""
    import signal

    end = time.monotonic() + TRIAL_SECONDS
    try:
        while time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                child = 0
                return os.waitstatus_to_exitcode(status) == 0
            time.sleep(0.01)
        return False
    finally:
        # Also when the user interrupts.
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
