"""GRIFFIN (arXiv 2404.01365) for JAX: faster answers, written with only the feed-forward neurons that a prompt needs.

Public names are loaded on first use: `import griffin_jax` alone loads nothing, not even JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from griffin_jax.adapters.adapter import Adapter, attach, detach, merge, stack, unmerge
    from griffin_jax.adapters.config import AdapterConfig
    from griffin_jax.adapters.library import Library
    from griffin_jax.adapters.peft import load_adapter, save_adapter
    from griffin_jax.checkpoints.loading import ConversionReport, convert, load_model, open_source, plan, verify
    from griffin_jax.checkpoints.native import save
    from griffin_jax.checkpoints.planning import NarrowingWarning, Plan, UncheckedWarning
    from griffin_jax.checkpoints.verification import Verification, VerificationError
    from griffin_jax.extensions.config import Extensions
    from griffin_jax.extensions.in_place import InPlace
    from griffin_jax.extensions.prior import Prior
    from griffin_jax.extensions.reconstruction import Reconstruction
    from griffin_jax.extensions.refresh import refresh
    from griffin_jax.extensions.speculative import Drafting, decode_speculative
    from griffin_jax.generation.config import GenerationConfig
    from griffin_jax.generation.decode import DecodeState, decode, init_decode
    from griffin_jax.generation.padding import bucket, pad
    from griffin_jax.generation.prefill import Prefilled, prefill
    from griffin_jax.generation.sampling import Greedy, Sample
    from griffin_jax.generation.scoring import teacher_forced
    from griffin_jax.griffin.config import GriffinConfig, kept_neurons
    from griffin_jax.griffin.neurons import ExpertNeurons
    from griffin_jax.griffin.prune import prune
    from griffin_jax.griffin.select import magnitude, select
    from griffin_jax.griffin.statistic import Statistics, token_statistic
    from griffin_jax.llm.llm import LLM, Generation, load
    from griffin_jax.model.cache import EMPTY, KVCache, empty_cache
    from griffin_jax.model.config import ModelConfig, Rotary
    from griffin_jax.model.feed_forward import FeedForward
    from griffin_jax.model.transformer import Transformer
    from griffin_jax.text.tokenizer import Tokenizer
    from griffin_jax.utils.messages import CheckpointWarning

__version__ = "0.2.0"

_NAMES = {
    "adapters.adapter": "Adapter attach detach merge stack unmerge",
    "adapters.config": "AdapterConfig",
    "adapters.library": "Library",
    "adapters.peft": "load_adapter save_adapter",
    "checkpoints.loading": "ConversionReport convert load_model open_source plan verify",
    "checkpoints.native": "save",
    "checkpoints.planning": "NarrowingWarning Plan UncheckedWarning",
    "checkpoints.verification": "Verification VerificationError",
    "extensions.config": "Extensions",
    "extensions.in_place": "InPlace",
    "extensions.prior": "Prior",
    "extensions.reconstruction": "Reconstruction",
    "extensions.refresh": "refresh",
    "extensions.speculative": "Drafting decode_speculative",
    "generation.config": "GenerationConfig",
    "generation.decode": "DecodeState decode init_decode",
    "generation.padding": "bucket pad",
    "generation.prefill": "Prefilled prefill",
    "generation.sampling": "Greedy Sample",
    "generation.scoring": "teacher_forced",
    "griffin.config": "GriffinConfig kept_neurons",
    "griffin.neurons": "ExpertNeurons",
    "griffin.prune": "prune",
    "griffin.select": "magnitude select",
    "griffin.statistic": "Statistics token_statistic",
    "llm.llm": "LLM Generation load",
    "model.cache": "EMPTY KVCache empty_cache",
    "model.config": "ModelConfig Rotary",
    "model.feed_forward": "FeedForward",
    "model.transformer": "Transformer",
    "text.tokenizer": "Tokenizer",
    "utils.messages": "CheckpointWarning",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

_RENAMED = {
    "Answer": "DecodeState",
    "Experts": "ExpertNeurons",
    "OneCopy": "InPlace",
    "begin": "init_decode",
    "decode_lossless": "decode_speculative",
}
"""Old names from version 0.1 and the names that replace them; the old ones still work."""

__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        from griffin_jax.utils.deprecation import warn_renamed

        warn_renamed(f"griffin_jax.{name}", f"griffin_jax.{_RENAMED[name]}")
        return __getattr__(_RENAMED[name])
    if name in ("jitted", "harness"):
        return importlib.import_module(f"griffin_jax.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"griffin_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
