"""Model families, one file for each. A new family is a new file here that defines `FAMILY`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from griffin_jax.checkpoints.schema.family import Family
from griffin_jax.checkpoints.schema.layouts import Layout, TensorRule

__all__ = ["Family", "Layout", "TensorRule", "families", "family_of", "gguf_family_of", "table"]


@functools.cache
def families() -> dict[str, Family]:
    """All families by `model_type`."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


REFUSED: dict[str, tuple[str, ...]] = {
    "it is a mixture of experts, and only dense feed-forward layers are supported": (
        "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "phimoe", "granitemoe", "granitemoeshared",
        "granitemoehybrid", "deepseek_v2", "deepseek_v3", "gpt_oss", "dbrx", "jetmoe", "glm4_moe", "ernie4_5_moe",
        "minimax", "llama4", "llama4_text",
        "qwen2moe", "qwen3moe", "deepseek2", "gpt-oss",
    ),
    "it reads more than text, and of such models only gemma3 and mistral3 are supported": (
        "gemma3n", "mllama", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paligemma",
        "phi4_multimodal", "qwen2vl", "qwen3vl",
    ),
    "it is an encoder with a decoder, and only decoders are supported": ("t5", "mt5", "bart", "pegasus", "t5gemma"),
    "it has layers without attention, and only transformers are supported": (
        "mamba", "mamba2", "falcon_mamba", "falcon_h1", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2",
        "rwkv6", "rwkv7",
    ),
}  # fmt: skip
"""Model types (and GGUF architectures) that people may expect here, by the reason why they are refused."""


def family_of(model_type: object, where: str) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: the model type is not supported; the message says why, or names the supported ones.
    """
    return _find(model_type, families(), f"{where}: model_type")


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
    raise ValueError(f"{what} {name!r} is not supported; supported are {', '.join(sorted(known))}")


def table() -> str:
    """A table in Markdown of what is supported and what is refused."""
    rows = [("models", "`model_type`", "GGUF architecture")]
    for family in sorted(families().values(), key=lambda family: family.title.lower()):
        architectures = family.gguf.architectures if family.gguf else family.also_gguf
        rows.append((family.title, _code(family.model_type), _code(*architectures) or "none"))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---|---|---|")
    lines += ["", "Refused with the reason:", ""]
    lines += [f"- {reason}: {_code(*names)}" for reason, names in REFUSED.items()]
    return "\n".join(lines)


def _code(*names: str) -> str:
    return ", ".join(f"`{name}`" for name in names)
