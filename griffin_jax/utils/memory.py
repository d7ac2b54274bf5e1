"""How much memory this process has used and can still get, and an error of one line where that is too little."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax

from griffin_jax.utils.address_space import limit

ROOT = Path("/")
"""The folder that holds `proc` and `sys`."""

CGROUPS = "sys/fs/cgroup"
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Files with the limit and the use of a group of processes, and what its `memory.stat` calls the pages of files that
are given up first, by the version of cgroups."""


def peak() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the platform does not tell."""
    # On Linux, getrusage's figure of a process begins with that of the one which started it.
    found = _status("VmHWM")
    if found is not None:
        return found
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak() -> None:
    """Let `peak` begin anew, where that is possible: on Linux."""
    with contextlib.suppress(OSError):
        (ROOT / "proc/self/clear_refs").write_text("5")


def resident() -> int | None:
    """Resident memory of this process, in bytes; None where the platform does not tell."""
    return _status("VmRSS")


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it and can be told to: glibc's.

    Glibc has a heap for each thread, and returns only what is free at its end. Where many threads come and go, as
    TensorStore's do, what they freed stays resident and cannot be used by the others.
    """
    if trim := getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim", None):
        trim(0)


def free(devices: Iterable[Any]) -> int | None:
    """Bytes that this process can still get on each of some devices of JAX; None where that is not known.

    On an accelerator that is what its allocator has left; on CPUs it is `free_of_host`. Devices of other processes are
    left out.
    """
    found = []
    for device in devices:
        if device.process_index != jax.process_index():
            continue
        if device.platform == "cpu":
            found.append(free_of_host())
            continue
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            found.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min((size for size in found if size is not None), default=None)


def free_of_host(root: Path = ROOT, address_space: int | None = None) -> int | None:
    """Bytes of main memory that this process can still get; None where that is not known.

    The least of what the system has available, of what is left to the process's control group and to those that this
    one is part of (version 1 or 2), and of the limit of its address space.

    Args:
        root: the folder that holds `proc` and `sys`.
        address_space: limit of the address space, in bytes; by default the process's own (`ulimit -v`).
    """
    found = list(_limits(root, address_space))
    return max(0, min(found)) if found else None


def _limits(root: Path, address_space: int | None) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        yield _kilobytes(root / "proc/meminfo", "MemAvailable")
    for folder, (most, used, file_pages) in _groups(root):
        # There is no limit where the file is absent or says "max".
        with contextlib.suppress(OSError, ValueError, KeyError):
            allowed = int((folder / most).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield allowed - int((folder / used).read_text()) + int(stat.get(file_pages, 0))
    most = limit() if address_space is None else address_space
    if most is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            yield most - _kilobytes(root / "proc/self/status", "VmSize")


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of the control groups that limit the memory of this process, the innermost first."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            base = root / CGROUPS
            if controllers == "memory":
                base, names = base / "memory", V1
            else:
                # Next to groups of version 1, those of version 2 have a folder of their own.
                base, names = (base / "unified" if (base / "unified").is_dir() else base), V2
            # In a container the path may be the host's, of which only the end, or nothing, is there.
            inner = PurePosixPath(path.lstrip("/"))
            for part in (inner, *inner.parents):
                yield base / part, names


def _status(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _kilobytes(ROOT / "proc/self/status", name)
    return None


def _kilobytes(file: Path, name: str) -> int:
    """A figure of a file that says `name:  123 kB`, in bytes."""
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def shown(size: int) -> str:
    """A size for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def check(parts: Mapping[str, int], available: int | None, advice: str) -> None:
    """Raise unless what is needed is free.

    Args:
        parts: bytes that are needed together, by what they are for.
        available: bytes that are free, from `free`; None if that is not known, and nothing is checked.
        advice: what to change, as in "take a smaller batch".

    Raises:
        MemoryError: more is needed than is free; in one line.
    """
    needed = sum(parts.values())
    if available is None or needed <= available:
        return
    unit, name, digits = (1e9, "GB", 1) if needed >= 1e9 else (1e6, "MB", 0) if needed >= 1e7 else (1e3, "kB", 0)
    listed = ", ".join(f"{part} {size / unit:,.{digits}f}" for part, size in parts.items() if size >= unit / 20)
    raise MemoryError(
        f"about {needed / unit:,.{digits}f} {name} are needed ({listed}), {available / unit:,.{digits}f} {name} are"
        f" free; {advice}"
    )
