"""Text that grows: its pieces are the whole, no token is decoded often, and stop strings are found anywhere."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from test_tokenizer import TEXTS, byte_level, sentencepiece

from griffin_jax.text.growing import GrowingText, find_stop
from griffin_jax.text.tokenizer import Tokenizer


class Counted:
    """A tokenizer that counts what it is given to decode."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self.count = tokenizer, 0
        self.unsettling, self.special_tokens = tokenizer.unsettling, tokenizer.special_tokens
        self.without_special = tokenizer.without_special

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        self.count += len(tokens)
        return self._tokenizer.decode(tokens, skip_special)


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece", "without a space before", "demo"])
def tokenizer(request) -> Tokenizer:
    if request.param == "demo":
        from griffin_jax.checkpoints.gguf import read_gguf_header

        return Tokenizer.from_gguf(read_gguf_header(request.getfixturevalue("demo_gguf"))[0])
    metadata = {
        "byte_level": byte_level,
        "sentencepiece": sentencepiece,
        "without a space before": lambda: sentencepiece(ggml__add_space_prefix=False),
    }
    return Tokenizer.from_gguf(metadata[request.param]())


def grown(
    tokenizer: object, tokens: list[int], step: int, stops: tuple[str, ...] = ()
) -> tuple[GrowingText, list[str]]:
    """The text of an answer that grows by so many tokens at a time, and its pieces."""
    text, pieces = GrowingText(tokenizer, 1, stops), []
    for end in range(1, len(tokens) + step, step):
        row = np.full((1, len(tokens)), -1)
        row[0, :end] = tokens[:end]
        text.update(row, np.array([False]), last=end >= len(tokens))
        if text.stopped[0]:
            break
        pieces += text.pieces()
    return text, pieces + text.pieces(last=True)


@pytest.mark.parametrize("step", [1, 3, 8])
def test_pieces_are_the_whole(tokenizer, step):
    rng, size = random.Random(step), tokenizer.size
    answers = [tokenizer.encode(text) for text in TEXTS if text]
    # And what no text has: single bytes, special tokens and halves of characters anywhere.
    answers += [[rng.randrange(size) for _ in range(60)] for _ in range(20)]
    few = [*sorted(tokenizer.unsettling)[-3:], *tokenizer.encode(" é🌋 a")]
    answers += [[rng.choice(few) for _ in range(60)] for _ in range(20)]
    for answer in answers:
        text, pieces = grown(tokenizer, answer, step)
        assert "".join(pieces) == tokenizer.decode(answer) == text.texts()[0]


def test_text_is_given_as_it_comes(tokenizer):
    answer = tokenizer.encode("hello hello h hi ell o he hell " * 10)
    _, pieces = grown(tokenizer, answer, 8)
    assert sum(bool(piece) for piece in pieces) > 0.7 * len(pieces)


@pytest.mark.parametrize("stops", [(), ("never written",)])
@pytest.mark.parametrize("content", ["text", "bytes"])
def test_no_token_is_decoded_often(tokenizer, stops, content):
    answer = tokenizer.encode("hello he said, h é🌋 " * 400)[:1900]
    if content == "bytes":
        answer = [sorted(tokenizer.unsettling)[-1]] * 1900
    counted = Counted(tokenizer)
    grown(counted, answer, 8, stops)
    assert counted.count <= (8 if content == "text" else 20) * len(answer)


@pytest.mark.parametrize("step", [1, 8])
def test_the_first_stop_string_ends_it(tokenizer, step):
    rng = random.Random(step)
    whole = tokenizer.decode(tokenizer.encode("hello he said, hé🌋llo hi hell " * 4))
    answer = tokenizer.encode(whole)
    for _ in range(20):
        start = rng.randrange(len(whole) - 6)
        stops = (whole[start : start + rng.randrange(1, 6)], "never written")
        text, pieces = grown(tokenizer, answer, step, stops)
        expected = tokenizer.decode(answer)
        assert text.stopped[0]
        assert "".join(pieces) == text.texts()[0] == expected[: find_stop(expected, stops)]
        (tokens,) = text.update(np.array([answer]), np.array([True]))
        assert find_stop(tokenizer.decode(tokens), stops) is not None
        assert find_stop(tokenizer.decode(tokens[:-1]), stops) is None
