"""Writes scores to a file text by text, so that an interrupted evaluation resumes where it stopped."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from griffin_jax.parallel.distributed import check_same, from_first
from griffin_jax.utils.wholefile import write_text

FILE = "scores.jsonl"


class Journal:
    """One file in the folder of an evaluation: its settings, then the scores of every text as a line of JSON.

    An incomplete last line, left by a process that was killed while writing, is dropped.

    Args:
        folder: the folder, which is made if it does not exist.
        settings: everything that the scores depend on.
        overwrite: drop scores of other settings, or a damaged file, instead of raising an error.
        unused: names of settings that may be None or missing as long as no score depends on them, and be given later.

    Raises:
        ValueError: the folder holds scores of other settings, or the file is damaged or of another kind.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        overwrite: bool = False,
        unused: Collection[str] = (),
    ):
        self.folder = Path(folder)
        self._file = self.folder / FILE
        self.scores: dict[str, Any] = {}
        wanted = json.loads(json.dumps(settings))
        try:
            lines = self._read()
            if lines:
                had = lines[0]["settings"]
                wanted = _completed(wanted, had, unused)
                self._check(_completed(had, wanted, unused), wanted)
                self.scores = {line["text"]: line["scores"] for line in lines[1:]}
                if had == wanted:
                    return
        except ValueError:
            if not overwrite:
                raise
            lines, wanted = [], json.loads(json.dumps(settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [{"settings": wanted}, *lines[1:]]
        write_text(self._file, "".join(json.dumps(line) + "\n" for line in lines))

    def add(self, scores: Mapping[str, Any]) -> None:
        """Writes the scores of some texts, by name, as values that JSON can hold. They are on disk when it returns."""
        with self._file.open("a", encoding="utf-8") as file:
            for text, found in scores.items():
                file.write(json.dumps({"text": text, "scores": found}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.scores.update(scores)

    @classmethod
    def going_on(cls, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> Journal:
        """The journal of these settings, for work that it only speeds up: scores of other settings are dropped."""
        return cls(folder, settings, overwrite=True)

    def remove(self) -> None:
        """Deletes the file, and its folder if nothing else is in it."""
        self._file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _read(self) -> list[dict[str, Any]]:
        if not self._file.is_file():
            return []
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self._file.open("r+b") as file:
                file.truncate(len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            if (lines and not isinstance(lines[0]["settings"], dict)) or any(
                {"text", "scores"} - line.keys() for line in lines[1:]
            ):
                raise ValueError("it is another kind of file")
            if not all(isinstance(line["text"], str) for line in lines[1:]):
                raise ValueError("names of texts must be texts")
        except (ValueError, AttributeError, LookupError, RecursionError, TypeError) as error:
            raise ValueError(f"{self._file} is damaged ({error}); give --overwrite or another --output") from error
        return lines

    def _check(self, had: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        changed = [
            f"{name} was {had.get(name)!r:.60}, is {wanted.get(name)!r:.60}"
            for name in sorted(had.keys() | wanted.keys())
            if had.get(name) != wanted.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds scores of other settings ({'; '.join(changed)}); give another --output, or"
                " --overwrite to drop them"
            )


def _completed(settings: Mapping[str, Any], others: Mapping[str, Any], unused: Collection[str]) -> dict[str, Any]:
    """Settings in which those of `unused` that are None or missing are taken from others."""
    return {**settings, **{name: others[name] for name in unused if name in others and settings.get(name) is None}}


class Mirror(Journal):
    """The scores of a journal that another process writes."""

    def __init__(self, scores: Mapping[str, Any]):
        self.scores = dict(scores)

    def add(self, scores: Mapping[str, Any]) -> None:
        """Takes over what the other process writes."""
        self.scores.update(scores)


def open_journal(
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    *,
    overwrite: bool = False,
    unused: Collection[str] = (),
) -> Journal:
    """A `Journal`, which only the first of several processes writes.

    Raises:
        ValueError: as from `Journal`; or the processes have different settings, so different texts or models.
    """
    check_same("the texts, the model or an option", sorted(settings.items()))
    opened: list[Journal] = []

    def scores() -> dict[str, Any]:
        opened.append(Journal(folder, settings, overwrite=overwrite, unused=unused))
        return opened[0].scores

    found = from_first(scores)
    return opened[0] if opened else Mirror(found)
