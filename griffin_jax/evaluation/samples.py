"""Texts to evaluate on, from files of users: everything that cannot be used is reported by line, and counted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from griffin_jax.utils.messages import shortened

SHOWN = 10
"""Lines that are named one by one for each reason; of the others the number."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One line of a JSONL file.

    Attributes:
        file: where it is from.
        line: its number, from 1.
        texts: the columns that were asked for, in that order.
    """

    file: str
    line: int
    texts: tuple[str, ...]

    @property
    def name(self) -> str:
        """Where it is, for people."""
        return f"{Path(self.file).name}, line {self.line}"


@dataclasses.dataclass
class Skipped:
    """What could not be used, and why: reason -> places."""

    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Notes one."""
        self.places.setdefault(reason, []).append(place)

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))

    def report(self, output: Any = None) -> None:
        """Says for people what is left out: places for each reason, at most `SHOWN` of them."""
        for reason, places in self.places.items():
            print(f"left out, {reason}: {shortened(places, SHOWN, '; ')}", file=output or sys.stderr, flush=True)


def read_jsonl(file: str | os.PathLike[str], columns: Sequence[str], skipped: Skipped) -> Iterator[Record]:
    """Records of a JSONL file (UTF-8) that have a text in each column; the others are noted in `skipped`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file}")
    with Path(file).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            texts = _texts(line, columns)
            if isinstance(texts, str):
                skipped.add(texts, Record(str(file), number, ()).name)
            else:
                yield Record(str(file), number, texts)


def _texts(line: bytes, columns: Sequence[str]) -> tuple[str, ...] | str:
    """The columns' texts, or why there are none."""
    try:
        found = json.loads(line)
    except UnicodeDecodeError:
        return "not UTF-8"
    except (json.JSONDecodeError, RecursionError):
        return "not JSON"
    if not isinstance(found, dict):
        return "no JSON object"
    for column in columns:
        if column not in found:
            return f"no column {column!r}"
        if not isinstance(found[column], str):
            return f"column {column!r} is no text"
        if not found[column].strip():
            return f"column {column!r} is empty"
        try:
            found[column].encode()
        except UnicodeEncodeError:
            return f"column {column!r} is not Unicode"
    return tuple(found[column] for column in columns)


def read_files(files: Iterable[Path], column: str, skipped: Skipped) -> Iterator[tuple[str, str]]:
    """Name and text of every line of JSONL files, and of every other file.

    Args:
        files: what is read, in this order.
        column: of JSONL that holds the text.
        skipped: what cannot be used, and why, is added.
    """
    for file in files:
        if file.suffix == ".jsonl":
            for record in read_jsonl(file, [column], skipped):
                yield record.name, record.texts[0]
        else:
            yield from read_texts([file], skipped)


def long_enough(
    texts: Iterable[tuple[str, str]], encode: Callable[[str], list[int]], least: int, skipped: Skipped
) -> Iterator[tuple[str, list[int]]]:
    """Name and tokens of the texts that have `least` tokens or more; the others are added to `skipped`."""
    for name, text in texts:
        tokens = encode(text)
        if len(tokens) < least:
            skipped.add(f"shorter than {least} tokens", name)
        else:
            yield name, tokens


def read_texts(files: Sequence[str | os.PathLike[str]], skipped: Skipped) -> Iterator[tuple[str, str]]:
    """Name and text of every file; those without one are noted in `skipped`.

    Raises:
        FileNotFoundError: one does not exist.
    """
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {file}")
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            skipped.add("not UTF-8", f"{file}, byte {error.start}")
            continue
        if text.strip():
            yield str(file), text
        else:
            skipped.add("empty", str(file))


def excerpt(after: str, before: str) -> Callable[[str], str]:
    """What follows the last `after` of a text, if it has one, and before the next `before`."""

    def cut(text: str) -> str:
        if after:
            text = text.rpartition(after)[2]
        return text.partition(before)[0] if before else text

    return cut


def sha256_of_files(files: Iterable[str | os.PathLike[str]]) -> str:
    """One hash of the contents of several files."""
    whole = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()


def nothing_left(skipped: Skipped, source: str) -> ValueError:
    """The error that no text could be used, with the reasons."""
    reasons = ", ".join(f"{len(places)} x {reason}" for reason, places in skipped.places.items())
    return ValueError(f"{source}: no text can be used ({reasons or 'there is none'})")


def as_json(skipped: Skipped) -> Mapping[str, Any]:
    """For results: how many, and where."""
    return {"count": len(skipped), "reasons": skipped.places}
