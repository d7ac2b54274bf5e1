"""Stop strings, also those with special tokens, which the text of an answer leaves out."""

from __future__ import annotations

from collections.abc import Sequence

from griffin_jax.text.tokenizer import Tokenizer


class StopStrings:
    """The stop strings of an answer.

    Where one of them has a special token in it, such as `<|im_end|>`, all are looked for in the text with special
    tokens, as `stop_strings` of transformers are; else in the text without them.

    Args:
        tokenizer: what turns an answer's tokens into text.
        strings: the stop strings.

    Attributes:
        special: whether one of them has a special token in it.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]):
        self._tokenizer, self._strings = tokenizer, tuple(strings)
        self.special = any(token in string for string in self._strings for token in tokenizer.special_tokens)

    @property
    def without_special(self) -> tuple[str, ...]:
        """What of each stop string is text."""
        return tuple(text for string in self._strings if (text := self._tokenizer.without_special(string)))

    def cut(self, tokens: Sequence[int]) -> str | None:
        """The text before the first stop string, without special tokens; None if there is no stop string."""
        text = self._tokenizer.decode(tokens, skip_special=not self.special)
        at = find_stop(text, self._strings)
        if at is None:
            return None
        return self._tokenizer.without_special(text[:at]) if self.special else text[:at]


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)
