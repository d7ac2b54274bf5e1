"""The key/value cache: one pair of arrays per layer, written in place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from griffin_jax.model.config import ModelConfig

EMPTY = -1
"""The position of a slot or token that holds nothing: padding, or a slot that is not written yet."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens read so far.

    Tokens fill the slots in the order in which they are written, and take the same slot in every row of a batch; rows
    differ in the *position* of the token in each slot. A prompt shorter than its bucket leaves slots with the position
    `EMPTY`, which no query attends to, and in every row the answer begins after the bucket. One scalar is therefore
    enough to say where the next token goes.

    Keys have their tokens on the last axis, values on the second to last. In this layout, both are right-hand sides of
    attention's products as they are stored, and XLA transposes nothing.

    Attributes:
        keys: keys of each layer after rotary embedding, (B, G, H, S).
        values: values of each layer, (B, G, S, H).
        positions: position of the token in each slot, (B, S); `EMPTY` for slots without a token.
        cursor: number of the next free slot, a scalar.
        context: how many tokens each row may come to hold at most, (B,). Some rotary embeddings choose their
            wavelengths by it.
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
        batch: B, the number of rows.
        slots: S, the number of tokens that each row has room for, padding included.
        dtype: dtype of keys and values.
        context: how many tokens each row may come to hold at most, without padding; all slots if None.
    """
    layers, b, g, h = range(config.num_layers), batch, config.kv_heads, config.head_dim
    return KVCache(
        keys=tuple(jnp.zeros((b, g, h, slots), dtype) for _ in layers),
        values=tuple(jnp.zeros((b, g, slots, h), dtype) for _ in layers),
        positions=jnp.full((batch, slots), EMPTY, jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
        context=jnp.full((batch,), slots, jnp.int32) if context is None else context,
    )
