"""Compiled programs that are kept on the disk, so that a second start need not compile them again.

This is JAX's persistent compilation cache. `griffin-jax` switches it on. The library does not, since that changes the
whole process; call `enable` for it, or set JAX_COMPILATION_CACHE_DIR.
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
"""What programs may take on the disk when `enable` is called; those that were not used for longest go."""


def enable(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Keep compiled programs, and use those that are kept, from now on in this process.

    Programs beyond `MAX_BYTES` are removed now, not whenever one is added: JAX's own limit reads the whole folder for
    each new program (jax 0.10 to 0.12), which takes a second and a half where there are 11,000.

    Nothing happens where JAX has a folder already, by JAX_COMPILATION_CACHE_DIR or its configuration, and where the
    cache is switched off with JAX_ENABLE_COMPILATION_CACHE=false.

    Args:
        folder: where they are kept; None for a folder of this kind of processor in the user's cache folder.

    Returns:
        The folder that is used; None if there is none, since it cannot be written to or the cache is switched off.
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
    # An answer takes a few programs, each of which compiles in less than JAX's limit of a second on some machines.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    trim(path)
    return path


def trim(folder: Path, most: int = MAX_BYTES) -> None:
    """Remove the files that were not used for longest, until the others have at most this many bytes.

    Other processes may do the same, or use what is removed: they compile it again.

    Args:
        folder: where programs are kept.
        most: bytes of those that stay.
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
    """What tells apart processors whose code differs: XLA compiles for just this one, and other machines may share the
    folder."""
    features = ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    digest = hashlib.sha256(f"{platform.processor()} {features}".encode()).hexdigest()
    return f"{platform.machine() or 'unknown'}-{digest[:12]}"
