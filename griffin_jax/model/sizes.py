"""Bytes of a model, of its cache and of one decode step, counted from the architecture."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
from jax.sharding import AbstractMesh

from griffin_jax.model.assembly import abstract_model
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.feed_forward import NEURON_AXES
from griffin_jax.model.sharding import HEADS, divided, dotted, model_shardings
from griffin_jax.parallel.mesh import MODEL_AXIS


class Sizes:
    """Bytes that each device has of the parts of a model, counted from its architecture; nothing is allocated.

    Args:
        config: the architecture.
        batch: number of sequences.
        slots: tokens that each row of the cache has room for.
        itemsize: bytes of a weight, and of a key or value.
        shared: whether the batch shares its experts, or every sequence has its own.
        devices: number of devices that the model is divided among, as `griffin_jax.model.sharding` says.

    Attributes:
        parameters: number of parameters of the full model on all devices together.
        local_parameters: number of parameters of the full model on one device.
        cache: bytes of keys and values in all slots.
        tables: bytes of the tables of which a step reads only a row for each token.
    """

    def __init__(self, config: ModelConfig, batch: int, slots: int, itemsize: int, *, shared: bool, devices: int = 1):
        self.config, self.batch, self.slots, self.itemsize = config, batch, slots, itemsize
        self.sets, self.devices = 1 if shared else batch, devices
        whole, shapes = local_shapes(dataclasses.replace(config, kv_copies=1), 1), local_shapes(config, devices)
        self.parameters = sum(map(math.prod, whole.values()))
        self.local_parameters = sum(map(math.prod, shapes.values()))
        rows = [whole.get(f"layers.0.ff.{name}", (0,)) for name in NEURON_AXES]
        self.row = sum(map(math.prod, rows)) // config.ff_width
        groups = config.kv_heads // (devices if divided(config, devices)[HEADS] else 1)
        self.cache = 2 * config.num_layers * batch * groups * config.head_dim * slots * itemsize
        tables = ["position_embedding"] if config.tied_head else ["embedding", "position_embedding"]
        looked_up = [shapes[table] for table in tables if table in shapes]
        self.tables = sum(map(math.prod, looked_up)) * itemsize
        self.table_rows = sum(shape[1] for shape in looked_up) * batch * itemsize

    def ff(self, kept: Sequence[int] | None) -> int:
        """Bytes of the parameters with a row for each neuron: all rows if `kept` is None, else the kept ones."""
        if kept is None:
            return self.config.ff_width // self.devices * self.config.num_layers * self.row * self.itemsize
        return sum(kept) // self.devices * self.sets * self.row * self.itemsize

    def weights(self, kept: Sequence[int] | None) -> int:
        """Bytes of the model: the full one if `kept` is None, else with the kept rows only."""
        return self.local_parameters * self.itemsize - self.ff(None) + self.ff(kept)

    def step(self, kept: Sequence[int] | None) -> int:
        """Bytes that one decode step must read: of tables only the tokens' rows, of the cache all slots."""
        return self.weights(kept) - self.tables + self.table_rows + self.cache


@functools.lru_cache(maxsize=16)
def local_shapes(config: ModelConfig, devices: int) -> Mapping[str, tuple[int, ...]]:
    """The shape of each device's part of every parameter of the full model, by path in the module.

    Raises:
        ValueError: this many devices cannot share the neurons evenly.
    """
    model = abstract_model(config)
    shardings = jax.tree.leaves(model_shardings(model, AbstractMesh((devices,), (MODEL_AXIS,))))
    leaves = jax.tree.leaves_with_path(model)
    shapes = {dotted(path): s.shard_shape(leaf.shape) for (path, leaf), s in zip(leaves, shardings, strict=True)}
    return MappingProxyType(shapes)
