"""The process that runs one program of `griffin_jax.evaluation.sandbox`; started by path, it imports nothing of ours.

    python sandboxed.py PROGRAM SECONDS BYTES

It gives up the network, if the system allows that, and limits its time, its memory and the size of its files. Then the
program runs under an audit hook, which refuses processes, sockets, foreign functions, and changes to files outside the
current folder.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PASSED = 86
"""The exit status if the program came to its end; a program that ends itself has another one."""

LARGEST_FILE = 16 << 20
"""The size of the largest file that a program may write, in bytes."""

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
"""Flags of Linux's unshare(2): a user without rights, and a network without devices."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MODULES = frozenset({"_socket", "_ctypes", "_posixsubprocess", "_multiprocessing", "resource"})
"""Modules that can reach out of the process without raising an audit event."""
EVENTS = (
    "socket.", "subprocess.", "ctypes.", "pty.", "shutil.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
    "os.system", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chdir", "os.fchdir", "os.chmod",
    "os.chown", "os.link", "os.symlink", "os.truncate", "os.utime", "os.setxattr", "os.removexattr",
)  # fmt: skip
"""Prefixes of the audit events that are refused."""


def leave_network() -> None:
    """Moves the process to a network without devices, if the system permits that."""
    import ctypes

    # Only Linux has this call; the audit hook refuses sockets everywhere.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]


def limit(seconds: int, memory: int) -> None:
    """Limits the process: processor time in seconds, address space in bytes, file sizes, and no further processes."""
    # Only Unix has the module resource, but the parent imports this file on all systems.
    import resource

    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: LARGEST_FILE,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    del sys.modules["resource"]


def watcher(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses what a program does not need.

    Args:
        folder: the folder in which files may be changed.
    """

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & WRITES:
                return
            if os.path.realpath(os.fsdecode(path)).startswith(folder + os.sep):
                return
        elif event == "import":
            if arguments[0] not in MODULES:
                return
        elif not event.startswith(EVENTS):
            return
        raise PermissionError(f"{event} is not allowed in this process")

    return watch


def main() -> None:
    """Runs the program; the exit status is `PASSED` if nothing was raised."""
    program, seconds, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    source = Path(program).read_text(encoding="utf-8")
    leave_network()
    limit(seconds, memory)
    sys.addaudithook(watcher(os.path.realpath(Path.cwd())))
    sys.argv = [program]
    # Without __name__, as in HumanEval's own harness: what an answer does as a script is not tested.
    exec(compile(source, program, "exec"), {})
    os._exit(PASSED)


if __name__ == "__main__":
    main()
