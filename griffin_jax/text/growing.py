"""The text of answers that are being written: what is new, and where a stop string ends it.

What a token adds to a text depends on those before it: its bytes may be part of a character, and the space that a first
word begins with is left out. So a text is settled up to tokens after which nothing before can change, and new tokens
are decoded together with the last settled ones, whose text is then taken off. Every token is decoded a few times, and
once more when its answer is complete: the text of an answer is that of all its tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from griffin_jax.text.stops import StopStrings, find_stop
from griffin_jax.text.tokenizer import Tokenizer

SHORT = 32
"""Tokens that are decoded again at every look, where their text cannot be settled; more wait until there are a quarter
more of them."""


@dataclasses.dataclass
class _Row:
    """One answer.

    Attributes:
        tokens: all of it so far.
        start: first token that new ones are decoded with.
        settled: tokens whose text is settled.
        context: the text of the tokens from `start` to `settled`.
        decoded: tokens at the last look.
        searched: text at the last look in which a stop string may have come: the new one, and some before it.
        waiting: settled text that was not given away.
        given: characters that were.
        tail: text after the settled one, which may change.
        end: settled text that a stop string may begin in.
        whole: text of the complete answer; None before.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    start: int = 0
    settled: int = 0
    context: str = ""
    decoded: int = 0
    searched: str = ""
    waiting: str = ""
    given: int = 0
    tail: str = ""
    end: str = ""
    whole: str | None = None


class GrowingText:
    """The text of growing answers: what is new, and whether a stop string was reached."""

    def __init__(self, tokenizer: Tokenizer | None, batch: int, stops: tuple[str, ...]):
        self._tokenizer, self._stops = tokenizer, stops
        self._strings = StopStrings(tokenizer, stops) if tokenizer is not None and stops else None
        # What is held back may be the beginning of one, of which the text leaves special tokens out.
        self._held = stops if self._strings is None else (*stops, *self._strings.without_special)
        self._rows = [_Row() for _ in range(batch)]
        self.stopped = [False] * batch
        self.ended = [False] * batch

    def update(
        self, tokens: Int[np.ndarray, "b n"], done: Bool[np.ndarray, "b"], *, last: bool = False
    ) -> list[list[int]]:
        """Takes over an answer's tokens; returns them without those after a stop string.

        Args:
            tokens: all of them so far, followed by negative numbers.
            done: which rows have ended.
            last: whether none come after these.
        """
        for index, (row, found) in enumerate(zip(self._rows, tokens, strict=True)):
            if self.stopped[index]:
                continue
            new = found[len(row.tokens) :]
            if more := new[new >= 0].tolist():
                row.tokens += more
                row.whole = None
            # Without stop strings nobody may want to see anything but the whole.
            if self._strings is not None:
                before = len(row.tokens) - len(more) if self._strings.special else row.decoded
                self._look(row, last=last or bool(done[index]))
                if self._has_stop(row, before):
                    self._cut(row, before)
                    self.stopped[index] = True
            self.ended[index] = bool(done[index]) or self.stopped[index]
        return [row.tokens for row in self._rows]

    def _look(self, row: _Row, *, last: bool = False) -> None:
        """Decode the new tokens."""
        assert self._tokenizer is not None
        count = len(row.tokens)
        unsettled = row.decoded - row.settled
        wait = unsettled // 4 if unsettled > SHORT and not last else 0
        if count <= row.decoded + wait:
            return
        row.decoded = count
        text = self._tokenizer.decode(row.tokens[row.start :])
        row.tail = text[len(row.context) :]
        row.searched = row.end + row.tail
        is_settled = row.tokens[-1] not in self._tokenizer.unsettling and not text.endswith("\ufffd")
        if not is_settled or not text.startswith(row.context):
            return
        row.waiting += row.tail
        row.end = (row.end + row.tail)[-self._longest :] if self._longest else ""
        # Tokens without text would leave it open whether the next ones begin a text.
        if row.tail:
            row.start, row.context = row.settled, self._tokenizer.decode(row.tokens[row.settled :])
        else:
            row.context = text
        row.settled, row.tail = count, ""

    @property
    def _longest(self) -> int:
        """Characters before new text that a stop string may begin in."""
        return max(map(len, self._stops), default=1) - 1

    def _has_stop(self, row: _Row, before: int) -> bool:
        """Whether a stop string has come since the row had so many tokens."""
        assert self._strings is not None
        if not self._strings.special:
            return find_stop(row.searched, self._stops) is not None
        # No character takes more tokens than the four bytes that it may have.
        start = max(0, before - 4 * (self._longest + 1))
        return self._strings.cut(row.tokens[start:]) is not None

    def _cut(self, row: _Row, before: int) -> None:
        """End a row before the first stop string, and its tokens with the one that completed it, after the first few,
        which have none."""
        assert self._strings is not None
        row.whole = self._strings.cut(row.tokens)
        low, high = before + 1, len(row.tokens)
        while low < high:
            middle = (low + high) // 2
            if self._strings.cut(row.tokens[:middle]) is None:
                low = middle + 1
            else:
                high = middle
        del row.tokens[low:]

    def texts(self) -> list[str]:
        """The text of every row."""
        return [self._whole(row) for row in self._rows]

    def _whole(self, row: _Row) -> str:
        if row.whole is None:
            row.whole = "" if self._tokenizer is None else self._tokenizer.decode(row.tokens)
        return row.whole

    def pieces(self, last: bool = False) -> list[str]:
        """What is new in every row. Held back, unless it is the last: what is not settled, such as a character whose
        bytes are not all there, and the beginning of what may become a stop string."""
        pieces = []
        for row, ended in zip(self._rows, self.ended, strict=True):
            if self._tokenizer is None:
                pieces.append("")
                continue
            if last or ended:
                piece = self._whole(row)[row.given :]
            else:
                self._look(row)
                held = max((_overlap(row.waiting, stop) for stop in self._held), default=0)
                piece = row.waiting[: len(row.waiting) - held]
                row.waiting = row.waiting[len(piece) :]
            row.given += len(piece)
            pieces.append(piece)
        return pieces


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
