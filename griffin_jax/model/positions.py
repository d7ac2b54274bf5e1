"""What attention computes from the positions of tokens: rotary embeddings, ALiBi biases and masks."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.model.cache import EMPTY, KVCache
from griffin_jax.model.config import Alibi, ModelConfig, Rotary
from griffin_jax.model.ops import computed_once


def rotary_frequencies(rotary: Rotary, head_dim: int, *, long: bool = False) -> np.ndarray:
    """The angle per position of each pair of dimensions that turns, (dims/2,) float32.

    Args:
        rotary: the rotary embedding.
        head_dim: H; all dimensions turn unless `rotary.dims` says otherwise.
        long: whether to use `longrope`'s frequencies for texts beyond the original context.
    """
    dims = head_dim if rotary.dims is None else rotary.dims
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    waves = np.float32(rotary.theta) ** exponents
    if rotary.kind == "longrope":
        waves = waves * np.asarray(rotary.long_factors if long else rotary.short_factors, np.float32)
    plain = (1.0 / waves).astype(np.float32)
    if rotary.kind in ("default", "longrope"):
        return plain
    scaled = plain / np.float32(rotary.factor)
    if rotary.kind == "linear":
        return scaled
    if rotary.kind == "llama3":
        rotations = rotary.original_positions * plain.astype(np.float64) / (2 * math.pi)
        blend = (rotations - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
    else:

        def dimension(rotations: float) -> float:
            """The (fractional) number of the pair that makes this many rotations within the original context."""
            ratio = rotary.original_positions / (rotations * 2 * math.pi)
            return dims * math.log(ratio) / (2 * math.log(rotary.theta))

        first, last = dimension(rotary.beta_fast), dimension(rotary.beta_slow)
        if rotary.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        ramp = (np.arange(dims // 2) - first) / max(last - first, 0.001)
        blend = 1.0 - np.clip(ramp, 0.0, 1.0)
    return (blend * plain + (1.0 - blend) * scaled).astype(np.float32)


def rotary_angles(
    positions: Int[Array, "b t"], context: Int[Array, "b"], rotary: Rotary, head_dim: int
) -> tuple[Float[Array, "b 1 t pairs"], Float[Array, "b 1 t pairs"]]:
    """Cosines and sines of the angles of each pair of dimensions at each position, float32.

    Args:
        positions: position of each token.
        context: how many tokens each row may come to hold at most, by which `longrope` chooses its frequencies.
        rotary: the rotary embedding.
        head_dim: H.
    """
    frequencies = jnp.asarray(rotary_frequencies(rotary, head_dim))
    if rotary.kind == "longrope":
        is_long = (context > rotary.original_positions)[:, None, None, None]
        frequencies = jnp.where(is_long, rotary_frequencies(rotary, head_dim, long=True), frequencies)
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
    cos, sin = computed_once(jnp.cos(angles), jnp.sin(angles))
    return cos * rotary.attention_factor, sin * rotary.attention_factor


def rotate(
    x: Float[Array, "b n t h"],
    cos: Float[Array, "b 1 t pairs"],
    sin: Float[Array, "b 1 t pairs"],
    interleaved: bool = False,
) -> Float[Array, "b n t h"]:
    """Turn the leading pairs of dimensions of x.

    Args:
        x: queries or keys.
        cos: cosines of the angles.
        sin: sines of the angles.
        interleaved: whether dimension 2i turns with 2i + 1, instead of i with i + pairs.
    """
    turning = 2 * cos.shape[-1]
    pairs = x[..., :turning].reshape(*x.shape[:-1], *((-1, 2) if interleaved else (2, -1)))
    axis = pairs.ndim - (1 if interleaved else 2)
    first, second = (jax.lax.index_in_dim(pairs, i, axis, keepdims=False) for i in (0, 1))
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=axis)
    turned = turned.reshape(*x.shape[:-1], turning)
    return jnp.concatenate([turned, x[..., turning:]], axis=-1) if turning < x.shape[-1] else turned


def query_growth(positions: Int[Array, "b t"], rotary: Rotary) -> Float[Array, "b 1 t 1"]:
    """The factor of each query, float32, that grows with its position and keeps attention sharp among very many
    keys."""
    lengths = jnp.floor(jnp.maximum(positions, 0).astype(jnp.float32) / rotary.original_positions)
    return (1.0 + rotary.query_growth * jnp.log(1.0 + lengths))[:, None, :, None]


def alibi_slopes(alibi: Alibi, heads: int) -> np.ndarray:
    """The slope with which the scores of each head fall with distance, (N,) float32."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (-alibi.max_bias * np.arange(1, power + 1) / power)
    if power != heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
    return slopes.astype(np.float32)


def alibi_bias(
    query_positions: Int[Array, "b t"], key_positions: Int[Array, "b s"], alibi: Alibi, scale: float, heads: int
) -> Float[Array, "b n t s"]:
    """The biases of the scores, float32, up to a constant for each query, which the softmax ignores.

    Args:
        query_positions: position of each query.
        key_positions: position of each key.
        alibi: the linear biases.
        scale: the factor of the scores.
        heads: N, the number of query heads.
    """
    slopes = jnp.asarray(alibi_slopes(alibi, heads))[:, None, None]
    if alibi.rounded:
        # Rounding makes the bias depend on the position of the key and not on the distance alone.
        keys = key_positions[:, None, None, :].astype(jnp.bfloat16)
        bias = (slopes.astype(jnp.bfloat16) * keys).astype(jnp.float32)
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], query_positions.shape[1], bias.shape[3]))
    else:
        bias = slopes * (key_positions[:, None, None, :] - query_positions[:, None, :, None]).astype(jnp.float32)
    return bias * scale if alibi.scaled else bias


def attention_mask(
    query_positions: Int[Array, "b t"], key_positions: Int[Array, "b s"], window: int = 0
) -> Bool[Array, "b 1 1 t s"]:
    """Which keys each query may read: those of real tokens, up to its own position and within the window.

    Args:
        query_positions: position of each query.
        key_positions: position of each key; `EMPTY` for padding.
        window: how many tokens back a query reads, itself included; 0 for all.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    mask = (key != EMPTY) & (key <= query)
    if window:
        mask &= key > query - window
    return mask[:, None, None]


@dataclasses.dataclass(frozen=True)
class Positions:
    """What attention needs to know about the positions of a call's tokens and of the cache; the same for many layers.

    In the shapes, t counts the queries, which are this call's tokens, s the slots of the cache that attention reads,
    and u this call's tokens as keys.

    Attributes:
        angles: cosines and sines of the rotary embedding; None without one.
        masks: which slots of the cache, and which of this call's tokens, each query may read.
        biases: what is added to the scores of both; None without ALiBi.
        queries: position of each of this call's tokens.
        slots: position of every slot of the cache, including those of this call's tokens.
        window: how many tokens back a query reads, itself included; 0 for all.
        growth: factor of the queries; None if there is none.
    """

    angles: tuple[Float[Array, "b 1 t pairs"], Float[Array, "b 1 t pairs"]] | None
    masks: tuple[Bool[Array, "b 1 1 t s"], Bool[Array, "b 1 1 t u"]]
    biases: tuple[Float[Array, "b n t s"], Float[Array, "b n t u"]] | None
    queries: Int[Array, "b t"]
    slots: Int[Array, "b slots"]
    window: int
    growth: Float[Array, "b 1 t 1"] | None = None

    def block(self, start: int, stop: int) -> Positions:
        """The same for the queries from `start` to `stop` of the call, without the keys after them, which they never
        read.

        Rotary angles and the factor of the queries are left out: they have been applied by then.
        """
        masks = (self.masks[0][..., start:stop, :], self.masks[1][..., start:stop, :stop])
        biases = self.biases
        if biases is not None:
            biases = biases[0][..., start:stop, :], biases[1][..., start:stop, :stop]
        queries = self.queries[:, start:stop]
        return Positions(None, masks, biases, queries, self.slots, self.window)


def layer_positions(
    config: ModelConfig, positions: Int[Array, "b t"], cache: KVCache, read_slots: int | None = None
) -> list[Positions]:
    """The `Positions` of every layer, with each distinct part computed once.

    Args:
        config: the architecture.
        positions: position of each of the call's tokens.
        cache: the tokens that were read before.
        read_slots: number of slots of the cache that attention reads; all if None.
    """
    cached, context = cache.positions[:, :read_slots], cache.context
    slots = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.cursor, axis=1)
    layers = range(config.num_layers)
    windows = dict.fromkeys(config.window(layer) for layer in layers)
    rotaries = dict.fromkeys(config.layer_rotary(layer) for layer in layers)
    masks = {w: (attention_mask(positions, cached, w), attention_mask(positions, positions, w)) for w in windows}
    angles = {r: None if r is None else rotary_angles(positions, context, r, config.head_dim) for r in rotaries}
    growths = {r: None if r is None or not r.query_growth else query_growth(positions, r) for r in rotaries}
    biases = None
    if config.alibi is not None:
        keys = (cached, positions)
        first, second = (alibi_bias(positions, k, config.alibi, config.score_scale, config.num_heads) for k in keys)
        biases = (first, second)
    return [
        Positions(angles[rotary], masks[window], biases, positions, slots, window, growths[rotary])
        for window, rotary in ((config.window(layer), config.layer_rotary(layer)) for layer in layers)
    ]
