"""Causal attention with a cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from griffin_jax.model.config import ModelConfig
from griffin_jax.model.kernels import triton_compiles
from griffin_jax.model.low_rank import plus_linear, plus_matmul
from griffin_jax.model.norm import head_norm, softcap
from griffin_jax.model.ops import ordered_after, with_gradients_of
from griffin_jax.model.parameters import array_of, bias_vector, matrix
from griffin_jax.model.positions import Positions, rotate
from griffin_jax.model.products import linear, matmul
from griffin_jax.model.weights import WeightFormat
from griffin_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS, dividing, mesh_of

QUERY_BLOCK = 256
"""Tokens of a prompt that attend together: scores with tokens after the block are not computed."""

KERNEL_TOKENS = 16
"""Tokens, at least, that the kernel for prompts reads on a GPU; fewer are read by another."""

KERNEL_ITEMSIZE = 2
"""Bytes of a number, at most, that a kernel reads: longer ones would lose digits on tensor cores."""

_Attended = tuple[Float[Array, "b n t h"], Float[Array, "b g h slots"], Float[Array, "b g slots h"]]
"""The mixed values, and the layer's cache with the tokens that attended."""


class Attention(nnx.Module):
    """Causal multi-head attention; N query heads read G key/value heads (MHA, GQA and MQA).

    The projections of x are one matrix, (G, R + 2, H, D): each group has its R queries, its key and
    its value. One product reads weights faster than three do, and devices can share the groups. Matrices of integers
    have scales: `qkv_scale` for each row, or for groups of it, and `out_scale` for each output, or `out_row_scale` for
    groups of each row. Both may have an addition of low rank, `qkv_left` and `qkv_right`, `out_left` and `out_right`;
    see `griffin_jax.model.low_rank`.
    """

    def __init__(self, config: ModelConfig, dtype: DTypeLike, weights: WeightFormat, rngs: nnx.Rngs | None):
        n, g, h, d = config.num_heads, config.kv_heads, config.head_dim, config.width
        qkv = matrix(rngs, (g, n // g + 2, h, d), fan_in=d, weights=weights)
        self.qkv, self.qkv_scale = qkv.values, qkv.scale
        out = matrix(rngs, (n, h, d), fan_in=n * h, weights=weights, outputs="last")
        self.out, self.out_scale, self.out_row_scale = out.values, out.scale, out.row_scale
        self.qkv_bias = bias_vector((g, n // g + 2, h), dtype) if config.attention_bias else None
        self.sinks = bias_vector((n,), dtype) if config.attention_sinks else None
        self.out_bias = bias_vector((d,), dtype) if config.attention_out_bias else None
        self.qkv_left: nnx.Param | None = nnx.data(None)
        self.qkv_right: nnx.Param | None = nnx.data(None)
        self.out_left: nnx.Param | None = nnx.data(None)
        self.out_right: nnx.Param | None = nnx.data(None)
        self.query_norm = head_norm(n, config, dtype)
        self.key_norm = head_norm(g, config, dtype)
        self.norm_after_rotary = config.head_norm_after_rotary
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

        Queries read the first S slots of the cache as it was and this call's own tokens, as far as `at.masks` allows.
        """
        query, key, value = self._projected(x)
        if not self.norm_after_rotary:
            query, key = self._normed(query, key)
        if at.angles is not None:
            query = rotate(query, *at.angles, self.interleaved)
            key = rotate(key, *at.angles, self.interleaved)
        if self.norm_after_rotary:
            query, key = self._normed(query, key)
        if at.growth is not None:
            query = query * at.growth.astype(query.dtype)

        operands = query, key, value, cached_keys, cached_values, cursor
        kernel = self._kernel(at, query, key)
        if kernel is None:
            mixed, cached_keys, cached_values = self._in_blocks(at, *operands)
        else:

            def in_blocks(*given: Any) -> _Attended:
                *own, queries, slots, masks = given
                return self._in_blocks(dataclasses.replace(at, queries=queries, slots=slots, masks=masks), *own)

            # Positions and masks are operands, too: functions with gradients of their own cannot close over arrays.
            mixed, cached_keys, cached_values = jax.lax.platform_dependent(
                *(*operands, at.queries, at.slots, at.masks),
                cuda=with_gradients_of(in_blocks, lambda *given: kernel(*given[:-1])),
                default=in_blocks,
            )

        b, n, t, h = query.shape
        mixed = mixed.swapaxes(1, 2).reshape(b, t, n * h)
        row_scale = None if self.out_row_scale is None else self.out_row_scale[...].reshape(n * h, -1)
        out = matmul(mixed, self.out[...].reshape(n * h, -1), array_of(self.out_scale), row_scale)
        out = plus_matmul(out, mixed.reshape(b, t, n, h), self.out_left, self.out_right)
        if self.out_bias is not None:
            out = out + self.out_bias[...]
        return out, cached_keys, cached_values

    def _kernel(
        self, at: Positions, query: Float[Array, "b n t h"], key: Float[Array, "b g t h"]
    ) -> Callable[..., _Attended] | None:
        """Attention as one kernel of a GPU, where there is one for these operands and this GPU; otherwise None.

        After the operands it takes the positions of the tokens and of the slots. There is none with something that is
        added to scores, or with sinks. On a mesh each device attends with the heads that it has.
        """
        tokens = query.shape[2]
        if query.dtype.itemsize > KERNEL_ITEMSIZE or at.biases is not None or self.sinks is not None:
            return None
        if not triton_compiles():
            return None
        try:
            # Here, because JAX does not have Triton everywhere, and most requests on a CPU need none.
            from griffin_jax.model.flash import decode_step, read_few, read_prompt
        except ImportError:
            return None
        options: dict[str, Any] = {"scale": self.scale, "cap": self.softcap, "window": at.window}

        def of_token(query, key, value, keys, values, cursor, queries, slots):
            b, n, _, h = query.shape
            grouped = query.reshape(b, key.shape[1], -1, h)
            own = queries[:, 0], slots, cursor
            mixed, keys, values = decode_step(grouped, key[:, :, 0], value[:, :, 0], keys, values, *own, **options)
            return mixed.reshape(b, n, 1, h), keys, values

        def of_prompt(query, key, value, keys, values, cursor, queries, slots):
            keys, values = _written(key, value, keys, values, cursor)
            read = read_few if query.shape[2] < KERNEL_TOKENS else read_prompt
            return read(query, keys, values, queries, slots, cursor, **options), keys, values

        kernel: Callable[..., _Attended] = of_token if tokens == 1 else of_prompt
        mesh = mesh_of(self.qkv[...])
        if mesh is not None:
            rows = PartitionSpec(dividing(mesh, DATA_AXIS, query.shape[0]))
            heads = PartitionSpec(*rows, dividing(mesh, MODEL_AXIS, key.shape[1]))
            kernel = jax.shard_map(
                kernel,
                mesh=mesh,
                in_specs=(*[heads] * 5, PartitionSpec(), rows, rows),
                out_specs=heads,
                check_vma=False,
            )
        return kernel

    def _in_blocks(
        self,
        at: Positions,
        query: Float[Array, "b n t h"],
        key: Float[Array, "b g t h"],
        value: Float[Array, "b g t h"],
        cached_keys: Float[Array, "b g h slots"],
        cached_values: Float[Array, "b g slots h"],
        cursor: Int[Array, ""],
    ) -> _Attended:
        """Attention in operations of XLA, with the queries of a prompt in blocks, and the cache written after it."""
        b, n, t, h = query.shape
        g = key.shape[1]
        grouped = query.reshape(b, g, n // g, t, h)
        blocks = []
        for start in range(0, t, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, t)
            own = grouped[:, :, :, start:stop], key[:, :, :stop], value[:, :, :stop]
            blocks.append(self._mixed(*own, at.block(start, stop), cached_keys, cached_values))
        mixed = jnp.concatenate(blocks, axis=3)
        key, value = ordered_after(mixed[:, :, 0], key, value)
        return mixed.reshape(b, n, t, h), *_written(key, value, cached_keys, cached_values, cursor)

    def _mixed(
        self,
        query: Float[Array, "b g r t h"],
        key: Float[Array, "b g u h"],
        value: Float[Array, "b g u h"],
        at: Positions,
        cached_keys: Float[Array, "b g h slots"],
        cached_values: Float[Array, "b g slots h"],
    ) -> Float[Array, "b g r t h"]:
        """The sum of the values of cache and call, weighted by the softmax of their scores."""
        b, g, r, _, _ = query.shape
        slots = at.masks[0].shape[-1]
        scores = jnp.einsum("bgrth,bguh->bgrtu", query, key, preferred_element_type=jnp.float32)
        if slots:
            read_keys = cached_keys[..., :slots]
            cached = jnp.einsum("bgrth,bghs->bgrts", query, read_keys, preferred_element_type=jnp.float32)
            scores = jnp.concatenate([cached, scores], axis=-1)
        mask = jnp.concatenate(at.masks, axis=-1) if slots else at.masks[1]
        scores = softcap(scores * self.scale, self.softcap)
        if at.biases is not None:
            bias = jnp.concatenate(at.biases, axis=-1) if slots else at.biases[1]
            scores = scores + bias.reshape(b, g, r, *bias.shape[2:])
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        # The softmax divides the mixed values, which are fewer than the weights.
        largest = jnp.max(scores, axis=-1, keepdims=True)
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32).reshape(1, g, r, 1, 1)
        largest = largest if sinks is None else jnp.maximum(largest, sinks)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        total = total if sinks is None else total + jnp.exp(sinks - largest)
        weights = weights.astype(query.dtype)
        mix = functools.partial(jnp.einsum, "bgrts,bgsh->bgrth", preferred_element_type=jnp.float32)
        mixed = mix(weights[..., slots:], value)
        if slots:
            mixed += mix(weights[..., :slots], cached_values[:, :, :slots])
        return (mixed / total).astype(query.dtype)

    def _projected(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b n t h"], Float[Array, "b g t h"], Float[Array, "b g t h"]]:
        """Queries, keys and values, before their norms and rotary embedding."""
        y = linear(x, self.qkv[...], array_of(self.qkv_scale))
        y = plus_linear(y, x, self.qkv_left, self.qkv_right)
        if self.qkv_bias is not None:
            y = y + self.qkv_bias[...]
        if self.clip is not None:
            y = jnp.clip(y, -self.clip, self.clip)
        b, t, _, _, h = y.shape
        query = y[:, :, :, :-2].reshape(b, t, -1, h).swapaxes(1, 2)
        key, value = y[:, :, :, -2].swapaxes(1, 2), y[:, :, :, -1].swapaxes(1, 2)
        return query, key, value

    def _normed(
        self, query: Float[Array, "b n t h"], key: Float[Array, "b g t h"]
    ) -> tuple[Float[Array, "b n t h"], Float[Array, "b g t h"]]:
        if self.query_norm is None or self.key_norm is None:
            return query, key
        return self.query_norm(query), self.key_norm(key)


def _written(
    key: Float[Array, "b g t h"],
    value: Float[Array, "b g t h"],
    keys: Float[Array, "b g h slots"],
    values: Float[Array, "b g slots h"],
    cursor: Int[Array, ""],
) -> tuple[Float[Array, "b g h slots"], Float[Array, "b g slots h"]]:
    """The cache with keys and values written at the cursor."""
    keys = jax.lax.dynamic_update_slice_in_dim(keys, key.swapaxes(2, 3), cursor, axis=3)
    return keys, jax.lax.dynamic_update_slice_in_dim(values, value, cursor, axis=2)
