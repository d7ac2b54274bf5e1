"""What a model family is: how its configuration is read, and which tensor goes where.

Tensor shapes are written as layouts, with the letters of `griffin_jax.model`: `(N H) D -> N H D` says that a
checkpoint's matrix of N * H rows becomes an (N, H, D) parameter, and `([N]+G+G H) D -> N H D` that the matrix has rows
for N + G + G heads, of which the first N become the parameter. The tensor's shape is checked against the left side, so
that a transposed or foreign tensor cannot slip through a reshape.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from griffin_jax.checkpoints.schema.attributes import Attributes, check_attributes
from griffin_jax.checkpoints.schema.layouts import Rules, TensorRule, sizes_of
from griffin_jax.model.config import ModelConfig
from griffin_jax.utils.messages import brief

QUANTISATIONS = ("gptq", "awq", "fp8", "fbgemm_fp8", "compressed-tensors", "bitsandbytes")
"""Values of `quant_method` that say how linear layers of any family are stored, see
`griffin_jax.checkpoints.quantised.methods`."""

QUANTISATION_ATTRIBUTES = ("quantization_config", "compression_config")
"""Attributes that say how a checkpoint is quantised; the second is that of compressed-tensors' first ones."""


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
            in Hugging Face's terms. The reader adds token ids, the vocabulary's size and whether the head is tied. Its
            `model_type` says which family it is, if several share the architecture.
        rules: rules that say which tensor goes where, by the names in GGUF files.
        ignored: regular expressions of tensors that are read in another way or not needed.
        numbers: names of metadata that hold a number for each layer, or one for all. Each number is read like a tensor
            of one value that has this name in the layer.
        alternatives: other such rules, for files whose tensors have other names; see `fitting_rules`.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[Attributes, StoredTensors], dict[str, Any]]
    rules: Rules
    ignored: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    alternatives: tuple[Rules, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: everything that is special about its checkpoints.

    Attributes:
        model_type: value of `model_type` in config.json.
        title: what people call its models, for the list of supported models.
        read_config: function that takes every attribute it knows and returns the architecture.
        rules: rules that say which tensor goes where.
        alternatives: other such rules, for checkpoints whose tensors have other names; see `fitting_rules`.
        prefix: prefix of the names of most tensors, which checkpoints of the bare model lack.
        ignored: regular expressions of tensors that say nothing that the configuration does not say.
        copies: tensors that may be present although their rule does not apply, each with the one that it must equal.
        gguf: how the family looks in GGUF files, if it is read from them.
        also_gguf: architectures of another family that llama.cpp converts these models to.
        renamed: regular expressions with their replacements, applied to the stored names of tensors in this order; for
            models whose text model is a part of a larger one.
        leaves_out: what the models read or write besides text, which is left out here; empty if nothing is.
        constants: regular expressions of ignored tensors that hold a number, each with that number.
        quantisations: values of `quant_method` whose tensors are read.
        unsaid_tie: whether a configuration that does not say if the head is tied leaves it to the stored tensors.
    """

    model_type: str
    title: str
    read_config: Callable[[Attributes], ModelConfig]
    rules: Rules
    alternatives: tuple[Rules, ...] = ()
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf: GgufFamily | None = None
    also_gguf: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    leaves_out: str = ""
    constants: Mapping[str, float] = dataclasses.field(default_factory=dict)
    quantisations: tuple[str, ...] = QUANTISATIONS
    unsaid_tie: bool = False

    def name_of(self, stored: str) -> str:
        """The name that a stored tensor has in `rules`."""
        return functools.reduce(lambda name, pair: re.sub(*pair, name), self.renamed, stored)

    def model_config(self, values: Mapping[str, Any], where: str) -> ModelConfig:
        """The architecture that a config.json describes.

        Raises:
            ValueError: an attribute is missing, out of range or not understood.
        """
        quantisation = quantisation_of(values)
        if quantisation and method_of(quantisation) not in self.quantisations:
            allowed = ", ".join(self.quantisations) or "unquantised checkpoints"
            raise ValueError(
                f"{where}: quantization_config is {quantisation!r:.500}, and of {self.model_type} only {allowed} can "
                "be read; use the unquantised checkpoint, or a GGUF file"
            )
        attributes = Attributes(values, where)
        attributes.take("model_type", str)
        attributes.ignore(*QUANTISATION_ATTRIBUTES)
        try:
            config = self.read_config(attributes)
            config = dataclasses.replace(config, max_positions=extended_positions(config))
        except ValueError as error:
            raise error if where in str(error) else ValueError(f"{where}: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
            raise ValueError(f"{where}: malformed, its values do not go together ({brief(error)})") from error
        check_attributes(attributes, self.model_type)
        return config


def read_text_part(
    attributes: Attributes, family: str, readers: Mapping[str, Callable[[Attributes], ModelConfig]]
) -> ModelConfig:
    """The architecture of the text model in a configuration that describes more, from its `text_config`.

    Args:
        attributes: attributes of the whole.
        family: name of the module.
        readers: function that reads the configuration of each model type that the text model may have. Where it does
            not say its type, it has the first.

    Raises:
        ValueError: the text model is of another type, or an attribute of it is missing, out of range or not understood.
    """
    attributes.require("text_config")
    values = attributes.take("text_config", dict)
    where = f"{attributes.where}: text_config"
    # What answers end with is said of the whole, and so is whether the head is tied.
    whole = {
        "bos_token_id": attributes.take("bos_token_id", int),
        "eos_token_id": attributes.take("eos_token_id", int, list),
        "tie_word_embeddings": attributes.take("tie_word_embeddings", bool, default=True),
    }
    part = Attributes(values | {name: value for name, value in whole.items() if value is not None}, where)
    part.ignore(*QUANTISATION_ATTRIBUTES)
    kind = part.take("model_type", str, default=next(iter(readers)))
    if kind not in readers:
        raise ValueError(f"{where}: model_type is {kind!r}; supported are {', '.join(readers)}")
    config = readers[kind](part)
    check_attributes(part, kind)
    return dataclasses.replace(config, family=family)


def extended_positions(config: ModelConfig) -> int:
    """The context of a model, in tokens, which a scaled rotary embedding makes longer than a configuration may say.

    Many that scale by a factor leave `max_position_embeddings` at the length that the model was trained with.
    """
    rotary = config.rotary
    # Gemma 3 counts the longer context already, and so does a LongRoPE, whose factor follows from both lengths.
    if rotary is None or config.local_rotary is not None or rotary.kind not in ("linear", "yarn", "llama3"):
        return config.max_positions
    return max(config.max_positions, int(rotary.factor * (rotary.original_positions or config.max_positions)))


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


def known_names(rules: Rules, config: ModelConfig) -> set[str]:
    """The names of all tensors that rules read, those of parameters that the model lacks included."""
    sizes = sizes_of(config)
    return {name for rule in rules_by_path(rules, config).values() for name in rule.tensors(sizes)}


def fitting_rules(ways: Sequence[Rules], config: ModelConfig, stored: Collection[str]) -> Rules:
    """Of several rules those that read the most tensors of a checkpoint; of equally good ones the first."""
    return max(ways, key=lambda rules: len(known_names(rules, config).intersection(stored)))


def is_ignored(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a tensor is knowingly ignored."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def quantisation_of(values: Mapping[str, Any]) -> Any:
    """How a checkpoint says that it is quantised, for the whole or for its text model; empty if it does not."""
    text = values.get("text_config")
    places = (values, text if isinstance(text, dict) else {})
    return next((place[name] for place in places for name in QUANTISATION_ATTRIBUTES if place.get(name)), {})


def method_of(quantisation: Any) -> str | None:
    """Who quantised a checkpoint, by its `quantization_config`: `quant_method`, which bitsandbytes' first ones lack."""
    if not isinstance(quantisation, dict):
        return None
    said = quantisation.get("quant_method")
    return "bitsandbytes" if said is None and {"load_in_4bit", "load_in_8bit"} & quantisation.keys() else said
