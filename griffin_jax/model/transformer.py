"""The whole transformer: a layer is attention and feed-forward, and a model is the embedding, the layers and the head.

`griffin_jax.model` explains the letters in names and shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.model.attention import Attention
from griffin_jax.model.cache import EMPTY, KVCache
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.feed_forward import FeedForward
from griffin_jax.model.norm import Norm, apply_norm, scaled, softcap, stream_and_norm
from griffin_jax.model.ops import lookup, together
from griffin_jax.model.parameters import array_of, as_format, bias_vector, floating, matrix
from griffin_jax.model.positions import Positions, layer_positions
from griffin_jax.model.products import linear
from griffin_jax.model.routed import Activations, RoutedFeedForward
from griffin_jax.model.weights import WeightFormat, dequantise, stored_bytes

LAYER_SCOPE = "layer"
"""The scope of everything that a layer computes, by which profiles and compiled programs name it."""

Observer = Callable[[int, Activations, Bool[Array, "b t"]], Any]
"""A function that sees the intermediates z of each feed-forward layer while the model reads tokens.

The model calls it inside jit, with the number of the layer, z, and which tokens are real (false for padding, where z is
finite but meaningless). z is (B, T, F) or, for a layer with routed experts, a
`griffin_jax.model.routed.RoutedActivations`, with the choices of each token and their weights. The function returns
arrays in any pytree, or None, and the model returns these next to its own output. Nothing else of z is kept, so only
one layer's z is in memory at a time.
"""


class Layer(nnx.Module):
    """Attention and feed-forward, each added to the residual stream.

    `ModelConfig.norm_placement` says where their norms are. Parallel layers add both to the same x.

    Args:
        config: the architecture.
        number: number of the layer, from 0.
        dtype: dtype of all parameters that `weights` does not cover.
        weights: how the matrices are stored.
        rngs: where the random matrices are drawn from; None for zeros.
    """

    def __init__(
        self, config: ModelConfig, number: int, dtype: DTypeLike, weights: WeightFormat, rngs: nnx.Rngs | None
    ):
        def norm(wanted: bool) -> Norm | None:
            return Norm((config.width,), config, dtype, bias=config.norm_bias) if wanted else None

        on_input = config.norm_placement in ("pre", "sandwich")
        on_output = config.norm_placement in ("output", "sandwich")
        on_sum = config.norm_placement == "post"
        self.attention_norm = norm(on_input)
        self.attention = Attention(config, dtype, weights, rngs)
        self.attention_out_norm = norm(on_output)
        self.attention_sum_norm = norm(on_sum)
        self.ff_norm = norm(on_input and not config.shared_norm)
        kind = RoutedFeedForward if config.routed(number) else FeedForward
        self.ff: Any = kind(config, dtype, weights, rngs)
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
        observe: Callable[[Activations, Bool[Array, "b t"]], Any] | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b g h slots"], Float[Array, "b g slots h"], Any]:
        """Read T tokens of every row.

        Args:
            x: the residual stream.
            real: which tokens are real; the others are padding.
            at: what attention needs to know about positions.
            cached_keys: keys of this layer in the cache.
            cached_values: values of this layer in the cache.
            cursor: number of the first slot that is written.
            observe: function that sees z and `real`, see `Observer`; or None.

        Returns:
            The residual stream after the layer, its cached keys and values with those of this call, and what `observe`
            returns (None without it).
        """
        x, normed = stream_and_norm(self.attention_norm, x)
        mixed, keys, values = self.attention(normed, at, cached_keys, cached_values, cursor)
        mixed = scaled(apply_norm(self.attention_out_norm, mixed), self.residual_scale)
        if self.parallel:
            normed = normed if self.ff_norm is None else self.ff_norm(x)
        else:
            x = apply_norm(self.attention_sum_norm, x + mixed)
            x, normed = stream_and_norm(self.ff_norm, x)
        z = self.ff.intermediate(normed)
        z, observed = (z, None) if observe is None else together(z, observe(z, real))
        y = scaled(apply_norm(self.ff_out_norm, self.ff.project(z)), self.residual_scale)
        x = x + mixed + y if self.parallel else x + y
        return apply_norm(self.ff_sum_norm, x), keys, values, observed


class Transformer(nnx.Module):
    """A decoder-only language model.

    Args:
        config: the architecture.
        dtype: dtype of the computation, and of all parameters that `weights` does not cover; norms, softmax, logits and
            statistics are always float32.
        weights: how the matrices are stored; in `dtype` if None.
        rngs: where the random matrices are drawn from (`rngs.params`); without it they are zero. To load the weights of
            a checkpoint, use `griffin_jax.load`.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: DTypeLike = jnp.float32,
        *,
        weights: WeightFormat | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        self.config = config
        self._format = weights = as_format(weights, dtype)
        self._dtype = jnp.dtype(dtype)
        d, v = config.width, config.vocab_size
        e = config.embedding_width or d
        weights.check(d, e)
        embedding = matrix(rngs, (v, e), fan_in=e, weights=weights.of_vocabulary())
        self.embedding, self.embedding_scale = embedding.values, embedding.scale
        self.project_in = None if e == d else floating(rngs, (e, d), fan_in=e, dtype=dtype)
        table = (config.max_positions, d)
        self.position_embedding = floating(rngs, table, fan_in=d, dtype=dtype) if config.learned_positions else None
        self.embedding_norm = Norm((d,), config, dtype, bias=config.norm_bias) if config.embedding_norm else None
        self.layers = nnx.List([Layer(config, n, dtype, weights, rngs) for n in range(config.num_layers)])
        self.norm = Norm((d,), config, dtype, bias=config.norm_bias) if config.final_norm else None
        self.project_out = None if e == d else floating(rngs, (d, e), fan_in=d, dtype=dtype)
        head = None if config.tied_head else matrix(rngs, (v, e), fan_in=e, weights=weights.of_vocabulary())
        self.head, self.head_scale = (None, None) if head is None else (head.values, head.scale)
        self.head_bias = bias_vector((v,), dtype) if config.head_bias else None

    @property
    def weights(self) -> WeightFormat:
        """How the matrices are stored."""
        return self._format if self._format.quantised else WeightFormat(self.embedding.dtype.name)

    @weights.setter
    def weights(self, weights: WeightFormat) -> None:
        """Set the format of the matrices, for code that has stored them anew."""
        self._dtype, self._format = self.dtype, weights

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the computation, and of all parameters that `weights` does not cover.

        It is read off the parameters, since a model may be cast like any pytree.
        """
        layer = self.layers[0]
        norms = (self.norm, layer.attention_norm, layer.ff_norm, layer.attention_out_norm, layer.attention_sum_norm)
        scales = [norm.scale for norm in norms if norm is not None and norm.scale is not None]
        if scales:
            return scales[0].dtype
        return self._dtype if self.weights == self._format else self.embedding.dtype

    @property
    def neurons(self) -> tuple[int, ...]:
        """Number of neurons of each feed-forward layer: F for a full or masked model, K for a pruned one."""
        return tuple(layer.ff.neurons for layer in self.layers)

    @property
    def adapted(self) -> bool:
        """Whether any matrix has a low-rank addition; see `griffin_jax.model.low_rank`."""
        owners = [owner for layer in self.layers for owner in (layer.attention, *layer.ff.parts())]
        return any(
            value is not None for owner in owners for name, value in vars(owner).items() if name.endswith("_left")
        )

    @property
    def ff_bytes(self) -> int:
        """Bytes of all feed-forward arrays with a row for each neuron, in the format in which the model stores them."""
        arrays = [rows for layer in self.layers for part in layer.ff.parts() for rows in part.rows().values()]
        kinds = [self.weights.dtype if array.dtype == jnp.int8 else array.dtype for array in arrays]
        return sum(stored_bytes(array.shape, kind) for array, kind in zip(arrays, kinds, strict=True))

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        cache: KVCache,
        *,
        read_slots: int | None = None,
        observe: Observer | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache, tuple[Any, ...]]:
        """Read T tokens of every row, after those that the cache holds.

        Args:
            tokens: token ids.
            positions: position of each token in its row, rising. `EMPTY` anywhere among them marks padding, which is
                written to the cache but never attended to, and enters no statistic.
            cache: the tokens that were read before, with room for T more.
            read_slots: number of slots of the cache that attention reads (all of them if None). They must hold every
                token so far; 0 for an empty cache.
            observe: function that sees the intermediates of every layer, such as `griffin_jax.griffin.statistic`'s
                `statistic`, which collects the statistic that GRIFFIN selects by.

        Returns:
            The residual stream after the last layer (for `logits`), the cache with T more tokens, and what `observe`
            returned for each layer (empty without it).
        """
        real = positions != EMPTY
        # Padding is zero between the layers: otherwise it could overflow, and 0 * inf in a sum over tokens would reach
        # the real ones.
        x = jnp.where(real[..., None], self.embed(tokens, positions), 0)
        at = layer_positions(self.config, positions, cache, read_slots)
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
        cache = dataclasses.replace(
            cache,
            keys=tuple(keys),
            values=tuple(values),
            positions=at[0].slots,
            cursor=cache.cursor + tokens.shape[1],
        )
        return x, cache, () if observe is None else tuple(observed)

    def embed(self, tokens: Int[Array, "b t"], positions: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The residual stream before the first layer; meaningless where a position is `EMPTY`."""
        x = lookup(self.embedding[...], tokens)
        if self.embedding_scale is not None:
            x = dequantise(x, lookup(self.embedding_scale[...], tokens))
        x = scaled(x.astype(self.dtype), self.config.embedding_scale)
        if self.project_in is not None:
            x = x @ self.project_in[...]
        if self.position_embedding is not None:
            x = x + self.position_embedding[...][jnp.maximum(positions, 0)]
        return apply_norm(self.embedding_norm, x)

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Float32 scores of every possible next token, from the residual stream after the last layer."""
        x = apply_norm(self.norm, x)
        if self.project_out is not None:
            x = x @ self.project_out[...]
        head, scale = (self.embedding, self.embedding_scale) if self.head is None else (self.head, self.head_scale)
        logits = linear(x, head[...], array_of(scale), dtype=jnp.float32)
        if self.head_bias is not None:
            logits = logits + self.head_bias[...].astype(jnp.float32)
        return softcap(scaled(logits, self.config.logit_scale), self.config.logit_softcap)
