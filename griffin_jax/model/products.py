"""Products of activations with matrices as they are stored, in the form that XLA makes fast on each platform.

    linear(x, w)    x times every row of w, summed over the last axis of w
    matmul(x, w)    x @ w, summed over the first axis of w

Both take matrices of floating numbers or of integers with scales (`griffin_jax.model.weights`), and compute the same
whatever their form: the docstrings say what XLA makes of the plain form, with which version and on which platform, and
how that was seen, so that the special form can go once XLA does better.

On GPUs and TPUs a conversion of the matrix is taken into its product, which reads the stored numbers and nothing else;
seen in programs compiled for H100 and TPU v5e. Scales of groups are fused on GPUs only: for TPU v5e XLA writes the
converted matrix, or the repeated scales, to memory at every step in each of the forms that were tried, and of these the
plain product reads and writes least. XLA's CPU code (jax 0.10 to 0.12) mostly writes the whole converted matrix to
memory first: products of integers then take ten times as long as those of float32. The forms that it does not do this
with depend on the number of tokens.
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

from griffin_jax.model.ops import with_gradients_of
from griffin_jax.model.weights import dequantise, grouped
from griffin_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS, axis_size, dividing, mesh_of

GEMV_VARIABLE = "GRIFFIN_JAX_GEMV"
"""Environment variable that, not empty, makes few tokens be multiplied by integers with `griffin_jax.model.gemv` on
NVIDIA GPUs. No GPU has run these kernels yet, so XLA's products are the default; `python -m benchmarks gpu` measures
both."""

FUSED_BYTES = 16 << 10
"""XLA's CPU code takes a conversion into a product with a vector only if the vector has fewer bytes (kFusionThreshold
in its cpu_instruction_fusion)."""

MOST_PASSES = 4
"""Parts of a longer vector, at most, that are each multiplied by the whole matrix."""

PASS_BYTES = 4 << 20
"""Size of the rows of an expert's matrix that a long vector is multiplied by in all passes, before the next rows. Seen
in timings: half or twice as many take up to 5% longer, 512 KiB and 16 MiB more."""

MOST_BRANCHES = 16
"""Matrices in bfloat16, at most, each of which has a branch of its own, since a program has as many for each layer."""

ROWS_FIRST = 128
"""Tokens, at most, that a matrix is multiplied by instead of they by it. For more of them what is gained is lost again
where the result is transposed. Seen in timings of prompts of 512 tokens, one and four at a time."""

BLOCK_ROWS = 512
"""Rows of a matrix that are converted at a time for more tokens: what they become stays in the processor's cache."""

PARTS = 12
"""Parts of a matrix whose rows are added up in one pass for one token. Seen in timings: nine to twelve take up to a
tenth less than eight, and sixteen of int8 half as long again."""

FUSED_TOKENS = 16
"""Tokens, at most, whose products with groups of integers are sums on GPUs, for which no matrix is converted in memory.
XLA makes one kernel of eight, so that these read the integers twice: a quarter of the bytes that a converted matrix
costs, which is written and read once."""

FUSED_TOKENS_OF_EACH = 8
"""Tokens of each sequence, at most, where each has a matrix of its own, of integers or of 16 bits, on GPUs and TPUs."""

ROW_PARTS = 64
"""Parts of a matrix whose rows are added up in one pass on GPUs: as many as XLA makes of a large one."""

_JAX = tuple(map(int, jax.__version__.split(".")[:2]))

DOTS_FUSE = _JAX < (0, 11)
"""Whether XLA's CPU code multiplies a vector by a converted matrix well (jax 0.10). In jax 0.12.0 it does so in loops
only: outside of one the product takes ten times as long, a vector in parts takes longer than a sum of products
everywhere, and of integers in groups sums take ten times as long as the product."""

DOTS_NEED_FLOATS = _JAX == (0, 11)
"""Whether it does so nowhere (jax 0.11): then blocks of rows are converted into the processor's cache first. Seen in
timings of a matrix of 8,960 x 1,536: 2 to 3 ms instead of 8 to 15 in int8, bfloat16 and int4."""

FEW_TOKENS = 1 if DOTS_NEED_FLOATS else 4
"""Tokens that are multiplied one by one, with converted numbers that never reach memory. Seen in timings: two tokens
take half as long as with `BLOCK_ROWS`, eight as long."""


def wide(weight: Num[Array, "..."], scale: Float[Array, "..."] | None) -> Float[Array, "..."]:
    """A stored matrix in float32, in a form that XLA's CPU code converts within its use.

    A conversion of bfloat16 is moved to where the program begins, and so all of the matrix is converted into memory
    (jax 0.10.2); one that is written with integers is not. Seen in timings, 20 ms instead of 2.
    """
    if weight.dtype == jnp.bfloat16:
        bits = jax.lax.bitcast_convert_type(weight, jnp.uint16).astype(jnp.uint32)
        return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)
    return weight.astype(jnp.float32) if scale is None else dequantise(weight, scale)


def here(x: Array, weight: Array, scale: Array | None) -> tuple[Array, Array, Array | None]:
    """The same arrays, whose use stays where it is.

    XLA (jax 0.10.2) moves conversions of weights out of the loop over tokens, since they are the same for all of them:
    then all weights are in memory in float32, too, and these are what every step reads. Seen in the compiled decode
    loop on CPUs. What depends on a barrier together with x stays with x.
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

    XLA's CPU code (jax 0.10.2) has a fast product of one token with a matrix of two axes that is not transposed in the
    program; with more axes it is slower. Seen in timings of decoding. On other platforms the axes stay as they are:
    merging (2, F, D) to (2 F, D), where F is divided among devices, makes XLA gather the matrix on every device at
    every token. Seen as an all-gather in programs compiled for eight GPUs and for eight CPU devices; hence on a mesh of
    CPUs each device merges the axes of its own part.

    Args:
        x: the activations.
        weight: the matrix.
        scale: of integers: one for each row (n = 1), or for each of n groups of a row.
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
    # Branches take time wherever programs are traced, so only what differs has one.
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
    """`griffin_jax.model.gemv`, if its kernels are to be used and take these operands on a GPU; otherwise None.

    They are not divided among devices: on a mesh of several XLA divides its own products.
    """
    mesh = mesh_of(weight)
    if not os.environ.get(GEMV_VARIABLE) or scale is None or (mesh is not None and mesh.size > 1):
        return None
    try:
        # Here, because JAX does not have Triton everywhere.
        from griffin_jax.model import gemv
    except ImportError:
        return None
    groups = scale.shape[-1] if scale.ndim == weight.ndim else 1
    return gemv if gemv.fits(math.prod(x.shape[:-1]), weight, groups) else None


def _as_it_is(x: Array, weight: Array, scale: Array | None, *, dtype: np.dtype, fused: int = FUSED_TOKENS) -> Array:
    """`linear` in the form for GPUs and TPUs.

    Scales of groups are neither multiplied onto a matrix that enters a product, for XLA would write all of it to memory
    in the dtype of x, nor onto the sums of each group, which are as many bytes as a matrix of int4 for eight tokens.
    A sum of products for each token is fused with the conversion, and those of up to eight tokens with each other: one
    kernel reads the integers and their scales, once. Seen in programs compiled for H100 (jax 0.10.2), and not for TPU
    v5e, which converts in memory whatever the form. More than `fused` tokens are worth a floating matrix.
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
    """All tokens in float32, for each of the p parts that the sequences are divided into among devices."""
    parts = axis_size(mesh_of(weight), DATA_AXIS)
    parts = parts if x.shape[0] % parts == 0 else 1
    return x.reshape(parts, -1, x.shape[-1]).astype(jnp.float32)


def _in_order(weight: Array, scale: Array | None, sequences: int | None = None) -> tuple[Array, Any]:
    """The same arrays, which lie in memory as they are: rows one after the other.

    XLA wants the numbers that it adds up next to each other, and would write the whole matrix anew, transposed, before
    the loop over tokens. Seen in programs compiled for H100 (jax 0.10.2); sums of rows as they lie read no more. What
    is divided among devices is pinned part by part, since XLA would put it together to keep its place.

    Args:
        weight: a matrix, the last axis but one of which counts rows.
        scale: scales of its rows.
        sequences: the axis that counts sequences, if each has a matrix of its own.
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
    """The sum over k; on GPUs in two passes: of some rows each, and of these sums.

    In one pass XLA would write all of the converted rows to memory for some shapes, such as 4,096 x 3,072 or 2,048 x
    2,048, and merges passes that nothing keeps apart. Seen in programs compiled for H100 (jax 0.10.2). On TPUs it is
    two passes that make it do so: seen for TPU v5e, with a matrix of int8 for each sequence.
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
    """The product with a matrix of two axes."""
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
        # A bias that is added next and used more than once is taken into the product, for which all of the matrix is
        # converted in memory then, at every token. Seen in timings of 16,384 x 1,024: 47 ms in bfloat16, 0.6 without.
        y = _in_memory(y)
    return y.reshape(b, t, -1).astype(dtype)


def _in_memory(x: Float[Array, "t d"]) -> Float[Array, "t d"]:
    """The same numbers, which are in memory before they are used.

    XLA's CPU code (jax 0.10 and 0.12) otherwise takes what computes a vector, such as a norm, into the product with a
    converted matrix, and computes it again for every row of that. Neither a barrier nor a table that it is written into
    keeps it from that; the branches of a condition are programs of their own. Seen in timings of a matrix of 8,960 x
    1,536 after a norm: 1.1 ms without, 0.5 with it.
    """
    return jax.lax.cond(jnp.isnan(x[0, 0]), lambda x: jnp.where(jnp.isnan(x), jnp.nan, x), lambda x: x, x)


def one_token(x: Float[Array, "d"], weight: Num[Array, "f d"], scale: Array | None) -> Float[Array, "f"]:
    """The product with one vector; `scale` is that of groups.

    A vector that is too long is multiplied by floating numbers part by part. Slices of the columns would be copied, so
    each part is multiplied by all rows cut into as many, of which only those that belong to it count: two passes over a
    matrix of 13,824 x 5,120 in bfloat16 take 12 ms, sums of products 100; two of 6,912 x 5,120 in float32, looked up
    among those of several experts, 20, sums 62, and the product, for which XLA copies the matrix, 363. Seen in timings;
    in a loop over tokens passes over int8 take four times as long as sums (but see `long_token`, for experts).
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
        # Not `wide`, which is written with integers, and for a sum these are converted in memory.
        return jnp.sum(weight.astype(jnp.float32) * x, axis=-1)
    matrix = wide(weight, scale)
    if parts is None:
        return jnp.sum(matrix * x, axis=-1)
    if parts == 1:
        return x @ matrix.T
    return _in_passes(x.reshape(parts, -1), matrix.reshape(-1, x.shape[0] // parts))


def parts_of(x: Float[Array, "d"], most: int = MOST_PASSES) -> int | None:
    """Into how many equal parts a vector is divided for XLA's CPU code; None if `most` are too few."""
    return next((n for n in range(1, most + 1) if x.shape[0] % n == 0 and x.nbytes // n < FUSED_BYTES), None)


def _vector_times(x: Float[Array, "d"], rows: Float[Array, "f d"]) -> Float[Array, "f"]:
    """The product with rows that have just been converted, which are in memory only if that is faster."""
    return jax.lax.optimization_barrier(rows) @ x if DOTS_NEED_FLOATS else x @ rows.T


def _in_passes(x: Float[Array, "p n"], rows: Float[Array, "fp n"]) -> Float[Array, "f"]:
    """The parts of a vector times those of each row, of which only those that belong together count."""
    each = [_vector_times(part, rows).reshape(-1, len(x))[:, number] for number, part in enumerate(x)]
    return jnp.sum(jnp.stack(each), axis=0)


def long_token(
    x: Float[Array, "d"], weight: Num[Array, "r d"], start: Int[Array, ""], count: int, parts: int
) -> Float[Array, "{count}"]:
    """`one_token` of a long vector and some rows of a larger matrix.

    With jax 0.12.0 also of a short one, and in bfloat16: two of four experts of 2,048 x 1,536 take 0.7 ms, and sums,
    which copy the experts, 2.6. Seen in timings. With jax 0.10 all of a matrix in bfloat16 would be converted.

    The passes are over blocks of the rows, which stay in the processor's cache for the second one. There are two blocks
    at least: what is in no loop XLA's CPU code (jax 0.10.2) copies. Seen in timings of two of four experts (6,912 x
    5,120 each): of int8 7 ms, in passes over all rows 10, as sums of products 250; of float32 11 ms, in passes over all
    rows 17, where the same two without a choice take 8.5.

    Args:
        x: the vector, float32.
        weight: the larger matrix.
        start: the first of the rows.
        count: how many rows.
        parts: of the vector, as `parts_of` gives.
    """
    flat, tokens = weight.reshape(-1, weight.shape[1] // parts), x.reshape(parts, -1)
    blocks = max(2, -(-count * weight.shape[1] * weight.dtype.itemsize // PASS_BYTES))
    size = -(-count // blocks)

    def fill(block: Array, y: Array) -> Array:
        # The last block begins where it ends with the last row.
        first = jnp.minimum(block * size, count - size)
        rows = jax.lax.dynamic_slice_in_dim(flat, (start + first) * parts, size * parts)
        return jax.lax.dynamic_update_slice_in_dim(y, _in_passes(tokens, wide(rows, None)), first, 0)

    # Not zeros, which depend on nothing, so that those of all layers are in memory at once.
    return jax.lax.fori_loop(0, blocks, fill, jnp.broadcast_to(x[0], (count,)))


def bfloat16_token(
    x: Float[Array, "d"], weight: Num[Array, "e r d"], expert: Int[Array, ""], parts: int
) -> Float[Array, "r"]:
    """`one_token` of a vector and one of a few matrices in bfloat16.

    XLA's CPU code (jax 0.10.2) has no look-up in bfloat16: it converts all matrices to float32 first, at every token.
    So there is a branch for each matrix, and for each part of the vector, since a matrix that two products take is
    copied. Seen in timings of two of four experts: 6,912 x 5,120 14 ms instead of 200, 6,912 x 2,048 4 instead of 53.

    Args:
        x: the vector, float32.
        weight: the matrices.
        expert: the number of one of them.
        parts: of the vector, as `parts_of` gives.
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
    """x times every row, as the transpose of weight @ x.T: on CPUs faster for few tokens.

    Seen in timings (jax 0.10.2): for 128 matrices of 1,536 x 2,048 and 16 tokens each 135 ms instead of 207, for 128
    tokens 628 instead of 699. XLA would undo it without the barrier.
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
    """x times every row, `times` of some of them at a time, which are converted for it."""
    rows = weight.shape[0]
    blocks, size = _blocks(rows, BLOCK_ROWS)

    def block(number: Array, y: Array) -> Array:
        # The last block begins where it ends with the last row.
        start = jnp.minimum(number * size, rows - size)
        own = times(x, wide(*_rows(weight, scale, start, size)))
        return jax.lax.dynamic_update_slice_in_dim(y, own, start, axis=1)

    # Not zeros, which depend on nothing, so that those of all layers are in memory at once. Where devices divide the
    # rows, what goes through the loop must be divided before it, too, which a product with one of them is.
    first = times(x, wide(*_rows(weight, scale, 0, 1)))
    return jax.lax.fori_loop(0, blocks, block, jnp.broadcast_to(first, (x.shape[0], rows)))


def _blocks(rows: int, most: int) -> tuple[int, int]:
    """The number of blocks that rows are divided into, and how many each has at most: two blocks, at least.

    A loop that runs once is none, and what is in no loop is converted where the program begins, for all layers; see
    `_rows`.
    """
    blocks = max(2, -(-rows // most))
    return blocks, -(-rows // blocks)


def _rows(weight: Array, scale: Array | None, start: int | Array, size: int) -> tuple[Array, Array | None]:
    """Some rows of a matrix and their scales, in a loop.

    Slices of all of it, or a matrix divided into blocks, as `jax.lax.scan` takes it, are copied, and those of all
    layers at once, since nothing makes them wait. So are single blocks outside of the loop: those of 24 layers took
    140 MB and a fifth of the time of 16 tokens in int8. Seen in compiled programs and timings on CPUs (jax 0.10.2).
    """
    rows = jax.lax.dynamic_slice_in_dim(weight, start, size)
    return rows, None if scale is None else jax.lax.dynamic_slice_in_dim(scale, start, size)


def matmul(
    x: Float[Array, "b t k"],
    weight: Num[Array, "k d"],
    scale: Float[Array, "d"] | None = None,
    row_scale: Float[Array, "k n"] | None = None,
) -> Float[Array, "b t d"]:
    """x @ weight, of the dtype of x.

    XLA's CPU code (jax 0.10.2) multiplies a vector by a matrix of a few hundred rows on a single core, and by larger
    ones at a third to half of the speed of memory. The sums of a few rows each, and then of these sums, are computed on
    all cores, as fast as memory can be read. Seen in timings of decoding.

    Args:
        x: the activations.
        weight: the matrix.
        scale: of integers, for each output.
        row_scale: of integers, for each of n groups of a row, instead.
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

    With scales of groups as in `linear`: sums of rows, fused with the conversion. XLA makes one kernel of two tokens
    only, so that sixteen read the matrix eight times, which is what it costs to convert it in memory. Seen in programs
    compiled for H100 (jax 0.10.2), where a product for each group writes as much for eight tokens as the integers have
    bytes, and transposes them before the loop. For TPU v5e sums read and write twice as much as the product with a
    matrix of 6,912 x 5,120 in int4, by XLA's count.
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
        # Parts of rows would be exchanged between devices.
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
    """x @ weight, as sums of `PARTS` rows that are added up by a product with ones; for CPUs.

    Scales of groups are multiplied onto x, with an axis for the groups. Groups as slices of the columns are as fast for
    small matrices, three times as slow for 8,960 x 1,536, and take ten times as long to compile. Seen in timings.

    Args:
        x: one vector, float32.
        rows: function of a start and a size that gives so many rows of the matrix, and the scales of their groups.
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
    """x @ weight, `times` of some rows of the matrix at a time, which are converted for it."""
    k = weight.shape[0]
    blocks, size = _blocks(k, 2 * BLOCK_ROWS)

    def block(number: Array, y: Array) -> Array:
        # The last block begins where it ends with the last row, and leaves out what the one before has added.
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
    """`linear` where each sequence has a matrix of its own.

    On GPUs and TPUs a product in which the axis of the sequences lies between others makes XLA write the matrices anew
    before the loop over tokens, whatever their dtype; sums of products, with conversions fused, do not. Seen in
    programs compiled for H100, on one device and on eight (jax 0.10.2).
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
    """`matmul` where each sequence has a matrix of its own; `scale` may be for all of them."""

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
