"""What a model family is: how its configuration is read, and which tensor goes where.

Tensor shapes are written as layouts, with the letters of `griffin_jax.model`: `(N H) D -> N H D` says
that a checkpoint's matrix of N * H rows becomes an (N, H, D) parameter. The left side is also what
the tensor's shape is checked against, so a transposed or foreign tensor cannot slip through a reshape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from griffin_jax.config import Activation, ModelConfig, Rotary
from griffin_jax.transformers_import import import_transformers

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Names of `hidden_act` -> ours."""

_IGNORED_GROUPS = (
    # What wrote the file, and how the model was trained.
    "architectures transformers_version _name_or_path name_or_path _commit_hash is_llama_config transformers.js_config "
    "unsloth_fixed unsloth_version initializer_range initializer_factor torch_dtype dtype use_bfloat16 "
    "attention_dropout attn_pdrop hidden_dropout hidden_dropout_prob resid_dropout resid_pdrop embd_pdrop dropout "
    "classifier_dropout gradient_checkpointing",
    # How transformers would run it: the same function, computed or returned differently.
    "use_cache pretraining_tp chunk_size_feed_forward torchscript return_dict output_attentions "
    "output_hidden_states output_scores return_dict_in_generate _attn_implementation attn_implementation "
    "_attn_implementation_autoset tf_legacy_loss is_decoder",
    # Tokens that no prompt or answer of ours depends on, labels of classifiers, names of tokenizers.
    "pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id tokenizer_class prefix "
    "id2label label2id num_labels problem_type finetuning_task task_specific_params",
    # How an answer is drawn, which is the caller's choice here.
    "max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences suppress_tokens begin_suppress_tokens "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty",
)
IGNORED_ATTRIBUTES = frozenset(name for group in _IGNORED_GROUPS for name in group.split())
"""Attributes of any configuration that do not change what the model computes."""

EXPECTED_ATTRIBUTES: dict[str, object] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
}
"""Attributes that are harmless at exactly this value."""


class Attributes:
    """The attributes of a configuration, with a record of which were read.

    Args:
        values: name -> value. None counts as not given.
        where: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.where = where
        self._values = {name: value for name, value in values.items() if value is not None}
        self._taken: set[str] = set()

    def require(self, *names: str) -> None:
        """Raise one `ValueError` that lists all of `names` that are missing."""
        if missing := [name for name in names if name not in self._values]:
            raise ValueError(f"{self.where}: missing {', '.join(missing)}")

    def take(self, name: str, *kinds: type, default: Any = None) -> Any:
        """The value of an attribute, or `default`.

        Args:
            name: of the attribute.
            kinds: allowed types; a whole number is a float too, a bool is only a bool.
            default: where the attribute is not given.

        Raises:
            ValueError: the value is of another type.
        """
        self._taken.add(name)
        value = self._values.get(name, default)
        if value is None or value is default:
            return default
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{self.where}: {name} must be {wanted}, got {value!r}")
        return value

    def rest(self) -> dict[str, Any]:
        """What was given and not taken."""
        return {name: value for name, value in self._values.items() if name not in self._taken}


def check_attributes(attributes: Attributes, model_type: str) -> None:
    """The config guard: nothing that could change the model may go unread.

    Raises:
        ValueError: attributes that were not read, are not knowingly ignored, and differ from the
            default of transformers' configuration class; it lists them with their values.
    """
    rest = {
        name: value
        for name, value in attributes.rest().items()
        if name not in IGNORED_ATTRIBUTES and (name, value) not in EXPECTED_ATTRIBUTES.items()
    }
    if rest:
        defaults = _transformers_defaults(model_type)
        rest = {name: value for name, value in rest.items() if name not in defaults or defaults[name] != value}
    if rest:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(rest.items()))
        raise ValueError(
            f"{attributes.where}: griffin_jax does not know what to do with {listed}. These may change what the model "
            "computes, so it is not loaded"
        )


@functools.cache
def _transformers_defaults(model_type: str) -> dict[str, Any]:
    """Attributes of transformers' default configuration of a model type; none if it has no such type."""
    try:
        return import_transformers().AutoConfig.for_model(model_type).to_dict()
    except (ImportError, ValueError):
        return {}


def read_activation(attributes: Attributes, name: str = "hidden_act") -> Activation:
    """The non-linearity of the feed-forward layer."""
    value = attributes.take(name, str, default="silu")
    if value not in ACTIVATIONS:
        raise ValueError(f"{attributes.where}: {name} is {value!r}; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def read_eos(attributes: Attributes) -> tuple[int, ...]:
    """The tokens that end an answer: one, several or none."""
    value = attributes.take("eos_token_id", int, list, default=[])
    tokens = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ValueError(f"{attributes.where}: eos_token_id must be whole numbers, got {value!r}")
    return tuple(dict.fromkeys(tokens))


def read_rotary(attributes: Attributes, max_positions: int) -> Rotary:
    """Rotary embedding, from `rope_theta` and `rope_scaling` or from transformers 5's `rope_parameters`.

    Raises:
        ValueError: the kind is not supported, an attribute is missing, or one is not understood.
    """
    theta = attributes.take("rope_theta", float, default=10_000.0)
    share = attributes.take("partial_rotary_factor", float, default=1.0)
    original = attributes.take("original_max_position_embeddings", int)
    scaling = attributes.take("rope_scaling", dict, default={})
    parameters = attributes.take("rope_parameters", dict, default={})
    if scaling and parameters and scaling != parameters:
        raise ValueError(
            f"{attributes.where}: rope_scaling {scaling} and rope_parameters {parameters} contradict each other"
        )
    rope = Attributes(scaling or parameters, f"{attributes.where}: rotary embedding")
    legacy_kind = rope.take("type", str, default="default")
    kind = rope.take("rope_type", str, default=legacy_kind)
    theta = rope.take("rope_theta", float, default=theta)
    share = rope.take("partial_rotary_factor", float, default=share)
    if share != 1.0:
        raise ValueError(f"{rope.where}: partial_rotary_factor is {share}; only whole heads are supported")
    if kind in ("llama3", "yarn"):
        inner = rope.take("original_max_position_embeddings", int, default=max_positions)
        original = inner if original is None else original

    if kind == "default":
        rotary = Rotary(theta=theta)
    elif kind == "dynamic":
        # Dynamic NTK scaling changes the wavelengths only beyond max_position_embeddings, and no
        # prompt with its answer may be longer than that here.
        rope.take("factor", float)
        rope.take("original_max_position_embeddings", int)
        rotary = Rotary(theta=theta)
    elif kind == "linear":
        rope.require("factor")
        rotary = Rotary(theta=theta, kind="linear", factor=rope.take("factor", float))
    elif kind == "llama3":
        rope.require("factor", "low_freq_factor", "high_freq_factor")
        rotary = Rotary(
            theta=theta,
            kind="llama3",
            factor=rope.take("factor", float),
            original_positions=original or 0,
            low_freq_factor=rope.take("low_freq_factor", float),
            high_freq_factor=rope.take("high_freq_factor", float),
        )
    elif kind == "yarn":
        rotary = _read_yarn(rope, theta, original or max_positions, max_positions)
    else:
        raise ValueError(f"{rope.where}: kind {kind!r}; supported are default, linear, dynamic, llama3, yarn")
    if rest := rope.rest():
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(rest.items()))
        raise ValueError(f"{rope.where}: kind {kind!r} does not use {listed}")
    return rotary


def _read_yarn(rope: Attributes, theta: float, original: int, max_positions: int) -> Rotary:
    factor = rope.take("factor", float, default=max_positions / original)
    mscale, mscale_all = rope.take("mscale", float), rope.take("mscale_all_dim", float)

    def magnitude(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    default = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude()
    return Rotary(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_positions=original,
        beta_fast=rope.take("beta_fast", float) or 32.0,
        beta_slow=rope.take("beta_slow", float) or 1.0,
        truncate=rope.take("truncate", bool, default=True),
        attention_factor=rope.take("attention_factor", float, default=default),
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of a checkpoint's tensor become those of a parameter.

    Attributes:
        before: axes of the checkpoint's tensor; several letters are one axis that holds their product.
        after: axes of the parameter, of the same letters.
    """

    before: tuple[tuple[str, ...], ...]
    after: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From notation such as `D (N H) -> N H D`. A text without an arrow leaves a tensor as it is."""
        before, _, after = text.partition("->")
        return cls(_axes(before), _axes(after or before))

    def shape_before(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor."""
        return _shape(self.before, sizes)

    def shape_after(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the parameter."""
        return _shape(self.after, sizes)

    def apply(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The parameter; a view of the checkpoint's tensor wherever that is possible."""
        letters = [letter for axis in self.before for letter in axis]
        order = [letters.index(letter) for axis in self.after for letter in axis]
        parts = array.reshape([_size(letter, sizes) for letter in letters])
        return parts.transpose(order).reshape(self.shape_after(sizes))


def _axes(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", text))


def _size(letter: str, sizes: Mapping[str, int]) -> int:
    return int(letter) if letter.isdigit() else sizes[letter]


def _shape(axes: tuple[tuple[str, ...], ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(_size(letter, sizes) for letter in axis) for axis in axes)


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """What the letters of layouts stand for in a model; P is the number of rotary pairs of a head."""
    return {
        "D": config.width,
        "F": config.ff_width,
        "G": config.num_kv_heads,
        "H": config.head_dim,
        "N": config.num_heads,
        "P": config.head_dim // 2,
        "V": config.vocab_size,
    }


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Which tensor of a checkpoint a parameter comes from.

    A rule applies to a model that has the parameter: that of a bias only to models with biases, that
    of the head only where it is not tied. Several rules may name the same tensor.

    Attributes:
        name: of the tensor in Hugging Face checkpoints; `{layer}` stands for the layer's number.
        path: of the parameter in the module tree.
        layout: of the tensor and the parameter, see `Layout`.
    """

    name: str
    path: str
    layout: str


@dataclasses.dataclass(frozen=True)
class GgufRule:
    """The Hugging Face name of a GGUF tensor.

    Attributes:
        name: in GGUF files; `{layer}` stands for the layer's number.
        hf_name: in Hugging Face checkpoints.
        layout: where llama.cpp stores the values in another order, how to put them back.
    """

    name: str
    hf_name: str
    layout: str | None = None


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """How a family looks in GGUF files.

    Attributes:
        architecture: value of `general.architecture`, and prefix of the family's metadata.
        read_config: the metadata (without the prefix), the names of the tensors and the tensor
            `rope_freqs.weight` (or None) -> a configuration in Hugging Face's terms. Token ids, the
            vocabulary's size and whether the head is tied are filled in by the reader.
        rules: names of tensors.
        ignored: names of tensors that are read in another way or not needed.
    """

    architecture: str
    read_config: Callable[[Attributes, frozenset[str], np.ndarray | None], dict[str, Any]]
    rules: tuple[GgufRule, ...]
    ignored: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: everything that is special about its checkpoints.

    Attributes:
        model_type: value of `model_type` in config.json.
        read_config: takes every attribute it knows and returns the architecture.
        rules: which tensor goes where.
        ignored: regular expressions of tensors that carry nothing the configuration does not say.
        copies: tensors that may be present although their rule does not apply, if they equal another.
        gguf: how it looks in GGUF files, if it is read from them.
    """

    model_type: str
    read_config: Callable[[Attributes], ModelConfig]
    rules: tuple[TensorRule, ...]
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf: GgufFamily | None = None

    def model_config(self, values: Mapping[str, Any], where: str) -> ModelConfig:
        """The architecture that a config.json describes.

        Raises:
            ValueError: an attribute is missing, out of range or not understood.
        """
        if values.get("quantization_config"):
            raise ValueError(
                f"{where}: quantised checkpoints are not supported, and quantization_config is "
                f"{values['quantization_config']!r}; use the unquantised one, or a GGUF file"
            )
        attributes = Attributes(values, where)
        attributes.take("model_type", str)
        try:
            config = self.read_config(attributes)
        except ValueError as error:
            raise error if where in str(error) else ValueError(f"{where}: {error}") from error
        check_attributes(attributes, self.model_type)
        return config

    def rules_by_path(self, config: ModelConfig) -> dict[str, TensorRule]:
        """Every rule, for every layer, by the parameter it fills; also of parameters the model lacks."""
        rules = (rule for template in self.rules for rule in _every_layer(template, config.num_layers))
        return {rule.path: rule for rule in rules}

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor is knowingly left aside."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def _every_layer(template: TensorRule, num_layers: int) -> list[TensorRule]:
    if "{layer}" not in template.path:
        return [template]
    return [
        TensorRule(template.name.format(layer=layer), template.path.format(layer=layer), template.layout)
        for layer in range(num_layers)
    ]
