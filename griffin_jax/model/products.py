"""Products of activations with matrices in their stored form, written so that XLA makes them fast on each platform.

    linear(x, w)    x times every row of w, summed over the last axis of w
    matmul(x, w)    x @ w, summed over the first axis of w

Both take matrices of floating-point numbers, or of integers with scales (`griffin_jax.model.weights`), and compute the
same in each form. The docstrings say what XLA makes of the plain form, with which version and on which platform, and
how that was seen, so that a special form can be removed once XLA does better.

On GPUs and TPUs, XLA fuses the conversion of a matrix into its product, which then reads the stored numbers and nothing
else; seen in programs compiled for H100 and TPU v5e. Group scales are fused on GPUs only. For TPU v5e, XLA writes the
converted matrix or the repeated scales to memory at every step, in each of the forms that were tried; of these, the
plain product reads and writes least. XLA's CPU code (jax 0.10 to 0.12) mostly writes the whole converted matrix to
memory first, and products of integers then take ten times as long as those of float32. Which forms avoid this depends
on the number of tokens.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from griffin_jax.model.kernels import triton_compiles
from griffin_jax.model.ops import with_gradients_of
from griffin_jax.model.weights import dequantise, grouped
from griffin_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS, axis_size, dividing, mesh_of

GEMV_VARIABLE = "GRIFFIN_JAX_GEMV"
"""Environment variable that, if it is not empty, makes `griffin_jax.model.gemv` compute the products of a few tokens
with matrices of integers on NVIDIA GPUs. No GPU has run these kernels yet, so XLA's products are the default; both are
measured by `python -m benchmarks gpu`."""

FUSED_BYTES = 16 << 10
"""XLA's CPU code fuses a conversion into a product with a vector only if the vector has fewer bytes than this
(kFusionThreshold in its cpu_instruction_fusion)."""

MOST_PASSES = 4
"""The largest number of parts that a longer vector is cut into; each part is multiplied by the whole matrix."""

PASS_BYTES = 4 << 20
"""Bytes of the rows of an expert's matrix that go through all passes of a long vector before the next rows do. Seen in
timings: half or twice as many take up to 5% longer, 512 KiB and 16 MiB more than that."""

MOST_BRANCHES = 16
"""The largest number of bfloat16 matrices that get a branch each; a program has this many branches for each layer."""

ROWS_FIRST = 128
"""The largest number of tokens for which products are computed as weight @ x.T. With more tokens, transposing the
result costs what this order gains. Seen in timings of prompts of 512 tokens, one and four at a time."""

BLOCK_ROWS = 512
"""Rows of a matrix that are converted at a time for more tokens; the converted rows stay in the processor's cache."""

PARTS = 12
"""Number of parts that the rows of a matrix are divided into for one token; one pass adds up the parts. Seen in
timings: nine to twelve take up to a tenth less than eight, and sixteen of int8 half as long again."""

FUSED_TOKENS = 16
"""The largest number of tokens whose products with grouped integers are written as sums on GPUs; no matrix is then
converted in memory. XLA makes one kernel for eight tokens, so sixteen tokens read the integers twice. This is a quarter
of the bytes that a converted matrix costs, which is written and read once."""

FUSED_TOKENS_OF_EACH = 8
"""The largest number of tokens of each sequence for which the same is done on GPUs and TPUs if each sequence has its
own matrix, of integers or of 16 bits."""

ROW_PARTS = 64
"""Number of parts that the rows of a matrix are divided into on GPUs; the first pass sums the rows of each part. XLA
divides a large matrix into as many."""

_JAX = tuple(map(int, jax.__version__.split(".")[:2]))

DOTS_FUSE = _JAX < (0, 11)
"""Whether XLA's CPU code multiplies a vector by a converted matrix well (jax 0.10). In jax 0.12.0 it does so only
inside loops: outside of a loop the product takes ten times as long. In that version a vector in parts takes longer than
a sum of products everywhere, and for grouped integers sums take ten times as long as the product."""

DOTS_NEED_FLOATS = _JAX == (0, 11)
"""Whether XLA's CPU code does so nowhere (jax 0.11): blocks of rows are then converted into the processor's cache
first. Seen in timings of a matrix of 8,960 x 1,536: 2 to 3 ms instead of 8 to 15 in int8, bfloat16 and int4."""

FEW_TOKENS = 1 if DOTS_NEED_FLOATS else 4
"""The largest number of tokens that are multiplied one by one, with converted numbers that never reach memory. Seen in
timings: two tokens take half as long as with `BLOCK_ROWS`, eight as long."""


def wide(weight: Num[Array, "..."], scale: Float[Array, "..."] | None) -> Float[Array, "..."]:
    """Convert a stored matrix to float32, in a form that XLA's CPU code fuses into the use of the matrix.

    XLA moves a plain conversion from bfloat16 to the beginning of the program, where it converts the whole matrix into
    memory (jax 0.10.2). It does not move a conversion that is written with integers. Seen in timings: 20 ms with the
    plain conversion, 2 with this one.
    """
    if weight.dtype == jnp.bfloat16:
        bits = jax.lax.bitcast_convert_type(weight, jnp.uint16).astype(jnp.uint32)
        return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)
    return weight.astype(jnp.float32) if scale is None else dequantise(weight, scale)


def here(x: Array, weight: Array, scale: Array | None) -> tuple[Array, Array, Array | None]:
    """Return the same arrays, and keep XLA from moving their use elsewhere.

    XLA (jax 0.10.2) moves conversions of weights out of the loop over tokens, since they are the same for all tokens.
    All weights are then in memory in float32, too, and every step reads those. Seen in the compiled decode loop on
    CPUs. Whatever depends on an optimisation barrier together with x stays with x.
    """
    return jax.lax.optimization_barrier((x, weight, scale))


def linear(
    x: Float[Array, "b t d"],
    weight: Num[Array, "*rows d"],
    scale: Float[Array, "*rows n"] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "b t *rows"]:
    """x times every row of `weight`.

    On CPUs the axes of rows are merged: XLA's CPU code (jax 0.10.2) has a fast product of one token with a matrix of
    two axes that is not transposed in the program, and is slower with more axes. Seen in timings of decoding. On other
    platforms the axes stay apart: merging (2, F, D) to (2 F, D), with F divided among devices, makes XLA gather the
    matrix on every device at every token. Seen as an all-gather in programs compiled for eight GPUs and for eight CPU
    devices. On a mesh of CPUs, each device therefore merges the axes of its own part.

    Args:
        x: the activations.
        weight: the matrix; all its axes but the last one count rows.
        scale: for integers, the scales of each row: one (n = 1), or one for each of n groups.
        dtype: dtype of the result; that of x if None.
    """
    mesh, dtype = mesh_of(weight), jnp.dtype(dtype or x.dtype)

    def flat(x: Array, weight: Array, scale: Array | None) -> Array:
        flattened = weight.reshape(-1, weight.shape[-1])
        scales = None if scale is None else scale.reshape(-1, scale.shape[-1])
        return _on_cpu(x, flattened, scales, dtype).reshape(*x.shape[:2], *weight.shape[:-1])

    devices, cpu = axis_size(mesh, MODEL_AXIS), flat
    if devices > 1 and weight.ndim == 3 and weight.shape[1] % devices == 0:
        divided = PartitionSpec(None, MODEL_AXIS)
        cpu = jax.shard_map(
            flat,
            mesh=mesh,
            axis_names={MODEL_AXIS},
            in_specs=(PartitionSpec(), divided, divided),
            out_specs=PartitionSpec(None, None, None, MODEL_AXIS),
        )
    default = functools.partial(_as_it_is, dtype=dtype)
    # Every branch takes time when a program is traced, so only platforms that differ have one.
    others: dict[str, Callable[..., Array]] = {}
    if scale is not None and scale.shape[-1] > 1:
        others["tpu"] = functools.partial(default, fused=0)
    if (gemv := _gemv(x, weight, scale)) is not None:

        def kernel(x: Array, weight: Array, scale: Array) -> Array:
            rows = weight.reshape(-1, weight.shape[-1]), scale.reshape(-1, scale.shape[-1])
            y = gemv.rows_times(x.reshape(-1, x.shape[-1]), *rows)
            return y.reshape(*x.shape[:2], *weight.shape[:-1]).astype(dtype)

        others["cuda"] = with_gradients_of(default, kernel)
    return jax.lax.platform_dependent(x, weight, scale, cpu=cpu, default=default, **others)


def _gemv(x: Array, weight: Array, scale: Array | None) -> Any:
    """The module `griffin_jax.model.gemv` if its kernels are to be used, and take these operands on a GPU; otherwise
    None.

    The kernels are not divided among devices: on a mesh of several devices, XLA divides its own products.

    Args:
        x: the activations.
        weight: the matrix.
        scale: scales of its rows, outputs or groups; None for floating-point numbers.
    """
    mesh = mesh_of(weight)
    if not os.environ.get(GEMV_VARIABLE) or scale is None or (mesh is not None and mesh.size > 1):
        return None
    if not triton_compiles():
        return None
    try:
        # Imported here, because JAX does not have Triton on every platform.
        from griffin_jax.model import gemv
    except ImportError:
        return None
    groups = scale.shape[-1] if scale.ndim == weight.ndim else 1
    return gemv if gemv.fits(math.prod(x.shape[:-1]), weight, groups) else None


def _as_it_is(x: Array, weight: Array, scale: Array | None, *, dtype: np.dtype, fused: int = FUSED_TOKENS) -> Array:
    """`linear` in the form for GPUs and TPUs.

    Group scales are not multiplied onto a matrix that enters a product, because XLA would write all of it to memory in
    the dtype of x. Nor are they multiplied onto the sums of each group, which for eight tokens have as many bytes as a
    matrix of int4. Instead, each token has a sum of products. XLA fuses it with the conversion, and the sums of up to
    eight tokens with each other, so that one kernel reads the integers and their scales once. Seen in programs compiled
    for H100 (jax 0.10.2), but not for TPU v5e, for which XLA converts in memory whatever the form. For more than
    `fused` tokens, it pays to make a floating-point matrix.
    """
    if scale is None or scale.shape[-1] == 1:
        y = _dot(x, weight, ((2,), (weight.ndim - 1,)), ((), ()), dtype=dtype if scale is None else jnp.float32)
        return y if scale is None else (y * scale[..., 0]).astype(dtype)
    tokens = _tokens(x, weight)
    if tokens.shape[1] > fused:
        x, weight, _ = here(x, weight, None)
        matrix = dequantise(weight, scale, x.dtype)
        return _dot(x, matrix, ((2,), (matrix.ndim - 1,)), ((), ()), dtype=dtype)
    matrix = grouped(weight, scale)
    across = (tokens.shape[0], *[1] * (weight.ndim - 1), *matrix.shape[-2:])
    each = [jnp.sum(matrix * tokens[:, t].reshape(across), axis=(-2, -1)) for t in range(tokens.shape[1])]
    return jnp.stack(each, axis=1).reshape(*x.shape[:2], *weight.shape[:-1]).astype(dtype)


def _tokens(x: Float[Array, "b t d"], weight: Array) -> Float[Array, "p bt d"]:
    """All tokens in float32, with an axis for the p parts that the devices divide the sequences into."""
    parts = axis_size(mesh_of(weight), DATA_AXIS)
    parts = parts if x.shape[0] % parts == 0 else 1
    return x.reshape(parts, -1, x.shape[-1]).astype(jnp.float32)


def _in_order(weight: Array, scale: Array | None, sequences: int | None = None) -> tuple[Array, Any]:
    """Return the same arrays, pinned to their layout in memory: rows one after the other.

    XLA wants the numbers that it adds up next to each other, and would write the whole matrix anew, transposed, before
    the loop over tokens. Seen in programs compiled for H100 (jax 0.10.2); sums over rows in this layout read no more.
    Arrays that are divided among devices are pinned part by part, since XLA would otherwise gather them to keep the
    layout.

    Args:
        weight: a matrix, whose second to last axis counts rows.
        scale: scales of its rows; None for floating-point numbers.
        sequences: number of the axis that counts sequences, if each has its own matrix.
    """

    def pinned(*arrays: Array | None) -> tuple[Array, Any]:
        return jax.tree.map(lambda array: with_layout_constraint(array, Layout(tuple(range(array.ndim)))), arrays)

    mesh = mesh_of(weight)
    axes: list[str | None] = [None] * weight.ndim
    if mesh is None:
        return pinned(weight, scale)
    axes[-2] = dividing(mesh, MODEL_AXIS, weight.shape[-2])
    if sequences is not None:
        axes[sequences] = dividing(mesh, DATA_AXIS, weight.shape[sequences])
    spec = PartitionSpec(*axes)
    return jax.shard_map(pinned, mesh=mesh, in_specs=spec, out_specs=spec)(weight, scale)


def _added(rows: Float[Array, "b k n g"], weight: Array) -> Float[Array, "b n g"]:
    """The sum over k. On GPUs it takes two passes: sums of some rows each, and the sum of these.

    In one pass, XLA would write all of the converted rows to memory for some shapes, such as 4,096 x 3,072 or
    2,048 x 2,048; and it merges passes that nothing keeps apart. Seen in programs compiled for H100 (jax 0.10.2). On
    TPUs, two passes are what makes XLA write the rows to memory: seen for TPU v5e, with a matrix of int8 for each
    sequence.

    Args:
        rows: the k rows of each of b matrices, with their columns in n groups of g.
        weight: the stored matrix of these rows, which says how devices divide them.
    """
    b, k = rows.shape[:2]
    devices = axis_size(mesh_of(weight), MODEL_AXIS)
    devices = devices if k % devices == 0 else 1
    parts = devices * math.gcd(k // devices, max(ROW_PARTS // devices, 1))

    def two_passes(rows: Array) -> Array:
        sums = jnp.sum(rows.reshape(b, parts, -1, *rows.shape[2:]), axis=2)
        return jnp.sum(jax.lax.optimization_barrier(sums), axis=1)

    return jax.lax.platform_dependent(rows, tpu=lambda rows: jnp.sum(rows, axis=1), default=two_passes)


def _dot(x: Array, weight: Array, contracting: tuple, batch: tuple, *, dtype: DTypeLike) -> Array:
    return jax.lax.dot_general(x, weight.astype(x.dtype), (contracting, batch), preferred_element_type=dtype)


def _on_cpu(x: Array, weight: Array, scale: Array | None, dtype: np.dtype) -> Array:
    """`linear` in the form for CPUs, for a matrix (F, D) and scales (F, n)."""
    b, t, d = x.shape
    if weight.dtype == x.dtype == jnp.float32:
        if 1 < b * t <= ROWS_FIRST:
            return rows_first(x.reshape(b * t, d), weight).reshape(b, t, -1)
        return jnp.einsum("btd,fd->btf", x, weight)
    x, weight, scale = here(x, weight, scale)
    per_row = scale is not None and scale.shape[-1] == 1
    inside = None if per_row else scale
    tokens = x.reshape(b * t, d).astype(jnp.float32)
    if b * t <= FEW_TOKENS:
        y = jnp.stack([one_token(token, weight, inside) for token in _in_memory(tokens)])
    else:
        y = blocks_of_rows(tokens, weight, inside)
    if per_row and scale is not None:
        y = y * scale[:, 0]
    elif b * t <= FEW_TOKENS:
        # XLA would fuse a bias that is added next, and used more than once, into the product, and then convert the
        # whole matrix in memory at every token. Seen in timings of 16,384 x 1,024: 47 ms in bfloat16, 0.6 without.
        y = _in_memory(y)
    return y.reshape(b, t, -1).astype(dtype)


def _in_memory(x: Float[Array, "t d"]) -> Float[Array, "t d"]:
    """Return the same numbers, and make sure that they are in memory before they are used.

    XLA's CPU code (jax 0.10 and 0.12) otherwise fuses the computation of a vector, such as a norm, into the product
    with a converted matrix, and repeats it for every row of the matrix. Neither a barrier nor writing the vector into a
    table prevents that. The branches of a condition do, because they are separate programs. Seen in timings of a matrix
    of 8,960 x 1,536 after a norm: 1.1 ms without, 0.5 with it.
    """
    return jax.lax.cond(jnp.isnan(x[0, 0]), lambda x: jnp.where(jnp.isnan(x), jnp.nan, x), lambda x: x, x)


def one_token(x: Float[Array, "d"], weight: Num[Array, "f d"], scale: Array | None) -> Float[Array, "f"]:
    """The product of one vector with every row of a matrix, on CPUs.

    A vector that is too long (see `FUSED_BYTES`) is multiplied by floating-point numbers part by part. XLA would copy
    slices of the columns; instead, all rows are cut into as many pieces as the vector has parts, each part is
    multiplied by all pieces, and only the products with its own pieces count. Two such passes over a matrix of
    13,824 x 5,120 in bfloat16 take 12 ms, sums of products 100. Two passes over 6,912 x 5,120 in float32, looked up
    among the matrices of several experts, take 20, sums 62, and the product, for which XLA copies the matrix, 363. Seen
    in timings. In a loop over tokens, passes over int8 take four times as long as sums (but see `long_token`, for
    experts).

    Args:
        x: the vector, float32.
        weight: the matrix.
        scale: scales of the groups of its rows, (F, n), or None.
    """

    def times(x: Array, rows: Array) -> Array:
        return _vector_times(x[0], rows)[None]

    passes = weight.dtype in (jnp.bfloat16, jnp.float32)
    parts = parts_of(x, MOST_PASSES if passes else 1)
    if DOTS_NEED_FLOATS:
        return blocks_of_rows(x[None], weight, scale, times)[0]
    if scale is None and (parts is None or not DOTS_FUSE):
        if parts == 1:
            return blocks_of_rows(x[None], weight, None, times)[0]
        # Not `wide`, which is written with integers: for a sum, XLA would convert those in memory.
        return jnp.sum(weight.astype(jnp.float32) * x, axis=-1)
    matrix = wide(weight, scale)
    if parts is None:
        return jnp.sum(matrix * x, axis=-1)
    if parts == 1:
        return x @ matrix.T
    return _in_passes(x.reshape(parts, -1), matrix.reshape(-1, x.shape[0] // parts))


def parts_of(x: Float[Array, "d"], most: int = MOST_PASSES) -> int | None:
    """The number of equal parts that a vector must be cut into for XLA's CPU code; None if `most` parts are too few."""
    return next((n for n in range(1, most + 1) if x.shape[0] % n == 0 and x.nbytes // n < FUSED_BYTES), None)


def _vector_times(x: Float[Array, "d"], rows: Float[Array, "f d"]) -> Float[Array, "f"]:
    """The product of a vector with rows that have just been converted, which are written to memory only if that is
    faster."""
    return jax.lax.optimization_barrier(rows) @ x if DOTS_NEED_FLOATS else x @ rows.T


def _in_passes(x: Float[Array, "p n"], rows: Float[Array, "fp n"]) -> Float[Array, "f"]:
    """The product of a vector with every row, part by part.

    Args:
        x: the p parts of the vector, of n numbers each.
        rows: the f rows, each cut into p pieces. Every part is multiplied by all pieces, but only the products of parts
            and pieces that belong together count.
    """
    each = [_vector_times(part, rows).reshape(-1, len(x))[:, number] for number, part in enumerate(x)]
    return jnp.sum(jnp.stack(each), axis=0)


def long_token(
    x: Float[Array, "d"], weight: Num[Array, "r d"], start: Int[Array, ""], count: int, parts: int
) -> Float[Array, "{count}"]:
    """`one_token` for a long vector and some rows of a larger matrix.

    With jax 0.12.0 this function also takes short vectors, and bfloat16: two of four experts of 2,048 x 1,536 take 0.7
    ms, and sums, which copy the experts, 2.6. Seen in timings. With jax 0.10 all of a bfloat16 matrix would be
    converted.

    The passes are over blocks of rows, which stay in the processor's cache for the second pass. There are at least two
    blocks, because XLA's CPU code (jax 0.10.2) copies what is not in a loop. Seen in timings of two of four experts
    (6,912 x 5,120 each): int8 takes 7 ms, 10 in passes over all rows, and 250 as sums of products; float32 takes 11 ms,
    and 17 in passes over all rows, where the same two experts without a choice take 8.5.

    Args:
        x: the vector, float32.
        weight: the larger matrix.
        start: number of the first row.
        count: number of rows.
        parts: number of parts of the vector, from `parts_of`.
    """
    flat, tokens = weight.reshape(-1, weight.shape[1] // parts), x.reshape(parts, -1)
    blocks = max(2, -(-count * weight.shape[1] * weight.dtype.itemsize // PASS_BYTES))
    size = -(-count // blocks)

    def fill(block: Array, y: Array) -> Array:
        # The last block is moved back to end with the last row.
        first = jnp.minimum(block * size, count - size)
        rows = jax.lax.dynamic_slice_in_dim(flat, (start + first) * parts, size * parts)
        return jax.lax.dynamic_update_slice_in_dim(y, _in_passes(tokens, wide(rows, None)), first, 0)

    # Not zeros: these depend on nothing, so that those of all layers would be in memory at once.
    return jax.lax.fori_loop(0, blocks, fill, jnp.broadcast_to(x[0], (count,)))


def bfloat16_token(
    x: Float[Array, "d"], weight: Num[Array, "e r d"], expert: Int[Array, ""], parts: int
) -> Float[Array, "r"]:
    """`one_token` for a vector and one of a few matrices in bfloat16.

    XLA's CPU code (jax 0.10.2) has no look-up in bfloat16: it converts all matrices to float32 first, at every token.
    There is therefore a branch for each matrix, and for each part of the vector, since XLA copies a matrix that two
    products use. Seen in timings of two of four experts: 14 ms instead of 200 for 6,912 x 5,120, 4 instead of 53 for
    6,912 x 2,048.

    Args:
        x: the vector, float32.
        weight: the matrices.
        expert: number of the matrix.
        parts: number of parts of the vector, from `parts_of`.
    """
    tokens = x.reshape(parts, -1)

    def branch(number: int, matrix: int, part: Array) -> Array:
        rows = wide(weight[matrix], None).reshape(-1, tokens.shape[1])
        return (part @ rows.T).reshape(-1, parts)[:, number]

    def in_branches(number: int) -> Array:
        branches = [functools.partial(branch, number, matrix) for matrix in range(weight.shape[0])]
        return jax.lax.switch(expert, branches, tokens[number])

    return jnp.sum(jnp.stack([in_branches(number) for number in range(parts)]), axis=0)


def rows_first(x: Float[Array, "t d"], weight: Float[Array, "f d"]) -> Float[Array, "t f"]:
    """x times every row, as the transpose of weight @ x.T, which is faster on CPUs for few tokens.

    Seen in timings (jax 0.10.2): for 128 matrices of 1,536 x 2,048 and 16 tokens each 135 ms instead of 207, for 128
    tokens 628 instead of 699. Without the barrier, XLA would undo it.
    """
    return jax.lax.optimization_barrier(weight @ x.T).T


def _rows_times(x: Float[Array, "t d"], weight: Float[Array, "f d"]) -> Float[Array, "t f"]:
    return rows_first(x, weight) if x.shape[0] <= ROWS_FIRST else jnp.einsum("td,fd->tf", x, weight)


def blocks_of_rows(
    x: Float[Array, "t d"],
    weight: Num[Array, "f d"],
    scale: Array | None,
    times: Callable[[Array, Array], Array] = _rows_times,
) -> Float[Array, "t f"]:
    """x times every row, for one block of rows after the other, each converted to float32 just before its product.

    Args:
        x: the tokens.
        weight: the matrix.
        scale: scales of the groups of its rows, (F, n), or None.
        times: product of the tokens with a block of R rows: (T, D) and (R, D) to (T, R).
    """
    rows = weight.shape[0]
    blocks, size = _blocks(rows, BLOCK_ROWS)

    def block(number: Array, y: Array) -> Array:
        # The last block is moved back to end with the last row.
        start = jnp.minimum(number * size, rows - size)
        own = times(x, wide(*_rows(weight, scale, start, size)))
        return jax.lax.dynamic_update_slice_in_dim(y, own, start, axis=1)

    # Not zeros: these depend on nothing, so that those of all layers would be in memory at once. If devices divide the
    # rows, what goes through the loop must be divided before it, too; a product with one row is.
    first = times(x, wide(*_rows(weight, scale, 0, 1)))
    return jax.lax.fori_loop(0, blocks, block, jnp.broadcast_to(first, (x.shape[0], rows)))


def _blocks(rows: int, most: int) -> tuple[int, int]:
    """The number of blocks that rows are divided into, at least two, and the largest number of rows of a block.

    To XLA a loop that runs once is no loop, and what is not in a loop is converted where the program begins, for all
    layers; see `_rows`.

    Args:
        rows: number of rows.
        most: the largest number of rows that a block may have.
    """
    blocks = max(2, -(-rows // most))
    return blocks, -(-rows // blocks)


def _rows(weight: Array, scale: Array | None, start: int | Array, size: int) -> tuple[Array, Array | None]:
    """Some rows of a matrix and their scales, for use in a loop.

    XLA copies slices of the whole matrix, and also a matrix that is divided into blocks as `jax.lax.scan` takes it. It
    makes these copies for all layers at once, since nothing makes them wait. The same is true of single blocks outside
    of the loop: those of 24 layers took 140 MB, and a fifth of the time of 16 tokens in int8. Seen in compiled programs
    and timings on CPUs (jax 0.10.2).
    """
    rows = jax.lax.dynamic_slice_in_dim(weight, start, size)
    return rows, None if scale is None else jax.lax.dynamic_slice_in_dim(scale, start, size)


def matmul(
    x: Float[Array, "b t k"],
    weight: Num[Array, "k d"],
    scale: Float[Array, "d"] | None = None,
    row_scale: Float[Array, "k n"] | None = None,
) -> Float[Array, "b t d"]:
    """x @ weight, in the dtype of x.

    XLA's CPU code (jax 0.10.2) multiplies a vector by a matrix of a few hundred rows on a single core, and by larger
    ones at a third to half of the speed of memory. On CPUs the product is therefore written as sums of a few rows each,
    and of these sums: they are computed on all cores, as fast as memory can be read. Seen in timings of decoding.

    Args:
        x: the activations.
        weight: the matrix.
        scale: for integers, one scale for each output.
        row_scale: for integers in groups, instead of `scale`, one scale for each of n groups of a row.
    """
    operands = x, weight, scale, row_scale
    others: dict[str, Callable[..., Array]] = {}
    if row_scale is not None:
        others["tpu"] = functools.partial(_matmul_as_it_is, fused=0)
    if (gemv := _gemv(x, weight, scale if row_scale is None else row_scale)) is not None:

        def kernel(x: Array, weight: Array, scale: Array | None, row_scale: Array | None) -> Array:
            y = gemv.sums_of_rows(x.reshape(-1, x.shape[-1]), weight, row_scale)
            return (y if scale is None else y * scale).reshape(*x.shape[:2], -1).astype(x.dtype)

        others["cuda"] = with_gradients_of(_matmul_as_it_is, kernel)
    return jax.lax.platform_dependent(*operands, cpu=_matmul_on_cpu, default=_matmul_as_it_is, **others)


def _matmul_as_it_is(
    x: Array, weight: Array, scale: Array | None, row_scale: Array | None, *, fused: int = FUSED_TOKENS
) -> Array:
    """`matmul` in the form for GPUs and TPUs.

    Group scales are handled as in `linear`, by sums of rows that are fused with the conversion. XLA makes one kernel
    for two tokens only, so that sixteen tokens read the matrix eight times, which is what it costs to convert it in
    memory. Seen in programs compiled for H100 (jax 0.10.2); there, a product for each group writes as many bytes for
    eight tokens as the integers have, and transposes the integers before the loop. For TPU v5e, sums read and write
    twice as much as the product with a matrix of 6,912 x 5,120 in int4, by XLA's count.
    """
    if row_scale is None:
        y = _dot(x, weight, ((2,), (0,)), ((), ()), dtype=x.dtype if scale is None else jnp.float32)
        return y if scale is None else (y * scale).astype(x.dtype)
    tokens = _tokens(x, weight)
    if tokens.shape[1] > fused:
        x, weight, _ = here(x, weight, None)
        return _dot(x, dequantise(weight, row_scale, x.dtype), ((2,), (0,)), ((), ()), dtype=x.dtype)
    matrix = grouped(*_in_order(weight, row_scale))
    each = [_added(matrix * tokens[:, t, :, None, None], weight) for t in range(tokens.shape[1])]
    return jnp.stack(each, axis=1).reshape(*x.shape[:2], -1).astype(x.dtype)


def _matmul_on_cpu(x: Array, weight: Array, scale: Array | None, row_scale: Array | None) -> Array:
    b, t, k = x.shape
    if axis_size(mesh_of(weight), MODEL_AXIS) > 1:
        # The forms below would exchange parts of rows between devices.
        y = jnp.einsum("btk,kd->btd", x.astype(jnp.float32), wide(weight, row_scale))
        return (y if scale is None else y * scale).astype(x.dtype)
    if b * t > 1 and weight.dtype == x.dtype == jnp.float32:
        return x @ weight
    x, weight, row_scale = here(x, weight, row_scale)
    tokens = x.reshape(b * t, k).astype(jnp.float32)
    if b * t == 1:
        y = sum_of_rows(tokens[0], functools.partial(_cut, weight, row_scale))[None]
    else:
        y = blocks_of_sums(tokens, weight, row_scale)
    return (y if scale is None else y * scale).reshape(b, t, -1).astype(x.dtype)


def _cut(weight: Array, scale: Array | None, start: int, size: int) -> tuple[Array, Array | None]:
    rows = slice(start, start + size)
    return weight[rows], None if scale is None else scale[rows]


def sum_of_rows(
    x: Float[Array, "k"], rows: Callable[[int, int], tuple[Num[Array, "_s d"], Array | None]]
) -> Float[Array, "d"]:
    """x @ weight for one token, as sums of `PARTS` rows that are added up by a product with ones; for CPUs.

    Group scales are multiplied onto x, which gets an axis for the groups. Handling groups as slices of the columns is
    as fast for small matrices, three times as slow for 8,960 x 1,536, and takes ten times as long to compile. Seen in
    timings.

    Args:
        x: one vector, float32.
        rows: function of a start and a size, which returns this many rows of the matrix, (S, D), and the scales of
            their groups, (S, n), or None.
    """
    k = x.shape[0]
    size = k // PARTS

    def scaled(start: int, size: int) -> Array:
        weight, scale = rows(start, size)
        factor = x[start : start + size, None]
        if scale is not None:
            factor = factor * scale.astype(jnp.float32)
        return (factor[..., None] * wide(weight, None).reshape(size, factor.shape[1], -1)).reshape(size, -1)

    def product(start: int, size: int) -> Array:
        return x[start : start + size] @ wide(*rows(start, size))

    if size == 0:
        return product(0, k)
    sums = sum((scaled(part * size, size) for part in range(1, PARTS)), scaled(0, size))
    y = (jnp.ones((1, size), jnp.float32) @ sums)[0]
    left = PARTS * size
    return y if left == k else y + product(left, k - left)


def blocks_of_sums(
    x: Float[Array, "t k"],
    weight: Num[Array, "k d"],
    scale: Array | None,
    times: Callable[[Array, Array], Array] = jnp.matmul,
) -> Float[Array, "t d"]:
    """x @ weight, for one block of rows after the other, each converted to float32 just before its product.

    Args:
        x: the tokens.
        weight: the matrix.
        scale: scales of the groups of its rows, (K, n), or None.
        times: product of a part of the tokens' columns with a block of R rows: (T, R) and (R, D) to (T, D).
    """
    k = weight.shape[0]
    blocks, size = _blocks(k, 2 * BLOCK_ROWS)

    def block(number: Array, y: Array) -> Array:
        # The last block is moved back to end with the last row, and leaves out the rows that the block before has
        # added.
        start = jnp.minimum(number * size, k - size)
        own = jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
        own = jnp.where(start + jnp.arange(size) < number * size, 0, own)
        return y + times(own, wide(*_rows(weight, scale, start, size)))

    # Zeros that depend on x and on the weights, see `blocks_of_rows`.
    zeros = jnp.minimum(jnp.abs(times(x[:, :1], wide(*_rows(weight, scale, 0, 1)))), 0)
    return jax.lax.fori_loop(0, blocks, block, zeros)


def linear_of_each(
    x: Float[Array, "b t d"], weight: Num[Array, "a b f d"], scale: Float[Array, "a b f n"] | None = None
) -> Float[Array, "b t a f"]:
    """`linear` for sequences that each have their own matrix.

    On GPUs and TPUs, a product in which the axis of the sequences lies between others makes XLA write the matrices anew
    before the loop over tokens, whatever their dtype. Sums of products, with conversions fused, do not. Seen in
    programs compiled for H100, on one device and on eight (jax 0.10.2).

    Args:
        x: the activations.
        weight: for each sequence, a matrices of F rows.
        scale: for integers, the scales of each row: one (n = 1), or one for each of n groups.
    """

    def as_it_is(x: Array, weight: Array, scale: Array | None) -> Array:
        if x.shape[1] > FUSED_TOKENS_OF_EACH or weight.dtype == jnp.float32:
            if scale is not None:
                x, weight, _ = here(x, weight, None)
            matrix = weight.astype(x.dtype) if scale is None else dequantise(weight, scale, x.dtype)
            return jnp.einsum("btd,abfd->btaf", x, matrix)
        weight, scale = _in_order(weight, scale, sequences=1)
        matrix = weight.astype(jnp.float32)[..., None, :] if scale is None else grouped(weight, scale)
        tokens = x.astype(jnp.float32).reshape(*x.shape[:2], 1, *matrix.shape[-2:])
        each = [jnp.sum(matrix * tokens[:, t], axis=(-2, -1)) for t in range(x.shape[1])]
        return jnp.moveaxis(jnp.stack(each), (1, 2), (2, 0)).astype(x.dtype)

    def one_by_one(x: Array, weight: Array, scale: Array | None) -> Array:
        if weight.dtype == x.dtype == jnp.float32:
            return as_it_is(x, weight, scale)

        def own(number: Array) -> Array:
            scales = None if scale is None else scale[:, number].reshape(-1, scale.shape[-1])
            return _on_cpu(x[number][None], weight[:, number].reshape(-1, weight.shape[-1]), scales, x.dtype)[0]

        y = jax.lax.map(own, jnp.arange(x.shape[0], dtype=jnp.int32))
        return y.reshape(*x.shape[:2], weight.shape[0], weight.shape[2])

    return jax.lax.platform_dependent(x, weight, scale, cpu=one_by_one, default=as_it_is)


def matmul_of_each(
    x: Float[Array, "b t k"],
    weight: Num[Array, "b k d"],
    scale: Float[Array, "*b d"] | None = None,
    row_scale: Float[Array, "b k n"] | None = None,
) -> Float[Array, "b t d"]:
    """`matmul` for sequences that each have their own matrix.

    Args:
        x: the activations.
        weight: the matrix of each sequence.
        scale: for integers, one scale for each output, (D,) for all sequences or (B, D).
        row_scale: for integers in groups, instead of `scale`, one scale for each of n groups of a row.
    """

    def as_it_is(x: Array, weight: Array, row_scale: Array | None) -> Array:
        if x.shape[1] > FUSED_TOKENS_OF_EACH or weight.dtype == jnp.float32:
            if row_scale is not None:
                x, weight, _ = here(x, weight, None)
            matrix = weight.astype(x.dtype) if row_scale is None else dequantise(weight, row_scale, x.dtype)
            return jnp.einsum("btk,bkd->btd", x, matrix, preferred_element_type=jnp.float32)
        weight, row_scale = _in_order(weight, row_scale, sequences=0)
        matrix = weight.astype(jnp.float32)[..., None] if row_scale is None else grouped(weight, row_scale)
        tokens = x.astype(jnp.float32)[..., None, None]
        each = [_added(matrix * tokens[:, t], weight) for t in range(x.shape[1])]
        return jnp.stack(each, axis=1).reshape(*x.shape[:2], -1)

    def one_by_one(x: Array, weight: Array, row_scale: Array | None) -> Array:
        if weight.dtype == x.dtype == jnp.float32:
            return as_it_is(x, weight, None)

        def own(number: Array) -> Array:
            scales = None if row_scale is None else row_scale[number]
            return _matmul_on_cpu(x[number].astype(jnp.float32)[None], weight[number], None, scales)[0]

        return jax.lax.map(own, jnp.arange(x.shape[0], dtype=jnp.int32))

    y = jax.lax.platform_dependent(
        x,
        weight,
        row_scale,
        cpu=lambda *given: one_by_one(*given).astype(jnp.float32),
        default=lambda *given: as_it_is(*given).astype(jnp.float32),
    )
    if scale is not None:
        y = y * (scale if scale.ndim == 1 else scale[:, None])
    return y.astype(x.dtype)
