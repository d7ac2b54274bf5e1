"""Tokenizers of GGUF files have the tokens of llama.cpp, here written down from llama-cpp-python 0.3.36.

Where llama-cpp-python is installed, it reads the same files next to it.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from gguf_vocabularies import BYTES, LlamaCpp, byte_level, file_of, names, sentencepiece

from griffin_jax.checkpoints.gguf import read_gguf_header
from griffin_jax.checkpoints.loading import load_model, open_source
from griffin_jax.text.gguf_tokenizer import UnknownTokenizerError, end_tokens
from griffin_jax.text.pretokenizers import PRETOKENIZERS
from griffin_jax.text.tokenizer import Tokenizer
from griffin_jax.utils.messages import CheckpointWarning

PROBE = "I'LLx pay $12345,\u00a0naïve 漢字aB\r\n\n  x=Ab e\u0301 ١٢?\n y"
WORDS = {
    "default": (
        "I|'|LLx| pay| |$|123|45|,|\xa0|na\xefve| \u6f22\u5b57aB|\r\n\n | x|=|Ab| e|\u0301| |\u0661\u0662|?|\n| y"
    ),
    "gpt-2": "I|'|LLx| pay| $|12345|,|\xa0|na\xefve| \u6f22\u5b57aB|\r\n\n | x|=|Ab| e|\u0301| \u0661\u0662|?|\n| y",
    "smollm": (
        "I|'|LLx| pay| $|1|2|3|4|5|,|\xa0|na\xefve| \u6f22\u5b57aB|\r\n\n | x|=|Ab| e|\u0301| |\u0661|\u0662|?|\n| y"
    ),
    "falcon": (
        "I|'|LLx| pay| |$|123|45|,|\xa0|na\xefve| \u6f22\u5b57aB|\r\n\n | x|=|Ab| e|\u0301| \u0661\u0662|?|\n| y"
    ),
    "llama-bpe": (
        "I|'LL|x| pay| $|123|45|,|\xa0na\xefve| \u6f22\u5b57aB|\r\n\n| | x|=Ab| e|\u0301| |\u0661\u0662|?\n| y"
    ),
    "dbrx": "I|'LL|x| pay| $|123|45|,|\xa0na\xefve| \u6f22\u5b57aB|\r\n\n| | x|=Ab| e|\u0301| |\u0661\u0662|?\n| y",
    "glm4": "I|'LL|x| pay| $|123|45|,|\xa0na\xefve| \u6f22\u5b57aB|\r\n\n| | x|=Ab| e|\u0301| |\u0661\u0662|?\n| y",
    "qwen2": (
        "I|'LL|x| pay| $|1|2|3|4|5|,|\xa0na\xefve| \u6f22\u5b57aB|\r\n\n| | x|=Ab| e|\u0301| |\u0661|\u0662|?\n| y"
    ),
    "qwen35": (
        "I|'LL|x| pay| $|1|2|3|4|5|,|\xa0na\xefve| \u6f22\u5b57aB|\r\n\n| | x|=Ab| e\u0301| |\u0661|\u0662|?\n| y"
    ),
    "laguna": (
        "I|'LL|x| pay| $|1|2|3|4|5|,|\xa0na\xefve| \u6f22\u5b57aB|\r|\n\n| | x|=Ab| e|\u0301| |\u0661|\u0662|?|\n| y"
    ),
    "minicpm5": (
        "I|'LL|x| pay| $|123|45|,|\xa0na\xefve| \u6f22\u5b57aB|\r\n\n| | x|=Ab| e|\u0301| |\u0661\u0662|?\n| y"
    ),
    "ufakzeka": (
        "I|'LLx| pay| $|1|2|3|4|5|,|\xa0na\xefve| \u6f22\u5b57aB|\r\n\n| | x|=Ab| e|\u0301| |\u0661|\u0662|?\n| y"
    ),
    "jais-2": "I|'LL|x| pay| $|123|45|,|\xa0na\xefve| \u6f22\u5b57aB|\r\n\n| | x|=Ab| e|\u0301| |\u0661\u0662|?\n| y",
    "bailingmoe": (
        "I|'LL|x| pay| $|1|2|3|4|5|,|\xa0na\xefve| \u6f22\u5b57aB|\r\n\n| | x|=Ab| e|\u0301| |\u0661|\u0662|?\n| y"
    ),
    "seed-coder": (
        "I|'LL|x| pay| $|1|2|3|4|5|,|\xa0na\xefve| \u6f22\u5b57aB|\r\n\n| | x|=Ab| e|\u0301| |\u0661|\u0662|?|\n| y"
    ),
    "exaone-moe": (
        "I|'LL|x pay| $|1|2|3|4|5|,|\xa0na\xefve \u6f22\u5b57aB|\r\n\n| | x|=Ab e\u0301| |\u0661|\u0662|?\n| y"
    ),
    "tekken": (
        "I|'LLx| pay| $|1|2|3|4|5|,|\xa0na\xefve| \u6f22\u5b57a|B|\r\n\n| | x|=Ab| e|\u0301| |\u0661|\u0662|?\n| y"
    ),
    "gpt-4o": "I'LL|x| pay| $|123|45|,|\xa0na\xefve| \u6f22\u5b57a|B|\r\n\n| | x|=Ab| e|\u0301| |\u0661\u0662|?\n| y",
    "deepseek-llm": (
        "I|'|LLx| pay| $|12345|,|\xa0na|\xef|ve| |\u6f22\u5b57|aB|\r|\n|\n| | x|=|Ab| e|\u0301 |\u0661\u0662|?|\n| y"
    ),
    "deepseek-coder": (
        "I|'|LLx| pay| $|1|2|3|4|5|,|\xa0na\xefve| |\u6f22\u5b57|aB|\r|\n|\n| | x|=|Ab| e|\u0301 |\u0661|\u0662|?|\n| y"
    ),
    "deepseek-v3": (
        "I|'LLx| pay| $|123|45|,|\xa0na\xefve| |\u6f22\u5b57|aB|\r\n\n| | x|=Ab| e\u0301| |\u0661\u0662|?\n| y"
    ),
    "spark2_5": (
        "I|'LLx| pay| $|1|2|3|4|5|,|\xa0na\xefve| |\u6f22\u5b57|aB|\r|\n|\n| | x|=Ab| e\u0301| |\u0661|\u0662|?|\n| y"
    ),
    "kimi-k2": (
        "I'LL|x| pay| $|123|45|,|\xa0na\xefve| |\u6f22\u5b57|aB|\r\n\n| | x|=Ab| e|\u0301| |\u0661\u0662|?\n| y"
    ),
    "bloom": "I'LLx| pay| $12345|,\xa0|na\xefve| \u6f22\u5b57aB|\r\n\n | x=Ab| e\u0301| \u0661\u0662|?\n| y",
    "viking": "I'LLx| pay| $|1|2|3|4|5|,\xa0|na\xefve| \u6f22\u5b57aB|\r\n\n | x=Ab| e\u0301| |\u0661|\u0662|?\n| y",
    "superbpe": "I'LLx pay $|12|345|,\xa0na\xefve \u6f22\u5b57|aB\r\n\n  x=Ab e\u0301 |\u0661\u0662|?\n y",
}
"""How llama.cpp cuts the probe into words."""

SAME = {
    "gpt-2": "phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama-v3 llama3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "dbrx": "smaug-bpe chatglm-bpe",
    "glm4": "glm5",
    "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    "bailingmoe": "bailingmoe2 llada-moe",
    "gpt-4o": "llama4 kanana2 talkie minimax-m2",
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "bloom": "poro-chat gpt3-finnish",
}
"""Names of the same rule."""


def words_vocabulary(text: str, longest: int = 24, **changes):
    """Metadata of a vocabulary in which every word of a text, of so many bytes at most, is one token."""
    letters = "".join(BYTES[byte] for byte in text.encode())
    parts = {letters[at : at + size]: None for size in range(2, longest + 1) for at in range(len(letters) - size + 1)}
    merges = [f"{part[:cut]} {part[cut:]}" for part in parts for cut in range(1, len(part))]
    return byte_level(tuple(parts), merges, **({"ggml__add_bos_token": False} | changes))


def text_of(token: str) -> str:
    back = {letter: byte for byte, letter in BYTES.items()}
    return bytes(back[letter] for letter in token).decode()


def test_every_name_of_a_rule_is_known():
    assert set(PRETOKENIZERS) == {*WORDS, *" ".join(SAME.values()).split()}
    for name, others in SAME.items():
        assert {PRETOKENIZERS[other] for other in others.split()} == {PRETOKENIZERS[name]}


@pytest.mark.parametrize("pre", WORDS)
def test_words(pre):
    metadata = words_vocabulary(PROBE, ggml__pre=pre)
    assert "|".join(map(text_of, names(Tokenizer.from_gguf(metadata), metadata, PROBE))) == WORDS[pre]


@pytest.mark.parametrize("pre", PRETOKENIZERS)
def test_words_are_those_of_llama_cpp(pre, tmp_path):
    peer = LlamaCpp(file_of(words_vocabulary(PROBE, 6, ggml__pre=pre, ggml__add_bos_token=None), tmp_path / "x.gguf"))
    tokenizer = Tokenizer.from_gguf(words_vocabulary(PROBE, 6, ggml__pre=pre, ggml__add_bos_token=None))
    draw = random.Random(0)
    for text in (PROBE, "hi<|end|> hi", *("".join(draw.choices(PROBE, k=12)) for _ in range(20))):
        assert tokenizer.encode(text) == peer.encode(text)
    peer.close()


def test_texts_are_not_composed():
    """Unicode's form C is part of Qwen's tokenizer.json, and llama.cpp does not know of it."""
    metadata = words_vocabulary("é", ggml__pre="qwen2")
    assert names(Tokenizer.from_gguf(metadata), metadata, "e\u0301") == ["e", "Ì", "ģ"]


def test_files_without_a_rule_are_cut_by_the_general_one():
    metadata = words_vocabulary(PROBE, ggml__pre=None)
    with pytest.warns(CheckpointWarning, match=r"no tokenizer\.ggml\.pre, as in files from before May 2024"):
        tokenizer = Tokenizer.from_gguf(metadata)
    assert "|".join(map(text_of, names(tokenizer, metadata, PROBE))) == WORDS["default"]


@pytest.mark.parametrize("changes", [{"ggml__pre": "novel"}, {"ggml__model": "bert"}])
def test_an_unknown_tokenizer_leaves_the_model(changes, tmp_path):
    metadata = byte_level(**changes)
    with pytest.raises(UnknownTokenizerError, match="supported are"):
        Tokenizer.from_gguf(metadata)
    with pytest.warns(CheckpointWarning, match=r"x\.gguf: tokenizer\.ggml\..* prompts must be token ids"):
        _, tokenizer = load_model(file_of(metadata, tmp_path / "x.gguf"))
    assert tokenizer is None


# ---- SentencePiece ----

CHAT_PIECES = ["▁", "h", "i", "hi", "▁hi", "[", "]", "▁[", "I", "IN", "INST", "ST", "N", "S", "T", "▁▁"]
CHAT_SPECIAL = ["<|endoftext|>", "<|user|>", "<x>"]


def chat_vocabulary(**changes):
    vocabulary = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *CHAT_PIECES, *CHAT_SPECIAL]
    types = [2, 3, 3] + [6] * 256 + [1] * len(CHAT_PIECES) + [3, 3, 4]
    scores = [0.0] * 259 + [-float(index) for index in range(len(CHAT_PIECES))] + [-1000.0] * 3
    return sentencepiece(**{"ggml__tokens": vocabulary, "ggml__token_type": types, "ggml__scores": scores} | changes)


PIECES = {
    "hi": "▁hi",
    " hi": "▁ ▁hi",
    "<s>[INST] hi</s>hi": "<s> ▁[ INST ] ▁hi </s> ▁hi",
    "<unk> hi": "<unk> ▁ ▁hi",
    "<|user|>\n hi": "<|user|> ▁ <0x0A> ▁hi",
    "hi<x> hi": "▁hi <x> ▁ ▁hi",
    "é": "▁ <0xC3> <0xA9>",
}
"""Tokens of llama.cpp for a SentencePiece vocabulary."""

BARE = {"hi": "hi", " hi": "▁hi", "<s>[INST] hi</s>hi": "<s> [ INST ] ▁hi </s> hi", "hi<x> hi": "hi <x> ▁hi"}
"""Those without `add_space_prefix`."""

STRIPPED = {
    "<s> hi": "<s> ▁ ▁hi",
    "<|user|>\n hi": "<|user|> ▁hi",
    "hi</s> \n": "▁hi </s>",
    "<x> hi": "<x> ▁hi",
    "<unk> hi": "<unk> ▁ ▁hi",
}
"""Those of a model of the name Phi-3."""


@pytest.mark.parametrize(
    ("pieces", "changes", "name"),
    [
        (PIECES, {}, "Llama"),
        (BARE, {"ggml__add_space_prefix": False}, "Llama"),
        (STRIPPED, {}, "Phi-3 Mini"),
        (PIECES, {"ggml__merges": ["[ I"]}, "Llama"),
    ],
)
def test_sentencepiece_tokens(pieces, changes, name, tmp_path):
    metadata = chat_vocabulary(**{"ggml__add_bos_token": False} | changes) | {"general.name": name}
    tokenizer = Tokenizer.from_gguf(metadata)
    assert {text: " ".join(names(tokenizer, metadata, text)) for text in pieces} == pieces
    tokenizer.save(tmp_path)
    saved = Tokenizer.from_folder(tmp_path)
    assert {text: " ".join(names(saved, metadata, text)) for text in pieces} == pieces
    peer = LlamaCpp(file_of(metadata, tmp_path / "x.gguf"))
    assert {text: tokenizer.encode(text) for text in pieces} == {text: peer.encode(text) for text in pieces}
    peer.close()


def test_tokens_around_a_text():
    metadata = chat_vocabulary(ggml__add_eos_token=True)
    tokenizer = Tokenizer.from_gguf(metadata)
    whole = tokenizer._tokenizer.encode("hi")
    assert whole == [*tokenizer.encode("hi"), metadata["tokenizer.ggml.eos_token_id"]]
    # What is encoded here goes on.
    assert names(tokenizer, metadata, "hi") == ["<s>", "▁hi"]
    assert tokenizer.decode(tokenizer.encode("hi hi")) == "hi hi"
    assert names(Tokenizer.from_gguf(metadata), metadata, "") == ["<s>"]
    unnamed = chat_vocabulary(ggml__bos_token_id=None, ggml__eos_token_id=None, ggml__unknown_token_id=None)
    assert names(Tokenizer.from_gguf(unnamed), metadata, "hi") == ["<s>", "▁hi"]


def test_special_tokens_outside_the_vocabulary():
    metadata = chat_vocabulary(ggml__bos_token_id=5000, ggml__eos_token_id=5000)
    with pytest.warns(CheckpointWarning, match="_token_id is 5000, outside the 278 tokens; it is not used") as found:
        tokenizer = Tokenizer.from_gguf(metadata)
    assert len(found) == 2
    assert tokenizer.encode("hi")[0] == 1
    with pytest.warns(CheckpointWarning, match="eos_token_id is 5000"):
        assert end_tokens(metadata) == [2, 275]


# ---- where answers end ----


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["<|endoftext|>", "<|im_end|>"], ["<|endoftext|>", "<|im_end|>"]),
        (["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"], ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]),
        (["<end_of_turn>", "<eos>", "<turn|>", "<start_of_turn>"], ["<end_of_turn>", "<eos>", "<turn|>"]),
        (["<|return|>", "<|call|>", "<|end|>"], ["<|return|>", "<|call|>"]),
        (["<|tool_response>", "</s>"], ["<|tool_response>"]),
        (["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]),
    ],
)
def test_ends_are_known_by_their_text(tokens, ends, tmp_path):
    metadata = byte_level(("<eos id>", *tokens, "h", "i", "hi"), ("h i",), ggml__eos_token_id=2)
    vocabulary = metadata["tokenizer.ggml.tokens"]
    vocabulary[0] = "<first>"
    assert {vocabulary[token] for token in end_tokens(metadata)} == {"<eos id>", *ends}
    file = file_of(metadata, tmp_path / "x.gguf")
    peer = LlamaCpp(file)
    assert peer.ends() == set(end_tokens(metadata))
    text = "hi" + "".join(tokens)
    assert peer.encode(text) == Tokenizer.from_gguf(metadata).encode(text)
    peer.close()


def test_the_model_ends_where_its_vocabulary_says(tmp_path):
    pieces = ["<|endoftext|>", "<|im_end|>", *(BYTES[byte] for byte in b"abc")]
    metadata = byte_level(ggml__tokens=pieces, ggml__token_type=[3, 3, 1, 1, 1], ggml__merges=[])
    assert open_source(file_of(metadata, tmp_path / "x.gguf")).config.eos_token_ids == (0, 1)


# ---- whole files ----


def many_texts() -> list[str]:
    """Some 600 texts: prose, code, chats and many scripts, with special tokens anywhere."""
    draw = random.Random(0)
    listed = (
        "<s> </s> <unk> <pad> <bos> <eos> <|im_start|> <|im_end|> <|endoftext|> <|eot_id|> <start_of_turn>"
        " <end_of_turn> [INST] [/INST] <|user|> <|end|> <think> </think> <0x41> <|file_sep|>"
    )
    special = listed.split()
    parts = [
        "hello", " hello", "  two", " ", "\n", "\n\n", "\n\n\n  ", "\t", "\r\n", "It's", "I'LL", "they'Re", "1984",
        "12345678", "3.50", "x**2", "def f(x):\n    return x", "camelCaseWordsHTTP", "!!!", "...", "$5", "a=b+c", "~^|",
        "é", "e\u0301", "漢字", "🎉", "👩‍👩‍👧", "▁", "naïve", "a\u3000b", "。，", "٠١", "\u00a0", "Привет, мир",
        "مرحبا", "नमस्ते", "สวัสดี", "안녕하세요", "ﬁ Ⅷ ½", "İ ſ", "x²", "\x01",
    ]  # fmt: skip
    mixed = ["".join(draw.choices(parts + special[:6], k=draw.randint(1, 14))) for _ in range(400)]
    framed = [token + part + token + " " + part for token in special for part in draw.sample(parts, 8)]
    code = [line for line in Path(__file__).read_text().splitlines() if line.strip()][:100]
    return [*mixed, *framed, *code, "", " "]


def check_file(file: Path) -> None:
    peer, metadata = LlamaCpp(file), read_gguf_header(file)[0]
    tokenizer = Tokenizer.from_gguf(metadata)
    texts = many_texts()
    assert len(texts) > 500
    assert [text for text in texts if tokenizer.encode(text) != peer.encode(text)] == []
    assert set(end_tokens(metadata)) == peer.ends()
    peer.close()


@pytest.mark.slow
def test_the_demo_model_has_the_tokens_of_llama_cpp(demo_gguf):
    check_file(demo_gguf)


@pytest.mark.slow
@pytest.mark.parametrize("file", os.environ.get("GRIFFIN_JAX_TEST_GGUF", "").split(os.pathsep))
def test_other_files_have_the_tokens_of_llama_cpp(file):
    if not file:
        pytest.skip("GRIFFIN_JAX_TEST_GGUF names no GGUF files")
    check_file(Path(file))
