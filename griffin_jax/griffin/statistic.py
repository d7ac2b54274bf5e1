"""What GRIFFIN records while a prompt is read: how strongly each neuron takes part (arXiv 2404.01365)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.model.cache import EMPTY
from griffin_jax.model.ops import sum_over_tokens


def statistic(layer: int, z: Float[Array, "b t f"], real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
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
    square_norm = jnp.sum(jnp.square(z), axis=-1, keepdims=True)
    alive = square_norm > 0
    return z * jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, square_norm, 1.0)), 0.0)


def token_statistic(z: Float[Array, "b t f"], real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
    """s_j^2 = sum_t z_tj^2 / ||z_t||^2 over the real tokens (arXiv 2404.01365, section 4.2).

    The square is kept and not s itself, because it is additive over tokens: chunks of a prompt are summed up. A token
    with z = 0 contributes nothing.

    Args:
        z: the input of the down projection, in any float dtype; finite also where it is padding.
        real: whether each token is real; false for padding.

    Returns:
        s^2 in float32. Its sum over neurons is the number of real tokens with z != 0.
    """
    return sum_over_tokens(jnp.square(relative_activations(z)), real)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What GRIFFIN selects by, recorded while prompts are read. Additive: those of chunks of a prompt may be summed.

    Attributes:
        squares: s^2 of every neuron of each layer, float32.
        tokens: number of real tokens of each sequence.
    """

    squares: tuple[Float[Array, "b _f"], ...]
    tokens: Int[Array, "b"]

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


def rows_at(z: Float[Array, "b t f"], at: Int[Array, "b r"]) -> Float[Array, "b r f"]:
    """Relative activations of some tokens.

    Args:
        z: the input of the down projection, in any float dtype.
        at: the columns of z to take; one that z does not have gives a row of zeros.

    Returns:
        z / ||z|| in the dtype of z, to which z has been rounded already.
    """
    present = (at >= 0) & (at < z.shape[1])
    chosen = jnp.take_along_axis(z, jnp.clip(at, 0, z.shape[1] - 1)[..., None], axis=1)
    return jnp.where(present[..., None], relative_activations(chosen), 0).astype(z.dtype)
