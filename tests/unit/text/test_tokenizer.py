"""Tokenizers of folders and of GGUF files."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from gguf_vocabularies import byte_level, names, sentencepiece
from reference import needs_torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

import griffin_jax
from griffin_jax.checkpoints.families import families
from griffin_jax.checkpoints.gguf import read_gguf_header
from griffin_jax.checkpoints.loading import convert, load_model, open_source
from griffin_jax.text import tokenizer_class
from griffin_jax.text.tokenizer import Tokenizer, check_fits
from griffin_jax.text.tokenizer_class import class_for
from griffin_jax.utils.messages import CheckpointWarning

ROOT = Path(__file__).parents[3]
TEXTS = [
    "Hello world",
    "  two  spaces,\n\n\nthree lines\tand a tab ",
    "It's 1984, they'll pay 3.50 for 12345 of them",
    "naïve café, 漢字, Ελληνικά, 🎉🏳️‍🌈",
    "def f(x):\n    return x**2  # square",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
]


# ---- the demo model's ----


@pytest.fixture(scope="module")
def demo(demo_gguf) -> Tokenizer:
    return Tokenizer.from_gguf(read_gguf_header(demo_gguf)[0])


@pytest.mark.thorough
@needs_torch  # which transformers wants for GGUF files
def test_ids_are_those_of_transformers(demo, demo_gguf):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name)
    for text in TEXTS:
        assert demo.encode(text) == reference.encode(text)
        assert demo.decode(demo.encode(text)) == reference.decode(reference.encode(text), skip_special_tokens=True)
        assert demo.decode(demo.encode(text), skip_special=False) == text
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert demo.chat(messages) == expected
    assert demo.chat("Hi") == demo.chat([{"role": "user", "content": "Hi"}])
    assert (demo.size, demo.eos_token_id) == (len(reference), reference.eos_token_id)


def test_smollm_splits_digits_before_spaces(demo):
    """As the vocabulary was learned and llama.cpp splits; transformers' reader of GGUF files forgets it."""
    assert [demo.decode([token]) for token in demo.encode("for  2020")] == ["for", "  ", "2", "0", "2", "0"]


def test_special_tokens_are_left_out_of_texts(demo):
    tokens = [*demo.encode("Hi"), demo.eos_token_id]
    assert demo.decode(tokens) == "Hi"
    assert demo.decode(tokens, skip_special=False) == "Hi<|im_end|>"


def test_saving_and_loading_changes_nothing(demo, tmp_path):
    demo.save(tmp_path)
    assert Tokenizer.is_in(tmp_path)
    back = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert back.encode(text) == demo.encode(text)
    assert back.chat("Hi") == demo.chat("Hi")
    assert (back.size, back.eos_token_id) == (demo.size, demo.eos_token_id)


# ---- vocabularies of GGUF files ----


def test_byte_level_vocabulary():
    metadata = byte_level()
    tokenizer = Tokenizer.from_gguf(metadata)
    assert names(tokenizer, metadata, "hi hi<|end|>") == ["hi", "Ġhi", "<|end|>"]
    assert tokenizer.decode(tokenizer.encode("hi hi<|end|>")) == "hi hi"
    assert tokenizer.decode(tokenizer.encode("<think>hi")) == "<think>hi"
    assert names(tokenizer, metadata, "<think>hi") == ["<think>", "hi"]
    assert tokenizer.decode(tokenizer.encode("é 🎉 \x00")) == "é 🎉 \x00"
    assert tokenizer.size == len(metadata["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ġ123", "4", "xx"]),
        ("smollm", ["Ġ", "1", "2", "3", "4", "xx"]),
        ("llama-bpe", ["<|end|>", "Ġ", "123", "4", "xx"]),
        ("qwen2", ["Ġ", "1", "2", "3", "4", "xx"]),
    ],
)
def test_pretokenizers_differ_in_numbers(pre, pieces):
    tokens = ("1", "2", "3", "4", "x", "Ġ", "12", "123", "Ġ123", "xx")
    merges = ("1 2", "12 3", "Ġ 123", "x x")
    metadata = byte_level(tokens, merges, ggml__pre=pre)
    assert names(Tokenizer.from_gguf(metadata), metadata, " 1234xx") == pieces


def test_llama3_takes_whole_words_without_merges():
    tokens = ("h", "i", "hi")
    whole = byte_level(tokens, (), ggml__pre="llama-bpe", ggml__add_bos_token=False)
    assert names(Tokenizer.from_gguf(whole), whole, "hi") == ["hi"]
    merged = byte_level(tokens, (), ggml__pre="gpt-2")
    assert names(Tokenizer.from_gguf(merged), merged, "hi") == ["h", "i"]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_first_token_is_added_where_the_file_says_so(make):
    for add in (True, False):
        metadata = make(ggml__add_bos_token=add)
        tokens = Tokenizer.from_gguf(metadata).encode("hi")
        assert (tokens[0] == metadata["tokenizer.ggml.bos_token_id"]) == add
    assert (Tokenizer.from_gguf(make()).encode("hi")[0] == 1) == (make is sentencepiece)


def test_sentencepiece_vocabulary(tmp_path):
    metadata = sentencepiece()
    tokenizer = Tokenizer.from_gguf(metadata)
    assert names(tokenizer, metadata, "hello hell") == ["<s>", "▁hello", "▁", "hell"]
    assert names(tokenizer, metadata, "é")[1:] == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("hello hell", "é 🎉", "hello  hello"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert names(Tokenizer.from_gguf(sentencepiece(ggml__add_space_prefix=False)), metadata, "hello")[1:] == ["hello"]
    assert tokenizer.size == len(metadata["tokenizer.ggml.tokens"])
    tokenizer.save(tmp_path)
    back = Tokenizer.from_folder(tmp_path)
    for text in ("hello hell", "é", " hello"):
        assert back.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level(ggml__pre="novel"), "tokenizer.ggml.pre is 'novel'; supported are default, gpt-2"),
        (byte_level(ggml__model="bert"), "tokenizer.ggml.model is 'bert'; supported are gpt2 and llama"),
        (byte_level(ggml__tokens=None), "has no tokenizer.ggml.tokens"),
        (byte_level(ggml__merges=None), "incomplete"),
        (byte_level(ggml__merges=["no such"]), "contradict each other"),
        (byte_level(ggml__merges=["one"]), "contradict each other"),
        (byte_level(ggml__token_type=[1]), "1 token types"),
        (sentencepiece(ggml__scores=None), "incomplete"),
        (sentencepiece(ggml__scores=[0.0]), "but 1 scores"),
    ],
)
def test_vocabularies_that_are_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_gguf(metadata)


# ---- chat ----


def test_chat_templates():
    plain = Tokenizer.from_gguf(byte_level())
    with pytest.raises(ValueError, match="has no chat template"):
        plain.chat("hi")
    template = (
        "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer = Tokenizer.from_gguf(byte_level(chat_template=template))
    assert tokenizer.decode(tokenizer.chat("hi")) == "userhi>"
    fussy = Tokenizer.from_gguf(byte_level(chat_template="{{ raise_exception('only poems') }}"))
    with pytest.raises(ValueError, match="rejects these messages: only poems"):
        fussy.chat("hi")


# ---- folders whose configuration names a class ----


def name_class(folder: Path, said: Any, model_type: str = "llama", **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": said, **more}))
    return folder


def save_older_llama(folder: Path, said: Any) -> Path:
    """A tokenizer.json like that of Llama 2, which puts a space before every part of a text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "hi", "▁hi"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("h", "i"), ("▁", "hi")]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    name_class(folder, said, bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False)
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("said", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
def test_tokens_are_those_of_the_automatic_class(said, tmp_path):
    from transformers import AutoTokenizer

    folder = save_older_llama(tmp_path / "hf", said)
    tokenizer, reference = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.save(tmp_path / "saved")
    for text in ("hi</s>\nhi", "hi</s> hi", " hi", "hi  hi", "</s>hi"):
        for each in (tokenizer, Tokenizer.from_folder(tmp_path / "saved")):
            assert each.encode(text) == reference.encode(text)
            assert each.decode(each.encode(text)) == reference.decode(reference.encode(text), skip_special_tokens=True)
    parts = reference.convert_ids_to_tokens(tokenizer.encode("hi</s>\nhi"))
    space = [] if said and said.startswith("Llama") else ["▁"]
    assert parts == ["<s>", "▁hi", "</s>", *space, "<0x0A>", "hi"]


CLASSES = (
    None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend",
    "GPT2TokenizerFast", "Qwen2Tokenizer", "CodeGenTokenizer", "GemmaTokenizerFast", "BloomTokenizerFast", "Novelty",
)  # fmt: skip


class Chosen(Exception):
    """The name of the class that is to read a folder."""


MODEL_TYPES = ("llama", "qwen2", "qwen3", "nemotron", "mistral", "gemma3", "gpt2", "exaone", "novelty")
"""With and without a class of their own, a wrong one on the hub, Mistral's format, and unknown to transformers."""


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in MODEL_TYPES)) for name in (*families(), "novelty")],
)
def test_the_class_is_the_one_that_the_automatic_class_takes(model_type, tmp_path, monkeypatch):
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    def choose(cls, *_, **__):
        raise Chosen(cls.__name__)

    monkeypatch.setattr(PreTrainedTokenizerBase, "from_pretrained", classmethod(choose))
    codes, contents = [{}, {"auto_map": ["code.Own", None]}], ["{}", '"ByteLevel"']
    for said, code, content in itertools.product(CLASSES, codes, contents):
        folder = name_class(tmp_path, said, model_type, **code)
        (folder / "tokenizer.json").write_text(content)
        # Without a class that it knows, it would run that code.
        if said not in (None, "Novelty") or not code:
            with pytest.raises(Chosen) as chosen:
                AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            assert class_for(folder).__name__ == str(chosen.value), (said, code, content)


@pytest.mark.parametrize("said", ["LlamaForCausalLM", "pipeline", "__name__", 3, ["LlamaTokenizer"]])
def test_names_that_are_not_those_of_tokenizers(said, tmp_path):
    """The file is read as it is."""
    folder = save_older_llama(tmp_path, said)
    assert class_for(folder) is PreTrainedTokenizerFast


def test_where_the_lists_are_not_in_the_source(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    folder = save_older_llama(tmp_path, "LlamaTokenizer")
    monkeypatch.setattr(tokenizer_class, "MISNAMED", "NOVELTY")
    monkeypatch.setattr(tokenizer_class, "_tables", tokenizer_class._tables.__wrapped__)
    assert class_for(folder) is AutoTokenizer


# ---- with models ----


def save_tokenizer(folder: Path, size: int) -> None:
    backend = Backend(models.BPE(vocab={f"t{index}": index for index in range(size)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def test_the_tokenizer_goes_with_the_model(tmp_path):
    folder = checkpoints.write(tmp_path / "hf")
    save_tokenizer(folder, checkpoints.VOCABULARY)
    _, tokenizer = load_model(folder)
    assert tokenizer is not None
    assert tokenizer.size == checkpoints.VOCABULARY
    _, converted = load_model(convert(folder, tmp_path / "native", progress=False).path)
    assert converted is not None
    assert converted.size == checkpoints.VOCABULARY


def test_a_tokenizer_that_does_not_fit(tmp_path):
    folder = checkpoints.write(tmp_path / "hf")
    save_tokenizer(folder, checkpoints.VOCABULARY + 1)
    with pytest.raises(ValueError, match="the tokenizer has 33 tokens, but the model's vocabulary only 32"):
        load_model(folder)
    with pytest.raises(ValueError, match="33 tokens"):
        convert(folder, tmp_path / "native", progress=False)
    assert not (tmp_path / "native").exists()
    config = open_source(checkpoints.write(tmp_path / "other")).config
    check_fits(Tokenizer.from_folder(folder), dataclasses.replace(config, vocab_size=33))


def test_added_tokens_beyond_the_embedding(tmp_path):
    """Chat models whose added_tokens.json has one token for padding more than the model has rows."""
    folder = checkpoints.write(tmp_path / "hf")
    save_tokenizer(folder, checkpoints.VOCABULARY)
    reader = PreTrainedTokenizerFast.from_pretrained(folder)
    reader.add_special_tokens({"pad_token": "<pad>"})
    reader.chat_template = "{{ messages[0]['content'] }}"
    reader.save_pretrained(folder)
    with pytest.warns(
        CheckpointWarning, match="32 tokens and no embedding for <pad> of its tokenizer; texts with them"
    ):
        llm = griffin_jax.load(folder)
    assert llm.tokenizer is not None
    for chat in (False, True):
        with pytest.raises(ValueError, match=r"the text has the token '<pad>' of id 32, .* vocabulary is \[0, 31\]"):
            llm.generate("<pad>", chat=chat, max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt 0 has token 32"):
        llm.generate([1, 32], max_new_tokens=1)
    with pytest.warns(CheckpointWarning):
        report = convert(folder, tmp_path / "native", progress=False)
    with pytest.warns(CheckpointWarning, match="no embedding for <pad>"):
        assert load_model(report.path)[1] is not None


def test_a_malformed_tokenizer(tmp_path):
    folder = checkpoints.write(tmp_path / "hf")
    for content in ("", "{", json.dumps({"model": {}})):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="the tokenizer cannot be read") as error:
            load_model(folder)
        assert str(folder) in str(error.value)


def save_sentencepiece(folder: Path, **options: Any) -> Any:
    """A tokenizer.model and nothing else, and the SentencePiece that reads it."""
    import sentencepiece

    texts = [f"the quick brown fox number {number} jumps over the lazy dog" for number in range(100)]
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=content, hard_vocab_limit=False, minloglevel=2, **options
    )
    (folder / "tokenizer.model").write_bytes(content.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())


@pytest.mark.parametrize("kind", [{"model_type": "bpe", "byte_fallback": True}, {"model_type": "unigram"}])
def test_only_a_tokenizer_model(kind, tmp_path):
    folder = checkpoints.write(tmp_path / "hf", config=checkpoints.CONFIG | {"vocab_size": 400})
    reference = save_sentencepiece(folder, vocab_size=300 if "byte_fallback" in kind else 60, **kind)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.size == reference.get_piece_size()
    for text in ("the lazy fox", "over the dog number 12"):
        assert tokenizer.encode(text, special=False) == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("content", "absent", "message"),
    [
        (None, "sentencepiece", r"tokenizer\.model: is read with sentencepiece, .*: pip install sentencepiece$"),
        (b"IQ== 0\nIg== 1\n", "tiktoken", r"tokenizer\.model: is a vocabulary of tiktoken, .*: pip install tiktoken$"),
        (b"", "", r"the tokenizer cannot be read \(it is no SentencePiece model\)$"),
        (b"garbage", "", r"the tokenizer cannot be read \(it is no SentencePiece model\)$"),
    ],
)
def test_a_tokenizer_model_that_cannot_be_read(content, absent, message, tmp_path, monkeypatch):
    if content is None:
        save_sentencepiece(tmp_path, vocab_size=60)
    else:
        (tmp_path / "tokenizer.model").write_bytes(content)
    if absent:
        find = importlib.util.find_spec
        monkeypatch.setitem(sys.modules, absent, None)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: (name != absent and find(name, *rest)) or None
        )
    with pytest.raises(ImportError if absent else ValueError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_no_class_imports_pytorch(tmp_path):
    code = (
        "import sys\n"
        "from griffin_jax.text.tokenizer import Tokenizer\n"
        "assert type(Tokenizer.from_folder(sys.argv[1])._tokenizer).__name__ == 'LlamaTokenizer'\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(save_older_llama(tmp_path, "LlamaTokenizer"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.thorough
def test_neither_pytorch_nor_chatter(tmp_path):
    """Loading a model with its tokenizer imports no PyTorch and prints nothing, even where it is not installed."""
    folder = checkpoints.write(tmp_path / "hf")
    save_tokenizer(folder, checkpoints.VOCABULARY)
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from griffin_jax.checkpoints.loading import load_model\n"
        "model, tokenizer = load_model(sys.argv[1])\n"
        "tokenizer.encode('t1')\n"
        "assert 'torch' not in sys.modules\n"
        "assert not any('modeling' in name for name in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
