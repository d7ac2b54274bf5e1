"""The text of answers that are being written: what is new, and where a stop string ends it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int

from griffin_jax.text.stops import StopStrings
from griffin_jax.text.tokenizer import Tokenizer


class GrowingText:
    """The text of growing answers: what is new, and whether a stop string was reached."""

    def __init__(self, tokenizer: Tokenizer | None, batch: int, stops: tuple[str, ...]):
        self._tokenizer, self._stops = tokenizer, stops
        self._strings = StopStrings(tokenizer, stops) if tokenizer is not None and stops else None
        self._rows: list[list[int]] = [[] for _ in range(batch)]
        self._texts = [""] * batch
        self._given = [0] * batch
        self.stopped = [False] * batch
        self.ended = [False] * batch

    def update(self, tokens: Int[np.ndarray, "b n"], done: Bool[np.ndarray, "b"]) -> list[list[int]]:
        """Takes over an answer's tokens; returns them without those behind a stop string."""
        for index, row in enumerate(tokens):
            if self.stopped[index]:
                continue
            self._rows[index] = [int(token) for token in row if token >= 0]
            if self._stops:
                self._cut(index)
            elif self._tokenizer is not None:
                self._texts[index] = self._tokenizer.decode(self._rows[index])
            self.ended[index] = bool(done[index]) or self.stopped[index]
        return self._rows

    def _cut(self, index: int) -> None:
        """Ends a row before the first stop string, and its tokens with the one that completed it."""
        assert self._tokenizer is not None
        assert self._strings is not None
        row = self._rows[index]
        text = self._strings.cut(row)
        if text is None:
            text = self._tokenizer.decode(row)
        else:
            self.stopped[index] = True
            low, high = 1, len(row)
            while low < high:
                middle = (low + high) // 2
                if self._strings.cut(row[:middle]) is None:
                    low = middle + 1
                else:
                    high = middle
            self._rows[index] = row[:low]
        self._texts[index] = text

    def texts(self) -> list[str]:
        return list(self._texts)

    def pieces(self, last: bool = False) -> list[str]:
        """What is new in every row. Held back, unless it is the last: a character whose bytes are not
        all there, and the beginning of what may become a stop string."""
        pieces = []
        for index, text in enumerate(self._texts):
            end = len(text)
            if not (last or self.ended[index]):
                end = len(text.rstrip("\ufffd"))
                held = max((_overlap(text[:end], stop) for stop in self._stops), default=0)
                end -= held
            pieces.append(text[self._given[index] : end])
            self._given[index] = max(self._given[index], end)
        return pieces


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
