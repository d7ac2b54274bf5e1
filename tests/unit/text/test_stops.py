"""Stop strings."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_vocabularies import byte_level

from griffin_jax.text.growing import GrowingText
from griffin_jax.text.stops import StopStrings
from griffin_jax.text.tokenizer import Tokenizer

TEXT = "hi<|end|>hi hi<think>\n<|end|>\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(byte_level())


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|end|>", "hi"),
        ("<|end|>\n", "hihi hi<think>\n"),
        ("hi<|end|>", ""),
        ("i<|end|>h", "h"),
        ("<think>", "hihi hi"),
        ("|end", None),
        ("hihi", ""),
    ],
)
def test_special_tokens_stop_answers(tokenizer, stop, text):
    """Tokens that are no text are found, too, and are left out of what stands before the stop."""
    tokens = tokenizer.encode(TEXT)
    assert StopStrings(tokenizer, [stop]).cut(tokens) == text
    growing = GrowingText(tokenizer, 1, (stop,))
    pieces = []
    for count in range(1, len(tokens) + 1):
        (row,) = growing.update(np.asarray([tokens[:count]]), np.asarray([False]))
        pieces += growing.pieces()
    assert growing.stopped == [text is not None]
    if text is not None:
        assert "".join(pieces) == text == growing.texts()[0]
        assert StopStrings(tokenizer, [stop]).cut(row) == text
        assert StopStrings(tokenizer, [stop]).cut(row[:-1]) is None


def test_stops_with_special_tokens_are_those_of_transformers(tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import StopStringCriteria

    tokens = tokenizer.encode(TEXT)
    for stop in ("<|end|>", "<|end|>\n", "hi<|end|>", "i<|end|>h", "<|end|>hi h", "never"):
        criterion = StopStringCriteria(tokenizer._tokenizer, [stop])
        ours = StopStrings(tokenizer, [stop])
        stopped = [
            any(bool(criterion(torch.tensor([tokens[:end]]), None)) for end in range(1, count + 1))
            for count in range(1, len(tokens) + 1)
        ]
        assert [ours.cut(tokens[:count]) is not None for count in range(1, len(tokens) + 1)] == stopped
