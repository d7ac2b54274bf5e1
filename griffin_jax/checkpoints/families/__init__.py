"""Model families, one file for each. A new family is a new file here that defines `FAMILY`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.layouts import Layout, TensorRule
from griffin_jax.checkpoints.schema.relevance import causal_models

__all__ = ["Family", "Layout", "TensorRule", "families", "family_of", "gguf_family_of", "table"]


@functools.cache
def families() -> dict[str, Family]:
    """All families by `model_type`."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


SAME = {"gpt-sw3": "gpt2"}
"""Model types in transformers' list whose configurations and models are those of another one."""

REFUSED: dict[str, tuple[str, ...]] = {
    "its experts, router or attention are computed in a way that is not supported yet": (
        "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp",
        "qwen4_exp_text", "flex_olmo", "granitemoehybrid",
        "granitemoe_swa", "deepseek_v4", "dbrx", "jetmoe",
        "minimax", "minimax_m2", "minimax_m3_vl_text",
        "llama4", "llama4_text", "afmoe", "aria_text", "beam", "cohere2_moe",
        "exaone_moe", "flint", "hunyuan_v1_moe", "hy_v3",
        "inkling_text", "inkling2_text", "inkling2_loop_text", "kolibri1", "laguna", "lara_mini",
        "lfm2_moe", "mellum", "mimo_v2_flash", "sarvam_moe", "solar_open", "zaya",
    ),
    "it reads or writes more than text, and of such models only gemma3 and mistral3 are supported": (
        "gemma3n", "gemma4", "gemma4_unified", "mllama", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
        "paligemma", "phi4_multimodal", "emu3", "fuyu", "git", "got_ocr2", "moshi", "moss_transcribe_diarize",
        "musicgen", "musicgen_melody", "cohere_compass_text", "apertus1p5_text", "qwen2vl", "qwen3vl",
    ),
    "it is an encoder with a decoder, or the decoder of one, and only models of a decoder alone are supported": (
        "t5", "mt5", "bart", "pegasus", "t5gemma", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian",
        "mbart", "mvp", "plbart", "prophetnet", "trocr", "whisper",
    ),
    "it is an encoder, which transformers can run as a decoder, too, and only decoders are supported": (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl",
        "xmod",
    ),
    "it has layers without attention, and only transformers are supported": (
        "mamba", "mamba2", "falcon_mamba", "falcon_h1", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2",
        "lfm2", "lfm3", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_text", "xlstm", "rwkv6", "rwkv7",
    ),
    "its keys and values come from a latent vector (MLA), and only attention with keys and values is supported": (
        "minicpm3", "youtu", "deepseek_v2", "deepseek_v3", "deepseek_v32", "axk1", "axk2", "bailing_hybrid",
        "dots3_note", "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "hy_v4", "kimi_linear", "longcat_flash",
        "sarvam_mla", "deepseek2",
    ),
    "its attention is none of softmax over scores of queries and keys alone: it has sinks, gates, differences, hashes "
    "or scores of its own": (
        "granite_swa", "dory", "diffllama", "doge", "reformer", "xlnet", "cpmant",
    ),
    "its layers differ in their sizes, share keys and values, or look up each token once more": (
        "gemma3n_text", "gemma4_text", "gemma4_unified_text",
    ),
    "it drafts for another model and reads that model's cache": ("gemma4_assistant", "gemma4_unified_assistant"),
    "it goes through its layers several times, or through those of several models": ("hrm_text", "blt"),
    "its positions or norms are computed in a way that is not supported yet": (
        "biogpt", "bitnet", "ctrl", "gpt_neox_japanese", "modernbert-decoder", "nanochat", "openai-gpt", "persimmon",
        "xglm",
    ),
}  # fmt: skip
"""Model types (and GGUF architectures) that people may expect here, by the reason why they are refused."""


NOT_IN_GGUF: dict[str, tuple[str, ...]] = {
    "llama.cpp does not convert it": (
        "codegen", "cwm", "gpt_neo", "gptj", "helium", "hyperclovax", "ministral", "opt", "vaultgemma",
    ),
}  # fmt: skip
"""Families that are not read from GGUF files, by the reason.

What llama.cpp converts is listed in its conversion/__init__.py (`TEXT_MODEL_MAP`), by the names of transformers'
classes. `gptj` is among its architectures, without a converter and a model.
"""


NEW = "transformers has it, and it was not looked at yet"
"""The reason for which all others are refused."""


def not_looked_at() -> list[str]:
    """Causal language models of the installed transformers that are neither run nor refused with a reason."""
    refused = {name for names in REFUSED.values() for name in names}
    return sorted(causal_models().keys() - refused - families().keys() - SAME.keys())


def family_of(model_type: object, where: str) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: the model type is not supported; the message says why, or names the supported ones.
    """
    name = SAME.get(model_type, model_type) if isinstance(model_type, str) else model_type
    return _find(name, families(), f"{where}: model_type")


def gguf_family_of(architecture: object, where: str) -> Family:
    """The family of a GGUF file.

    Raises:
        ValueError: the architecture is not supported; the message says why, or names the supported ones.
    """
    known = {name: family for family in families().values() if family.gguf for name in family.gguf.architectures}
    return _find(architecture, known, f"{where}: GGUF architecture")


def _find(name: object, known: Mapping[str, Family], what: str) -> Family:
    if isinstance(name, str) and name in known:
        return known[name]
    for reason, names in REFUSED.items():
        if name in names:
            raise ValueError(f"{what} {name!r} is not supported: {reason}")
    if name in not_looked_at():
        raise ValueError(f"{what} {name!r} is not supported: {NEW}")
    raise ValueError(f"{what} {name!r} is not supported; supported are {', '.join(sorted(known))}")


def table() -> str:
    """A table in Markdown of what is supported and what is refused.

    Every causal language model of the installed transformers is in it: what a new release brings is refused as new.
    """
    rows = [("models", "`model_type`", "GGUF architecture")]
    for family in sorted(families().values(), key=lambda family: family.title.lower()):
        architectures = family.gguf.architectures if family.gguf else family.also_gguf
        rows.append((family.title, _code(family.model_type), _code(*architectures) or "none"))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---|---|---|")
    lines += ["", "Not read from GGUF files:", ""]
    lines += [f"- {reason}: {_code(*names)}" for reason, names in NOT_IN_GGUF.items()]
    lines += ["", "Refused with the reason:", ""]
    lines += [f"- {reason}: {_code(*names)}" for reason, names in REFUSED.items()]
    if new := not_looked_at():
        lines += [f"- {NEW}: {_code(*new)}"]
    return "\n".join(lines)


def _code(*names: str) -> str:
    return ", ".join(f"`{name}`" for name in names)
