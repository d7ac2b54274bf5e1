"""Whether a limit of the address space (`ulimit -v`) lets JAX start, found out where a failure does no harm.

Threads of JAX, XLA and TensorStore reserve some GB of addresses for stacks and for memory to come, more where there are
more processors. Where a thread cannot be made, C++ ends the process without a word to Python. So a child tries first.

Imports nothing large, because nothing large may be imported before.
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
"""Address space of what begins after JAX has: tokenizers, the reading of checkpoints, and their threads."""

TRIAL_SECONDS = 120


def limit() -> int | None:
    """The limit of this process's address space, in bytes; None where there is none."""
    try:
        import resource
    except ImportError:
        return None
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if most == resource.RLIM_INFINITY else most


def check_start(module: str) -> None:
    """Raise unless JAX can start and a module can be imported; does nothing if there is no limit, or JAX is there.

    Args:
        module: name of the module.

    Raises:
        MemoryError: the limit is too small; in one line.
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
    """What a child does: start JAX, compile something, and see whether there is room for the rest."""
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
    """Whether a child ends with code 0; one that takes too long is ended."""
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
        # Also where the user interrupts.
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
