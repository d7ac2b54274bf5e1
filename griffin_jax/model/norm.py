"""RMSNorm and LayerNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from griffin_jax.model.config import ModelConfig
from griffin_jax.model.ops import of_one_row
from griffin_jax.model.parameters import bias_vector


class Norm(nnx.Module):
    """RMSNorm, x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467), or LayerNorm (arXiv 1607.06450).

    Mean, variance and the division are computed in float32.

    Args:
        shape: shape of the scale and of the bias.
        config: the architecture, which says what kind of norm it is.
        dtype: dtype of the scale and of the bias.
        bias: whether there is a bias.
        joint: whether all heads of a (B, N, T, H) array are normalised together.
    """

    def __init__(
        self, shape: tuple[int, ...], config: ModelConfig, dtype: DTypeLike, *, bias: bool = False, joint: bool = False
    ):
        self.plus_one = config.norm_plus_one
        start = jnp.zeros(shape, dtype) if self.plus_one else jnp.ones(shape, dtype)
        self.scale = nnx.Param(start) if config.norm_scale else None
        self.bias = bias_vector(shape, dtype) if bias else None
        self.centered = config.norm == "layer"
        self.eps = config.norm_eps
        self.joint = joint

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalise x over its last axis or, if `joint`, over all heads of a (B, N, T, H) array together."""
        return self.of_stream(x)[1]

    def of_stream(self, x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Return x and its norm, for an x that is used again.

        Callers must go on with the x that is returned; see `griffin_jax.model.ops.of_one_row`.
        """
        return of_one_row(self._normed, x) if x.size == x.shape[-1] else (x, self._normed(x))

    def _normed(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        axes = (1, 3) if self.joint else -1
        x32 = x.astype(jnp.float32)
        if self.centered:
            x32 = x32 - jnp.mean(x32, axis=axes, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + self.eps)
        if self.scale is None:
            return normed.astype(x.dtype)
        if self.bias is None and not self.plus_one:
            return normed.astype(x.dtype) * self.scale[...]
        scale = self.scale[...].astype(jnp.float32)
        scaled32 = normed * (1.0 + scale if self.plus_one else scale)
        return (scaled32 if self.bias is None else scaled32 + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def apply_norm(norm: Norm | None, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """norm(x), or x if there is no norm."""
    return x if norm is None else norm(x)


def stream_and_norm(norm: Norm | None, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
    """x and norm(x), or x twice if there is no norm: for an x that is used again besides its norm."""
    return (x, x) if norm is None else norm.of_stream(x)


def scaled(x: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """scale * x in the dtype of x."""
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)


def softcap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap * tanh(x / cap), or x if there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def head_norm(heads: int, config: ModelConfig, dtype: DTypeLike) -> Norm | None:
    """The norm of queries or keys that `ModelConfig.head_norm` asks for; None if it asks for none.

    Args:
        heads: number of heads: N for queries, G for keys.
        config: the architecture.
        dtype: dtype of the scale.
    """
    if config.head_norm == "none":
        return None
    shape = (config.head_dim,) if config.head_norm == "shared" else (heads, 1, config.head_dim)
    return Norm(shape, config, dtype, joint=config.head_norm == "joint")
