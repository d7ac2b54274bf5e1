"""What is free, from files as Linux has them, and the line where that is too little."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from griffin_jax.utils import memory

MIB = 1 << 20


def linux(root: Path, available: int, groups: str, files: dict[str, str] | None = None, used: int = 100) -> Path:
    """A root folder where the system has some MiB available, and this process uses others."""
    contents = {
        "proc/meminfo": f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:  {available * 1024} kB\n",
        "proc/self/status": f"Name:\tpython\nVmSize:\t{used * 1024} kB\nVmRSS:\t{used * 512} kB\n",
        "proc/self/cgroup": groups,
    }
    for name, content in (contents | (files or {})).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def v2(folder: str, limit: int | None, used: int, cached: int = 0) -> dict[str, str]:
    at = f"sys/fs/cgroup/{folder}".rstrip("/")
    stat = f"anon 5\ninactive_file {cached * MIB}\nactive_file 7\n"
    found = {f"{at}/memory.current": str(used * MIB), f"{at}/memory.stat": stat}
    return found | {f"{at}/memory.max": "max\n" if limit is None else str(limit * MIB)}


def v1(folder: str, limit: int, used: int, cached: int = 0) -> dict[str, str]:
    at = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    return {
        f"{at}/memory.limit_in_bytes": str(limit * MIB),
        f"{at}/memory.usage_in_bytes": str(used * MIB),
        f"{at}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cached * MIB}\n",
    }


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 4000),
        ("0::/\n", v2("", 3000, 1200, 200), 2000),
        ("0::/a/b\n", v2("a/b", None, 10), 4000),
        ("0::/a/b\n", v2("a/b", None, 10) | v2("a", 1000, 400), 600),
        ("0::/a/b\n", v2("a/b", 900, 850) | v2("a", 1000, 400), 50),
        ("0::/a/b\n", v2("a/b", 900, 950), 0),
        # Of a container, which sees its own group where the root is.
        ("0::/docker/0123\n", v2("", 2500, 500), 2000),
        ("9:name=systemd:/\n4:memory:/one/two\n1:cpu:/\n", v1("one/two", 1 << 40, 10) | v1("one", 700, 100, 50), 650),
        ("4:memory:/one\n0::/two\n", v1("one", 800, 100) | v2("unified/two", 650, 50), 600),
        ("broken\n", v2("", None, 3), 4000),
    ],
)
def test_the_least_of_all_limits_counts(tmp_path, groups, files, expected):
    assert memory.free_of_host(linux(tmp_path, 4000, groups, files), 1 << 50) == expected * MIB


def test_the_address_space_is_a_limit(tmp_path):
    root = linux(tmp_path, 4000, "0::/\n", used=300)
    assert memory.free_of_host(root, 1000 * MIB) == 700 * MIB
    assert memory.free_of_host(root, 200 * MIB) == 0


def test_nothing_is_known_without_the_files(tmp_path):
    assert memory.free_of_host(tmp_path, 1 << 40) is None


def test_accelerators_tell_what_they_have_left(monkeypatch):
    def device(stats: dict[str, int] | None, process: int = 0) -> SimpleNamespace:
        return SimpleNamespace(platform="gpu", process_index=process, memory_stats=lambda: stats)

    devices = [device({"bytes_limit": 10, "bytes_in_use": 3}), device({"bytes_limit": 10}), device(None)]
    assert memory.free(devices) == 7
    assert memory.free(devices[2:]) is None
    assert memory.free([device({"bytes_limit": 1}, process=1)]) is None
    monkeypatch.setattr(memory, "free_of_host", lambda: 5)
    assert memory.free(jax.devices()) == 5


def test_the_peak_can_begin_anew():
    memory.reset_peak()
    before = memory.peak()
    assert before is not None
    array = np.ones(64 * MIB // 8)
    after, now = memory.peak(), memory.resident()
    del array
    assert after is not None
    assert now is not None
    assert after >= max(before + 60 * MIB, now)
    memory.reset_peak()
    assert memory.peak() < after


def test_too_little_is_one_line():
    parts = {"weights": 6_200_000_000, "cache": 340_000_000, "nothing": 12}
    memory.check(parts, None, "")
    memory.check(parts, 6_540_000_012, "")
    with pytest.raises(MemoryError) as error:
        memory.check(parts, 6_540_000_011, "take a smaller batch")
    assert str(error.value) == (
        "about 6.5 GB are needed (weights 6.2, cache 0.3), 6.5 GB are free; take a smaller batch"
    )
    with pytest.raises(MemoryError, match=r"^about 3,000 kB are needed \(cache 3,000\), 1,000 kB are free; wait$"):
        memory.check({"cache": 3_000_000, "nothing": 12}, 1_000_000, "wait")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc keeps")
def test_what_threads_have_freed_is_given_back():
    """Blocks that lie below one still in use, as glibc returns only what is at the end of a thread's heap."""

    def blocks(_: int) -> list[bytearray]:
        return [bytearray(64 << 10) for _ in range(400)]

    with ThreadPoolExecutor(4) as threads:
        held = list(threads.map(blocks, range(4)))
        kept = [each[-1] for each in held]
        in_use = memory.resident()
        del held
        memory.give_back()
    assert kept
    assert in_use is not None
    assert memory.resident() < in_use - 64 * MIB
