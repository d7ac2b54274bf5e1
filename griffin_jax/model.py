"""The whole transformer, from the bottom up: norm, rotary, attention, feed-forward, layer, model.

Letters in names and shapes: B batch, T query tokens, S cache slots, D width, F neurons of a
feed-forward layer (K after pruning), N query heads, G key/value heads, R = N / G, H head size,
V vocabulary.

A module is a pytree, so `jax.jit(prefill)(model, ...)` takes it as it is. A pruned model is the same
module tree with feed-forward matrices of K rows where the full one has F; nothing here knows which
one it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.cache import EMPTY, KVCache
from griffin_jax.config import Activation, ModelConfig, Rotary
from griffin_jax.griffin import token_statistic

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467), the mean in float32."""

    def __init__(self, width: int, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x32 = x.astype(jnp.float32)
        rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * rms).astype(x.dtype) * self.scale[...]


def rotary_frequencies(rotary: Rotary, head_dim: int) -> np.ndarray:
    """Angle per position of each pair of dimensions, (H/2,) float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(rotary.theta) ** exponents).astype(np.float32)
    if rotary.kind == "default":
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
            """The (fractional) pair that turns this often within the original context."""
            ratio = rotary.original_positions / (rotations * 2 * math.pi)
            return head_dim * math.log(ratio) / (2 * math.log(rotary.theta))

        first, last = dimension(rotary.beta_fast), dimension(rotary.beta_slow)
        if rotary.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = (np.arange(head_dim // 2) - first) / max(last - first, 0.001)
        blend = 1.0 - np.clip(ramp, 0.0, 1.0)
    return (blend * plain + (1.0 - blend) * scaled).astype(np.float32)


def rotary_angles(
    positions: Int[Array, "b t"], rotary: Rotary, head_dim: int
) -> tuple[Float[Array, "b 1 t h"], Float[Array, "b 1 t h"]]:
    """Cosines and sines by which `rotate` turns a query or key at each position, float32."""
    angles = positions[:, None, :, None].astype(jnp.float32) * rotary_frequencies(rotary, head_dim)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * rotary.attention_factor, jnp.sin(angles) * rotary.attention_factor


def rotate(
    x: Float[Array, "b n t h"], cos: Float[Array, "b 1 t h"], sin: Float[Array, "b 1 t h"]
) -> Float[Array, "b n t h"]:
    """Rotary embedding of the half-split layout: dimension i turns with dimension i + H/2."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cos.astype(x.dtype) + turned * sin.astype(x.dtype)


def attention_mask(query_positions: Int[Array, "b t"], key_positions: Int[Array, "b s"]) -> Bool[Array, "b 1 1 t s"]:
    """Which keys a query may read: those of real tokens at or before its own position."""
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    return ((key != EMPTY) & (key <= query))[:, None, None]


class Attention(nnx.Module):
    """Causal multi-head attention; N query heads read G key/value heads (MHA, GQA and MQA)."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None):
        n, g, h, d = config.num_heads, config.num_kv_heads, config.head_dim, config.width
        self.query = _matrix(rngs, (n, h, d), fan_in=d, dtype=dtype)
        self.key = _matrix(rngs, (g, h, d), fan_in=d, dtype=dtype)
        self.value = _matrix(rngs, (g, h, d), fan_in=d, dtype=dtype)
        self.out = _matrix(rngs, (n, h, d), fan_in=n * h, dtype=dtype)
        self.query_bias = _bias((n, h), dtype) if config.attention_bias else None
        self.key_bias = _bias((g, h), dtype) if config.attention_bias else None
        self.value_bias = _bias((g, h), dtype) if config.attention_bias else None
        self.out_bias = _bias((d,), dtype) if config.attention_out_bias else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: tuple[Float[Array, "b 1 t h"], Float[Array, "b 1 t h"]],
        masks: tuple[Bool[Array, "b 1 1 t s"], Bool[Array, "b 1 1 t t"]],
        cached_keys: Float[Array, "b g h slots"],
        cached_values: Float[Array, "b g slots h"],
        cursor: Int[Array, ""],
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b g h slots"], Float[Array, "b g slots h"]]:
        """The output, and the layer's cache with this call's keys and values written at `cursor`.

        Queries read the first S slots of the cache as it was, and this call's own tokens; `masks`
        says which of both.
        """
        query = rotate(_heads(x, self.query, self.query_bias), *angles)
        key = rotate(_heads(x, self.key, self.key_bias), *angles)
        value = _heads(x, self.value, self.value_bias)

        b, n, t, h = query.shape
        g, slots = key.shape[1], masks[0].shape[-1]
        query = query.reshape(b, g, n // g, t, h)
        scores = jnp.einsum("bgrth,bguh->bgrtu", query, key, preferred_element_type=jnp.float32)
        if slots:
            read_keys = cached_keys[..., :slots]
            cached = jnp.einsum("bgrth,bghs->bgrts", query, read_keys, preferred_element_type=jnp.float32)
            scores = jnp.concatenate([cached, scores], axis=-1)
        mask = jnp.concatenate(masks, axis=-1) if slots else masks[1]
        scores = jnp.where(mask, scores * (h**-0.5), jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bgrtu,bguh->bgrth", weights[..., slots:], value)
        if slots:
            mixed += jnp.einsum("bgrts,bgsh->bgrth", weights[..., :slots], cached_values[:, :, :slots])

        key, value = _after(mixed[:, :, 0], key, value)
        cached_keys = jax.lax.dynamic_update_slice(cached_keys, key.swapaxes(2, 3), (0, 0, 0, cursor))
        cached_values = jax.lax.dynamic_update_slice(cached_values, value, (0, 0, cursor, 0))

        mixed = mixed.reshape(b, n, t, h).swapaxes(1, 2).reshape(b, t, n * h)
        out = _down(mixed, self.out[...].reshape(n * h, -1))
        if self.out_bias is not None:
            out = out + self.out_bias[...]
        return out, cached_keys, cached_values


class FeedForward(nnx.Module):
    """y = Wd^T z + b with z = act(Wg x) * (Wu x), or z = act(Wu x + b) if not gated.

    All matrices are neuron-major: row j belongs to neuron j, so that keeping a neuron keeps a row of
    each. They are (F, D); (K, D) after pruning; (B, K, D) where each sequence of a batch keeps
    neurons of its own.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None):
        f, d = config.ff_width, config.width
        self.gate = _matrix(rngs, (f, d), fan_in=d, dtype=dtype) if config.gated else None
        self.up = _matrix(rngs, (f, d), fan_in=d, dtype=dtype)
        self.down = _matrix(rngs, (f, d), fan_in=f, dtype=dtype)
        self.gate_bias = _bias((f,), dtype) if config.gated and config.ff_bias else None
        self.up_bias = _bias((f,), dtype) if config.ff_bias else None
        self.down_bias = _bias((d,), dtype) if config.ff_bias else None
        self.activation: Activation = config.activation

    @property
    def neurons(self) -> int:
        """F, or K after pruning."""
        return self.up.shape[-2]

    def intermediate(self, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
        """z, the input of the down projection: one value for each neuron and token."""
        act = ACTIVATIONS[self.activation]
        up = self._rows(x, self.up, self.up_bias)
        if self.gate is None:
            return act(up)
        return act(self._rows(x, self.gate, self.gate_bias)) * up

    def project(self, z: Float[Array, "b t f"]) -> Float[Array, "b t d"]:
        """The layer's output for given intermediates."""
        y = jnp.einsum("btf,bfd->btd", z, self.down[...]) if self.down.ndim == 3 else _down(z, self.down[...])
        return y if self.down_bias is None else y + self.down_bias[...]

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.project(self.intermediate(x))

    def with_statistic(
        self, x: Float[Array, "b t d"], real: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b f"]]:
        """The exact output, and GRIFFIN's s^2 summed over the real tokens, float32."""
        z = self.intermediate(x)
        return self.project(z), token_statistic(z, real)

    def _rows(self, x: Array, weight: nnx.Param, bias: nnx.Param | None) -> Array:
        y = jnp.einsum("btd,bfd->btf" if weight.ndim == 3 else "btd,fd->btf", x, weight[...])
        if bias is None:
            return y
        return y + (bias[...][:, None] if bias.ndim == 2 else bias[...])


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.attention_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.attention = Attention(config, dtype, rngs)
        self.ff_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.ff = FeedForward(config, dtype, rngs)


class Transformer(nnx.Module):
    """A decoder-only language model.

    Args:
        config: the architecture.
        dtype: of the weights, and so of the computation; norms, softmax, logits and statistics are
            float32 always.
        rngs: matrices are drawn at random from `rngs.params`; without it they are zero. Weights of a
            checkpoint come through `griffin_jax.load`.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike = jnp.float32, *, rngs: nnx.Rngs | None = None):
        self.config = config
        self.embedding = _matrix(rngs, (config.vocab_size, config.width), fan_in=config.width, dtype=dtype)
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.width, config.norm_eps, dtype)
        shape = (config.vocab_size, config.width)
        self.head = None if config.tied_head else _matrix(rngs, shape, fan_in=config.width, dtype=dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the weights."""
        return self.embedding.dtype

    @property
    def neurons(self) -> tuple[int, ...]:
        """Neurons of each feed-forward layer: F, or the kept ones of a pruned model."""
        return tuple(layer.ff.neurons for layer in self.layers)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        cache: KVCache,
        *,
        read_slots: int | None = None,
        collect: bool = False,
    ) -> tuple[Float[Array, "b t d"], KVCache, tuple[Float[Array, "b _f"], ...]]:
        """Reads T tokens of every row, behind those that the cache holds.

        Args:
            tokens: token ids.
            positions: of each token in its row; `EMPTY` marks padding, which is written to the cache
                but never attended to and enters no statistic.
            cache: what was read so far, with room for T more tokens.
            read_slots: attention reads only this many slots of the cache (all of them if None). They
                must hold every token so far; 0 for an empty cache.
            collect: whether to gather GRIFFIN's statistic.

        Returns:
            The residual stream behind the last layer (for `logits`), the cache with T more tokens,
            and per layer the statistic s^2 over these tokens (empty unless `collect`).
        """
        masks = (
            attention_mask(positions, cache.positions[:, :read_slots]),
            attention_mask(positions, positions),
        )
        angles = rotary_angles(positions, self.config.rotary, self.config.head_dim)
        real = positions != EMPTY

        # Padding is zero between the layers: what it would become could overflow, and 0 * inf in a sum over
        # tokens would reach the real ones.
        x = jnp.where(real[..., None], self.embedding[...][tokens], 0)
        keys, values, statistics = [], [], []
        for layer, layer_keys, layer_values in zip(self.layers, cache.keys, cache.values, strict=True):
            mixed, layer_keys, layer_values = layer.attention(
                layer.attention_norm(x), angles, masks, layer_keys, layer_values, cache.cursor
            )
            keys.append(layer_keys)
            values.append(layer_values)
            x = x + mixed
            if collect:
                y, statistic = layer.ff.with_statistic(layer.ff_norm(x), real)
                statistics.append(statistic)
            else:
                y = layer.ff(layer.ff_norm(x))
            x = jnp.where(real[..., None], x + y, 0)
        written = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.cursor))
        cache = KVCache(tuple(keys), tuple(values), written, cache.cursor + tokens.shape[1])
        return x, cache, tuple(statistics)

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Scores of every next token, float32, from the residual stream."""
        head = self.embedding if self.head is None else self.head
        return jnp.einsum("btd,vd->btv", self.norm(x), head[...], preferred_element_type=jnp.float32)


def _matrix(rngs: nnx.Rngs | None, shape: tuple[int, ...], *, fan_in: int, dtype: DTypeLike) -> nnx.Param:
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype))
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5)


def _bias(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))


def _heads(x: Float[Array, "b t d"], weight: nnx.Param, bias: nnx.Param | None) -> Float[Array, "b n t h"]:
    y = jnp.einsum("btd,nhd->bnth", x, weight[...])
    return y if bias is None else y + bias[...][:, None]


def _after(read: Float[Array, "b g t h"], *writes: Float[Array, "b g t h"]) -> tuple[Float[Array, "b g t h"], ...]:
    """The same values, but depending on `read`.

    XLA copies a whole cache if a write into it is not ordered behind the reads, and only a dependency
    orders them: it drops an optimization barrier before it decides on copies. Zero times a number is
    not folded away, since it is NaN for infinities.
    """
    return tuple(write + 0 * read for write in writes)


def _down(x: Float[Array, "b t k"], weight: Float[Array, "k d"]) -> Float[Array, "b t d"]:
    """x @ weight, in a form that is fast for one token on CPUs too.

    There XLA multiplies a vector by a matrix of a few hundred rows on a single core, which cannot
    read as fast as all together. As a sum of independent parts it runs on all of them.
    """
    b, t, k = x.shape
    parts = math.gcd(k, 4)
    if b * t > 1 or parts == 1:
        return x @ weight

    def split(x: Array, weight: Array) -> Array:
        x, weight = x.reshape(parts, -1), weight.reshape(parts, k // parts, -1)
        pieces = jnp.einsum("pk,pkd->pd", x, weight, preferred_element_type=jnp.float32)
        return pieces.sum(axis=0).reshape(1, 1, -1).astype(x.dtype)

    return jax.lax.platform_dependent(x, weight, cpu=split, default=jnp.matmul)
