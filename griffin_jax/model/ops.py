"""The products that XLA needs written in a special way."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size, mesh_of


def lookup(table: Float[Array, "v e"], tokens: Int[Array, "b t"]) -> Float[Array, "b t e"]:
    """The rows of these tokens.

    A single one is looked up twice: of one lookup XLA makes a slice, and a table that is divided among devices
    is put together whole to be sliced.
    """
    b, t = tokens.shape
    return table[tokens] if b * t > 1 else table[jnp.broadcast_to(tokens, (2, 1))][:1]


def linear(x: Float[Array, "b t d"], weight: Float[Array, "*rows d"]) -> Float[Array, "b t *rows"]:
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


def ordered_after(
    read: Float[Array, "b g t h"], *writes: Float[Array, "b g t h"]
) -> tuple[Float[Array, "b g t h"], ...]:
    """The same values, but depending on `read`.

    XLA copies a whole cache if a write into it is not ordered behind the reads, and only a dependency
    orders them: it drops an optimization barrier before it decides on copies. Zero times a number is
    not folded away, since it is NaN for infinities.
    """
    return tuple(write + 0 * read for write in writes)


def matmul(x: Float[Array, "b t k"], weight: Float[Array, "k d"]) -> Float[Array, "b t d"]:
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
