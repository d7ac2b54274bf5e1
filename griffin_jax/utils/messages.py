"""Helpers for messages to people."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from typing import TextIO

OUT_OF_MEMORY = (
    "can't start new thread", "std::bad_alloc", "RESOURCE_EXHAUSTED", "annot allocate memory", "can't allocate memory",
)  # fmt: skip
"""What errors of Python, C++, XLA, the operating system and PyTorch say when memory runs out."""


CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters with which a text can control a terminal or look like another text."""


def brief(error: BaseException) -> str:
    """The type of another package's error and the beginning of its first line."""
    lines = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {lines[0].encode(errors='replace').decode()[:300]}" if lines else type(error).__name__
    )


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a Rust library, which pyo3 does not make a subclass of `Exception`."""
    return type(error).__name__ == "PanicException"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of any package says that memory, or a thread with its stack, could not be had."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(said in str(error) for said in OUT_OF_MEMORY)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    """A text from a file as one line that cannot control a terminal: unprintable characters are escaped."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def shown(text: str, stream: TextIO) -> str:
    """What a model wrote, as it may be written to `stream`.

    In a terminal, control characters would move the cursor, change the title or turn the direction of writing. They are
    escaped, except for line breaks and tabs. Files get every character.
    """
    if not stream.isatty():
        return text
    return CONTROLS.sub(lambda found: _escaped(found[0]), text)


def shortened(names: Sequence[str], limit: int, separator: str = ", ") -> str:
    """The first `limit` names, and how many more there are."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more


class CheckpointWarning(UserWarning):
    """Warns that something in a checkpoint is left out, or may be wrong."""


class SpeedWarning(UserWarning):
    """Warns that answers are right, but slower than they need be."""
