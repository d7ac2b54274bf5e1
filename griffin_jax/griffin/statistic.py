"""What GRIFFIN records while a prompt is read: how strongly each neuron takes part (arXiv 2404.01365)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.model.cache import EMPTY
from griffin_jax.model.ops import sum_in_two_steps, sum_over_tokens
from griffin_jax.model.routed import Activations, RoutedActivations, everywhere


def statistic(layer: int, z: Activations, real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
    """The observer (see `griffin_jax.model.transformer.Observer`) that collects GRIFFIN's s^2 over the real tokens."""
    del layer
    return token_statistic(z, real)


def relative_activations(z: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """zbar = z / ||z||, each token by itself (arXiv 2404.01365, section 3).

    Args:
        z: the input of the down projection, finite, in any float dtype.

    Returns:
        zbar in float32; zero where z is zero. Tokens with ||z|| below about 1e-19 count as zero, since ||z||^2 must be
        a normal float32.
    """
    z = z.astype(jnp.float32)
    return z * _inverse_norms(z)


def _inverse_norms(z: Float[Array, "*b f"]) -> Float[Array, "*b 1"]:
    square_norm = jnp.sum(jnp.square(z), axis=-1, keepdims=True)
    alive = square_norm > 0
    return jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, square_norm, 1.0)), 0.0)


def token_statistic(z: Activations, real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
    """s_j^2 = sum_t z_tj^2 / ||z_t||^2 over the real tokens (arXiv 2404.01365, section 4.2).

    The square is kept and not s itself, because it is additive over tokens: chunks of a prompt are summed up. A token
    with z = 0 contributes nothing. Of a layer with routed experts, each neuron has the sum over the tokens that chose
    its expert, and ||z_t|| is the norm within that expert, so that a token's weights of its experts change nothing.

    Args:
        z: the input of the down projection, in any float dtype; finite also where it is padding.
        real: whether each token is real; false for padding.

    Returns:
        s^2 in float32. Its sum over neurons is the number of real tokens with z != 0.
    """
    if isinstance(z, RoutedActivations):
        return _of_experts(z, real)
    return jax.lax.platform_dependent(z, real, cuda=_in_two_steps, default=_as_product)


def _as_product(z: Float[Array, "b t f"], real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
    return sum_over_tokens(jnp.square(relative_activations(z)), real)


def _in_two_steps(z: Float[Array, "b t f"], real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
    """The same for GPUs, whose kernels XLA (jax 0.11.2) would join otherwise.

    Without the barrier it computes z in the kernel that sums its squares; and where kernels of two layers read `real`,
    it makes one of both, until which z of all layers stays in memory: 28 MB more for each layer of Llama-2-13B and
    1,024 tokens. Seen in prefill compiled for H100.
    """
    z, real = jax.lax.optimization_barrier((z, real))
    z = z.astype(jnp.float32)
    return sum_in_two_steps(jnp.square(z * jnp.where(real[..., None], _inverse_norms(z), 0)))


def _of_experts(z: RoutedActivations, real: Bool[Array, "b t"]) -> Float[Array, "b n"]:
    """The statistic of each expert over its own tokens, and of the shared ones over all."""
    squares = jnp.square(relative_activations(z.z))
    if squares.ndim == 5:
        # One of the devices has the expert, the others zeros.
        squares = jnp.sum(squares, axis=3)
    chose = (z.experts[..., None] == jnp.arange(z.count)) & real[:, :, None, None]
    # As a product, since sums over places that differ from token to token are slow on CPUs and GPUs.
    by_expert = jnp.einsum("btke,btkf->bef", chose.astype(jnp.float32), squares, precision=jax.lax.Precision.HIGHEST)
    own = by_expert.reshape(real.shape[0], -1)
    return own if z.shared is None else jnp.concatenate([own, token_statistic(z.shared, real)], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What GRIFFIN selects by, recorded while prompts are read. Additive: those of chunks of a prompt may be summed.

    Attributes:
        squares: s^2 of every neuron of each layer, float32.
        tokens: number of real tokens of each sequence.
        ranges: sizes of the ranges of each layer's neurons that are selected from one by one, which a model with routed
            experts has, as `ModelConfig.neuron_ranges`; empty where each layer is one range.
    """

    squares: tuple[Float[Array, "b _f"], ...]
    tokens: Int[Array, "b"]
    ranges: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), metadata={"static": True})

    def __add__(self, other: Statistics) -> Statistics:
        return jax.tree.map(jnp.add, self, other)


def spread(lengths: Int[Array, "b"], rows: int) -> Int[Array, "b {rows}"]:
    """The positions of tokens that stand for each sequence: all of them, or the middles of `rows` equal parts.

    Args:
        lengths: number of tokens of each sequence.
        rows: number of tokens to take at most; static.

    Returns:
        Rising positions, followed by `EMPTY` where a sequence is shorter.
    """
    number = jnp.arange(rows, dtype=jnp.int32)
    length = jnp.asarray(lengths, jnp.int32)[:, None]
    odd, parts = 2 * number + 1, 2 * rows
    # odd * length / parts, without the product, which is too large for int32 where a context is long.
    middle = odd * (length // parts) + odd * (length % parts) // parts
    return jnp.where(length > rows, middle, jnp.where(number < length, number, EMPTY))


def tokens_at(x: Any, at: Int[Array, "b r"]) -> tuple[Any, Bool[Array, "b r"]]:
    """Some tokens of arrays (B, T, ...).

    Args:
        x: arrays in any pytree, such as `griffin_jax.model.routed.Activations`.
        at: the columns to take; for one that there is not the nearest one is taken.

    Returns:
        The arrays of these tokens, and which of the columns there are.
    """
    tokens = jax.tree.leaves(x)[0].shape[1]
    nearest = jnp.clip(at, 0, tokens - 1)

    def take(array: Array) -> Array:
        return jnp.take_along_axis(array, nearest.reshape(*nearest.shape, *[1] * (array.ndim - 2)), axis=1)

    return jax.tree.map(take, x), (at >= 0) & (at < tokens)


def rows_at(z: Activations, at: Int[Array, "b r"]) -> Float[Array, "b r f"]:
    """Relative activations of some tokens, of all neurons of a layer.

    Args:
        z: the input of the down projection, in any float dtype.
        at: the columns of z to take; one that z does not have gives a row of zeros.

    Returns:
        z / ||z|| in the dtype of z, to which z has been rounded already.
    """
    taken, present = tokens_at(z, at)
    chosen = everywhere(taken)
    return jnp.where(present[..., None], relative_activations(chosen), 0).astype(chosen.dtype)
