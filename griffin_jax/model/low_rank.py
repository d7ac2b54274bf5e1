"""Additions of low rank to matrices, without forming the sum: (W + left right) x is W x + left (right x).

Every matrix here has the width D as its last axis, and a row for each head, neuron, ... on the axes before it. An
addition of rank S (in this module S is no number of slots) has a row of `left` for each row of the matrix, and S rows
of `right`, each of the width D:

    W'[row] = W[row] + sum_s left[row, s] right[s]

Whatever keeps, moves or divides the rows of W therefore does the same with the rows of `left`, and `right` stays as it
is. The sequences of a batch may share an addition, or each have their own. In the latter case `right` has an axis for
the sequences before S, and `left` has one before its last axis of rows.

For one token, the products are those of a vector with a matrix of two axes, which are fast in XLA's CPU code
(jax 0.10.2). Sums of products over the last axis, which XLA would join with what comes after, are not vectorised: they
made decoding with an adapter of rank 8 a tenth slower. Sums over the first axis are vectorised, and are no slower than
products. Seen in timings.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size, mesh_of


def plus_linear(
    y: Float[Array, "b t *rows"], x: Float[Array, "b t d"], left: nnx.Param | None, right: nnx.Param | None
) -> Float[Array, "b t *rows"]:
    """Add a matrix's addition to the result of `griffin_jax.model.products.linear`.

    Args:
        y: the product with the matrix alone.
        x: the activations.
        left: (*rows, S), with an axis B before the last axis of rows if each sequence has its own; None if nothing is
            added.
        right: (S, D), or (B, S, D) if each sequence has its own.
    """
    if left is None or right is None:
        return y
    rows, basis = left[...], right[...]
    if x.shape[0] * x.shape[1] == 1:
        low = basis.reshape(-1, x.shape[-1]) @ x[0, 0].astype(basis.dtype)
        # Merging an axis that is divided among devices would gather it on all of them.
        axes = (-1,) if axis_size(mesh_of(rows), MODEL_AXIS) == 1 else y.shape[2:]
        return (y + (rows.reshape(*axes, low.shape[0]) @ low).reshape(y.shape)).astype(y.dtype)
    low = jnp.einsum("btd,sd->bts" if basis.ndim == 2 else "btd,bsd->bts", x.astype(basis.dtype), basis)
    more = jnp.einsum("bts,...bfs->bt...f" if rows.ndim == y.ndim else "bts,...fs->bt...f", low, rows)
    return (y + more).astype(y.dtype)


def plus_matmul(
    y: Float[Array, "b t d"], x: Float[Array, "b t *rows"], left: nnx.Param | None, right: nnx.Param | None
) -> Float[Array, "b t d"]:
    """Add a matrix's addition to the result of `griffin_jax.model.products.matmul`.

    Args:
        y: the product with the matrix alone.
        x: the activations, with an axis for each axis of rows.
        left: (*rows, S), with an axis B before the last axis of rows if each sequence has its own; None if nothing is
            added.
        right: (S, D), or (B, S, D) if each sequence has its own.
    """
    if left is None or right is None:
        return y
    rows, basis = left[...], right[...]
    if x.shape[0] * x.shape[1] == 1:
        own = x[0, 0].reshape(-1, 1).astype(rows.dtype)
        low = jnp.sum(rows.reshape(own.shape[0], -1) * own, axis=0)
        return (y + low @ basis.reshape(-1, y.shape[-1])).astype(y.dtype)
    axes = "nf"[-(x.ndim - 2) :]
    of_rows = f"{axes[:-1]}bfs" if rows.ndim == x.ndim else f"{axes}s"
    low = jnp.einsum(f"bt{axes},{of_rows}->bts", x.astype(rows.dtype), rows)
    return (y + jnp.einsum("bts,sd->btd" if basis.ndim == 2 else "bts,bsd->btd", low, basis)).astype(y.dtype)


def plus_matrix(
    matrix: Float[Array, "*rows d"], left: nnx.Param | None, right: nnx.Param | None
) -> Float[Array, "*rows d"]:
    """The matrix with its addition.

    Raises:
        ValueError: each sequence of a batch has its own addition.
    """
    if left is None or right is None:
        return matrix
    if right[...].ndim > 2 or left[...].ndim > matrix.ndim:
        raise ValueError(
            "this model has an adapter for each sequence of a batch, and so no matrix for all of them; attach one"
            " adapter, or merge it"
        )
    return (matrix + jnp.einsum("...s,sd->...d", left[...], right[...])).astype(matrix.dtype)
