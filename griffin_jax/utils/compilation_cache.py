"""Keeps compiled programs on disk, so that a second start need not compile them again.

This is JAX's persistent compilation cache. `griffin-jax` switches it on. The library does not, because that affects the
whole process: call `enable`, or set JAX_COMPILATION_CACHE_DIR.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import jax

from griffin_jax.utils.download import cache_folder

MAX_BYTES = 2 << 30
"""Bytes of programs on disk that `enable` leaves; it removes the least recently used first."""


def enable(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Keep compiled programs on disk from now on in this process, and use those that are there.

    Programs beyond `MAX_BYTES` are removed once, by this call, and not whenever one is added: JAX's own limit reads the
    whole folder for each new program (jax 0.10 to 0.12), which takes a second and a half if it holds 11,000.

    Nothing changes if JAX already has a folder, from JAX_COMPILATION_CACHE_DIR or its configuration, or if
    JAX_ENABLE_COMPILATION_CACHE=false switches the cache off.

    Args:
        folder: folder for the programs; None for one in the user's cache folder that is specific to this kind of
            processor.

    Returns:
        The folder that is used; None if it cannot be written to, or if the cache is switched off.
    """
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"]:
        return None
    if settings["jax_compilation_cache_dir"]:
        return Path(settings["jax_compilation_cache_dir"])
    path = cache_folder() / "programs" / _processor() if folder is None else Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(path, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    # JAX keeps programs that compile for at least a second; on some machines those of an answer take less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    trim(path)
    return path


def trim(folder: Path, most: int = MAX_BYTES) -> None:
    """Remove the least recently used files until the others have at most `most` bytes.

    Other processes may trim the same folder at the same time. If they need what was removed, they compile it again.

    Args:
        folder: folder that holds the programs.
        most: bytes that may stay.
    """
    files = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    files.append((max(found.st_atime_ns, found.st_mtime_ns), found.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size


def _processor() -> str:
    """A name that differs between kinds of processors.

    XLA compiles for exactly this kind, and other machines may share the folder.
    """
    features = ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    digest = hashlib.sha256(f"{platform.processor()} {features}".encode()).hexdigest()
    return f"{platform.machine() or 'unknown'}-{digest[:12]}"
