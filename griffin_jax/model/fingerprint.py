"""Which weights a model has, as one short hash."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt

from griffin_jax.model.assembly import without_copies
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.sharding import dotted
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import mesh_of

BLOCK = 1 << 22
"""Numbers that are added up at a time."""

LATER_FIELDS = (
    "ff_clip=None", "up_plus_one=False", "attention_sinks=False", "routing=None", "centred=False",
    "expert_parallel=False",
)  # fmt: skip
"""Fields that `ModelConfig` and its parts got later, as models have them that have nothing of the kind: these keep
their hashes."""


def fingerprint(model: Transformer) -> str:
    """A hash of all weights: 16 hexadecimal digits, equal for equal models on whichever devices they are.

    It tells apart models that were confused or changed. It does not protect against somebody who wants two models to
    have the same hash.

    Args:
        model: the full model; models of different dtypes have different hashes.
    """
    config = model.config
    described = repr(dataclasses.replace(config, kv_copies=1, expert_parallel=False))
    for later in LATER_FIELDS:
        described = described.replace(f", {later}", "")
    whole = hashlib.sha256(described.encode())
    leaves = {dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(model)}
    for path in sorted(leaves):
        # One after the other, or the integers of all weights would be in memory together. Layers have equal programs.
        like = re.sub(r"\.\d+\.", ".0.", path) if config.kv_copies > 1 else ""
        checksum = jax.device_get(_checksum(leaves[path], like, config))
        dtype = model.weights.dtype_of(path) if leaves[path].dtype == jnp.int8 else leaves[path].dtype
        whole.update(f"{path} {dtype} {checksum}\n".encode())
    return whole.hexdigest()[:16]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _checksum(leaf: Array, path: str, config: ModelConfig) -> UInt[Array, ""]:
    """A sum modulo 2^32, so that the order of adding up does not matter; odd factors make places count."""

    def total(part: Array, first: Array | int) -> UInt[Array, ""]:
        # Two numbers of 4 bits are one byte, or are not, as XLA likes.
        part = part.astype(jnp.int8) if part.dtype == jnp.int4 else part
        bits = jax.lax.bitcast_convert_type(part, jnp.dtype(f"uint{8 * part.dtype.itemsize}")).astype(jnp.uint32)
        places = jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape) + jnp.uint32(first)
        return jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)

    def of_block(number: Array, sum: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(rows, number * size, size)
        return sum + total(part, number.astype(jnp.uint32) * np.uint32(part.size))

    leaf = without_copies(path, leaf, config)
    rows = leaf.reshape(-1, leaf.shape[-1])
    size = next(n for n in range(max(1, min(len(rows), BLOCK // rows.shape[1])), 0, -1) if len(rows) % n == 0)
    if size == len(rows) or mesh_of(leaf) is not None:
        return total(leaf, 0)
    # XLA's CPU code (jaxlib 0.10) writes what it adds up into memory first: integers as large as the weights.
    return jax.lax.fori_loop(0, len(rows) // size, of_block, jnp.uint32(0))
