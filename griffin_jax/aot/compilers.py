"""XLA's compilers for chips that you don't have: found in this environment, or fetched into a folder outside of it.

The compilers are the plugins with which JAX runs on such chips. On a machine without the chip, they stay out of the
environment: JAX would load them in every process, and complain in each about missing drivers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from griffin_jax.utils.download import cache_folder, run_pip
from griffin_jax.utils.wholefile import hidden_folder

Platform = Literal["cuda", "tpu"]
MODULES: dict[Platform, tuple[str, ...]] = {
    "cuda": ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"),
    "tpu": ("libtpu",),
}
MEGABYTES: dict[Platform, int] = {"cuda": 182, "tpu": 137}
"""Size of the download for each platform, without CUDA, which compiling does not need."""


def requirements(platform: Platform) -> list[str]:
    """The packages that fit the installed JAX, in the notation of pip."""
    if platform == "cuda":
        version = importlib.metadata.version("jaxlib")
        return [f"jax-cuda12-plugin=={version}", f"jax-cuda12-pjrt=={version}"]
    wanted = [re.match(r"(libtpu\s*[^;]*)", line) for line in importlib.metadata.requires("jax") or []]
    return [match[1].replace(" ", "") for match in wanted if match][:1] or ["libtpu"]


def folder(platform: Platform) -> Path:
    """The folder in which a fetched compiler is kept."""
    name = re.sub(r"[^\w.\-]+", "-", requirements(platform)[0]).strip("-.")
    return cache_folder() / "compilers" / f"{name}-{sys.implementation.cache_tag}"


def find(platform: Platform) -> Path | None:
    """The folder that must be on the compiling process's path; None if the environment itself has the compiler.

    Raises:
        FileNotFoundError: the compiler is neither in the environment nor in the folder.
    """
    if any(map(_installed, MODULES[platform])):
        return None
    if folder(platform).is_dir():
        return folder(platform)
    raise FileNotFoundError(f"XLA's compiler for {platform} has not been fetched")


def fetch(platform: Platform, notice: Callable[[str], None] = lambda line: None) -> Path | None:
    """Like `find`, but download a missing compiler, without its dependencies. The folder appears whole or not at all.

    Args:
        platform: platform of the chip.
        notice: called with one line before a download.

    Raises:
        RuntimeError: the compiler cannot be downloaded or written.
    """
    try:
        return find(platform)
    except FileNotFoundError:
        pass
    wanted, target = requirements(platform), folder(platform)
    notice(f"fetching XLA's compiler for {platform} once ({MEGABYTES[platform]} MB): {' '.join(wanted)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with hidden_folder(target) as temporary:
            whole = temporary / "whole"
            if reason := run_pip("install", "--no-compile", "--target", str(whole), *wanted):
                raise RuntimeError(_help(platform, reason))
            try:
                whole.rename(target)
            except OSError:
                # Another process was faster; its copy is as good.
                if not target.is_dir():
                    raise
                shutil.rmtree(whole)
    except OSError as error:
        raise RuntimeError(_help(platform, f"{target.parent} cannot be written ({error})")) from error
    return target


def search_path(folder: Path | None) -> str:
    """PYTHONPATH for a process that sees what this process sees, and a fetched compiler."""
    own = [os.path.abspath(path) for path in sys.path]
    return os.pathsep.join(own if folder is None else [*own, str(folder)])


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _help(platform: Platform, reason: str) -> str:
    return (
        f"XLA's compiler for {platform} could not be fetched: {reason}. It exists for Linux; where there is a network,"
        f" `python -m pip install --no-deps --target {folder(platform)} {' '.join(requirements(platform))}` gets it"
    )
