"""Text to token ids and back, by a Hugging Face fast tokenizer."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from griffin_jax.model.config import ModelConfig
from griffin_jax.text.bounded import bounded_templates
from griffin_jax.text.gguf_tokenizer import read_tokenizer
from griffin_jax.text.tokenizer_class import class_for
from griffin_jax.utils.messages import brief, is_out_of_memory, is_panic
from griffin_jax.utils.transformers_import import import_transformers

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of a tokenizer; a folder with any of them has one."""

BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""Files of its settings."""

NAMED_TEMPLATES = "additional_chat_templates/*.jinja"
"""Files of further chat templates."""


class Tokenizer:
    """Text to token ids and back.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocabulary: rows of the model's embedding; a text with a token beyond them is refused. None for no limit.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None = None):
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary

    @property
    def size(self) -> int:
        """The largest token id plus one: how many rows of the embedding it needs."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def added(self) -> set[str]:
        """The tokens next to the vocabulary that texts are made of."""
        return set(self._tokenizer.added_tokens_encoder)

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokens that are no text, such as the one that ends an answer."""
        added = self._tokenizer.added_tokens_decoder.values()
        return tuple(sorted({str(token.content) for token in added if token.special}))

    def without_special(self, text: str) -> str:
        """A text without the special tokens in it."""
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, longest_first)), "", text) if longest_first else text

    @property
    def eos_token_id(self) -> int | None:
        """The token that the tokenizer itself ends a text with, if it has one."""
        return self._tokenizer.eos_token_id

    @property
    def bos_token_id(self) -> int | None:
        """The token that a text begins with, if the tokenizer has one, whether or not `encode` puts it there."""
        return self._tokenizer.bos_token_id

    @functools.cached_property
    def unsettling(self) -> frozenset[int]:
        """Tokens after which the text before may still change: single bytes, of which a vocabulary without characters
        for them makes some, and what `decode` leaves out."""
        byte = re.compile(r"<0x[0-9A-Fa-f]{2}>")
        found = {token for name, token in self._tokenizer.get_vocab().items() if byte.fullmatch(name)}
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(found | {token for token, what in added if what.special} | {*self._tokenizer.all_special_ids})

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The Jinja template of chats, or several by name; None if the model was not trained to chat."""
        return self._tokenizer.chat_template

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, which goes on: without the token (EOS) that some tokenizers end texts with.

        Args:
            text: the text.
            special: whether to begin with the first token (BOS), where the model was trained so.

        Raises:
            ValueError: the text has a lone surrogate, so it is not Unicode, or a token that the model has no embedding
                for.
        """
        tokens = self._known(self._tokenizer.encode(_unicode(text), add_special_tokens=special))
        return tokens[: len(tokens) - self._frame[1]] if special else tokens

    @property
    def beginning(self) -> list[int]:
        """The special tokens with which a text begins; they are the same for all texts."""
        return self.encode("A")[: self._frame[0]]

    @functools.cached_property
    def _frame(self) -> tuple[int, int]:
        """How many special tokens the tokenizer puts before and after a text."""
        whole, plain = (self._tokenizer.encode("A", add_special_tokens=special) for special in (True, False))
        more = len(whole) - len(plain)
        before = next((start for start in range(more) if whole[start : start + len(plain)] == plain), more)
        return before, more - before

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids.

        Args:
            tokens: the ids.
            skip_special: whether to leave out tokens that are not text, such as the one that ends an answer.
        """
        return self._tokenizer.decode(
            [int(token) for token in tokens], skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )

    def chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Args:
            messages: what the user says, or a list of `{"role": ..., "content": ...}`.

        Raises:
            ValueError: there is no chat template, it rejects the messages, or they have a token that the model has no
                embedding for.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": _unicode(messages)}]
        return self._known(self._apply_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))

    def chat_text(self, messages: Sequence[Mapping[str, str]], *, begin_answer: bool = True, **arguments: Any) -> str:
        """The text of a conversation, special tokens included.

        Args:
            messages: a list of `{"role": ..., "content": ...}`.
            begin_answer: whether to end where the model's answer begins, and not in the middle of the last message.
            **arguments: further arguments of the template, such as `enable_thinking`.

        Raises:
            ValueError: there is no chat template, or it rejects the messages.
        """
        return self._apply_template(
            messages,
            add_generation_prompt=begin_answer,
            continue_final_message=not begin_answer,
            tokenize=False,
            **arguments,
        )

    def _apply_template(self, messages: Sequence[Mapping[str, str]], **arguments: Any) -> Any:
        if not self._tokenizer.chat_template:
            raise ValueError("this tokenizer has no chat template, so the model was not trained to chat; use encode()")
        try:
            with bounded_templates():
                return self._tokenizer.apply_chat_template(list(messages), **arguments)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"the chat template rejects these messages: {error}") from error

    def beyond(self, vocabulary: int) -> list[str]:
        """The tokens that a model with so many has no embedding for."""
        return sorted(token for token, index in self._tokenizer.get_vocab().items() if index >= vocabulary)

    def within(self, vocabulary: int) -> Tokenizer:
        """This tokenizer for a model with so many tokens: it refuses texts that have others."""
        return Tokenizer(self._tokenizer, vocabulary)

    def _known(self, tokens: list[int]) -> list[int]:
        for token in tokens:
            if self._vocabulary is not None and token >= self._vocabulary:
                name = self._tokenizer.convert_ids_to_tokens(token)
                raise ValueError(
                    f"the text has the token {name!r} of id {token}, and the model has no embedding for it: its"
                    f" vocabulary is [0, {self._vocabulary - 1}]; leave it out"
                )
        return tokens

    @property
    def digest(self) -> str:
        """A hash of what texts become tokens by, chat template included: equal for equal tokenizers."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        said = {
            "tokenizer": self._tokenizer.get_vocab() if backend is None else backend.to_str(),
            "template": self._tokenizer.chat_template,
            "special": {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()},
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files; `from_folder` reads them."""
        self._tokenizer.save_pretrained(folder)

    @staticmethod
    def is_in(folder: str | Path) -> bool:
        """Whether a folder holds the files of a tokenizer."""
        return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)

    @classmethod
    def files_in(cls, folder: str | Path) -> list[Path]:
        """The files that `from_folder` reads, as far as they are there; none in a folder without a tokenizer."""
        folder = Path(folder)
        if not cls.is_in(folder):
            return []
        # Where there is a tokenizer.json, no other vocabulary is read.
        exact = (folder / "tokenizer.json").is_file()
        vocabularies = ("tokenizer.json",) if exact else ("tokenizer.model", "vocab.json", "merges.txt")
        named = (folder / name for name in (*vocabularies, *BESIDE))
        return [file for file in (*named, *sorted(folder.glob(NAMED_TEMPLATES))) if file.is_file()]

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer in a folder, such as a Hugging Face checkpoint.

        Raises:
            ImportError: its files are of a kind that another package reads, and that is not installed.
            ValueError: its files are missing or malformed.
        """
        transformers = import_transformers()
        folder = Path(folder)
        exact = (folder / "tokenizer.json").is_file()
        if not exact and not (folder / "vocab.json").is_file():
            _check_readable(folder / "tokenizer.model")
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            # The automatic class, which imports PyTorch, only where it is to build a tokenizer from older files.
            reader = class_for(folder) if exact else transformers.AutoTokenizer
            # Without the argument, transformers asks on stdin whether to run code that lies in the folder.
            tokenizer = reader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except BaseException as error:
            if is_out_of_memory(error) or (not isinstance(error, Exception) and not is_panic(error)):
                raise
            raise ValueError(f"{folder}: the tokenizer cannot be read ({brief(error)})") from error
        finally:
            transformers.logging.set_verbosity(verbosity)
        return cls(tokenizer)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata.

        Args:
            metadata: values by key, from `griffin_jax.checkpoints.sources.read_gguf_header`.

        Raises:
            UnknownTokenizerError: the vocabulary is of a kind that is not supported.
            ValueError: it is incomplete.
        """
        return cls(read_tokenizer(metadata))


def _check_readable(file: Path) -> None:
    """Raise unless this is a tokenizer.model, and the package that reads it is there; transformers' errors mislead.

    Raises:
        ImportError: the package is not installed.
        ValueError: the file is of neither kind.
    """
    if not file.is_file():
        return
    content = file.read_bytes()
    if re.match(rb"[A-Za-z0-9+/=]+ [0-9]+\n", content):
        if importlib.util.find_spec("tiktoken") is None:
            raise ImportError(f"{file}: is a vocabulary of tiktoken, which is not installed: pip install tiktoken")
        return
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(
            f"{file}: is read with sentencepiece, which is not installed: pip install sentencepiece"
        ) from error
    try:
        found = content and SentencePieceProcessor(model_proto=content).get_piece_size()
    except (RuntimeError, OSError, ValueError, TypeError):
        found = 0
    if not found:
        raise ValueError(f"{file}: the tokenizer cannot be read (it is no SentencePiece model)")


def _unicode(text: str) -> str:
    """The text; `ValueError` if it has lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not Unicode: {error}") from error
    return text


def check_fits(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise `ValueError` if the tokenizer's vocabulary is larger than the model's.

    Tokens that were added to it, such as one for padding, may lie beyond the embedding: no text needs them.
    """
    if set(tokenizer.beyond(config.vocab_size)) - tokenizer.added:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens, but the model's vocabulary only {config.vocab_size}; they do "
            "not belong together"
        )
