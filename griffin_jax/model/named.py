"""The architectures of well-known models by name, for tasks that need no weights: compiling, sizes, speed limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from griffin_jax.model.config import ModelConfig, Rotary, Routing


def _llama(
    vocab: int, width: int, ff: int, layers: int, heads: int, kv_heads: int, context: int, theta: float, **other: Any
) -> ModelConfig:
    """A config with RMSNorm before each sublayer, rotary embedding and gated SiLU, as in most families."""
    fields: dict[str, Any] = {"family": "llama", "head_dim": width // heads, "rotary": Rotary(theta)} | other
    return ModelConfig(
        vocab_size=vocab, width=width, ff_width=ff, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        max_positions=context, **fields,
    )  # fmt: skip


def _opt(width: int, ff: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        family="opt", vocab_size=50272, width=width, ff_width=ff, num_layers=layers, num_heads=heads,
        num_kv_heads=heads, head_dim=width // heads, max_positions=2048, activation="relu", gated=False, norm="layer",
        norm_bias=True, rotary=None, learned_positions=True, tied_head=True, attention_bias=True,
        attention_out_bias=True, ff_bias=True,
    )  # fmt: skip


_LLAMA_3_1 = Rotary(500_000.0, "llama3", factor=8.0, original_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0)
_GEMMA: dict[str, Any] = {
    "head_dim": 256, "activation": "gelu_tanh", "norm_eps": 1e-6, "norm_plus_one": True, "tied_head": True,
}  # fmt: skip
_GPT_OSS_ROTARY = Rotary(
    150_000.0, "yarn", factor=32.0, original_positions=4096, truncate=False, attention_factor=0.1 * math.log(32) + 1
)
_QWEN_3: dict[str, Any] = {"family": "qwen3", "head_dim": 128, "norm_eps": 1e-6, "head_norm": "shared"}

NAMED: Mapping[str, ModelConfig] = MappingProxyType({
    "Llama-2-7B": _llama(32000, 4096, 11008, 32, 32, 32, 4096, 1e4),
    "Llama-2-13B": _llama(32000, 5120, 13824, 40, 40, 40, 4096, 1e4),
    "Llama-2-70B": _llama(32000, 8192, 28672, 80, 64, 8, 4096, 1e4),
    "Llama-3-8B": _llama(128256, 4096, 14336, 32, 32, 8, 8192, 5e5),
    "Llama-3-70B": _llama(128256, 8192, 28672, 80, 64, 8, 8192, 5e5),
    "Llama-3.1-8B": _llama(128256, 4096, 14336, 32, 32, 8, 131072, 5e5, rotary=_LLAMA_3_1),
    "Mistral-7B": _llama(32000, 4096, 14336, 32, 32, 8, 32768, 1e4, family="mistral", windows=(4096,) * 32),
    "Gemma-7B": _llama(
        256000, 3072, 24576, 28, 16, 16, 8192, 1e4, family="gemma", embedding_scale=3072**0.5, **_GEMMA
    ),
    "Gemma-2-9B": _llama(
        256000, 3584, 14336, 42, 16, 8, 8192, 1e4, family="gemma2", embedding_scale=3584**0.5,
        norm_placement="sandwich", windows=(4096, 0) * 21, attention_softcap=50.0, logit_softcap=30.0, **_GEMMA,
    ),
    "Qwen2.5-7B": _llama(
        152064, 3584, 18944, 28, 28, 4, 131072, 1e6, family="qwen2", norm_eps=1e-6, attention_bias=True
    ),
    "Qwen3-8B": _llama(151936, 4096, 12288, 36, 32, 8, 40960, 1e6, **_QWEN_3),
    "Mixtral-8x7B": _llama(
        32000, 4096, 14336, 32, 32, 8, 32768, 1e6, family="mixtral", routing=Routing(8, 2, 14336, normalised=True)
    ),
    "Qwen3-30B-A3B": _llama(
        151936, 2048, 6144, 48, 32, 4, 40960, 1e6, routing=Routing(128, 8, 768, normalised=True),
        **(_QWEN_3 | {"family": "qwen3_moe"}),
    ),
    "gpt-oss-20b": _llama(
        201088, 2880, 2880, 24, 64, 8, 131072, 150_000.0, family="gpt_oss", head_dim=64, rotary=_GPT_OSS_ROTARY,
        windows=(128, 0) * 12, activation="gelu_quick", ff_clip=7.0, up_plus_one=True, attention_sinks=True,
        attention_bias=True, attention_out_bias=True, ff_bias=True,
        routing=Routing(32, 4, 2880, normalised=True, router_bias=True),
    ),
    "Qwen3-32B": _llama(151936, 5120, 25600, 64, 64, 8, 40960, 1e6, **_QWEN_3),
    "Phi-4": _llama(100352, 5120, 17920, 40, 40, 10, 16384, 250_000.0, family="phi3"),
    "OPT-6.7B": _opt(4096, 16384, 32, 32),
    "OPT-13B": _opt(5120, 20480, 40, 40),
    "ReLULLaMA-7B": _llama(32000, 4096, 11008, 32, 32, 32, 4096, 1e4, activation="relu"),
    "SmolLM2-135M": _llama(49152, 576, 1536, 30, 9, 3, 8192, 1e5, tied_head=True),
    "SmolLM2-360M": _llama(49152, 960, 2560, 32, 15, 5, 8192, 1e5, tied_head=True),
    "SmolLM2-1.7B": _llama(49152, 2048, 8192, 24, 32, 32, 8192, 130_000.0, tied_head=True),
})  # fmt: skip
"""The architectures, from the config.json that each model's authors published on the Hugging Face hub.

Special tokens are left out: they change no size and belong to a tokenizer. The position tables of the OPT models have
two rows fewer than in their checkpoints, in which the first two are never used.
"""


def named(name: str, layers: int | None = None) -> ModelConfig:
    """The architecture of a well-known model.

    Args:
        name: one of the names in `NAMED`, in upper or lower case.
        layers: how many layers to keep, counted from the first; all if None.

    Raises:
        ValueError: no model has this name, or it has fewer layers.
    """
    for known, config in NAMED.items():
        if known.lower() == name.lower():
            return config if layers is None else with_layers(config, layers)
    raise ValueError(f"there is no model named {name!r}; there are {', '.join(NAMED)}")


def with_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The same architecture with its first `layers` layers only.

    Raises:
        ValueError: the architecture has fewer layers.
    """
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= config.num_layers:
        raise ValueError(f"layers must be a whole number in [1, {config.num_layers}], got {layers!r}")
    return dataclasses.replace(
        config,
        num_layers=layers,
        windows=config.windows[:layers],
        unrotated_layers=tuple(layer for layer in config.unrotated_layers if layer < layers),
        routing=None if config.routing is None else _first_layers(config.routing, layers),
    )


def _first_layers(routing: Routing, layers: int) -> Routing:
    dense = tuple(layer for layer in routing.dense_layers if layer < layers)
    return dataclasses.replace(routing, dense_layers=dense)
