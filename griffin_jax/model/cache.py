"""The key/value cache: one pair of arrays per layer, written in place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from griffin_jax.model.config import ModelConfig

EMPTY = -1
"""The position of a slot, or of a token, that holds nothing: padding, or not written yet."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far.

    Tokens take slots in the order in which they were written, the same slot for every row of a
    batch; what makes rows differ is the *position* of each slot. A prompt shorter than its bucket
    leaves slots with position `EMPTY`, which no query ever attends to, and the answer begins behind
    the bucket for every row. So one scalar says where the next token goes.

    Keys are stored with their tokens last and values with their tokens second to last: each then is
    the right-hand side of attention's two products as it lies, and XLA transposes nothing.

    Attributes:
        keys: per layer, after rotary embedding.
        values: per layer.
        positions: of each slot, `EMPTY` where it holds nothing.
        cursor: the next free slot.
        context: the most tokens that each row may come to hold, which some rotary embeddings choose
            their wavelengths by.
    """

    keys: tuple[Float[Array, "b g h s"], ...]
    values: tuple[Float[Array, "b g s h"], ...]
    positions: Int[Array, "b s"]
    cursor: Int[Array, ""]
    context: Int[Array, "b"]

    @property
    def slots(self) -> int:
        """S, how many tokens each row has room for."""
        return self.positions.shape[1]

    def without_last(self, count: int | Int[Array, ""]) -> KVCache:
        """The last `count` slots given back: they hold nothing, and the next tokens take them."""
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
        config: of the model.
        batch: rows.
        slots: tokens of each row, padding included.
        dtype: of keys and values.
        context: tokens that each row may come to hold, padding not included; all slots if None.
    """
    layers, b, g, h = range(config.num_layers), batch, config.kv_heads, config.head_dim
    return KVCache(
        keys=tuple(jnp.zeros((b, g, h, slots), dtype) for _ in layers),
        values=tuple(jnp.zeros((b, g, slots, h), dtype) for _ in layers),
        positions=jnp.full((batch, slots), EMPTY, jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
        context=jnp.full((batch,), slots, jnp.int32) if context is None else context,
    )
