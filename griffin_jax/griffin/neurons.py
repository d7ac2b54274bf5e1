"""Expert neurons: which neurons a pruned model keeps.

The term is the paper's (arXiv 2404.01365). It has nothing to do with the routed experts of a mixture of experts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from numpy.typing import ArrayLike

from griffin_jax.griffin.config import check_groups
from griffin_jax.parallel.mesh import to_host
from griffin_jax.utils.arrayfile import load_arrays, save_arrays
from griffin_jax.utils.deprecation import renamed_arguments, renamed_attribute

if TYPE_CHECKING:
    from griffin_jax.model.transformer import Transformer

EXPERTS_FORMAT = "griffin_jax experts 1"

Ranges = tuple[tuple[int, ...], ...]
"""For each layer, a number for each range of its neurons."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ExpertNeurons:
    """The neurons that a pruned model keeps: a sequence with one array of indices per layer.

    Attributes:
        indices: indices of each layer's kept neurons, ascending, int32: (K,) for the whole batch, or (B, K) with a row
            for every sequence. K may differ between layers.
        neurons: F, the number of neurons of each layer of the model that they were selected for.
        groups: number of groups of equal size that the neurons of a layer (or of each range) are divided into, each of
            which keeps the same number; see `GriffinConfig`.
        model: fingerprint of the model that they were selected for, as in the result of `LLM.experts`; None if it is
            not known. An `LLM` refuses expert neurons of another model.
        ranges: for a model with routed experts, the sizes of the ranges that each layer's neurons are divided into
            (`ModelConfig.neuron_ranges`); empty for a model whose layers are one range each.
        shares: how many neurons each of these ranges keeps.
    """

    indices: tuple[Int[Array, "*b _k"], ...]
    neurons: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    groups: int = dataclasses.field(default=1, metadata={"static": True})
    model: str | None = dataclasses.field(default=None, metadata={"static": True})
    ranges: Ranges = dataclasses.field(default=(), metadata={"static": True})
    shares: Ranges = dataclasses.field(default=(), metadata={"static": True})

    shards = renamed_attribute("groups")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, layer: int) -> Int[Array, "*b _k"]:
        return self.indices[layer]

    def __iter__(self) -> Iterator[Int[Array, "*b _k"]]:
        return iter(self.indices)

    @property
    def kept(self) -> tuple[int, ...]:
        """K of every layer."""
        return tuple(indices.shape[-1] for indices in self.indices)

    @property
    def shared(self) -> bool:
        """Whether the whole batch has one set of neurons."""
        return self.indices[0].ndim == 1

    def masks(self) -> tuple[Bool[Array, "*b _f"], ...]:
        """The kept neurons of each layer as a mask over all its neurons, (F,) or (B, F); true for kept neurons."""

        def mask(indices: Array, neurons: int) -> Array:
            nothing = jnp.zeros((*indices.shape[:-1], neurons), bool)
            return jnp.put_along_axis(nothing, indices, True, axis=-1, inplace=False)

        return tuple(map(mask, self.indices, self.neurons))

    @classmethod
    def from_masks(cls, masks: Sequence[ArrayLike], ranges: Ranges = ()) -> ExpertNeurons:
        """Expert neurons from boolean masks.

        Args:
            masks: a mask for each layer, true for neurons that are kept: (F,) for the whole batch, or (B, F) with a row
                for every sequence.
            ranges: as for `from_indices`.

        Raises:
            ValueError: a mask is not boolean, keeps nothing, or keeps more neurons in one sequence
                than in another; some layers have one mask for the batch and others one per sequence; or ranges do not
                keep equally many.
        """
        indices = []
        for layer, mask in enumerate(np.asarray(m) for m in masks):
            if mask.dtype != np.bool_ or mask.ndim not in (1, 2):
                raise ValueError(
                    f"mask of layer {layer} must be boolean of shape (F,) or (B, F), got {mask.dtype} {mask.shape}"
                )
            kept = np.unique(mask.sum(axis=-1))
            if kept.size != 1:
                raise ValueError(
                    f"mask of layer {layer} keeps {kept.tolist()} neurons; every sequence must keep as many"
                )
            indices.append(np.nonzero(mask)[-1].reshape(*mask.shape[:-1], -1))
        return cls.from_indices(indices, [np.shape(mask)[-1] for mask in masks], ranges=ranges)

    @classmethod
    @renamed_arguments(shards="groups")
    def from_indices(
        cls, indices: Sequence[ArrayLike], neurons: Sequence[int], groups: int = 1, ranges: Ranges = ()
    ) -> ExpertNeurons:
        """Expert neurons from indices in any order; they are checked and sorted.

        Args:
            indices: the kept neurons of each layer, (K,) for the whole batch or (B, K).
            neurons: F, the number of neurons of each layer.
            groups: number of groups that each range is divided into. All groups of a range must keep equally many
                neurons.
            ranges: for a model with routed experts, the sizes of the ranges of each layer's neurons
                (`ModelConfig.neuron_ranges`). Ranges of the same size must keep equally many neurons.

        Raises:
            ValueError: there are no layers, `indices` and `neurons` have different numbers of layers, an index is not
                a whole number, is repeated or lies outside [0, F), a layer keeps nothing, layers differ in their batch,
                or groups or ranges do not keep equally many.
        """
        if not indices or len(indices) != len(neurons):
            raise ValueError(
                f"experts of {len(indices)} layers for a model of {len(neurons)}; give one array per layer"
            )
        checked, shares = [], []
        for layer, (array, width) in enumerate(zip(map(np.asarray, indices), neurons, strict=True)):
            if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2) or array.size == 0:
                raise ValueError(
                    f"experts of layer {layer} must be whole numbers of shape (K,) or (B, K) with K >= 1,"
                    f" got {array.dtype} {array.shape}"
                )
            if array.shape[:-1] != np.shape(indices[0])[:-1]:
                raise ValueError(f"experts of layer {layer} have shape {array.shape}, layer 0 {np.shape(indices[0])}")
            if array.min() < 0 or array.max() >= width:
                raise ValueError(
                    f"experts of layer {layer} lie in [{array.min()}, {array.max()}]; its neurons are [0, {width - 1}]"
                )
            array = np.sort(array, axis=-1)
            if (np.diff(array, axis=-1) == 0).any():
                raise ValueError(f"experts of layer {layer} name a neuron twice")
            shares.append(_shares(array, tuple(ranges[layer]) if ranges else (width,), groups, layer))
            checked.append(jnp.asarray(array, jnp.int32))
        return cls(
            tuple(checked),
            tuple(neurons),
            groups,
            None,
            *((tuple(map(tuple, ranges)), tuple(shares)) if ranges else ()),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the expert neurons to a safetensors file, completely or not at all; an existing file is replaced.

        If there are several processes, all of them must call this; the first one writes.

        Raises:
            OSError: the file cannot be written.
        """
        arrays = {f"layers.{layer}": indices for layer, indices in enumerate(to_host(self.indices))}
        metadata = {"neurons": " ".join(map(str, self.neurons)), "groups": str(self.groups)}
        if self.model is not None:
            metadata["model"] = self.model
        if self.shares:
            # Only the sizes of the ranges are stored: the shares follow from the indices.
            metadata["ranges"] = json.dumps(self.ranges)
        if jax.process_index() == 0:
            save_arrays(path, EXPERTS_FORMAT, arrays, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertNeurons:
        """The expert neurons from a file that `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, or has another format or version.
        """
        arrays, metadata = load_arrays(path, EXPERTS_FORMAT)
        try:
            neurons = [int(width) for width in metadata["neurons"].split()]
            indices = [arrays[f"layers.{layer}"] for layer in range(len(neurons))]
            # Version 0.1.0 called groups shards.
            groups = int(metadata.get("groups", metadata.get("shards", 1)))
            ranges = tuple(tuple(map(int, sizes)) for sizes in json.loads(metadata.get("ranges", "[]")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        try:
            found = cls.from_indices(indices, neurons, groups, ranges)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return dataclasses.replace(found, model=metadata.get("model"))


def _shares(indices: np.ndarray, sizes: tuple[int, ...], groups: int, layer: int) -> tuple[int, ...]:
    """Counts how many kept neurons of a layer lie in each range.

    Raises:
        ValueError: ranges of the same size, sequences, or groups of a range do not keep equally many neurons.
    """
    rows = indices.reshape(-1, indices.shape[-1])
    if sum(sizes) <= rows.max():
        raise ValueError(f"ranges of layer {layer} have {sum(sizes)} neurons, fewer than its experts name")
    kept: dict[int, int] = {}
    for start, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
        counts = np.sum((rows >= start) & (rows < start + size), axis=-1)
        if (counts != kept.setdefault(size, counts[0])).any():
            raise ValueError(f"of experts of layer {layer}, some ranges of {size} neurons keep more than others")
        check_groups(groups, size, int(counts[0]))
        for row in rows:
            own = row[(row >= start) & (row < start + size)] - start
            if (own.reshape(groups, -1) // (size // groups) != np.arange(groups)[:, None]).any():
                raise ValueError(f"of experts of layer {layer}, some of {groups} groups keep more than others")
    return tuple(int(kept[size]) for size in sizes)


def check_experts(experts: ExpertNeurons, model: Transformer) -> None:
    """Raise `ValueError` unless expert neurons fit the model's layers, their widths and their routed experts."""
    if experts.neurons != model.neurons:
        raise ValueError(
            f"these experts are for a model of {_widths(experts.neurons)}, this one has {_widths(model.neurons)}"
        )
    if experts.ranges != ranges_of(model):
        raise ValueError(
            "these experts are for a model with other routed experts; give from_indices and from_masks the model's"
            " ranges, model.config.neuron_ranges"
        )


def ranges_of(model: Transformer) -> Ranges:
    """The ranges that neurons of a full model are selected from; empty if the model has no routed experts."""
    return () if model.config.routing is None else model.config.neuron_ranges


def _widths(neurons: Sequence[int]) -> str:
    widths = sorted(set(neurons))
    described = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
    return f"{len(neurons)} layers with {described} neurons"
