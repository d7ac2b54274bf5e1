"""Text to token ids and back, by a Hugging Face fast tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin_jax.model.config import ModelConfig
from griffin_jax.utils.transformers_import import import_transformers

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of a tokenizer; a folder with any of them has one."""

CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type`: tokens that are never part of a text, and tokens matched whole in a text."""

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclasses.dataclass(frozen=True)
class _Pretokenizer:
    """How a byte-level vocabulary cuts a text into words before it merges bytes.

    Attributes:
        split: regular expression of words.
        digits: whether every digit is first made a word of its own.
        whole_words: whether a word that is a token is taken whole, and not merged from bytes.
        nfc: whether texts are first composed to Unicode's form C.
        bos: whether texts begin with the first token (BOS) unless the file says otherwise.
    """

    split: str
    digits: bool = False
    whole_words: bool = False
    nfc: bool = False
    bos: bool = False


_LLAMA3 = _Pretokenizer(LLAMA3_SPLIT, whole_words=True, bos=True)
PRETOKENIZERS: dict[str, _Pretokenizer] = {
    "default": _Pretokenizer(GPT2_SPLIT),
    "gpt-2": _Pretokenizer(GPT2_SPLIT),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _Pretokenizer(QWEN2_SPLIT, nfc=True),
    "smollm": _Pretokenizer(GPT2_SPLIT, digits=True),
}
"""How texts are cut into words, by the `tokenizer.ggml.pre` of GGUF files."""


class Tokenizer:
    """Text to token ids and back.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    @property
    def size(self) -> int:
        """The largest token id plus one: how many rows of the embedding it needs."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

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
        """Token ids of a text.

        Args:
            text: the text.
            special: whether to begin with the first token (BOS), where the model was trained so.

        Raises:
            ValueError: the text has a lone surrogate, so it is not Unicode.
        """
        return self._tokenizer.encode(_unicode(text), add_special_tokens=special)

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
            ValueError: there is no chat template, or it rejects the messages.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": _unicode(messages)}]
        return self._apply_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)

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
            return self._tokenizer.apply_chat_template(list(messages), **arguments)
        except Exception as error:
            raise ValueError(f"the chat template rejects these messages: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files; `from_folder` reads them."""
        self._tokenizer.save_pretrained(folder)

    @staticmethod
    def is_in(folder: str | Path) -> bool:
        """Whether a folder holds the files of a tokenizer."""
        return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer in a folder, such as a Hugging Face checkpoint.

        Raises:
            ValueError: its files are missing or malformed.
        """
        transformers = import_transformers()
        # tokenizer.json says everything, and reading it directly does not pull in PyTorch as the automatic class
        # would; that one knows how to build a tokenizer from older files.
        exact = (Path(folder) / "tokenizer.json").is_file()
        reader = transformers.PreTrainedTokenizerFast if exact else transformers.AutoTokenizer
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            tokenizer = reader.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            raise ValueError(f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {error})") from error
        finally:
            transformers.logging.set_verbosity(verbosity)
        return cls(tokenizer)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata.

        Args:
            metadata: values by key, from `griffin_jax.checkpoints.sources.read_gguf_header`.

        Raises:
            ValueError: the vocabulary is incomplete, or of a kind that is not supported.
        """
        kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise ValueError("the GGUF file has no tokenizer.ggml.tokens")
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        special = {}
        for name, key in names.items():
            token = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if token is None:
                continue
            if not 0 <= token < len(tokens):
                raise ValueError(f"tokenizer.ggml.{key}_token_id is {token}, outside the {len(tokens)} tokens")
            special[name] = tokens[token]
        try:
            if kind == "gpt2":
                backend, bos = _byte_level(metadata, tokens)
            elif kind == "llama":
                backend, bos = _sentencepiece(metadata, tokens, special)
            else:
                raise ValueError(f"tokenizer.ggml.model is {kind!r}; supported are gpt2 and llama")
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"the GGUF file's tokenizer is incomplete ({type(error).__name__}: {error})") from error
        _add_special(backend, metadata, tokens)
        if metadata.get("tokenizer.ggml.add_bos_token", bos) and "bos_token" in special:
            _begin_with(backend, special["bos_token"])
        return cls(
            import_transformers().PreTrainedTokenizerFast(
                tokenizer_object=backend,
                chat_template=metadata.get("tokenizer.chat_template"),
                clean_up_tokenization_spaces=False,
                **special,
            )
        )


def _unicode(text: str) -> str:
    """The text; `ValueError` if it has lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not Unicode: {error}") from error
    return text


def check_fits(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise `ValueError` if the tokenizer has tokens that the model has no embedding for."""
    if tokenizer.size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} tokens, but the model's vocabulary only {config.vocab_size}; they do "
            "not belong together"
        )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Backend, bool]:
    """Byte-level BPE, and whether its texts begin with the first token by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRETOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {name!r}; supported are {', '.join(PRETOKENIZERS)}")
    kind = PRETOKENIZERS[name]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(_bpe(models.BPE, vocabulary, merges, ignore_merges=kind.whole_words))
    steps = [
        *([pre_tokenizers.Digits(individual_digits=True)] if kind.digits else []),
        pre_tokenizers.Split(Regex(kind.split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if kind.nfc:
        backend.normalizer = normalizers.NFC()
    return backend, kind.bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], special: Mapping[str, str]) -> tuple[Backend, bool]:
    """SentencePiece BPE with a fall-back to bytes, and whether its texts begin with the first token by default."""
    merges = (
        [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        if "tokenizer.ggml.merges" in metadata
        else _merges_of_scores(tokens, metadata["tokenizer.ggml.scores"])
    )
    build = import_transformers().LlamaTokenizer
    vocabulary = {token: index for index, token in enumerate(tokens)}
    named = {name: token for name, token in special.items() if name != "pad_token"}
    add_prefix_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer = _bpe(build, vocabulary, merges, add_prefix_space=add_prefix_space, **named)
    return tokenizer.backend_tokenizer, True


def _bpe(build: Any, vocabulary: dict[str, int], merges: list[tuple[str, ...]], **arguments: Any) -> Any:
    try:
        return build(vocab=vocabulary, merges=merges, **arguments)
    except Exception as error:
        raise ValueError(f"the GGUF file's vocabulary and merges contradict each other: {error}") from error


def _merges_of_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, ...]]:
    """The merges of a SentencePiece vocabulary: every way to put a token together, best score first."""
    if len(scores) != len(tokens):
        raise ValueError(f"the GGUF file has {len(tokens)} tokens, but {len(scores)} scores")
    index = {token: number for number, token in enumerate(tokens)}
    merges = []
    for token, number in index.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in halves if left in index and right in index]
        known.sort(key=lambda pair: (index[pair[0]], index[pair[1]]))
        merges += [(scores[number], pair) for pair in known]
    merges.sort(key=lambda merge: (merge[0], len(merge[1][0]), len(merge[1][1])), reverse=True)
    return [pair for _, pair in merges]


def _add_special(backend: Backend, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Declare the tokens that merges must not touch."""
    from tokenizers import AddedToken

    kinds = metadata.get("tokenizer.ggml.token_type") or []
    if len(kinds) not in (0, len(tokens)):
        raise ValueError(f"the GGUF file has {len(tokens)} tokens, but {len(kinds)} token types")
    by_kind = {
        kind: [
            AddedToken(token, normalized=False) for token, found in zip(tokens, kinds, strict=False) if found == kind
        ]
        for kind in (CONTROL, USER_DEFINED)
    }
    backend.add_special_tokens(by_kind[CONTROL])
    backend.add_tokens(by_kind[USER_DEFINED])


def _begin_with(backend: Backend, token: str) -> None:
    """Let every text begin with a token."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, backend.token_to_id(token))]
    )
