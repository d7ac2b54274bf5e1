"""Bytes of a model, of its cache and of one decode step, counted from the architecture."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from griffin_jax.model.assembly import abstract_model, parameter_shapes
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.feed_forward import NEURON_AXES
from griffin_jax.model.sharding import HEADS, divided, dotted, model_shardings
from griffin_jax.model.weights import Precision, stored_bytes
from griffin_jax.parallel.mesh import MODEL_AXIS


def masks_are_less(neurons: int, kept: int, sets: int) -> bool:
    """Whether a decode step that reads all neurons once reads no more than one that reads each sequence's kept neurons.

    Args:
        neurons: number of neurons of the full model.
        kept: number of neurons that each sequence keeps.
        sets: number of sequences that have their own kept neurons.
    """
    return sets > 1 and sets * kept >= neurons


def part_read(config: ModelConfig, layer: int, tokens: int = 1, devices: int = 1) -> float:
    """The fraction of a layer's neurons on each device that a decode step reads.

    With routed experts, this counts the experts that the tokens choose: as if all choices differed, as far as there are
    enough experts. If devices hold whole experts, all choices may be experts of one device.

    Args:
        config: the architecture.
        layer: number of the layer.
        tokens: number of tokens in the step.
        devices: number of devices that the model is divided among.
    """
    routing = config.routing
    if routing is None or not config.routed(layer):
        return 1.0
    parts = devices if config.expert_parallel else 1
    chosen = min(routing.experts // parts, routing.active * tokens) * routing.width
    return (parts * chosen + routing.shared_width) / config.neurons[layer]


class Sizes:
    """Bytes that the parts of a model have on each device, counted from its architecture; nothing is allocated.

    Args:
        config: the architecture.
        batch: number of sequences.
        slots: number of tokens that each row of the cache has room for.
        precision: how the model computes, and how its matrices are stored.
        shared: whether the sequences of the batch share their expert neurons; otherwise each has its own.
        refitted: whether kept rows are changed, so that every sequence has its own copy of them, however many they are.
        devices: number of devices that the model is divided among, as `griffin_jax.model.sharding` says.

    Attributes:
        parameters: number of parameters of the full model on all devices together.
        local: bytes of the full model on one device.
        row: bytes of a neuron, on all devices together.
        cache: bytes of keys and values in all slots, on one device.
        tables: bytes of the tables from which a step reads only one row for each token.
        table_rows: bytes of these rows for one token of each sequence.
    """

    def __init__(
        self, config: ModelConfig, batch: int, slots: int, precision: Precision, *, shared: bool, devices: int = 1,
        refitted: bool = False,
    ):  # fmt: skip
        self.config, self.batch, self.slots, self.precision = config, batch, slots, precision
        self.sets, self.devices, self.refitted = 1 if shared else batch, devices, refitted
        one = dataclasses.replace(config, kv_copies=1)
        arrays = local_arrays(config, devices, precision)
        self.parameters = sum(map(math.prod, parameter_shapes(one).values()))
        self.local = sum(map(bytes_of, arrays.values()))
        of_layer = local_arrays(one, 1, precision)
        # A neuron of an expert is as large as any other.
        part = "ff.experts" if config.routed(0) else "ff"
        rows = [of_layer[path] for name in NEURON_AXES if (path := f"layers.0.{part}.{name}") in of_layer]
        self.row = sum(map(bytes_of, rows)) / math.prod(of_layer[f"layers.0.{part}.down"].shape[:-1])
        itemsize = precision.itemsize
        groups = config.kv_heads // (devices if divided(config, devices)[HEADS] else 1)
        self.cache = 2 * config.num_layers * batch * groups * config.head_dim * slots * itemsize
        tables = ["position_embedding"] if config.tied_head else ["embedding", "embedding_scale", "position_embedding"]
        looked_up = [arrays[table] for table in tables if table in arrays]
        self.tables = sum(map(bytes_of, looked_up))
        self.table_rows = sum(stored_bytes(table.shape[1:], table.dtype) for table in looked_up) * batch

    def masked(self, kept: Sequence[int] | None) -> bool:
        """Whether pruned decoding reads the full model, with a mask for each sequence, instead of copies of the kept
        rows.

        Args:
            kept: number of neurons of each layer that a sequence keeps; None for the full model.
        """
        if kept is None or self.sets == 1:
            return False
        if self.config.routing is not None:
            # Each sequence would need a copy of all experts.
            return True
        return not self.refitted and masks_are_less(sum(self.config.neurons), sum(kept), self.sets)

    def ff(self, kept: Sequence[int] | None) -> int:
        """Bytes of the parameters with a row for each neuron: of all rows if `kept` is None or the full model is
        masked, otherwise of the rows that the sequences keep."""
        if kept is None or self.masked(kept):
            return int(sum(self.config.neurons) // self.devices * self.row)
        return int(sum(kept) // self.devices * self.sets * self.row)

    def read(self, kept: Sequence[int] | None) -> int:
        """Bytes of the neurons' rows that a decode step reads; see `part_read`."""
        rows = self.config.neurons if kept is None or self.masked(kept) else kept
        sets = 1 if kept is None or self.masked(kept) else self.sets
        read = sum(k * part_read(self.config, layer, self.batch, self.devices) for layer, k in enumerate(rows))
        return int(read / self.devices * sets * self.row)

    def copied(self, kept: Sequence[int]) -> int:
        """Bytes of the kept rows that are held next to the full model: none if the full model is masked."""
        return 0 if self.masked(kept) else self.ff(kept)

    def weights(self, kept: Sequence[int] | None) -> int:
        """Bytes of the model that decodes: the full one if `kept` is None, otherwise one with the kept rows only."""
        return self.local - self.ff(None) + self.ff(kept)

    def step(self, kept: Sequence[int] | None) -> int:
        """Bytes that a decode step must read: the weights, of which tables count only with the tokens' rows, and all
        slots of the cache."""
        return self.weights(kept) - self.ff(kept) + self.read(kept) - self.tables + self.table_rows + self.cache


def bytes_of(array: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array in storage, where a byte holds two numbers of 4 bits."""
    return stored_bytes(array.shape, array.dtype)


def held_bytes(array: jax.ShapeDtypeStruct, platform: str) -> int:
    """Bytes of an array in the dtype in which the devices of a platform hold it; see
    `griffin_jax.model.weights.held`."""
    return math.prod(array.shape) if platform == "cpu" and array.dtype == jnp.int4 else bytes_of(array)


@functools.lru_cache(maxsize=16)
def local_arrays(config: ModelConfig, devices: int, precision: Precision) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each device's part of every array of the full model, by the array's path in the module.

    Raises:
        ValueError: the devices cannot share the neurons evenly, or the precision does not fit the model.
    """
    model = abstract_model(config, precision.dtype, precision.weights)
    shardings = jax.tree.leaves(model_shardings(model, AbstractMesh((devices,), (MODEL_AXIS,))))
    leaves = jax.tree.leaves_with_path(model)
    arrays = {
        dotted(path): jax.ShapeDtypeStruct(s.shard_shape(leaf.shape), leaf.dtype)
        for (path, leaf), s in zip(leaves, shardings, strict=True)
    }
    return MappingProxyType(arrays)
