"""Programs that are kept: by commands unless told not to, and never against the user's own settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from griffin_jax.utils import compilation_cache

SCRIPT = """
import sys
import jax
from griffin_jax.cli.main import main
from griffin_jax.utils import compilation_cache

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
assert main(sys.argv[1:]) == 0
print(hits.count("/jax/compilation_cache/cache_misses"), hits.count("/jax/compilation_cache/cache_hits"))
print(jax.config.jax_compilation_cache_dir)
"""


def run(tmp_path, model, *arguments: str, **environment: str) -> tuple[int, int, str]:
    """Programs that were compiled, programs that were found, and the folder."""
    command = ["generate", "--model", str(model), "--prompt", "A river", "--max-new-tokens", "4", *arguments]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command],
        env={**settings, "GRIFFIN_JAX_CACHE": str(tmp_path / "cache"), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts, folder = done.stdout.splitlines()[-2:]
    misses, hits = map(int, counts.split())
    return misses, hits, folder


def test_what_was_not_used_for_longest_goes(tmp_path):
    for age, name in enumerate(("newest", "middle", "oldest")):
        (tmp_path / name).write_bytes(bytes(1000))
        os.utime(tmp_path / name, ns=(10**18 - age, 10**17))
    (tmp_path / "folder").mkdir()
    compilation_cache.trim(tmp_path, 3000)
    assert len(list(tmp_path.iterdir())) == 4
    compilation_cache.trim(tmp_path, 2999)
    assert {path.name for path in tmp_path.iterdir()} == {"newest", "middle", "folder"}
    compilation_cache.trim(tmp_path / "nothing")


@pytest.mark.thorough
def test_a_second_start_compiles_nothing(worded, tmp_path):
    misses, hits, folder = run(tmp_path, worded.folder)
    assert misses > 3
    assert hits == 0
    assert folder.startswith(str(tmp_path / "cache" / "programs"))
    # JAX's own limit leaves these. With it, each new program reads the whole folder.
    assert not list(Path(folder).glob("*-atime"))
    again = run(tmp_path, worded.folder)
    assert again == (0, misses, folder)


@pytest.mark.slow
def test_it_can_be_switched_off(worded, tmp_path):
    assert run(tmp_path, worded.folder, "--no-compilation-cache") == (0, 0, "None")
    assert run(tmp_path, worded.folder, JAX_ENABLE_COMPILATION_CACHE="false") == (0, 0, "None")
    assert not (tmp_path / "cache").exists()
    own = str(tmp_path / "own")
    assert run(tmp_path, worded.folder, JAX_COMPILATION_CACHE_DIR=own)[2] == own
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert run(tmp_path, worded.folder) == (0, 0, "None")
