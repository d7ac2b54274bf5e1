"""A file is whole or what it was before."""

from __future__ import annotations

import numpy as np
import pytest

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
