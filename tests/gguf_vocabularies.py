"""Vocabularies of GGUF files for tests, and llama.cpp reading them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from checkpoints_gguf import write_gguf

from griffin_jax.text.tokenizer import Tokenizer

PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = {byte: chr(byte) for byte in PRINTED} | {
    byte: chr(256 + index) for index, byte in enumerate(sorted(set(range(256)) - set(PRINTED)))
}
"""The letters that byte-level vocabularies write bytes with."""


def byte_level(tokens=("h", "i", "hi", "Ġ", "Ġhi"), merges=("h i", "Ġ hi"), **changes):
    """Metadata of a small byte-level vocabulary."""
    alphabet = [letter for letter in BYTES.values() if letter not in tokens]
    vocabulary = ["<|end|>", "<think>", *tokens, *alphabet]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3, 4] + [1] * (len(vocabulary) - 2),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
    }
    metadata.update({f"tokenizer.{name.replace('__', '.')}": value for name, value in changes.items()})
    return {name: value for name, value in metadata.items() if value is not None}


def sentencepiece(**changes):
    """Metadata of a small SentencePiece vocabulary, with scores and no merges."""
    pieces = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "▁he"]
    vocabulary = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(index) for index in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    metadata.update({f"tokenizer.{name.replace('__', '.')}": value for name, value in changes.items()})
    return {name: value for name, value in metadata.items() if value is not None}


def names(tokenizer: Tokenizer, metadata, text: str) -> list[str]:
    return [metadata["tokenizer.ggml.tokens"][token] for token in tokenizer.encode(text)]


def file_of(metadata: Mapping[str, Any], file: Path) -> Path:
    """A GGUF file with this metadata."""
    ids = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return write_gguf(file, checkpoints.tensors(), checkpoints.CONFIG | ids, metadata=metadata)


class LlamaCpp:
    """The tokenizer of llama.cpp for a GGUF file; the test is skipped where llama-cpp-python is not installed."""

    def __init__(self, file: Path):
        self._library = library = pytest.importorskip("llama_cpp")
        library.llama_backend_init()
        library.llama_log_set(_quiet(library), ctypes.c_void_p(0))
        parameters = library.llama_model_default_params()
        parameters.vocab_only = True
        self._model = library.llama_model_load_from_file(str(file).encode(), parameters)
        assert self._model, f"llama.cpp does not read {file}"
        self._vocabulary = library.llama_model_get_vocab(self._model)

    def close(self) -> None:
        self._library.llama_model_free(self._model)

    def encode(self, text: str, special: bool = True) -> list[int]:
        encoded = text.encode()
        tokens = (self._library.llama_token * (len(encoded) + 8))()
        count = self._library.llama_tokenize(
            self._vocabulary, encoded, len(encoded), tokens, len(tokens), special, True
        )
        assert count >= 0
        return list(tokens[:count])

    def ends(self) -> set[int]:
        """The tokens that end an answer."""
        count = self._library.llama_vocab_n_tokens(self._vocabulary)
        return {token for token in range(count) if self._library.llama_vocab_is_eog(self._vocabulary, token)}


_QUIET: list[Any] = []


def _quiet(library: Any) -> Any:
    """A log that says nothing; it must outlive its use."""
    if not _QUIET:
        _QUIET.append(library.llama_log_callback(lambda level, text, data: None))
    return _QUIET[0]
