"""The statistic that GRIFFIN records during prefill: how strongly each neuron takes part in a prompt.

A feed-forward layer computes z_t, with one value for each of its F neurons, at every token t. Dividing z_t by its norm
gives the relative activations zbar_t, and the statistic s_j of neuron j is the norm of zbar_tj over the tokens of the
prompt (arXiv 2404.01365, section 4.2):

    zbar_t = z_t / ||z_t||        s_j^2 = sum_t zbar_tj^2

z is the input of the layer's down projection: act(Wg x) * (Wu x) if the layer is gated, else act(Wu x), plus biases if
the model has any.
"""

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
    """The observer (see `griffin_jax.model.transformer.Observer`) that returns s^2 of a layer over the real tokens."""
    del layer
    return token_statistic(z, real)


def relative_activations(z: Float[Array, "*b f"]) -> Float[Array, "*b f"]:
    """The relative activations zbar_t = z_t / ||z_t|| of each token (arXiv 2404.01365, section 3).

    Args:
        z: the input of the down projection, (..., F); finite, in any float dtype.

    Returns:
        zbar in float32, zero for tokens with z = 0. Tokens with ||z|| below about 1e-19 count as zero, since ||z||^2
        must be a normal float32.
    """
    z = z.astype(jnp.float32)
    return z * _inverse_norms(z)


def _inverse_norms(z: Float[Array, "*b f"]) -> Float[Array, "*b 1"]:
    square_norm = jnp.sum(jnp.square(z), axis=-1, keepdims=True)
    alive = square_norm > 0
    return jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, square_norm, 1.0)), 0.0)


def token_statistic(z: Activations, real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
    """s_j^2 = sum_t z_tj^2 / ||z_t||^2 over the real tokens (arXiv 2404.01365, section 4.2).

    s^2 is kept rather than s because it is additive over tokens: the values of a prompt's chunks can be summed. A token
    with z = 0 contributes nothing.

    In a layer with routed experts, the sum for a neuron is over the tokens that chose its expert, and ||z_t|| is the
    norm within that expert. The weights that a token gives its experts therefore have no influence.

    Args:
        z: the input of the down projection, (B, T, F), in any float dtype; must be finite even at padding.
        real: whether each token is real, (B, T); false for padding.

    Returns:
        s^2 in float32, (B, F). In a layer without routed experts, its sum over the neurons is the number of real tokens
        with z != 0.
    """
    if isinstance(z, RoutedActivations):
        return _of_experts(z, real)
    return jax.lax.platform_dependent(z, real, cuda=_in_two_steps, default=_as_product)


def _as_product(z: Float[Array, "b t f"], real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
    return sum_over_tokens(jnp.square(relative_activations(z)), real)


def _in_two_steps(z: Float[Array, "b t f"], real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
    """The statistic on GPUs, with a barrier that keeps XLA (jax 0.11.2) from fusing kernels.

    Without the barrier, XLA computes z in the kernel that sums its squares. If the kernels of two layers read `real`,
    it also fuses them into one, and z of all layers stays in memory until that kernel runs: 28 MB more for each layer
    of Llama-2-13B and 1,024 tokens. Seen in prefill compiled for H100.
    """
    z, real = jax.lax.optimization_barrier((z, real))
    z = z.astype(jnp.float32)
    return sum_in_two_steps(jnp.square(z * jnp.where(real[..., None], _inverse_norms(z), 0)))


def _of_experts(z: RoutedActivations, real: Bool[Array, "b t"]) -> Float[Array, "b n"]:
    """The statistic of each routed expert over the tokens that chose it, and of the shared experts over all tokens."""
    squares = jnp.square(relative_activations(z.z))
    if squares.ndim == 5:
        # Each expert is on one of the devices; the others contribute zeros.
        squares = jnp.sum(squares, axis=3)
    chose = (z.experts[..., None] == jnp.arange(z.count)) & real[:, :, None, None]
    # A matrix product, because scattered sums (to places that differ from token to token) are slow on CPUs and GPUs.
    by_expert = jnp.einsum("btke,btkf->bef", chose.astype(jnp.float32), squares, precision=jax.lax.Precision.HIGHEST)
    own = by_expert.reshape(real.shape[0], -1)
    return own if z.shared is None else jnp.concatenate([own, token_statistic(z.shared, real)], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """The statistics of prompts, by which `select` chooses neurons.

    They are additive: the statistics of a prompt's chunks can be added up with `+`.

    Attributes:
        squares: s^2 of every neuron, float32, (B, F) for each layer.
        tokens: number of real tokens of each sequence, (B,).
        ranges: for a model with routed experts, the sizes of the ranges that each layer's neurons are divided into, as
            in `ModelConfig.neuron_ranges`; neurons are selected within each range. Empty if each layer is one range.
    """

    squares: tuple[Float[Array, "b _f"], ...]
    tokens: Int[Array, "b"]
    ranges: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), metadata={"static": True})

    def __add__(self, other: Statistics) -> Statistics:
        return jax.tree.map(jnp.add, self, other)


def spread(lengths: Int[Array, "b"], rows: int) -> Int[Array, "b {rows}"]:
    """The positions of at most `rows` tokens, spread evenly over each sequence.

    A sequence with at most `rows` tokens gives all of its positions. A longer one is divided into `rows` equal parts,
    and the middle of each part is taken.

    Args:
        lengths: number of tokens of each sequence, (B,).
        rows: the largest number of tokens to take; static.

    Returns:
        Ascending positions, (B, rows), followed by `EMPTY` if a sequence has fewer tokens.
    """
    number = jnp.arange(rows, dtype=jnp.int32)
    length = jnp.asarray(lengths, jnp.int32)[:, None]
    odd, parts = 2 * number + 1, 2 * rows
    # odd * length / parts. The plain product would overflow an int32 if the context is long.
    middle = odd * (length // parts) + odd * (length % parts) // parts
    return jnp.where(length > rows, middle, jnp.where(number < length, number, EMPTY))


def tokens_at(x: Any, at: Int[Array, "b r"]) -> tuple[Any, Bool[Array, "b r"]]:
    """Takes some tokens of arrays of shape (B, T, ...).

    Args:
        x: a pytree of such arrays, for example `griffin_jax.model.routed.Activations`.
        at: the columns to take in each row, (B, R). A column outside [0, T) is replaced by the nearest one inside.

    Returns:
        The arrays of these tokens, (B, R, ...), and which of the columns lie in [0, T), (B, R).
    """
    tokens = jax.tree.leaves(x)[0].shape[1]
    nearest = jnp.clip(at, 0, tokens - 1)

    def take(array: Array) -> Array:
        return jnp.take_along_axis(array, nearest.reshape(*nearest.shape, *[1] * (array.ndim - 2)), axis=1)

    return jax.tree.map(take, x), (at >= 0) & (at < tokens)


def rows_at(z: Activations, at: Int[Array, "b r"]) -> Float[Array, "b r f"]:
    """The relative activations of all neurons of a layer at some tokens.

    Args:
        z: the input of the down projection, (B, T, F), in any float dtype.
        at: the columns of z to take, (B, R). A column outside [0, T) gives a row of zeros.

    Returns:
        z / ||z||, (B, R, F), in the dtype of z: z was rounded to that dtype already. For routed experts, z has zeros at
        the experts that a token did not choose.
    """
    taken, present = tokens_at(z, at)
    chosen = everywhere(taken)
    return jnp.where(present[..., None], relative_activations(chosen), 0).astype(chosen.dtype)
