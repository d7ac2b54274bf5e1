"""Tiny random models of every family, for the tests of parity. A new family is one new file that defines `CASES`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reference import load_torch

from griffin_jax.checkpoints.families import families
from griffin_jax.model.config import ModelConfig, Rotary

VOCABULARY, WIDTH, FF, LAYERS, HEADS, KV_HEADS, CONTEXT = 101, 32, 48, 2, 4, 2, 256
"""Sizes of the tiny models. They differ wherever they could be mistaken for each other, and are the same for all
families, so that little is compiled anew."""

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": FF, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
"""Sizes by the names that most configurations use."""

VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "head_dim": 8,
}  # fmt: skip
"""Sizes of an encoder of images, which no text goes through."""


@dataclasses.dataclass(frozen=True)
class Cases:
    """Tiny models of one family.

    Attributes:
        config: attributes that all of them share.
        variants: name -> further attributes.
        down: end of the name of the torch modules whose input is z.
        not_in_gguf: variants that a GGUF file cannot say, with the reason.
        routed: whether layers have routed experts, whose tests are in `tests/parity/test_routed_parity.py`.
    """

    config: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    down: str = "mlp.down_proj"
    not_in_gguf: Mapping[str, str] = dataclasses.field(default_factory=dict)
    routed: bool = False


def all_cases() -> dict[str, Cases]:
    """Model type -> its cases."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").CASES for name in names}


TOKENWISE = frozenset({
    "family", "vocab_size", "width", "ff_width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions",
    "kv_copies", "expert_parallel", "activation", "norm", "norm_eps", "norm_scale", "norm_bias", "norm_plus_one",
    "final_norm", "head_norm_after_rotary", "shared_norm", "attention_scale",
    "ff_clip", "up_plus_one", "qkv_clip", "embedding_width", "embedding_scale", "embedding_norm", "residual_scale",
    "logit_scale", "logit_softcap", "tied_head", "head_bias", "attention_bias", "attention_out_bias", "bos_token_id",
    "eos_token_ids",
})  # fmt: skip
"""Fields of a configuration that are sizes, or change what is computed of one token by itself. Reading whole sequences
shows whether they are right; a cache, padding or pruned neurons change nothing about them."""


def attention_structure(config: ModelConfig) -> tuple[Any, ...]:
    """What cached steps and ragged rows depend on: how a token finds those before it."""

    def kind(rotary: Rotary | None) -> str | None:
        # LongRoPE goes by the length of a text. Others differ in a table of angles.
        if rotary is None:
            return None
        return "longrope" if rotary.kind == "longrope" else "growing" if rotary.query_growth else "rotary"

    layers = {(config.window(layer) > 0, layer in config.unrotated_layers) for layer in range(config.num_layers)}
    return (
        kind(config.rotary), kind(config.local_rotary), frozenset(layers), config.learned_positions,
        config.alibi is not None, config.alibi is not None and config.alibi.scaled,
        config.attention_softcap is not None, config.head_norm != "none", config.attention_sinks,
    )  # fmt: skip


def feed_forward_structure(config: ModelConfig) -> tuple[Any, ...]:
    """What statistics, the choice of neurons and pruned layers depend on: what is around the neurons of a layer."""
    return config.norm_placement, config.parallel, config.gated, config.ff_bias, config.routing is not None


def model_config(model_type: str, attributes: Mapping[str, Any]) -> ModelConfig:
    """What a variant becomes, without its weights."""
    from transformers import AutoConfig

    values = json.loads(AutoConfig.for_model(model_type, **attributes).to_json_string())
    return families()[model_type].model_config(values, model_type)


def first_of_each(structure: Callable[[ModelConfig], Any]) -> set[tuple[str, str]]:
    """Family and variant that are the first of their structure."""
    found: dict[Any, tuple[str, str]] = {}
    for family, cases in all_cases().items():
        if cases.routed:
            continue
        for variant, attributes in cases.variants.items():
            found.setdefault(structure(model_config(family, {**cases.config, **attributes})), (family, variant))
    return set(found.values())


def build_torch(model_type: str, attributes: Mapping[str, Any], folder: Path, seed: int = 0) -> Any:
    """A random torch model, saved to a folder as transformers does."""
    torch = load_torch()
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **attributes)
    attention = attributes.get("attn_implementation", "eager")
    kind = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    model = kind.from_config(config, attn_implementation=attention).eval()
    # About the gain of one for each matrix: with larger weights the attention of a random model is a maximum rather
    # than a mean, and which key wins hangs on the last bit.
    center = 0.0 if model_type.startswith(("gemma", "nemotron", "vaultgemma")) else 1.0
    with torch.no_grad():
        # What is added to the scores of experts is no parameter in some models.
        biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
        for name, parameter in [*model.named_parameters(), *biases]:
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(std=0.2)
            else:
                parameter.uniform_(center - 0.5, center + 0.5)
    model.save_pretrained(folder)
    return model


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Change attributes of a folder's config.json; a change to `...` removes one."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
