"""Chat templates, vocabularies and tokenizers of somebody else: none of them takes all time or memory."""

from __future__ import annotations

import sys

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models

from griffin_jax.text import bounded
from griffin_jax.text.gguf_tokenizer import LONGEST_TOKEN
from griffin_jax.text.tokenizer import Tokenizer


def with_template(template: str) -> Tokenizer:
    backend = Backend(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template))


MESSAGES = [{"role": "user", "content": "a"}]
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MACROS = "{% macro m(n) %}{% for i in range(99) %}{{ m(n - 1) if n }}{% endfor %}{% endmacro %}{{ m(9) }}"


@pytest.mark.skipif(sys.gettrace() is not None, reason="a debugger or a measurement of coverage counts lines already")
@pytest.mark.parametrize("template", [NESTED, MACROS])
def test_templates_without_end(monkeypatch, template):
    monkeypatch.setattr(bounded, "MOST_LINES", 20_000)
    with pytest.raises(ValueError, match=r"chat template .*runs more than 20,000 lines") as error:
        with_template(template).chat_text(MESSAGES)
    assert len(str(error.value).splitlines()) == 1
    assert sys.gettrace() is None


def test_templates_with_an_end():
    tokenizer = with_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    assert tokenizer.chat_text(MESSAGES * 3000) == "a" * 3000


def test_long_tokens_of_sentencepiece():
    tokens = ["<unk>", "<s>", "</s>", "a", "a" * (LONGEST_TOKEN + 1)]
    fields = {"model": "llama", "tokens": tokens, "scores": [0.0] * 5, "unknown_token_id": 0}
    with pytest.raises(ValueError, match="a token of 1025 characters; at most 1024 are allowed"):
        Tokenizer.from_gguf({f"tokenizer.ggml.{name}": value for name, value in fields.items()})


class PanicException(BaseException):
    """As pyo3 calls it, and like it no `Exception`."""


@pytest.mark.parametrize(("raised", "found"), [(PanicException, ValueError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_a_panic_is_an_error_like_others(tmp_path, monkeypatch, raised, found):
    def fail(*_, **__):
        raise raised("called `Option::unwrap()` on a `None` value")

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", fail)
    with pytest.raises(found, match="on a `None` value"):
        Tokenizer.from_folder(tmp_path)
