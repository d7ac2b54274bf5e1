"""How byte-level vocabularies of GGUF files cut texts into words: the names that `tokenizer.ggml.pre` may have.

The expressions are those by which llama.cpp reads the same files (https://github.com/ggml-org/llama.cpp,
src/llama-vocab.cpp), not those of the tokenizer.json that a file was made from: where the two differ, users of a GGUF
file know the tokens of the former. Expressions that Unicode's case folding would change are written without it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Pretokenizer:
    """How a byte-level vocabulary cuts a text into words before it merges bytes.

    Attributes:
        splits: regular expressions, one applied to the pieces that the one before it leaves. What matches is a piece of
            its own, and so is what lies between two matches.
        whole_words: whether a word that is a token is taken whole, and not merged from bytes.
        bos: whether texts begin with the first token (BOS) unless the file says otherwise.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False


_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s+(?!\S)|\s+"
_DIGIT, _THREE_DIGITS, _NUMBER = r"\p{N}", r"\p{N}{1,3}", r"\p{N}+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES


def _words(
    numbers: str, words: str = r"[^\r\n\p{L}\p{N}]?\p{L}+", lines: str = r"\s*[\r\n]+", spaces: str = _SPACES
) -> str:
    """The expression of Llama 3 and its relatives, with other numbers, words, ends of lines or white space."""
    return rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{lines}|{spaces}"


_LLAMA3 = f"{_CONTRACTIONS}|{_words(_THREE_DIGITS)}"
_QWEN2 = f"{_CONTRACTIONS}|{_words(_DIGIT)}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    rf"|\s*[\r\n]+|{_SPACES}"
)
_CASCADE = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
_JAIS2 = f"{_CONTRACTIONS}|{_words(_THREE_DIGITS, spaces=_CASCADE)}"
_BAILING = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|" + _words(_DIGIT, lines=r"\s*[\r\n]")
_SEED = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_SPACES}"
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}"
)

# Letters outside ASCII count as both small and capital.
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"


def _by_case(numbers: str, contractions: str = "") -> str:
    """The expression of GPT-4o and Tekken, which begins a word where a capital follows a small letter."""
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}{_UPPER}*{_LOWER}+{contractions}|{first}{_UPPER}+{_LOWER}*{contractions}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"
    )


_HAN_OR_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
_HAN_OR_HANGUL = "[一-龥ࠀ-一가-\ud7ff]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|" + _SPACES
)
_SPARK = _DEEPSEEK3.replace(r"[\r\n]*|\s*[\r\n]+|", r"|[\r\n]|")
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    "ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_HAN = "㐀-䶿一-鿿\uf900-\ufaff𠀀-\U0002a6df\U0002a700-\U0002ebef\U0002f800-\U0002fa1f"
_KIMI = (
    rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
)
_SENTENCES = " ?[^(\\s|.,!?…。，、।۔،)]+"


_KINDS: dict[str, Pretokenizer] = {
    "default": Pretokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, _NUMBER, "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt olmo jais trillion granite-docling": Pretokenizer((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Pretokenizer((_DIGIT, _GPT2)),
    "falcon": Pretokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "llama-bpe llama-v3 llama3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Pretokenizer(
        (_LLAMA3,), whole_words=True, bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": Pretokenizer((_LLAMA3,)),
    "glm4 glm5": Pretokenizer((_LLAMA3,), whole_words=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": Pretokenizer((_QWEN2,)),
    "qwen35": Pretokenizer((_QWEN35,)),
    "laguna": Pretokenizer((r"[^\n]+|[\n]+", _QWEN2)),
    "minicpm5": Pretokenizer((_THREE_DIGITS, f"{_CONTRACTIONS}|{_words(_NUMBER)}"), whole_words=True),
    "ufakzeka": Pretokenizer((_words(_DIGIT),)),
    "jais-2": Pretokenizer((_JAIS2,)),
    "bailingmoe bailingmoe2 llada-moe": Pretokenizer((_BAILING,)),
    "seed-coder": Pretokenizer((_SEED,)),
    "exaone-moe": Pretokenizer((_EXAONE_MOE,)),
    "tekken": Pretokenizer((_by_case(_DIGIT),), whole_words=True, bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Pretokenizer((_by_case(_THREE_DIGITS, f"{_CONTRACTIONS}?"),)),
    "deepseek-llm": Pretokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            _HAN_OR_HANGUL,
            _NUMBER,
        )
    ),
    "deepseek-coder": Pretokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_OR_HANGUL, _DIGIT)),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Pretokenizer((_THREE_DIGITS, _HAN_OR_KANA, _DEEPSEEK3)),
    "spark2_5": Pretokenizer((_THREE_DIGITS, _HAN_OR_KANA, _SPARK, _DIGIT)),
    "kimi-k2": Pretokenizer((_KIMI,)),
    "bloom poro-chat gpt3-finnish": Pretokenizer((_SENTENCES,)),
    "viking": Pretokenizer((_SENTENCES, _DIGIT)),
    "superbpe": Pretokenizer((_NUMBER, "(?=([0-9]{3})+(?![0-9]))")),
}

PRETOKENIZERS: dict[str, Pretokenizer] = {name: kind for names, kind in _KINDS.items() for name in names.split()}
"""How texts are cut into words, by the `tokenizer.ggml.pre` of GGUF files."""
