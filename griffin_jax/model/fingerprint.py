"""Which weights a model has, as one short hash."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt

from griffin_jax.model.assembly import without_copies
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.sharding import dotted
from griffin_jax.model.transformer import Transformer


def fingerprint(model: Transformer) -> str:
    """A hash of all weights: 16 hexadecimal digits, equal for equal models on whichever devices they are.

    It tells apart models that were confused or changed. It does not protect against somebody who wants two models to
    have the same hash.

    Args:
        model: the full model; models of different dtypes have different hashes.
    """
    whole = hashlib.sha256(repr(dataclasses.replace(model.config, kv_copies=1)).encode())
    leaves = {dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(model)}
    for path, checksum in jax.device_get(_checksums(leaves, model.config)).items():
        whole.update(f"{path} {leaves[path].dtype} {checksum}\n".encode())
    return whole.hexdigest()[:16]


@functools.partial(jax.jit, static_argnums=1)
def _checksums(leaves: dict[str, Array], config: ModelConfig) -> dict[str, UInt[Array, ""]]:
    """Sums modulo 2^32, in which the order of additions does not matter; odd factors make places count."""

    def checksum(leaf: Array) -> UInt[Array, ""]:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
        places = jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
        return jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)

    return {path: checksum(without_copies(path, leaf, config)) for path, leaf in leaves.items()}
