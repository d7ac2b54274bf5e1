"""Which weights a model has, as one short hash."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt

from griffin_jax.model import Transformer


def fingerprint(model: Transformer) -> str:
    """A hash of all weights: 16 hexadecimal digits, equal for equal models wherever they lie.

    It tells models apart that were confused or changed. It is no protection against somebody who wants two models to
    have the same.

    Args:
        model: the full model; its dtype counts.
    """
    whole = hashlib.sha256(repr(model.config).encode())
    leaves = jax.tree_util.tree_leaves_with_path(model)
    for (path, leaf), checksum in zip(leaves, jax.device_get(_checksums([leaf for _, leaf in leaves])), strict=True):
        whole.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {checksum}\n".encode())
    return whole.hexdigest()[:16]


@jax.jit
def _checksums(leaves: list[Array]) -> list[UInt[Array, ""]]:
    """Sums modulo 2^32, so that the order of adding up does not matter; odd factors make places count."""

    def checksum(leaf: Array) -> UInt[Array, ""]:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
        places = jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
        return jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)

    return [checksum(leaf) for leaf in leaves]
