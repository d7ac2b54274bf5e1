"""The loss of a language model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from griffin_jax.model.cache import EMPTY, empty_cache
from griffin_jax.model.transformer import Transformer
from griffin_jax.training.data import Batch


def next_token_losses(model: Transformer, batch: Batch) -> tuple[Float[Array, "b r"], Float[Array, "b r"]]:
    """-log p of every token after the first, in nats, float32; and 1 for each of them that is real, 0 for padding.

    Args:
        model: a full, pruned or adapted model; the losses are differentiable in its floating parameters.
        batch: the sequences.
    """
    tokens, lengths = jnp.asarray(batch.tokens), jnp.asarray(batch.lengths)
    columns = jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32)
    read = columns < lengths[:, None] - 1
    positions = jnp.where(read, columns, EMPTY)
    cache = empty_cache(model.config, positions.shape[0], positions.shape[1], model.dtype)
    hidden, _, _ = model(tokens[:, :-1], positions, cache, read_slots=0)
    scores = jax.nn.log_softmax(model.logits(hidden))
    losses = -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(read, losses, 0.0), read.astype(jnp.float32)


def next_token_loss(model: Transformer, batch: Batch) -> Float[Array, ""]:
    """The mean of `next_token_losses` over all real tokens."""
    losses, counted = next_token_losses(model, batch)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(counted), 1)
