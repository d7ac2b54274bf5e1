"""What a model family is: how its configuration is read, and which tensor goes where.

Tensor shapes are written as layouts, with the letters of `griffin_jax.model`: `(N H) D -> N H D` says that a
checkpoint's matrix of N * H rows becomes an (N, H, D) parameter, and `([N]+G+G H) D -> N H D` that the matrix has rows
for N + G + G heads, of which the first N become the parameter. The tensor's shape is checked against the left side, so
that a transposed or foreign tensor cannot slip through a reshape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from griffin_jax.model.config import Activation, ModelConfig, Rotary
from griffin_jax.utils.transformers_import import import_transformers

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Our names of activations, by their names in `hidden_act`."""

_IGNORED_GROUPS = (
    # What wrote the file, how the model was trained, and which remote code would run it, which is never run here.
    "architectures auto_map custom_pipelines transformers_version _name_or_path name_or_path _commit_hash "
    "is_llama_config transformers.js_config unsloth_fixed unsloth_version initializer_range initializer_factor "
    "torch_dtype dtype use_bfloat16 attention_dropout attn_pdrop hidden_dropout hidden_dropout_prob resid_dropout "
    "resid_pdrop embd_pdrop dropout attention_probs_dropout_prob activation_dropout layerdrop init_std "
    "classifier_dropout gradient_checkpointing cache_implementation",
    # How transformers would run it: the same function, computed or returned differently.
    "use_cache output_past pretraining_tp chunk_size_feed_forward torchscript return_dict output_attentions "
    "output_hidden_states output_scores return_dict_in_generate _attn_implementation attn_implementation "
    "_attn_implementation_autoset tf_legacy_loss is_decoder",
    # Tokens that no prompt or answer of ours depends on, labels of classifiers, names of tokenizers.
    "pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id tokenizer_class prefix "
    "id2label label2id num_labels _num_labels problem_type finetuning_task task_specific_params",
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
        values: values by name. None counts as not given, except for `is_null`.
        where: name of the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.where = where
        self._nulls = frozenset(name for name, value in values.items() if value is None)
        self._values = {name: value for name, value in values.items() if value is not None}
        self._taken: set[str] = set()

    def require(self, *names: str) -> None:
        """Raise one `ValueError` that lists all of `names` that are missing."""
        if missing := [name for name in names if name not in self._values]:
            raise ValueError(f"{self.where}: missing {', '.join(missing)}")

    def take(self, name: str, *kinds: type, default: Any = None) -> Any:
        """The value of an attribute, or `default`.

        Args:
            name: name of the attribute.
            kinds: allowed types; a whole number is also a float, but a bool is only a bool.
            default: value where the attribute is not given.

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

    def ignore(self, *names: str) -> None:
        """Count attributes as read because their values change nothing."""
        self._taken.update(names)

    def expect(self, **values: Any) -> None:
        """Count attributes as read that may have only these values, if they are given at all.

        Raises:
            ValueError: an attribute has another value.
        """
        for name, value in values.items():
            if (given := self._values.get(name, value)) != value:
                raise ValueError(f"{self.where}: {name} is {given!r}; only {value!r} is supported")
        self.ignore(*values)

    def rename(self, **names: str) -> None:
        """Give attributes the names that most families use, such as `rename(n_embd="hidden_size")`.

        Raises:
            ValueError: both names are given, with different values.
        """
        for old, new in names.items():
            value = self._values.pop(old, None)
            if value is not None and self._values.setdefault(new, value) != value:
                raise ValueError(f"{self.where}: {old} is {value!r}, but {new} is {self._values[new]!r}")
            if old in self._nulls and new not in self._values:
                self._nulls |= {new}

    def is_null(self, name: str) -> bool:
        """Whether an attribute is given as null, which switches off some features that are on by default."""
        return name in self._nulls

    def rest(self) -> dict[str, Any]:
        """The attributes that were given but not taken."""
        return {name: value for name, value in self._values.items() if name not in self._taken}


def check_attributes(attributes: Attributes, model_type: str) -> None:
    """The config guard: no attribute that could change the model may go unread.

    Raises:
        ValueError: there are attributes that were not read, are not knowingly ignored, and differ from the default of
            transformers' configuration class; the message lists them with their values.
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
    """Attributes of transformers' default configuration of a model type; empty if it has no such type."""
    try:
        return import_transformers().AutoConfig.for_model(model_type).to_dict()
    except (ImportError, ValueError):
        return {}


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
"""Names of sizes in most configurations."""


def read_sizes(attributes: Attributes, **defaults: Any) -> dict[str, Any]:
    """The fields of `ModelConfig` that most families name alike.

    Args:
        attributes: attributes of the configuration.
        defaults: defaults of attributes that the family's configurations may leave out.

    Raises:
        ValueError: an attribute is missing or not a whole number.
    """
    attributes.require(*(name for name in SIZES if name not in defaults))
    vocabulary, width, ff_width, layers, heads, positions = (
        attributes.take(name, int, default=defaults.get(name)) for name in SIZES
    )
    return {
        "vocab_size": vocabulary,
        "width": width,
        "ff_width": ff_width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": attributes.take("num_key_value_heads", int, default=defaults.get("num_key_value_heads", heads)),
        "head_dim": attributes.take("head_dim", int, default=defaults.get("head_dim"))
        or whole_heads(attributes, width, heads),
        "max_positions": positions,
        **read_special_tokens(attributes, **defaults),
    }


def whole_heads(attributes: Attributes, width: int, heads: int) -> int:
    """The head size of a model whose heads share its width evenly.

    Raises:
        ValueError: they cannot.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"{attributes.where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return width // heads


def read_special_tokens(attributes: Attributes, **defaults: Any) -> dict[str, Any]:
    """The first token of a text and the tokens that end an answer, as fields of `ModelConfig`."""
    return {
        "bos_token_id": _special_token(attributes, "bos_token_id", defaults),
        "eos_token_ids": read_eos(attributes, defaults.get("eos_token_id")),
    }


def _special_token(attributes: Attributes, name: str, defaults: Mapping[str, Any]) -> int | None:
    return attributes.take(name, int, default=None if attributes.is_null(name) else defaults.get(name))


def read_layer_types(attributes: Attributes, default: Sequence[bool]) -> list[bool]:
    """Whether the attention of each layer has a window, from `layer_types`.

    Args:
        attributes: attributes of the configuration.
        default: value of each layer, if the configuration does not say.

    Raises:
        ValueError: there is not one known type for each layer.
    """
    types = attributes.take("layer_types", list)
    if types is None:
        return list(default)
    if len(types) != len(default) or not set(types) <= {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"{attributes.where}: layer_types must be {len(default)} times 'sliding_attention' or 'full_attention', "
            f"got {types!r}"
        )
    return [kind == "sliding_attention" for kind in types]


def read_gguf_sizes(attributes: Attributes, *required: str) -> dict[str, Any]:
    """What the metadata of most architectures name alike, in the terms of config.json.

    Args:
        attributes: attributes of the metadata.
        required: names of further fields that must be there.

    Raises:
        ValueError: a field is missing or of another type, or the model is a mixture of experts.
    """
    attributes.require(
        "embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length", *required
    )
    width = attributes.take("embedding_length", int)
    heads = attributes.take("attention.head_count", int)
    head_dim = attributes.take("attention.key_length", int, default=width // max(heads, 1))
    value_dim = attributes.take("attention.value_length", int, default=head_dim)
    if value_dim != head_dim:
        raise ValueError(f"{attributes.where}: attention.value_length is {value_dim}, but keys have {head_dim}")
    turning = attributes.take("rope.dimension_count", int, default=head_dim)
    if experts := attributes.take("expert_count", int, default=0):
        raise ValueError(f"{attributes.where}: mixtures of experts are not supported (expert_count is {experts})")
    attributes.take("expert_used_count", int)
    return {
        "hidden_size": width,
        "intermediate_size": attributes.take("feed_forward_length", int),
        "num_hidden_layers": attributes.take("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": attributes.take("attention.head_count_kv", int, default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": attributes.take("context_length", int),
        # Half a dimension more, so that rounding down gives `turning` again, however the division was rounded.
        **({} if turning == head_dim else {"partial_rotary_factor": (turning + 0.5) / head_dim}),
    }


def windows_of(window: int | None, windowed: Sequence[bool]) -> tuple[int, ...]:
    """`ModelConfig.windows` where some layers have this window; empty where none has."""
    return tuple(window if has else 0 for has in windowed) if window and any(windowed) else ()


def read_activation(attributes: Attributes, name: str = "hidden_act", default: str = "silu") -> Activation:
    """The non-linearity of the feed-forward layer."""
    value = attributes.take(name, str, default=default)
    if value not in ACTIVATIONS:
        raise ValueError(f"{attributes.where}: {name} is {value!r}; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def read_eos(attributes: Attributes, default: int | list[int] | None = None) -> tuple[int, ...]:
    """The tokens that end an answer: one, several or none."""
    if default is None or attributes.is_null("eos_token_id"):
        default = []
    value = attributes.take("eos_token_id", int, list, default=default)
    tokens = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ValueError(f"{attributes.where}: eos_token_id must be whole numbers, got {value!r}")
    return tuple(dict.fromkeys(tokens))


def read_rotary(
    attributes: Attributes,
    max_positions: int,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    share: float | None = None,
    original: int | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Rotary:
    """Rotary embedding, from `rope_theta` and `rope_scaling` or from transformers 5's `rope_parameters`.

    Args:
        attributes: attributes of the configuration.
        max_positions: the context, in tokens.
        head_dim: H, the size of a head.
        theta: the family's default base.
        share: the family's default for the share of a head that turns; None if it turns whole heads only.
        original: the family's default for the context of the unscaled model, in tokens; None to look in `rope_scaling`.
        kinds: meanings of all kinds that the family has, by their names there; None for the usual ones.

    Raises:
        ValueError: the kind is not supported, or an attribute is missing or not understood.
    """
    theta = attributes.take("rope_theta", float, default=theta)
    given_share = attributes.take("partial_rotary_factor", float)
    original = attributes.take("original_max_position_embeddings", int, default=original)
    scaling = attributes.take("rope_scaling", dict, default={})
    parameters = attributes.take("rope_parameters", dict, default={})
    if scaling and parameters and scaling != parameters:
        raise ValueError(
            f"{attributes.where}: rope_scaling {scaling} and rope_parameters {parameters} contradict each other"
        )
    if given_share is not None:
        parameters = {"partial_rotary_factor": given_share, **(scaling or parameters)}
    return rotary_of(
        parameters or scaling,
        f"{attributes.where}: rotary embedding",
        max_positions,
        head_dim,
        theta=theta,
        share=share,
        original=original,
        kinds=kinds,
    )


def rotary_of(
    parameters: Mapping[str, Any],
    where: str,
    max_positions: int,
    head_dim: int,
    *,
    theta: float,
    share: float | None = None,
    original: int | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Rotary:
    """Rotary embedding from the value of `rope_scaling` or `rope_parameters`.

    Args:
        parameters: that value.
        where: where it is from, for messages.
        max_positions: the context, in tokens.
        head_dim: H, the size of a head.
        theta: base, if `parameters` has none.
        share: share of a head that turns, if `parameters` has none; None if it must be the whole head.
        original: context of the unscaled model, in tokens, which takes precedence over that in `parameters`.
        kinds: meanings of all allowed kinds, by their names; None for the usual ones.

    Raises:
        ValueError: the kind is not supported, or an attribute is missing or not understood.
    """
    rope = Attributes(parameters, where)
    legacy_kind = rope.take("type", str, default="default")
    kind = rope.take("rope_type", str, default=legacy_kind)
    if kinds is not None:
        if kind not in kinds:
            raise ValueError(f"{where}: kind {kind!r}; supported are {', '.join(kinds)}")
        kind = kinds[kind]
    theta = rope.take("rope_theta", float, default=theta)
    given_share = rope.take("partial_rotary_factor", float, default=share or 1.0)
    if share is None and given_share != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor is {given_share}; this family turns whole heads only")
    dims = int(head_dim * given_share)
    plain = Rotary(theta=theta, dims=None if dims == head_dim else dims)
    if kind in ("llama3", "yarn", "longrope"):
        inner = rope.take("original_max_position_embeddings", int, default=max_positions)
        original = inner if original is None else original

    if kind == "default":
        rotary = plain
    elif kind == "dynamic":
        # Dynamic NTK scaling changes the wavelengths only beyond max_position_embeddings, and no
        # prompt with its answer may be longer than that here.
        rope.take("factor", float)
        rope.take("original_max_position_embeddings", int)
        rotary = plain
    elif kind == "linear":
        rope.require("factor")
        rotary = dataclasses.replace(plain, kind="linear", factor=rope.take("factor", float))
    elif kind == "llama3":
        rope.require("factor", "low_freq_factor", "high_freq_factor")
        rotary = dataclasses.replace(
            plain,
            kind="llama3",
            factor=rope.take("factor", float),
            original_positions=original or 0,
            low_freq_factor=rope.take("low_freq_factor", float),
            high_freq_factor=rope.take("high_freq_factor", float),
        )
    elif kind == "yarn":
        rotary = _read_yarn(rope, plain, original or max_positions, max_positions)
    elif kind == "longrope":
        rotary = _read_longrope(rope, plain, original or max_positions, max_positions)
    else:
        raise ValueError(f"{rope.where}: kind {kind!r}; supported are default, linear, dynamic, llama3, yarn, longrope")
    if rest := rope.rest():
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(rest.items()))
        raise ValueError(f"{rope.where}: kind {kind!r} does not use {listed}")
    return rotary


def _read_longrope(rope: Attributes, plain: Rotary, original: int, max_positions: int) -> Rotary:
    rope.require("short_factor", "long_factor")
    factor = rope.take("factor", float, default=max_positions / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = {}
    for name in ("short_factor", "long_factor"):
        factors[name] = rope.take(name, list)
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in factors[name]):
            raise ValueError(f"{rope.where}: {name} must be numbers, got {factors[name]!r}")
    return dataclasses.replace(
        plain,
        kind="longrope",
        original_positions=original,
        attention_factor=rope.take("attention_factor", float, default=default),
        short_factors=tuple(map(float, factors["short_factor"])),
        long_factors=tuple(map(float, factors["long_factor"])),
    )


def _read_yarn(rope: Attributes, plain: Rotary, original: int, max_positions: int) -> Rotary:
    factor = rope.take("factor", float, default=max_positions / original)
    mscale, mscale_all = rope.take("mscale", float), rope.take("mscale_all_dim", float)

    def magnitude(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    default = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude()
    return dataclasses.replace(
        plain,
        kind="yarn",
        factor=factor,
        original_positions=original,
        beta_fast=rope.take("beta_fast", float) or 32.0,
        beta_slow=rope.take("beta_slow", float) or 1.0,
        truncate=rope.take("truncate", bool, default=True),
        attention_factor=rope.take("attention_factor", float, default=default),
    )


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of an axis: a letter, a number, or a sum of them of which one part is taken.

    Attributes:
        parts: the summands; only one where nothing is cut out.
        taken: number of the part that is taken.
    """

    parts: tuple[str, ...]
    taken: int = 0

    @classmethod
    def parse(cls, text: str) -> Factor:
        """The factor that a text such as `H`, `2` or `[N]+G+G` describes."""
        parts = text.split("+")
        taken = next((i for i, part in enumerate(parts) if part.startswith("[")), 0)
        return cls(tuple(part.strip("[]") for part in parts), taken)

    @property
    def letter(self) -> str:
        """The part that is taken."""
        return self.parts[self.taken]

    def size(self, sizes: Mapping[str, int]) -> int:
        """The size of the whole factor."""
        return sum(_size(part, sizes) for part in self.parts)

    def cut(self, sizes: Mapping[str, int]) -> slice:
        """The slice of the part that is taken."""
        start = sum(_size(part, sizes) for part in self.parts[: self.taken])
        return slice(start, start + _size(self.letter, sizes))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of a checkpoint's tensor become those of a parameter.

    Attributes:
        before: axes of the checkpoint's tensor; an axis of several factors has the size of their product.
        after: axes of the parameter, with the same letters. Factors of 1 may be added and left out.
    """

    before: tuple[tuple[Factor, ...], ...]
    after: tuple[tuple[Factor, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that a text describes: `D (N H) -> N H D`, or `([N]+G+G H) D -> N H D` for a part of a tensor.

        A text without an arrow leaves the tensor as it is.
        """
        before, _, after = text.partition("->")
        return cls(_axes(before), _axes(after or before))

    def shape_before(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor."""
        return tuple(math.prod(factor.size(sizes) for factor in axis) for axis in self.before)

    def shape_after(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(math.prod(_size(factor.letter, sizes) for factor in axis) for axis in self.after)

    def apply(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The parameter from the checkpoint's tensor; a view of it where that is possible."""
        factors = [factor for axis in self.before for factor in axis]
        parts = array.reshape([factor.size(sizes) for factor in factors])
        parts = parts[tuple(factor.cut(sizes) for factor in factors)]
        parts = parts.squeeze(tuple(axis for axis, factor in enumerate(factors) if factor.letter == "1"))
        letters = [factor.letter for factor in factors if factor.letter != "1"]
        order = [letters.index(factor.letter) for axis in self.after for factor in axis if factor.letter != "1"]
        return parts.transpose(order).reshape(self.shape_after(sizes))


def _axes(text: str) -> tuple[tuple[Factor, ...], ...]:
    groups = re.findall(r"\([^)]*\)|\S+", text)
    return tuple(tuple(Factor.parse(factor) for factor in group.strip("()").split()) for group in groups)


def _size(letter: str, sizes: Mapping[str, int]) -> int:
    return int(letter) if letter.isdigit() else sizes[letter]


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The sizes that the letters of layouts stand for in a model.

    In addition to those of `griffin_jax.model`: C positions of the context, E columns of the embedding, P pairs of
    dimensions of a head.
    """
    return {
        "C": config.max_positions,
        "D": config.width,
        "E": config.embedding_width or config.width,
        "F": config.ff_width,
        "G": config.num_kv_heads,
        "H": config.head_dim,
        "N": config.num_heads,
        "P": config.head_dim // 2,
        "R": config.num_heads // config.num_kv_heads,
        "V": config.vocab_size,
    }


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Which tensor of a checkpoint a parameter comes from.

    A rule applies to models that have the parameter: that of a bias only to models with biases, that of the head only
    where it is not tied. Several rules may take their parts of one fused tensor.

    Attributes:
        name: name of the tensor; `{layer}` stands for the number of the layer, `{head}` for the number of a head, where
            every head has a tensor of its own.
        path: path of the parameter in the module tree.
        layout: how the tensor's axes become the parameter's, see `Layout`. With `{head}`, the tensors of all heads are
            stacked along a new first axis.
        add: number that is added to the stored values.
    """

    name: str
    path: str
    layout: str
    add: float = 0.0

    def in_layer(self, layer: int) -> TensorRule:
        """The rule with a number in place of `{layer}`."""
        name, path = (text.replace("{layer}", str(layer)) for text in (self.name, self.path))
        return dataclasses.replace(self, name=name, path=path)

    def tensors(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the rule reads."""
        shape = Layout.parse(self.layout).shape_before(sizes)
        if "{head}" not in self.name:
            return {self.name: shape}
        return {self.name.replace("{head}", str(head)): shape[1:] for head in range(shape[0])}


def layer_rules(prefix: str, *rules: tuple[str, str, str]) -> tuple[TensorRule, ...]:
    """Rules for the tensors of a layer, each from its name after `prefix`, path within the layer, and layout."""
    return tuple(TensorRule(prefix + name, f"layers.{{layer}}.{path}", layout) for name, path, layout in rules)


Rules = tuple[TensorRule, ...] | Callable[[ModelConfig], tuple[TensorRule, ...]]
"""Rules of a family; a function where they depend on more of the configuration than which parameters it has."""


GGUF_RULES = (
    TensorRule("token_embd.weight", "embedding", "V D"),
    TensorRule("token_embd_norm.weight", "embedding_norm.scale", "D"),
    TensorRule("token_embd_norm.bias", "embedding_norm.bias", "D"),
    TensorRule("position_embd.weight", "position_embedding", "C D"),
    TensorRule("output_norm.weight", "norm.scale", "D"),
    TensorRule("output_norm.bias", "norm.bias", "D"),
    TensorRule("output.weight", "head", "V D"),
    *layer_rules(
        "blk.{layer}.",
        ("attn_norm.weight", "attention_norm.scale", "D"),
        ("attn_norm.bias", "attention_norm.bias", "D"),
        ("attn_q.weight", "attention.query", "(N H) D -> N H D"),
        ("attn_k.weight", "attention.key", "(G H) D -> G H D"),
        ("attn_v.weight", "attention.value", "(G H) D -> G H D"),
        ("attn_output.weight", "attention.out", "D (N H) -> N H D"),
        ("attn_q.bias", "attention.query_bias", "(N H) -> N H"),
        ("attn_k.bias", "attention.key_bias", "(G H) -> G H"),
        ("attn_v.bias", "attention.value_bias", "(G H) -> G H"),
        ("attn_output.bias", "attention.out_bias", "D"),
        ("ffn_norm.weight", "ff_norm.scale", "D"),
        ("ffn_norm.bias", "ff_norm.bias", "D"),
        ("ffn_gate.weight", "ff.gate", "F D"),
        ("ffn_up.weight", "ff.up", "F D"),
        ("ffn_down.weight", "ff.down", "D F -> F D"),
        ("ffn_gate.bias", "ff.gate_bias", "F"),
        ("ffn_up.bias", "ff.up_bias", "F"),
        ("ffn_down.bias", "ff.down_bias", "D"),
    ),
)
"""Rules with llama.cpp's names, which are the same for all architectures.

A family whose files differ adds its own rules after these: of several rules for the same parameter the last one counts.
"""

FUSED_GGUF_RULES = (
    *GGUF_RULES,
    *layer_rules(
        "blk.{layer}.",
        ("attn_qkv.weight", "attention.query", "([N]+G+G H) D -> N H D"),
        ("attn_qkv.weight", "attention.key", "(N+[G]+G H) D -> G H D"),
        ("attn_qkv.weight", "attention.value", "(N+G+[G] H) D -> G H D"),
        ("attn_qkv.bias", "attention.query_bias", "([N]+G+G H) -> N H"),
        ("attn_qkv.bias", "attention.key_bias", "(N+[G]+G H) -> G H"),
        ("attn_qkv.bias", "attention.value_bias", "(N+G+[G] H) -> G H"),
    ),
)
"""The same for architectures whose queries, keys and values are one tensor; llama.cpp stores them in this order."""


class StoredTensors(Protocol):
    """The tensors of a GGUF file, which the description of a family may look at in addition to the metadata."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor in the file, outermost axis first."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor."""
        ...


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """How a family looks in GGUF files.

    Attributes:
        architectures: values of `general.architecture`, each also the prefix of the family's metadata.
        read_config: function of the metadata (without the prefix) and the file's tensors that gives a configuration
            in Hugging Face's terms. The reader adds token ids, the vocabulary's size and whether the head is tied.
        rules: rules that say which tensor goes where, by the names in GGUF files.
        ignored: regular expressions of tensors that are read in another way or not needed.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[Attributes, StoredTensors], dict[str, Any]]
    rules: Rules
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: everything that is special about its checkpoints.

    Attributes:
        model_type: value of `model_type` in config.json.
        title: what people call its models, for the list of supported models.
        read_config: function that takes every attribute it knows and returns the architecture.
        rules: rules that say which tensor goes where.
        prefix: prefix of the names of most tensors, which checkpoints of the bare model lack.
        ignored: regular expressions of tensors that say nothing that the configuration does not say.
        copies: tensors that may be present although their rule does not apply, each with the one that it must equal.
        gguf: how the family looks in GGUF files, if it is read from them.
        also_gguf: architectures of another family that llama.cpp converts these models to.
    """

    model_type: str
    title: str
    read_config: Callable[[Attributes], ModelConfig]
    rules: Rules
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf: GgufFamily | None = None
    also_gguf: tuple[str, ...] = ()

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


def rules_by_path(rules: Rules, config: ModelConfig) -> dict[str, TensorRule]:
    """Every rule, for every layer, by the path of its parameter; also for parameters that the model lacks."""
    templates = rules if isinstance(rules, tuple) else rules(config)
    return {
        rule.path: rule
        for template in templates
        for rule in (
            [template.in_layer(layer) for layer in range(config.num_layers)]
            if "{layer}" in template.path
            else [template]
        )
    }


def is_ignored(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a tensor is knowingly ignored."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)
