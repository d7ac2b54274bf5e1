"""Chat templates with an end: Jinja's sandbox keeps a template from everything but looping for hours."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

MOST_LINES = 5_000_000
"""Lines of a template that may run, loops counted as often as they turn: some seconds. Thousands of messages need a
hundredth of it."""

TEMPLATE = "<template>"
"""What Jinja calls the code of a template that is no file."""


@contextlib.contextmanager
def bounded_templates() -> Iterator[None]:
    """In this block and thread, a Jinja template that runs too many lines ends with a `ValueError`.

    Python counts them as it does for debuggers. Where one is at work, or measures coverage, nothing is counted.
    """
    if sys.gettrace() is not None:
        yield
        return
    left = MOST_LINES

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"the chat template runs more than {MOST_LINES:,} lines, so it may never end")
        return count

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return count if frame.f_code.co_filename == TEMPLATE else None

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(None)
