"""The attributes of a config.json, each taken knowingly, and the readers that families have in common."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from griffin_jax.checkpoints.schema.relevance import read_by_transformers
from griffin_jax.model.config import LARGEST_FLOAT, LARGEST_SIZE, MOST_LAYERS, Activation
from griffin_jax.utils.messages import CheckpointWarning
from griffin_jax.utils.transformers_import import import_transformers

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
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
            ValueError: the value is of another type, or a number that is not finite in float32 or int32.
        """
        self._taken.add(name)
        value = self._values.get(name, default)
        if value is None or value is default:
            return default
        if isinstance(value, int | float) and not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
            raise ValueError(f"{self.where}: {name} must be finite in float32, got {value!r:.100}")
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, int) and not -LARGEST_SIZE <= value <= LARGEST_SIZE:
            raise ValueError(f"{self.where}: {name} must be at most 2^31 - 1, got {value!r:.100}")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{self.where}: {name} must be {wanted}, got {value!r:.200}")
        return value

    def count(self, name: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
        """A whole number of at least 1, checked before anything is divided by it or made as often.

        Raises:
            ValueError: it is missing, of another type or out of range.
        """
        value = self.take(name, int, default=default)
        if value is None:
            self.require(name)
        if value is None or isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{self.where}: {name} must be a whole number from 1 to {most}, got {value!r:.100}")
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

    def unite(self, count: int, *names: str) -> None:
        """Replace lists of a value for each layer by that value, where it is the same in all.

        Args:
            count: number of layers.
            names: names of attributes that may be lists.

        Raises:
            ValueError: a list is of another length, or layers differ.
        """
        for name in names:
            value = self._values.get(name)
            if isinstance(value, list):
                if len(value) != count or any(each != value[0] for each in value):
                    raise ValueError(
                        f"{self.where}: {name} is {value!r:.200}; only one value, the same in all {count} layers, is "
                        "supported"
                    )
                self._values[name] = value[0]

    def fill(self, *names: str) -> None:
        """Count attributes that are given as null as not given, so that they have their defaults."""
        self._nulls -= set(names)

    def is_null(self, name: str) -> bool:
        """Whether an attribute is given as null, which switches off some features that are on by default."""
        return name in self._nulls

    def rest(self) -> dict[str, Any]:
        """The attributes that were given but not taken."""
        return {name: value for name, value in self._values.items() if name not in self._taken}


def check_attributes(attributes: Attributes, model_type: str) -> None:
    """The config guard: no attribute that could change the model may go unread.

    Attributes that transformers' code for the model type does not read either change nothing; a `CheckpointWarning`
    names them.

    Raises:
        ValueError: there are attributes that were not read, are not knowingly ignored, and differ from the default of
            transformers' configuration class, although its code reads them; the message lists them with their values.
    """
    rest = {
        name: value
        for name, value in attributes.rest().items()
        if name not in IGNORED_ATTRIBUTES and (name, value) not in EXPECTED_ATTRIBUTES.items()
    }
    if rest:
        defaults = _transformers_defaults(model_type)
        rest = {name: value for name, value in rest.items() if name not in defaults or defaults[name] != value}
    read = read_by_transformers(model_type) if rest else None
    warn_of_unread(attributes.where, rest, None if read is None else read | EXPECTED_ATTRIBUTES.keys())


def warn_of_unread(where: str, rest: Mapping[str, Any], read: Collection[str] | None) -> None:
    """Warn of attributes that no code reads.

    Args:
        where: name of the file, for messages.
        rest: attributes that were given but not taken.
        read: names that transformers reads; None if that is not known, and any of them might be read.

    Raises:
        ValueError: transformers reads some of them, so they may change what the model computes.
    """
    if unknown := {name: value for name, value in rest.items() if read is None or name in read}:
        raise ValueError(
            f"{where}: griffin_jax does not know what to do with {_listed(unknown)}. These may change what the model "
            "computes, so it is not loaded"
        )
    if rest:
        message = f"{where}: {_listed(rest)} changes nothing here, and nothing in transformers"
        warnings.warn(message, CheckpointWarning, stacklevel=2)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in sorted(values.items()))


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
        attributes.count(name, defaults.get(name), MOST_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE)
        for name in SIZES
    )
    # As null they are not the family's defaults, but follow from the other sizes.
    given = {name: value for name, value in defaults.items() if not attributes.is_null(name)}
    return {
        "vocab_size": vocabulary,
        "width": width,
        "ff_width": ff_width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": attributes.take("num_key_value_heads", int, default=given.get("num_key_value_heads", heads)),
        "head_dim": attributes.take("head_dim", int, default=given.get("head_dim"))
        or whole_heads(attributes, width, heads),
        "max_positions": positions,
        **read_special_tokens(attributes, vocabulary, **defaults),
    }


def whole_heads(attributes: Attributes, width: int, heads: int) -> int:
    """The head size of a model whose heads share its width evenly.

    Raises:
        ValueError: they cannot.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"{attributes.where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return width // heads


def read_special_tokens(attributes: Attributes, vocabulary: int, **defaults: Any) -> dict[str, Any]:
    """The first token of a text and the tokens that end an answer, as fields of `ModelConfig`.

    Args:
        attributes: attributes of the configuration.
        vocabulary: number of tokens that the model knows.
        defaults: defaults of attributes that the family's configurations may leave out.

    Warns:
        CheckpointWarning: a token is outside the vocabulary. No answer can have it, so it is left out.
    """
    bos = _special_token(attributes, "bos_token_id", defaults)
    eos = read_eos(attributes, defaults.get("eos_token_id"))
    for name, tokens in (("bos_token_id", () if bos is None else (bos,)), ("eos_token_id", eos)):
        if outside := [token for token in tokens if not 0 <= token < vocabulary]:
            effect = "no answer ends with it" if name == "eos_token_id" else "no text begins with it"
            warnings.warn(
                f"{attributes.where}: {name} {', '.join(map(str, outside))} is outside the vocabulary of {vocabulary},"
                f" so {effect}",
                CheckpointWarning,
                stacklevel=2,
            )
    return {
        "bos_token_id": bos if bos is not None and 0 <= bos < vocabulary else None,
        "eos_token_ids": tuple(token for token in eos if 0 <= token < vocabulary),
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
    if len(types) != len(default) or any(kind not in ("sliding_attention", "full_attention") for kind in types):
        raise ValueError(
            f"{attributes.where}: layer_types must be {len(default)} times 'sliding_attention' or 'full_attention', "
            f"got {types!r:.200}"
        )
    return [kind == "sliding_attention" for kind in types]


def read_gguf_sizes(attributes: Attributes, *required: str) -> dict[str, Any]:
    """What the metadata of most architectures name alike, in the terms of config.json.

    Args:
        attributes: attributes of the metadata.
        required: names of further fields that must be there.

    Raises:
        ValueError: a field is missing or of another type.
    """
    attributes.require(
        "embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length", *required
    )
    layers = attributes.count("block_count", most=MOST_LAYERS)
    attributes.unite(layers, "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    width = attributes.count("embedding_length")
    heads = attributes.count("attention.head_count")
    head_dim = attributes.count("attention.key_length", width // heads)
    value_dim = attributes.take("attention.value_length", int, default=head_dim)
    if value_dim != head_dim:
        raise ValueError(f"{attributes.where}: attention.value_length is {value_dim}, but keys have {head_dim}")
    turning = attributes.take("rope.dimension_count", int, default=head_dim)
    return {
        "hidden_size": width,
        "intermediate_size": attributes.take("feed_forward_length", int),
        "num_hidden_layers": layers,
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
