"""How many bytes a model, its cache and one decode step are, counted from the architecture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from griffin_jax.assembly import NEURON_MAJOR, parameter_shapes
from griffin_jax.config import ModelConfig


class Sizes:
    """Bytes of the parts of a model, counted from its architecture; nothing is allocated.

    Args:
        config: the model.
        batch: sequences.
        slots: tokens that each row of the cache has room for.
        itemsize: bytes of a weight, and of a key or value.
        shared: whether the batch shares its experts, or every sequence has its own.

    Attributes:
        parameters: of the full model, counted.
        cache: bytes of keys and values, all slots.
        tables: bytes of the tables that a step looks up a row of for each token, and does not read.
    """

    def __init__(self, config: ModelConfig, batch: int, slots: int, itemsize: int, *, shared: bool):
        self.config, self.batch, self.slots, self.itemsize = config, batch, slots, itemsize
        self.sets = 1 if shared else batch
        shapes = parameter_shapes(config)
        self.parameters = sum(map(math.prod, shapes.values()))
        ends = tuple(f"layers.0.ff.{name}" for name in NEURON_MAJOR)
        self.row = sum(math.prod(shape[1:]) for path, shape in shapes.items() if path in ends)
        self.cache = 2 * config.num_layers * batch * config.num_kv_heads * config.head_dim * slots * itemsize
        tables = ["position_embedding"] if config.tied_head else ["embedding", "position_embedding"]
        looked_up = [shapes[table] for table in tables if table in shapes]
        self.tables = sum(map(math.prod, looked_up)) * itemsize
        self.table_rows = sum(shape[1] for shape in looked_up) * batch * itemsize

    def ff(self, kept: Sequence[int] | None) -> int:
        """The parameters with a row for each neuron: all rows, or the kept ones."""
        if kept is None:
            return self.config.ff_width * self.config.num_layers * self.row * self.itemsize
        return sum(kept) * self.sets * self.row * self.itemsize

    def weights(self, kept: Sequence[int] | None) -> int:
        """The model's: the full one's, or with the kept rows only."""
        return self.parameters * self.itemsize - self.ff(None) + self.ff(kept)

    def step(self, kept: Sequence[int] | None) -> int:
        """What one decode step must read: of tables only the tokens' rows, of the cache all slots."""
        return self.weights(kept) - self.tables + self.table_rows + self.cache
