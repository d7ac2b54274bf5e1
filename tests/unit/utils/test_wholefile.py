"""A file is whole or what it was before."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from griffin_jax.utils import wholefile
from griffin_jax.utils.arrayfile import load_arrays
from griffin_jax.utils.wholefile import replacing, write_text


def test_existing_files_are_replaced(tmp_path):
    for text in ("first", "sécond"):
        write_text(tmp_path / "file.txt", text)
        assert (tmp_path / "file.txt").read_text(encoding="utf-8") == text
    with replacing(tmp_path / "file.npz") as partial, partial.open("wb") as file:
        np.savez_compressed(file, x=np.arange(3))
    assert np.load(tmp_path / "file.npz")["x"].tolist() == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.npz", "file.txt"]


def test_failures_change_nothing(tmp_path):
    write_text(tmp_path / "file.txt", "before")

    def interrupted() -> None:
        with replacing(tmp_path / "file.txt") as partial:
            partial.write_text("half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "file.txt").read_text() == "before"
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "nowhere" / "file.txt", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_planted_links_are_not_followed(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    names = iter(["a" * 16, "b" * 16])
    monkeypatch.setattr(wholefile.secrets, "token_hex", lambda size: next(names))
    wholefile.hidden(tmp_path / "file.txt").symlink_to(mine)
    names = iter(["a" * 16])
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file.txt", "text")
    assert mine.read_text() == "mine"


def test_names_cannot_be_guessed(tmp_path):
    assert wholefile.hidden(tmp_path / "x") != wholefile.hidden(tmp_path / "x")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux does")
def test_what_is_swept(tmp_path):
    """Only what a process of this machine left that is gone, and only of the same target."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as running:
        started = wholefile._start(running.pid)
        host, end = wholefile._host(), "0" * 16
        kept = [
            f".x.partial-{host}-{running.pid}-{started}-{end}",
            f".x.partial-{'0' * 8}-1-1-{end}",
            f".xy.partial-{host}-999999999-1-{end}",
            f".x.partial-{host}-999999999-1-{end}.mine",
            ".x.partial-mine",
            ".x",
            "x.partial",
        ]
        swept = [f".x.partial-{host}-999999999-1-{end}", f".x.partial-{host}-{running.pid}-{started + 1}-{end}"]
        for name in (*kept, *swept):
            (tmp_path / name).mkdir()
            (tmp_path / name / "inside").write_text("text")
        write_text(tmp_path / "x", "text")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "x"])
        running.kill()
    # It has ended, and so goes what it left.
    write_text(tmp_path / "x", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept[1:], "x"])


def test_arrays_are_saved_without_traces(tmp_path, monkeypatch):
    from griffin_jax.utils import arrayfile

    seen = []
    replace = wholefile.os.replace
    monkeypatch.setattr(wholefile.os, "replace", lambda *two: seen.extend(tmp_path.iterdir()) or replace(*two))
    arrayfile.save_arrays(tmp_path / "a", "test 1", {"x": np.arange(3)}, {})
    assert len(seen) == 1
    assert arrayfile.load_arrays(tmp_path / "a", "test 1")[0]["x"].tolist() == [0, 1, 2]


def test_arrays_of_dtypes_that_numpy_lacks(tmp_path):
    header = b'{"__metadata__":{"format":"test 1"},"x":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"a is damaged: ") as error:
        load_arrays(tmp_path / "a", "test 1")
    assert len(str(error.value).splitlines()) == 1
