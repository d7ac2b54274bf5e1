"""How much memory this process has used and can still get, and a one-line error if that is too little."""

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
"""For either version of cgroups: the files with a control group's limit and usage, and the entry of its `memory.stat`
for the pages of files that are reclaimed first."""


def peak() -> int | None:
    """Largest resident memory of this process so far, in bytes; None if the platform does not tell."""
    # On Linux, getrusage's figure begins with that of the process which started this one.
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
    """Let `peak` start anew; this works on Linux only."""
    with contextlib.suppress(OSError):
        (ROOT / "proc/self/clear_refs").write_text("5")


def resident() -> int | None:
    """Resident memory of this process, in bytes; None if the platform does not tell."""
    return _status("VmRSS")


def give_back() -> None:
    """Return freed memory to the system; this has an effect only if the C library is glibc.

    Glibc has a heap for each thread, and returns only what is free at the end of a heap. If many threads come and go,
    as TensorStore's do, the memory that they freed stays resident, and other threads cannot use it.
    """
    if trim := getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim", None):
        trim(0)


def free(devices: Iterable[Any]) -> int | None:
    """Bytes that this process can still get on each of some JAX devices; None if that is unknown.

    On an accelerator this is what its allocator has left; on CPUs it is `free_of_host`. Devices of other processes are
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
    """Bytes of main memory that this process can still get; None if that is unknown.

    This is the least of three figures: what the system has available, what the limits of the process's control group
    and of the groups around it (version 1 or 2) leave, and what the limit of the address space leaves.

    Args:
        root: the folder that holds `proc` and `sys`.
        address_space: limit of the address space, in bytes; by default that of the process (`ulimit -v`).
    """
    found = list(_limits(root, address_space))
    return max(0, min(found)) if found else None


def _limits(root: Path, address_space: int | None) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        yield _kilobytes(root / "proc/meminfo", "MemAvailable")
    for folder, (most, used, file_pages) in _groups(root):
        # If the file is absent or says "max", there is no limit.
        with contextlib.suppress(OSError, ValueError, KeyError):
            allowed = int((folder / most).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield allowed - int((folder / used).read_text()) + int(stat.get(file_pages, 0))
    most = limit() if address_space is None else address_space
    if most is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            yield most - _kilobytes(root / "proc/self/status", "VmSize")


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of the control groups that limit this process's memory, innermost first, each with its names of files."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            base = root / CGROUPS
            if controllers == "memory":
                base, names = base / "memory", V1
            else:
                # If there are groups of version 1, too, those of version 2 are in a separate folder.
                base, names = (base / "unified" if (base / "unified").is_dir() else base), V2
            # In a container the path may be that on the host, of which only the end, or nothing, exists here.
            inner = PurePosixPath(path.lstrip("/"))
            for part in (inner, *inner.parents):
                yield base / part, names


def _status(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _kilobytes(ROOT / "proc/self/status", name)
    return None


def _kilobytes(file: Path, name: str) -> int:
    """A figure from a file with lines such as `name:  123 kB`, in bytes."""
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def shown(size: int) -> str:
    """A size in GB or MB, for messages."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def check(parts: Mapping[str, int], available: int | None, advice: str) -> None:
    """Raise unless the memory that is needed is free.

    Args:
        parts: bytes that are needed at the same time, by their purpose.
        available: bytes that are free, from `free`; None if that is unknown, and then nothing is checked.
        advice: what to change, as in "take a smaller batch".

    Raises:
        MemoryError: more is needed than is free. The message is one line.
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
