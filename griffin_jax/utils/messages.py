"""Parts of messages to people."""

from __future__ import annotations

from collections.abc import Sequence


def brief(error: BaseException) -> str:
    """An error of another package: its type and the beginning of its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def shortened(names: Sequence[str], limit: int, separator: str = ", ") -> str:
    """The first `limit` names, and how many more there are."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more


class CheckpointWarning(UserWarning):
    """Warns of something in a checkpoint that is left out, or that may be wrong with it."""
