"""Measurements of a model's neurons and experts on general text, before any training."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from griffin_jax.factor.config import TOKENS
from griffin_jax.factor.layer import in_training
from griffin_jax.factor.losses import Oracle
from griffin_jax.factor.training import read, trained
from griffin_jax.generation import jitted
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import to_host
from griffin_jax.training.data import Batch, Packed
from griffin_jax.utils import programs


def activations(model: Transformer, packed: Packed, *, seed: int = 0) -> list[Float[np.ndarray, "t _f"]]:
    """The relative activations of each layer for at most about `TOKENS` tokens, float16, to group by coactivation.

    Args:
        model: a dense model.
        packed: the texts.
        seed: seed of the order in which sequences are taken.
    """
    batch = _some(packed, seed)
    wanted = batch.tokens.shape[1]
    rows = jitted.prefill(model, batch.tokens, batch.lengths, max_new_tokens=0, rows=wanted).rows
    real = np.arange(wanted) < np.asarray(batch.lengths)[:, None]
    return [to_host(layer)[real].astype(np.float16) for layer in rows]


def centred(model: Transformer, packed: Packed, *, oracle: Oracle = "joint", seed: int = 0) -> Transformer:
    """Move the average output of each expert, over the tokens that should not choose it, to the layer's bias.

    The average is subtracted from the expert's output and added to the layer's bias, so all experts together compute
    what they did before. For an expert that every token should choose, the average is over all tokens.

    Args:
        model: a factored model before training.
        packed: the texts.
        oracle: how the labels are found, which say what a token should choose.
        seed: seed of the order in which sequences are taken.
    """
    parameters = []
    for layer, mean in zip(model.layers, unchosen_means(model, _some(packed, seed), oracle), strict=True):
        experts, whole = layer.ff.experts.down_bias[...], layer.ff.down_bias[...]
        parameters.append(
            {
                "experts.down_bias": experts.astype(jnp.float32) - mean,
                "down_bias": whole.astype(jnp.float32) + jnp.sum(mean, axis=0),
            }
        )
    return trained(model, tuple(parameters))


def _some(packed: Packed, seed: int) -> Batch:
    return packed.batches(max(TOKENS // packed.tokens.shape[1], 1), seed=seed)(0)


@programs.jit(static_argnames="oracle")
def unchosen_means(model: Transformer, batch: Batch, oracle: Oracle) -> tuple[Float[Array, "e d"], ...]:
    """For each layer, the average output of each expert over the tokens that should not choose it.

    Args:
        model: a factored model before training.
        batch: the sequences to read.
        oracle: how the labels are found, which say what a token should choose.
    """

    def observe(_number: int, z: Any, real: Array) -> Array:
        def mean(weights: Array) -> Array:
            total = jnp.sum(weights, axis=(0, 1))[:, None]
            return jnp.einsum("bte,bted->ed", weights, z.outputs) / jnp.maximum(total, 1), total  # pyright: ignore

        every = jnp.broadcast_to(real[..., None], z.labels.shape).astype(jnp.float32)
        (others, count), (overall, _) = mean(every * (1 - z.labels)), mean(every)
        return jnp.where(count > 0, others, overall)

    return read(in_training(model, routes="all", oracle=oracle), batch, observe)[2]
