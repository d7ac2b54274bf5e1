"""Tokenizers in the metadata of GGUF files, with the tokens of llama.cpp, which these files are made for.

What llama.cpp does with a vocabulary is read from its src/llama-vocab.cpp (https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from griffin_jax.text.pretokenizers import PRETOKENIZERS
from griffin_jax.utils.messages import CheckpointWarning, brief, is_out_of_memory, is_panic
from griffin_jax.utils.transformers_import import import_transformers

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Values of `tokenizer.ggml.token_type`: for what has no token, never part of a text, and matched whole in a text."""

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""The parts of keys of special tokens, by what transformers calls them."""

DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}
"""Special tokens of files that do not name them, by `tokenizer.ggml.model`."""

_ENDS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>"
    " <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜>"
    " [e~["
)
ENDS: frozenset[str] = frozenset(_ENDS.split())
"""Tokens that end an answer wherever a vocabulary has them, since few files say all that do."""

NO_ENDS = {
    "<|end|>": (
        {"<|return|>", "<|call|>"},
        {"<|return|>", "<|calls|>"},
        {"<|flush|>", "<|call|>"},
        {"<|flush|>", "<|calls|>"},
    ),
    "</s>": ({"<|tool_response>"},),
}
"""Tokens of `ENDS` that end no answer next to all of some others.

They are part of texts then: `<|end|>` as a whole, `</s>` like any word.
"""

FILL_IN_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Tokens of code models that end an answer, by the part of the key that names one where a file does."""

STRIPPING_MODELS = ("phi-3", "phi3")
"""Parts of `general.name` of models whose special tokens take in the white space after them."""

NOT_STRIPPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""Special tokens of those models that do not."""

_SPACE = "▁"

LONGEST_TOKEN = 1024
"""Characters that a token of a SentencePiece vocabulary may have; those of real ones have some dozens."""


class UnknownTokenizerError(ValueError):
    """The tokenizer is of a kind that is not supported, so the model can only be given token ids."""


def read_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """The text of every token.

    Raises:
        ValueError: there are none.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError("the GGUF file has no tokenizer.ggml.tokens")
    return [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]


def special_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    """The id of a special token, such as `eos`; None if the file has none.

    Args:
        metadata: values by key.
        name: what its key begins with after `tokenizer.ggml.`.
        count: number of tokens.

    Warns:
        CheckpointWarning: it is outside the vocabulary, and None or the default is taken.
    """
    default = DEFAULT_IDS.get(metadata.get("tokenizer.ggml.model", ""), {}).get(name)
    default = default if default is not None and default < count else None
    token = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token is None:
        return default
    if isinstance(token, int) and 0 <= token < count:
        return token
    warnings.warn(
        f"tokenizer.ggml.{name}_token_id is {token}, outside the {count} tokens; it is not used",
        CheckpointWarning,
        stacklevel=3,
    )
    return default


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer: those that the file names, and those that are known by their text.

    Raises:
        ValueError: there is no vocabulary.
    """
    tokens = read_tokens(metadata)
    index = {token: number for number, token in enumerate(tokens)}
    named = [special_id(metadata, name, len(tokens)) for name in ("eos", "eot", "eom")]
    found = [*named, *sorted(index[text] for text in _texts_of_ends(index))]
    for name, texts in FILL_IN_ENDS.items():
        token = special_id(metadata, name, len(tokens))
        found += [index[text] for text in texts if text in index] if token is None else [token]
    not_ends = {index[text] for text in _texts_of_no_ends(index)}
    return list(dict.fromkeys(token for token in found if token is not None and token not in not_ends))


def _texts_of_ends(known: Mapping[str, int]) -> set[str]:
    """The tokens of `ENDS` that end answers of a vocabulary."""
    return set(known.keys() & ENDS) - _texts_of_no_ends(known)


def _texts_of_no_ends(known: Mapping[str, int]) -> set[str]:
    """Those that do not."""
    return {
        text
        for text, neighbours in NO_ENDS.items()
        if text in known and any(others <= known.keys() for others in neighbours)
    }


def read_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The fast tokenizer of transformers that gives llama.cpp's tokens.

    Args:
        metadata: values by key.

    Raises:
        UnknownTokenizerError: the vocabulary is of a kind that is not supported.
        ValueError: it is incomplete.

    Warns:
        CheckpointWarning: the file does not say how words are cut, or a special token is outside the vocabulary.
    """
    tokens = read_tokens(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    ids = {name: special_id(metadata, key, len(tokens)) for name, key in SPECIAL.items()}
    special = {name: tokens[token] for name, token in ids.items() if token is not None}
    try:
        if kind == "gpt2":
            backend, bos = _byte_level(metadata, tokens)
        elif kind == "llama":
            backend, bos = _sentencepiece(metadata, tokens, special.get("unk_token")), True
        else:
            raise UnknownTokenizerError(f"tokenizer.ggml.model is {kind!r}; supported are gpt2 and llama")
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the GGUF file's tokenizer is incomplete ({type(error).__name__}: {error})") from error
    _add_special(backend, metadata, tokens)
    begin = special.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", bos) else None
    end = special.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    _frame(backend, begin, end)
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Backend, bool]:
    """Byte-level BPE, and whether its texts begin with the first token by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre")
    if not name:
        name = "default"
        warnings.warn(
            "there is no tokenizer.ggml.pre, as in files from before May 2024: texts are cut into words by a general"
            " rule, which may not be that of the model, and answers may be worse; take a newer file",
            CheckpointWarning,
            stacklevel=3,
        )
    if name not in PRETOKENIZERS:
        raise UnknownTokenizerError(f"tokenizer.ggml.pre is {name!r}; supported are {', '.join(PRETOKENIZERS)}")
    kind = PRETOKENIZERS[name]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(_bpe(models.BPE, tokens, merges, ignore_merges=kind.whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in kind.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, kind.bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], unknown: str | None) -> Backend:
    """SentencePiece BPE with a fall-back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if "tokenizer.ggml.scores" in metadata or "tokenizer.ggml.merges" not in metadata:
        merges = _merges_of_scores(tokens, metadata["tokenizer.ggml.scores"])
    else:
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(_bpe(models.BPE, tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # Normalizers see what lies between two special tokens, so each such text begins with a space.
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return backend


def _bpe(build: Any, tokens: Sequence[str], merges: list[tuple[str, ...]], **arguments: Any) -> Any:
    try:
        return build(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, **arguments)
    except BaseException as error:
        if is_out_of_memory(error) or (not isinstance(error, Exception) and not is_panic(error)):
            raise
        raise ValueError(f"the GGUF file's vocabulary and merges contradict each other ({brief(error)})") from error


def _merges_of_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, ...]]:
    """The merges of a SentencePiece vocabulary: every way to put a token together, best score first."""
    if len(scores) != len(tokens):
        raise ValueError(f"the GGUF file has {len(tokens)} tokens, but {len(scores)} scores")
    # Each is cut at every place, which takes memory that grows with the square of its length.
    if (longest := max(map(len, tokens))) > LONGEST_TOKEN:
        raise ValueError(f"the GGUF file has a token of {longest} characters; at most {LONGEST_TOKEN} are allowed")
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
    known = {token: index for index, token in enumerate(tokens)}
    of_kind = {
        kind: {token for token, found in zip(tokens, kinds, strict=False) if found == kind}
        for kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    controls = of_kind[CONTROL] | of_kind[UNKNOWN] | _texts_of_ends(known)
    for name, texts in FILL_IN_ENDS.items():
        if f"tokenizer.ggml.{name}_token_id" not in metadata:
            controls |= set(texts) & known.keys()
    no_ends = _texts_of_no_ends(known)
    controls -= no_ends
    defined = (of_kind[USER_DEFINED] - controls - no_ends) | (no_ends & {"<|end|>"})
    stripping = any(name in str(metadata.get("general.name", "")).lower() for name in STRIPPING_MODELS)

    def declared(texts: set[str]) -> list[AddedToken]:
        return [
            AddedToken(text, normalized=False, rstrip=stripping and text not in NOT_STRIPPING)
            for text in sorted(texts, key=known.__getitem__)
        ]

    backend.add_special_tokens(declared(controls))
    backend.add_tokens(declared(defined))


def _frame(backend: Backend, begin: str | None, end: str | None) -> None:
    """Let every text begin and end with a token."""
    from tokenizers import processors

    if begin is None and end is None:
        return
    first, last = ([] if begin is None else [begin]), ([] if end is None else [end])
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *first, "$B", *last],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys([*first, *last])],
    )
