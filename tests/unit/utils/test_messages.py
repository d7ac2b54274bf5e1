from __future__ import annotations

import io

import pytest

from griffin_jax.utils.messages import shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x1b[2J and \x9b2J", "\\x1b[2J and \\x9b2J"),
        ("one\rtwo\x08\x7f", "one\\rtwo\\x08\\x7f"),
        ("abc\u202edcba\u2066", "abc\\u202edcba\\u2066"),
    ],
)
def test_a_model_cannot_command_a_terminal(written, seen):
    assert shown(written, Terminal()) == seen
    assert shown(written, io.StringIO()) == written


def test_what_is_text_is_shown_as_it_is():
    text = "a\tb\nnaïve — 東京 हिन्दी 👩‍👩‍👧 ↵"
    assert shown(text, Terminal()) == text
