"""The key/value cache: one pair of arrays per layer, written in place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from griffin_jax.model.config import ModelConfig

EMPTY = -1
"""The position of a slot or a token that holds nothing: it is padding, or not written yet."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far.

    Tokens take slots in the order in which they are written, the same slot for every row of a batch; rows differ in the
    *position* of each slot. A prompt shorter than its bucket leaves slots with position `EMPTY`, which no query ever
    attends to, and the answer begins after the bucket in every row. So one scalar says where the next token goes.

    Keys are stored with their tokens last and values with their tokens second to last: so both are right-hand sides of
    attention's products as they are stored, and XLA transposes nothing.

    Attributes:
        keys: keys of each layer, after rotary embedding.
        values: values of each layer.
        positions: position of the token in each slot, `EMPTY` where there is none.
        cursor: number of the next free slot.
        context: the most tokens that each row may come to hold, by which some rotary embeddings choose their
            wavelengths.
    """

    keys: tuple[Float[Array, "b g h s"], ...]
    values: tuple[Float[Array, "b g s h"], ...]
    positions: Int[Array, "b s"]
    cursor: Int[Array, ""]
    context: Int[Array, "b"]

    @property
    def slots(self) -> int:
        """S, the number of tokens that each row has room for."""
        return self.positions.shape[1]

    def without_last(self, count: int | Int[Array, ""]) -> KVCache:
        """The cache without its last `count` tokens, whose slots are free again."""
        cursor = self.cursor - count
        written = jnp.arange(self.slots, dtype=jnp.int32) < cursor
        return dataclasses.replace(self, positions=jnp.where(written, self.positions, EMPTY), cursor=cursor)


def empty_cache(
    config: ModelConfig,
    batch: int,
    slots: int,
    dtype: DTypeLike = jnp.float32,
    *,
    context: Int[Array, "b"] | None = None,
) -> KVCache:
    """A cache with room for `slots` tokens in each of `batch` rows.

    Args:
        config: the architecture of the model.
        batch: number of rows.
        slots: tokens of each row, padding included.
        dtype: dtype of keys and values.
        context: tokens that each row may come to hold, without padding; all slots if None.
    """
    layers, b, g, h = range(config.num_layers), batch, config.kv_heads, config.head_dim
    return KVCache(
        keys=tuple(jnp.zeros((b, g, h, slots), dtype) for _ in layers),
        values=tuple(jnp.zeros((b, g, slots, h), dtype) for _ in layers),
        positions=jnp.full((batch, slots), EMPTY, jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
        context=jnp.full((batch,), slots, jnp.int32) if context is None else context,
    )
