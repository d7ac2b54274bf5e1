"""Beyond GRIFFIN: the relative activations of whole texts in a few rows, to which a reconstruction can be fitted.

Ridge regression depends on the rows that it is fitted to only through their second moments. Thousands of tokens can
therefore be replaced by a matrix C of a few rows whose second moments are close to theirs:

    C^T C ~ G = mean_t zbar_t zbar_t^T        (F, F) for each layer

The best C with a given number of rows consists of the leading eigenvectors of G, each times the square root of its
eigenvalue. G itself is too large for wide layers, but its product with a few vectors, Y = G Q, can be summed up token
by token and is sufficient (the Nystrom approximation Y (Q^T Y)^-1 Y^T; Tropp, Yurtsever, Udell and Cevher,
arXiv 1706.05736). At first, Q is random. Reading the texts once more, with the orthonormalised Y as Q, comes close to
the eigenvectors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from griffin_jax.parallel.mesh import to_host
from griffin_jax.utils import programs

PASSES = 2
"""Number of times that the texts are read."""

SHIFT = 1e-6
"""Multiple of the identity, relative to the norm of Y, that is added to G against rounding errors and subtracted again
from its eigenvalues."""

Bases = tuple[Float[Array, "_f _q"], ...]
"""An array with a few columns for each layer, (F, Q): the matrices Q or Y."""


def random_bases(neurons: Sequence[int], rows: int, seed: int = 0) -> Bases:
    """Q of every layer for the first reading of the texts: random orthonormal columns, a third more than `rows`.

    Args:
        neurons: F, the number of neurons of each layer.
        rows: number of rows that C will have.
        seed: seed for drawing the columns.
    """
    rng = np.random.default_rng(seed)
    shapes = [(f, min(f, -(-4 * rows // 3))) for f in neurons]
    return tuple(_orthonormal(rng.standard_normal(shape)) for shape in shapes)


def next_bases(products: Bases) -> Bases:
    """Q for the next reading of the texts: the orthonormalised Y."""
    return tuple(_orthonormal(to_host(product)) for product in products)


def _orthonormal(columns: Float[np.ndarray, "f q"]) -> Float[Array, "f q"]:
    return jnp.asarray(np.linalg.qr(columns.astype(np.float64))[0], jnp.float32)


@programs.jit(donate_argnames="products")
def add_products(
    products: Bases, bases: Bases, rows: tuple[Float[Array, "b t _f"], ...], counted: Bool[Array, "b"]
) -> Bases:
    """Adds zbar_t (zbar_t^T Q) of more tokens to Y of every layer, float32.

    Args:
        products: Y so far, (F, Q) for each layer; its memory is reused.
        bases: Q, (F, Q) for each layer.
        rows: zbar of the tokens, (B, T, F) for each layer, as `prefill` returns it; rows of zeros are padding.
        counted: which sequences to add, (B,).
    """

    def added(product: Array, basis: Array, rows: Array) -> Array:
        rows = jnp.where(counted[:, None, None], rows, 0).astype(jnp.float32).reshape(-1, rows.shape[-1])
        exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return product + exact(rows.T, exact(rows, basis))

    return tuple(map(added, products, bases, rows))


def leading_rows(products: Bases, bases: Bases, tokens: int, rows: int) -> tuple[Float[Array, "_c _f"], ...]:
    """C of every layer, a matrix of calibration rows in float16, with the row of the largest eigenvalue first.

    Args:
        products: Y, (F, Q) for each layer, summed over all tokens.
        bases: Q, (F, Q) for each layer.
        tokens: number of tokens.
        rows: the largest number of rows of C; there are no more than neurons or tokens.
    """
    found = []
    for product, basis in zip(products, bases, strict=True):
        q, y = to_host(basis).astype(np.float64), to_host(product).astype(np.float64) / tokens
        shift = SHIFT * max(np.linalg.norm(y), np.finfo(np.float32).tiny)
        y += shift * q
        middle = q.T @ y
        factor = np.linalg.cholesky((middle + middle.T) / 2)
        root = np.linalg.solve(factor, y.T)  # root^T root approximates G + shift
        squares, vectors = np.linalg.eigh(root @ root.T)
        best = np.argsort(-squares, kind="stable")[: min(rows, tokens)]
        scale = np.sqrt(np.maximum(squares[best] - shift, 0) / squares[best])
        leading = scale[:, None] * (vectors[:, best].T @ root)
        # The signs of eigenvectors are arbitrary; fixing them makes the result the same everywhere.
        largest = np.take_along_axis(leading, np.abs(leading).argmax(axis=1)[:, None], axis=1)
        found.append(jnp.asarray(leading * np.where(largest < 0, -1, 1), jnp.float16))
    return tuple(found)
