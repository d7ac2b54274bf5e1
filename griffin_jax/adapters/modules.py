"""The linear layers that adapters are for: their names in Hugging Face's models, and their matrices in this package."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from griffin_jax.checkpoints.families import families
from griffin_jax.checkpoints.schema.family import rules_by_path
from griffin_jax.checkpoints.schema.layouts import Layout, sizes_of
from griffin_jax.model.config import ModelConfig

INWARD, OUTWARD = ("query", "key", "value", "gate", "up"), ("out", "down")
"""Names of the matrices that read the residual stream, and of those that write to it."""

GROUPS = {"attention": ("query", "key", "value", "out"), "feed_forward": ("gate", "up", "down")}
"""Names of the matrices of a layer, by the part of the layer that they belong to."""

WIDTH = (("D",),)
"""The factors of an axis that is the width of the residual stream."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A matrix of the model that corresponds to a linear layer in Hugging Face's model, or to some rows of one.

    Attributes:
        path: path of the matrix, such as `layers.3.attention.query`.
        layout: how the axes of the linear layer's weight become those of the matrix.
    """

    path: str
    layout: Layout

    @property
    def matrix(self) -> str:
        """The last name of the path."""
        return self.path.rpartition(".")[-1]

    @property
    def width_first(self) -> bool:
        """Whether the first axis of the linear layer's weight is the width of the residual stream."""
        return tuple(factor.parts for factor in self.layout.before[0]) == WIDTH

    def rows(self, factor: Float[Array, "..."], config: ModelConfig) -> Float[Array, "*rows r"]:
        """The part of a factor of an adapter that belongs to the rows of this matrix.

        Args:
            factor: factor of shape (rows of the linear layer, R), in the order of the linear layer.
            config: configuration of the model.
        """
        sizes = sizes_of(config) | {"D": factor.shape[-1]}
        # The layout of the weight also holds for an array that has R in place of the width.
        return self.layout.apply(factor.T if self.width_first else factor, sizes)  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class Module:
    """A linear layer of a Hugging Face model.

    Attributes:
        name: name of the layer, such as `model.layers.3.self_attn.q_proj`.
        inputs: number of inputs.
        outputs: number of outputs.
        parts: matrices of this package that the layer consists of.
    """

    name: str
    inputs: int
    outputs: int
    parts: tuple[Part, ...]

    @property
    def inward(self) -> bool:
        """Whether the layer reads the residual stream; otherwise it writes to it."""
        return self.parts[0].matrix in INWARD

    @property
    def kind(self) -> str:
        """The last part of the name, which is the same in all layers of the model."""
        return self.name.rpartition(".")[-1]

    @property
    def stored_transposed(self) -> bool:
        """Whether the weight is stored with the inputs first, as in the Conv1D of transformers."""
        return self.parts[0].width_first == self.inward


@functools.lru_cache(maxsize=16)
def modules_of(config: ModelConfig) -> Mapping[str, Module]:
    """The linear layers of a model by their names.

    Matrices that are not separate linear layers in Hugging Face's model are left out, and so are those of routed and
    shared experts.

    Raises:
        ValueError: the model's family is not one of Hugging Face's.
    """
    family = families().get(config.family)
    if family is None:
        raise ValueError(f"adapters need the names of Hugging Face's models, and there is no family {config.family!r}")
    rules, sizes = rules_by_path(family.rules, config), sizes_of(config)
    found: dict[str, Module] = {}
    for layer in range(config.num_layers):
        dense = () if config.routed(layer) else _matrices("feed_forward", config)
        for name in (*_matrices("attention", config), *dense):
            path = f"layers.{layer}.{'attention' if name in GROUPS['attention'] else 'ff'}.{name}"
            rule = rules.get(path)
            if rule is None or "{head}" in rule.name or not rule.name.endswith(".weight"):
                continue
            part, module = Part(path, Layout.parse(rule.layout)), rule.name.removesuffix(".weight")
            shape = part.layout.shape_before(sizes)
            inward = name in INWARD
            inputs, outputs = shape if part.width_first == inward else shape[::-1]
            parts = (*found[module].parts, part) if module in found else (part,)
            found[module] = Module(module, inputs, outputs, parts)
    return found


def _matrices(group: str, config: ModelConfig) -> list[str]:
    return [name for name in GROUPS[group] if name != "gate" or config.gated]


def chosen_modules(config: ModelConfig, targets: Sequence[str]) -> tuple[Module, ...]:
    """The linear layers that the targets name.

    Args:
        config: configuration of the model.
        targets: `attention`, `feed_forward`, or the last parts of names, such as `q_proj`.

    Raises:
        ValueError: the model does not have these linear layers.
    """
    modules = modules_of(config)
    kinds = list(dict.fromkeys(module.kind for module in modules.values()))
    if unknown := [name for name in targets if name not in GROUPS and name not in kinds]:
        raise ValueError(f"targets has {unknown[0]!r}; this model has {', '.join((*GROUPS, *kinds))}")
    there = {part.matrix for module in modules.values() for part in module.parts}
    for group in GROUPS.keys() & set(targets):
        if missing := [name for name in _matrices(group, config) if name not in there]:
            why = "is no linear layer of its own"
            if config.routing is not None and group == "feed_forward":
                why = "of routed experts has no adapter, which is for layers that every token reads,"
            raise ValueError(
                f"targets has {group!r}, and {missing[0]} {why} in models of the family {config.family}; this model"
                f" has {', '.join(kinds)}"
            )

    def wanted(module: Module) -> bool:
        return any(module.kind == name or module.parts[0].matrix in GROUPS.get(name, ()) for name in targets)

    return tuple(module for module in modules.values() if wanted(module))


def padded(array: Float[Array, "*rows r"], start: int, size: int) -> Float[Array, "*rows s"]:
    """Widen an array to `size` columns: its own columns begin at `start`, and the others are zeros."""
    before = [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, [*before, (start, size - start - array.shape[-1])])
