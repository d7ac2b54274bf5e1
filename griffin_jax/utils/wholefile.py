"""Files and folders that are written whole or not at all.

A file or folder that is being written has a hidden name, next to the path that it is for. Nobody can guess the name, so
nobody can have put a link there. The name says which process writes it. If that process is killed, the next one that
writes to the same path removes what it left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = re.compile(r"\.partial-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{16}")
"""The end of a hidden name: a hash of the machine's name, the process id, its start time, and random digits."""

STATE, START = 0, 19
"""Places of these fields in Linux's `/proc/PID/stat`, counted after the name of the program."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write next to `path`, which replaces `path` at the end of the block; if that fails, nothing changes.

    Raises:
        OSError: the file cannot take the place of `path`.
    """
    path = Path(path)
    sweep(path)
    partial = hidden(path)
    # This fails if anything has that name, even a link.
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file (UTF-8); an existing one is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def hidden_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder next to `path`, whose content is moved to `path` once it is whole; removed at the end of the block.

    Raises:
        OSError: the folder cannot be created.
    """
    path = Path(path)
    sweep(path)
    partial = hidden(path)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def hidden(path: Path) -> Path:
    """A new hidden name next to `path`."""
    pid = os.getpid()
    return path.with_name(f".{path.name}.partial-{_host()}-{pid}-{_start(pid) or 0}-{secrets.token_hex(8)}")


def sweep(path: Path) -> None:
    """Remove what ended processes left of writing `path`; running ones and those of other machines keep their files."""
    prefix = f".{path.name}"
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            found = PARTIAL.fullmatch(entry.name, len(prefix)) if entry.name.startswith(prefix) else None
            if found is None or found["host"] != _host() or not _is_gone(int(found["pid"]), int(found["start"])):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _start(pid: int) -> int | None:
    """When a process began, in clock ticks of Linux; None if it has ended or this cannot be found out."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[STATE] in "ZX" else int(fields[START])


def _is_gone(pid: int, start: int) -> bool:
    """Whether the process that began at `start` has ended; another one may have its number by now."""
    if os.path.exists("/proc/self/stat"):
        return _start(pid) != start
    if os.name == "nt":  # where no way to ask is free of side effects
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
