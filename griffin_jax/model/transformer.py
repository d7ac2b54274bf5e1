"""The whole transformer, from the bottom up: norm, rotary, attention, feed-forward, layer, model.

Letters in names and shapes: B batch, T query tokens, S cache slots, D width, F neurons of a
feed-forward layer (K after pruning), N query heads, G key/value heads, R = N / G, H head size,
V vocabulary.

A module is a pytree, so `jax.jit(prefill)(model, ...)` takes it as it is. A pruned model is the same
module tree with feed-forward matrices of K rows where the full one has F; nothing here knows which
one it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.griffin.select import token_statistic
from griffin_jax.model.cache import EMPTY, KVCache
from griffin_jax.model.config import Activation, Alibi, ModelConfig, Rotary
from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size, mesh_of

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


QUERY_BLOCK = 256
"""Tokens of a prompt that attend together: scores with tokens behind the block are not computed."""

LAYER_SCOPE = "layer"
"""What profiles and compiled programs call everything that a layer computes."""

Observer = Callable[[int, Float[Array, "b t f"], Bool[Array, "b t"]], Any]
"""Sees the intermediates z of each feed-forward layer while the model reads.

It is called, inside of jit, with the layer's number, z and which tokens are real (false for padding, where z is finite
and means nothing). What it returns, arrays in any pytree or None, is returned beside the model's output. Whatever it
does not keep is not kept: z of one layer is in memory at a time.
"""


def statistic(layer: int, z: Float[Array, "b t f"], real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
    """The observer that collects GRIFFIN's s^2 over the real tokens, float32."""
    del layer
    return token_statistic(z, real)


class Norm(nnx.Module):
    """RMSNorm, x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467), or LayerNorm (arXiv 1607.06450).

    The statistics are float32.
    """

    def __init__(
        self, shape: tuple[int, ...], config: ModelConfig, dtype: DTypeLike, *, bias: bool = False, joint: bool = False
    ):
        self.plus_one = config.norm_plus_one
        self.scale = nnx.Param(jnp.zeros(shape, dtype) if self.plus_one else jnp.ones(shape, dtype))
        self.bias = _bias(shape, dtype) if bias else None
        self.centered = config.norm == "layer"
        self.eps = config.norm_eps
        self.joint = joint

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x normalised over its last axis; if `joint`, over all heads of a (B, N, T, H) array together."""
        axes = (1, 3) if self.joint else -1
        x32 = x.astype(jnp.float32)
        if self.centered:
            x32 = x32 - jnp.mean(x32, axis=axes, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + self.eps)
        if self.plus_one:
            return (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        if self.bias is None:
            return normed.astype(x.dtype) * self.scale[...]
        return (normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def rotary_frequencies(rotary: Rotary, head_dim: int, *, long: bool = False) -> np.ndarray:
    """Angle per position of each pair of dimensions that turns, (dims/2,) float32.

    Args:
        rotary: the embedding.
        head_dim: H, of which all dimensions turn unless `rotary.dims` says otherwise.
        long: of `longrope`, the frequencies for texts beyond the original context.
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
            """The (fractional) pair that turns this often within the original context."""
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
    """Cosines and sines of the turns at each position; `context` is the most tokens a row may come to hold."""
    frequencies = jnp.asarray(rotary_frequencies(rotary, head_dim))
    if rotary.kind == "longrope":
        is_long = (context > rotary.original_positions)[:, None, None, None]
        frequencies = jnp.where(is_long, rotary_frequencies(rotary, head_dim, long=True), frequencies)
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
    # Written into an array, or XLA's CPU code would compute them again in every layer, for every head.
    table = jnp.zeros((2, *angles.shape)).at[0].set(jnp.cos(angles)).at[1].set(jnp.sin(angles))
    return table[0] * rotary.attention_factor, table[1] * rotary.attention_factor


def rotate(
    x: Float[Array, "b n t h"],
    cos: Float[Array, "b 1 t pairs"],
    sin: Float[Array, "b 1 t pairs"],
    interleaved: bool = False,
) -> Float[Array, "b n t h"]:
    """Rotary embedding of the leading pairs: i turns with i + pairs, or 2i with 2i + 1 if interleaved."""
    turning = 2 * cos.shape[-1]
    pairs = x[..., :turning].reshape(*x.shape[:-1], *((-1, 2) if interleaved else (2, -1)))
    axis = pairs.ndim - (1 if interleaved else 2)
    first, second = (jax.lax.index_in_dim(pairs, i, axis, keepdims=False) for i in (0, 1))
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=axis)
    turned = turned.reshape(*x.shape[:-1], turning)
    return jnp.concatenate([turned, x[..., turning:]], axis=-1) if turning < x.shape[-1] else turned


def alibi_slopes(alibi: Alibi, heads: int) -> np.ndarray:
    """How fast each head's scores fall with distance, (N,) float32."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (-alibi.max_bias * np.arange(1, power + 1) / power)
    if power != heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
    return slopes.astype(np.float32)


def alibi_bias(
    query_positions: Int[Array, "b t"], key_positions: Int[Array, "b s"], alibi: Alibi, scale: float, heads: int
) -> Float[Array, "b n t s"]:
    """What is added to the scores, up to a number for each query, which a softmax ignores. Float32."""
    slopes = jnp.asarray(alibi_slopes(alibi, heads))[:, None, None]
    if alibi.rounded:
        # Rounding makes it depend on the key's position itself and not on the distance.
        keys = key_positions[:, None, None, :].astype(jnp.bfloat16)
        bias = (slopes.astype(jnp.bfloat16) * keys).astype(jnp.float32)
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], query_positions.shape[1], bias.shape[3]))
    else:
        bias = slopes * (key_positions[:, None, None, :] - query_positions[:, None, :, None]).astype(jnp.float32)
    return bias * scale if alibi.scaled else bias


def attention_mask(
    query_positions: Int[Array, "b t"], key_positions: Int[Array, "b s"], window: int = 0
) -> Bool[Array, "b 1 1 t s"]:
    """Which keys a query may read: those of real tokens at or before its own position.

    With a window, only the last `window` of them.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    mask = (key != EMPTY) & (key <= query)
    if window:
        mask &= key > query - window
    return mask[:, None, None]


@dataclasses.dataclass(frozen=True)
class Positions:
    """How the tokens of a call lie to each other and to the cache: the same for many layers.

    Attributes:
        angles: of the rotary embedding, or None.
        masks: which slots of the cache, and which of this call's tokens, a query may read.
        biases: what is added to the scores of both, or None.
    """

    angles: tuple[Float[Array, "b 1 t pairs"], Float[Array, "b 1 t pairs"]] | None
    masks: tuple[Bool[Array, "b 1 1 t s"], Bool[Array, "b 1 1 t u"]]
    biases: tuple[Float[Array, "b n t s"], Float[Array, "b n t u"]] | None

    def block(self, start: int, stop: int) -> Positions:
        """Of these tokens of the call only, and of it up to the last of them, behind which they read nothing."""
        masks = (self.masks[0][..., start:stop, :], self.masks[1][..., start:stop, :stop])
        if self.biases is None:
            return Positions(None, masks, None)
        return Positions(None, masks, (self.biases[0][..., start:stop, :], self.biases[1][..., start:stop, :stop]))


def layer_positions(
    config: ModelConfig, positions: Int[Array, "b t"], cached: Int[Array, "b s"], context: Int[Array, "b"]
) -> list[Positions]:
    """`Positions` for every layer, each distinct part computed once."""
    layers = range(config.num_layers)
    windows = dict.fromkeys(config.window(layer) for layer in layers)
    rotaries = dict.fromkeys(config.layer_rotary(layer) for layer in layers)
    masks = {w: (attention_mask(positions, cached, w), attention_mask(positions, positions, w)) for w in windows}
    angles = {r: None if r is None else rotary_angles(positions, context, r, config.head_dim) for r in rotaries}
    biases = None
    if config.alibi is not None:
        keys = (cached, positions)
        first, second = (alibi_bias(positions, k, config.alibi, config.score_scale, config.num_heads) for k in keys)
        biases = (first, second)
    return [Positions(angles[config.layer_rotary(layer)], masks[config.window(layer)], biases) for layer in layers]


class Attention(nnx.Module):
    """Causal multi-head attention; N query heads read G key/value heads (MHA, GQA and MQA).

    The projections of x are one matrix, (G, R + 2, H, D): each group has its R queries, its key and
    its value. One product reads weights faster than three do, and groups can be shared out to devices.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None):
        n, g, h, d = config.num_heads, config.kv_heads, config.head_dim, config.width
        self.qkv = _matrix(rngs, (g, n // g + 2, h, d), fan_in=d, dtype=dtype)
        self.out = _matrix(rngs, (n, h, d), fan_in=n * h, dtype=dtype)
        self.qkv_bias = _bias((g, n // g + 2, h), dtype) if config.attention_bias else None
        self.out_bias = _bias((d,), dtype) if config.attention_out_bias else None
        self.query_norm = _head_norm(n, config, dtype)
        self.key_norm = _head_norm(g, config, dtype)
        self.scale = config.score_scale
        self.softcap = config.attention_softcap
        self.clip = config.qkv_clip
        self.interleaved = config.rotary is not None and config.rotary.interleaved

    def __call__(
        self,
        x: Float[Array, "b t d"],
        at: Positions,
        cached_keys: Float[Array, "b g h slots"],
        cached_values: Float[Array, "b g slots h"],
        cursor: Int[Array, ""],
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b g h slots"], Float[Array, "b g slots h"]]:
        """The output, and the layer's cache with this call's keys and values written at `cursor`.

        Queries read the first S slots of the cache as it was, and this call's own tokens; `at.masks`
        says which of both.
        """
        query, key, value = self._projected(x)
        if at.angles is not None:
            query = rotate(query, *at.angles, self.interleaved)
            key = rotate(key, *at.angles, self.interleaved)

        b, n, t, h = query.shape
        g = key.shape[1]
        query = query.reshape(b, g, n // g, t, h)
        blocks = []
        for start in range(0, t, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, t)
            own = query[:, :, :, start:stop], key[:, :, :stop], value[:, :, :stop]
            blocks.append(self._mixed(*own, at.block(start, stop), cached_keys, cached_values))
        mixed = jnp.concatenate(blocks, axis=3)

        key, value = _after(mixed[:, :, 0], key, value)
        cached_keys = jax.lax.dynamic_update_slice(cached_keys, key.swapaxes(2, 3), (0, 0, 0, cursor))
        cached_values = jax.lax.dynamic_update_slice(cached_values, value, (0, 0, cursor, 0))

        mixed = mixed.reshape(b, n, t, h).swapaxes(1, 2).reshape(b, t, n * h)
        out = _down(mixed, self.out[...].reshape(n * h, -1))
        if self.out_bias is not None:
            out = out + self.out_bias[...]
        return out, cached_keys, cached_values

    def _mixed(
        self,
        query: Float[Array, "b g r t h"],
        key: Float[Array, "b g u h"],
        value: Float[Array, "b g u h"],
        at: Positions,
        cached_keys: Float[Array, "b g h slots"],
        cached_values: Float[Array, "b g slots h"],
    ) -> Float[Array, "b g r t h"]:
        """Values of the cache and of this call's tokens, weighted by the softmax of their scores."""
        b, g, r, _, _ = query.shape
        slots = at.masks[0].shape[-1]
        scores = jnp.einsum("bgrth,bguh->bgrtu", query, key, preferred_element_type=jnp.float32)
        if slots:
            read_keys = cached_keys[..., :slots]
            cached = jnp.einsum("bgrth,bghs->bgrts", query, read_keys, preferred_element_type=jnp.float32)
            scores = jnp.concatenate([cached, scores], axis=-1)
        mask = jnp.concatenate(at.masks, axis=-1) if slots else at.masks[1]
        scores = _softcap(scores * self.scale, self.softcap)
        if at.biases is not None:
            bias = jnp.concatenate(at.biases, axis=-1) if slots else at.biases[1]
            scores = scores + bias.reshape(b, g, r, *bias.shape[2:])
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        # The softmax divides the mixed values, which are fewer than the weights.
        weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights.astype(query.dtype)
        mix = functools.partial(jnp.einsum, "bgrts,bgsh->bgrth", preferred_element_type=jnp.float32)
        mixed = mix(weights[..., slots:], value)
        if slots:
            mixed += mix(weights[..., :slots], cached_values[:, :, :slots])
        return (mixed / total).astype(query.dtype)

    def _projected(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b n t h"], Float[Array, "b g t h"], Float[Array, "b g t h"]]:
        """Queries, keys and values, before rotary embedding."""
        weight = self.qkv[...]
        y = _times(x, weight)
        if self.qkv_bias is not None:
            y = y + self.qkv_bias[...]
        if self.clip is not None:
            y = jnp.clip(y, -self.clip, self.clip)
        b, t, _, _, h = y.shape
        query = y[:, :, :, :-2].reshape(b, t, -1, h).swapaxes(1, 2)
        key, value = y[:, :, :, -2].swapaxes(1, 2), y[:, :, :, -1].swapaxes(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value


class FeedForward(nnx.Module):
    """y = Wd^T z + b with z = act(Wg x) * (Wu x), or z = act(Wu x + b) if not gated.

    All matrices are neuron-major: a row belongs to a neuron, so that keeping a neuron keeps a row of
    each. Those of x are one, `inner`: (2, F, D), gate and up, or (1, F, D) if not gated; one product reads
    weights faster than two do. `down` is (F, D). After pruning there are K rows for F; where each sequence
    of a batch keeps neurons of its own, `inner` is (A, B, K, D) and `down` (B, K, D).

    The neurons may lie in two groups of rows, the second of which is `rest`; see `griffin_jax.extensions.in_place`.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None):
        a, f, d = 2 if config.gated else 1, config.ff_width, config.width
        self.inner = _matrix(rngs, (a, f, d), fan_in=d, dtype=dtype)
        self.down = _matrix(rngs, (f, d), fan_in=f, dtype=dtype)
        self.inner_bias = _bias((a, f), dtype) if config.ff_bias else None
        self.down_bias = _bias((d,), dtype) if config.ff_bias else None
        self.activation: Activation = config.activation
        self.rest: FeedForward | None = nnx.data(None)

    @property
    def neurons(self) -> int:
        """F, or K after pruning."""
        return self.down.shape[-2] + (0 if self.rest is None else self.rest.neurons)

    @property
    def per_sequence(self) -> bool:
        """Whether each sequence of a batch has neurons of its own."""
        return self.down.ndim == 3

    def intermediate(self, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
        """z, the input of the down projection: one value for each neuron and token, those of `rest` last."""
        z = self._own_intermediate(x)
        return z if self.rest is None else jnp.concatenate([z, self.rest.intermediate(x)], axis=-1)

    def _own_intermediate(self, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
        weight = self.inner[...]
        y = jnp.einsum("btd,abfd->btaf", x, weight) if self.per_sequence else _times(x, weight)
        if self.inner_bias is not None:
            bias = self.inner_bias[...]
            y = y + (bias.swapaxes(0, 1)[:, None] if self.per_sequence else bias)
        z = ACTIVATIONS[self.activation](y[:, :, 0])
        return z * y[:, :, 1] if y.shape[2] == 2 else z

    def project(self, z: Float[Array, "b t f"]) -> Float[Array, "b t d"]:
        """The layer's output for given intermediates."""
        own = self.down.shape[-2]
        others = None if self.rest is None else self.rest.project(z[..., own:])
        z = z[..., :own]
        y = jnp.einsum("btf,bfd->btd", z, self.down[...]) if self.per_sequence else _down(z, self.down[...])
        y = y if others is None else y + others
        return y if self.down_bias is None else y + self.down_bias[...]

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.project(self.intermediate(x))


class Layer(nnx.Module):
    """Attention and feed-forward, each added to the residual stream.

    With f for either, `ModelConfig.norm_placement` says what the norms are applied to. Parallel
    layers add both to the same x.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs | None):
        def norm(wanted: bool) -> Norm | None:
            return Norm((config.width,), config, dtype, bias=config.norm_bias) if wanted else None

        on_input = config.norm_placement in ("pre", "sandwich")
        on_output = config.norm_placement in ("output", "sandwich")
        on_sum = config.norm_placement == "post"
        self.attention_norm = norm(on_input)
        self.attention = Attention(config, dtype, rngs)
        self.attention_out_norm = norm(on_output)
        self.attention_sum_norm = norm(on_sum)
        self.ff_norm = norm(on_input and not config.shared_norm)
        self.ff = FeedForward(config, dtype, rngs)
        self.ff_out_norm = norm(on_output)
        self.ff_sum_norm = norm(on_sum)
        self.parallel = config.parallel
        self.residual_scale = config.residual_scale

    @jax.named_scope(LAYER_SCOPE)
    def __call__(
        self,
        x: Float[Array, "b t d"],
        real: Bool[Array, "b t"],
        at: Positions,
        cached_keys: Float[Array, "b g h slots"],
        cached_values: Float[Array, "b g slots h"],
        cursor: Int[Array, ""],
        observe: Callable[[Float[Array, "b t f"], Bool[Array, "b t"]], Any] | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b g h slots"], Float[Array, "b g slots h"], Any]:
        """The residual stream behind the layer, its cache, and what `observe` makes of z, if it is given."""
        normed = _apply(self.attention_norm, x)
        mixed, keys, values = self.attention(normed, at, cached_keys, cached_values, cursor)
        mixed = _scaled(_apply(self.attention_out_norm, mixed), self.residual_scale)
        if self.parallel:
            normed = normed if self.ff_norm is None else self.ff_norm(x)
        else:
            x = _apply(self.attention_sum_norm, x + mixed)
            normed = _apply(self.ff_norm, x)
        z = self.ff.intermediate(normed)
        observed = None if observe is None else observe(z, real)
        y = _scaled(_apply(self.ff_out_norm, self.ff.project(z)), self.residual_scale)
        x = x + mixed + y if self.parallel else x + y
        return _apply(self.ff_sum_norm, x), keys, values, observed


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
        d, v = config.width, config.vocab_size
        e = config.embedding_width or d
        self.embedding = _matrix(rngs, (v, e), fan_in=e, dtype=dtype)
        self.project_in = None if e == d else _matrix(rngs, (e, d), fan_in=e, dtype=dtype)
        table = (config.max_positions, d)
        self.position_embedding = _matrix(rngs, table, fan_in=d, dtype=dtype) if config.learned_positions else None
        self.embedding_norm = Norm((d,), config, dtype, bias=config.norm_bias) if config.embedding_norm else None
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = Norm((d,), config, dtype, bias=config.norm_bias) if config.final_norm else None
        self.project_out = None if e == d else _matrix(rngs, (d, e), fan_in=d, dtype=dtype)
        self.head = None if config.tied_head else _matrix(rngs, (v, e), fan_in=e, dtype=dtype)
        self.head_bias = _bias((v,), dtype) if config.head_bias else None

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
        observe: Observer | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache, tuple[Any, ...]]:
        """Reads T tokens of every row, behind those that the cache holds.

        Args:
            tokens: token ids.
            positions: of each token in its row, rising; `EMPTY` anywhere among them marks padding, which is
                written to the cache but never attended to and enters no statistic.
            cache: what was read so far, with room for T more tokens.
            read_slots: attention reads only this many slots of the cache (all of them if None). They
                must hold every token so far; 0 for an empty cache.
            observe: sees the intermediates of every layer; `statistic` collects what GRIFFIN selects by.

        Returns:
            The residual stream behind the last layer (for `logits`), the cache with T more tokens,
            and per layer what `observe` returned (empty without it).
        """
        real = positions != EMPTY
        # Padding is zero between the layers: what it would become could overflow, and 0 * inf in a sum over
        # tokens would reach the real ones.
        x = jnp.where(real[..., None], self.embed(tokens, positions), 0)
        at = layer_positions(self.config, positions, cache.positions[:, :read_slots], cache.context)
        keys, values, observed = [], [], []
        for number, layer in enumerate(self.layers):
            observe_layer = None if observe is None else functools.partial(observe, number)
            x, layer_keys, layer_values, seen = layer(
                x, real, at[number], cache.keys[number], cache.values[number], cache.cursor, observe_layer
            )
            x = jnp.where(real[..., None], x, 0)
            keys.append(layer_keys)
            values.append(layer_values)
            observed.append(seen)
        written = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.cursor))
        cache = dataclasses.replace(
            cache,
            keys=tuple(keys),
            values=tuple(values),
            positions=written,
            cursor=cache.cursor + tokens.shape[1],
        )
        return x, cache, () if observe is None else tuple(observed)

    def embed(self, tokens: Int[Array, "b t"], positions: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The residual stream before the first layer; anything where a position is `EMPTY`."""
        x = _scaled(_rows(self.embedding[...], tokens), self.config.embedding_scale)
        if self.project_in is not None:
            x = x @ self.project_in[...]
        if self.position_embedding is not None:
            x = x + self.position_embedding[...][jnp.maximum(positions, 0)]
        return _apply(self.embedding_norm, x)

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Scores of every next token, float32, from the residual stream."""
        x = _apply(self.norm, x)
        if self.project_out is not None:
            x = x @ self.project_out[...]
        head = self.embedding if self.head is None else self.head
        logits = jnp.einsum("btd,vd->btv", x, head[...], preferred_element_type=jnp.float32)
        if self.head_bias is not None:
            logits = logits + self.head_bias[...].astype(jnp.float32)
        return _softcap(_scaled(logits, self.config.logit_scale), self.config.logit_softcap)


def _apply(norm: Norm | None, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    return x if norm is None else norm(x)


def _scaled(x: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)


def _softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    return x if cap is None else cap * jnp.tanh(x / cap)


def _head_norm(heads: int, config: ModelConfig, dtype: DTypeLike) -> Norm | None:
    if config.head_norm == "none":
        return None
    shape = (config.head_dim,) if config.head_norm == "shared" else (heads, 1, config.head_dim)
    return Norm(shape, config, dtype, joint=config.head_norm == "joint")


def _matrix(rngs: nnx.Rngs | None, shape: tuple[int, ...], *, fan_in: int, dtype: DTypeLike) -> nnx.Param:
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype))
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5)


def _rows(table: Float[Array, "v e"], tokens: Int[Array, "b t"]) -> Float[Array, "b t e"]:
    """The rows of these tokens.

    A single one is looked up twice: of one lookup XLA makes a slice, and a table that is divided among devices
    is put together whole to be sliced.
    """
    b, t = tokens.shape
    return table[tokens] if b * t > 1 else table[jnp.broadcast_to(tokens, (2, 1))][:1]


def _times(x: Float[Array, "b t d"], weight: Float[Array, "*rows d"]) -> Float[Array, "b t *rows"]:
    """x times every row of `weight`.

    XLA's CPU code is fast for one token only if the matrix has two axes and is not transposed by itself. Elsewhere
    the axes stay: one that is divided among devices can only be merged if it comes first. On CPUs each device merges
    what it has of a feed-forward layer, (A, F, D), which is divided along its neurons.
    """
    mesh = mesh_of(weight)

    def flat(x: Array, weight: Array) -> Array:
        y = jnp.einsum("btd,fd->btf", x, weight.reshape(-1, weight.shape[-1]))
        return y.reshape(*x.shape[:2], *weight.shape[:-1])

    def as_it_is(x: Array, weight: Array) -> Array:
        return jax.lax.dot_general(x, weight, (((2,), (weight.ndim - 1,)), ((), ())))

    devices, cpu = axis_size(mesh, MODEL_AXIS), flat
    if devices > 1 and weight.ndim == 3 and weight.shape[1] % devices == 0:
        cpu = jax.shard_map(
            flat,
            mesh=mesh,
            axis_names={MODEL_AXIS},
            in_specs=(PartitionSpec(), PartitionSpec(None, MODEL_AXIS)),
            out_specs=PartitionSpec(None, None, None, MODEL_AXIS),
        )
    return jax.lax.platform_dependent(x, weight, cpu=cpu, default=as_it_is)


def _bias(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))


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
