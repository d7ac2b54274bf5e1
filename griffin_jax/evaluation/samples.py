"""Reads texts from users' files; everything that cannot be used is counted, and reported with its line."""

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
"""The number of lines that are named one by one for each reason; the others are only counted."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One line of a JSONL file.

    Attributes:
        file: the file that the line comes from.
        line: the number of the line, from 1.
        texts: the texts of the requested columns, in their order.
    """

    file: str
    line: int
    texts: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name and the line, for people."""
        return f"{Path(self.file).name}, line {self.line}"


@dataclasses.dataclass
class Skipped:
    """The texts that could not be used: the places for each reason."""

    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Notes a place, with the reason."""
        self.places.setdefault(reason, []).append(place)

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))

    def report(self, output: Any = None) -> None:
        """Prints what is left out, for people: at most `SHOWN` places for each reason."""
        for reason, places in self.places.items():
            print(f"left out, {reason}: {shortened(places, SHOWN, '; ')}", file=output or sys.stderr, flush=True)


def read_jsonl(file: str | os.PathLike[str], columns: Sequence[str], skipped: Skipped) -> Iterator[Record]:
    """Records of a JSONL file (UTF-8) that have a text in each column; the others are noted in `skipped`.

    Raises:
        FileNotFoundError: the file does not exist.
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
    """The texts of the columns, or the reason why the line cannot be used."""
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
    """Yields the name and text of every line of JSONL files, and of every other file as a whole.

    Args:
        files: the files, in the order in which they are read.
        column: column of JSONL files that holds the text.
        skipped: receives what cannot be used, with the reason.
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
    """Yields the name and tokens of texts with at least `least` tokens; the others are added to `skipped`."""
    for name, text in texts:
        tokens = encode(text)
        if len(tokens) < least:
            skipped.add(f"shorter than {least} tokens", name)
        else:
            yield name, tokens


def read_texts(files: Sequence[str | os.PathLike[str]], skipped: Skipped) -> Iterator[tuple[str, str]]:
    """Yields the name and text of every file; files without a text are added to `skipped`.

    Raises:
        FileNotFoundError: a file does not exist.
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
    """A function that returns the part of a text after its last `after` (if it has one) and before the next `before`.

    An empty mark cuts nothing.
    """

    def cut(text: str) -> str:
        if after:
            text = text.rpartition(after)[2]
        return text.partition(before)[0] if before else text

    return cut


def sha256_of_files(files: Iterable[str | os.PathLike[str]]) -> str:
    """A single hash of the contents of several files."""
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
    """The number of skipped texts and their places, as results hold them."""
    return {"count": len(skipped), "reasons": skipped.places}
