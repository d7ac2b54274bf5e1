"""Products of tokens with the matrices of the experts that they chose, in the form that XLA makes fast.

    linear_of_experts(x, experts, w)    each token times the rows of its experts' matrices
    matmul_of_experts(z, experts, w)    each choice's z @ its expert's matrix, summed over the choices of a token

Letters in shapes, besides those of `griffin_jax.model`: e experts, k choices of a token, a matrices that multiply x
(gate and up, or up alone), n groups of a row, m devices that hold whole experts, p pairs.

A *pair* is a token and one of its choices. Few pairs go through their matrices one after the other, so that only the
chosen matrices are read; this is the case in decoding. Many pairs are sorted by their experts, and go through the
matrix of each expert in blocks. No expert has a capacity, and no token is dropped.

`jax.lax.ragged_dot` computes this product, too. XLA for CPUs and GPUs (jax 0.10.2) turns it into a product of every
token with every expert: 76 s instead of 1.4 for 1,024 tokens with 4 of 64 experts (768 x 2,048, 2 cores), and
temporaries of 4.7 GB for 1,024 tokens with 8 of 128 experts in a program compiled for an H100. On TPUs it is a kernel,
and is used here.

Both products have derivatives with respect to all operands except the choices and integers. The derivatives are
products of the same kind, and a matrix for each expert that is a sum over its pairs. Nothing but the operands is kept
for them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Num

from griffin_jax.model.products import (
    DOTS_FUSE,
    MOST_BRANCHES,
    ROW_PARTS,
    bfloat16_token,
    blocks_of_rows,
    blocks_of_sums,
    here,
    long_token,
    one_token,
    parts_of,
    rows_first,
    sum_of_rows,
)
from griffin_jax.model.weights import dequantise, floating_rows, grouped
from griffin_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS, axis_size, dividing, local_sequences, mesh_of

BLOCK_TOKENS = 32
"""Tokens of an expert that go through its matrix together. With fewer, the matrix is read more often; with more, there
is more computation for places that hold no token."""

CPU_BLOCKS = (8, 16, 32, 48, 64, 80, 96, 128)
"""The same on CPUs, where a block has the smallest of these sizes that its tokens fit into. Seen in timings with 64
tokens per expert (768 x 2,048, 128 experts): blocks of 32 take a third longer."""


def linear_of_experts(
    x: Float[Array, "b t d"],
    experts: Int[Array, "b t k"],
    weight: Num[Array, "e a f d"],
    scale: Float[Array, "e a f n"] | None = None,
    bias: Float[Array, "e a f"] | None = None,
    *,
    by_expert: bool = False,
) -> Float[Array, "b t k *m a f"]:
    """Each token times every row of the matrices of its experts, float32.

    Args:
        x: the tokens.
        experts: numbers of the experts that each token chose.
        weight: the matrices of all experts.
        scale: for integers, the scales of each row: one (n = 1), or one for each of n groups.
        bias: added to the product with each row.
        by_expert: whether each of the devices that share the model holds whole experts, instead of rows of all experts.
            The result then has an axis m for these devices, and is zero except for the device that has the expert.
    """
    mesh = mesh_of(weight)
    by_expert = by_expert and axis_size(mesh, MODEL_AXIS) > 1
    form = _form(experts, weight, mesh, by_expert)

    def product(x: Array, experts: Array, weight: Array, scale: Array | None, bias: Array | None) -> Array:
        own = _of_device(experts, weight.shape[0]) if by_expert else experts
        y: Array = _linear(form, x, own, weight, scale)
        if bias is not None:
            y = y + _or_zero(form, _chosen(bias, own).astype(jnp.float32), own, weight.shape[0])
        return y[:, :, :, None] if by_expert else y

    if mesh is None:
        return product(x, experts, weight, scale, bias)
    tokens, neurons = _divided(x, weight.shape[2], mesh)
    rows, out = PartitionSpec(None, None, neurons), PartitionSpec(*tokens, None, None, None, neurons)
    if by_expert:
        rows, out = PartitionSpec(MODEL_AXIS), PartitionSpec(*tokens, None, None, MODEL_AXIS)
    return jax.shard_map(
        product, mesh=mesh, in_specs=(tokens, tokens, rows, rows, rows), out_specs=out, check_vma=False
    )(x, experts, weight, scale, bias)


def matmul_of_experts(
    z: Float[Array, "b t k *m f"],
    experts: Int[Array, "b t k"],
    weight: Num[Array, "e f d"],
    scale: Float[Array, "e d"] | None = None,
    row_scale: Float[Array, "e f n"] | None = None,
) -> Float[Array, "b t d"]:
    """Each choice's z @ the matrix of its expert, summed over the choices of a token; float32.

    Args:
        z: for each token and choice, the values of the expert's neurons; with an axis m for devices if these hold whole
            experts, see `linear_of_experts`.
        experts: numbers of the experts that each token chose.
        weight: the matrices of all experts.
        scale: for integers, one scale for each output of an expert.
        row_scale: for integers in groups, instead of `scale`, one scale for each of n groups of a row.
    """
    mesh, by_expert = mesh_of(weight), z.ndim == 5
    form = _form(experts, weight, mesh, by_expert)
    if mesh is None:
        y: Array = _matmul(form, z, experts, weight, scale, row_scale)
        return y
    tokens, neurons = _divided(z, weight.shape[1], mesh)
    of_z, rows, outputs = PartitionSpec(*tokens, None, None, neurons), PartitionSpec(None, neurons), PartitionSpec()
    if by_expert:
        of_z, rows, outputs = PartitionSpec(*tokens, None, None, MODEL_AXIS), *[PartitionSpec(MODEL_AXIS)] * 2

    def summed(z: Array, experts: Array, weight: Array, scale: Array | None, row_scale: Array | None) -> Array:
        if by_expert:
            z, experts = z[:, :, :, 0], _of_device(experts, weight.shape[0])
        y: Array = _matmul(form, z, experts, weight, scale, row_scale)
        return jax.lax.psum(y, MODEL_AXIS) if by_expert or neurons is not None else y

    return jax.shard_map(
        summed, mesh=mesh, in_specs=(of_z, tokens, rows, outputs, rows), out_specs=tokens, check_vma=False
    )(z, experts, weight, scale, row_scale)


@dataclasses.dataclass(frozen=True)
class _Form:
    """Which form a product takes.

    Attributes:
        few: whether pairs go through their matrices one after the other.
        partial: whether some choices are missing, because another device has their experts. A missing choice has the
            number after the last expert, reads nothing on CPUs, and gives zeros.
    """

    few: bool
    partial: bool


def _form(experts: Array, weight: Array, mesh: Mesh | AbstractMesh | None, by_expert: bool) -> _Form:
    """The form of a product. Pairs are few if a device has no more pairs than matrices."""
    pairs = local_sequences(mesh, experts.shape[0]) * math.prod(experts.shape[1:])
    matrices = weight.shape[0] // (axis_size(mesh, MODEL_AXIS) if by_expert else 1)
    return _Form(pairs <= matrices, by_expert)


def _divided(x: Array, neurons: int, mesh: Mesh | AbstractMesh) -> tuple[PartitionSpec, str | None]:
    """How tokens and neurons are divided among devices, each of which sorts its own tokens.

    Returns:
        The spec of the tokens, and the mesh axis that divides the neurons, if any does.
    """
    return PartitionSpec(dividing(mesh, DATA_AXIS, x.shape[0])), dividing(mesh, MODEL_AXIS, neurons)


def _of_device(experts: Int[Array, "b t k"], count: int) -> Int[Array, "b t k"]:
    """The choices as numbers of this device's own `count` experts; the number `count` stands for the experts of other
    devices."""
    own = experts - jax.lax.axis_index(MODEL_AXIS) * count
    return jnp.where((own >= 0) & (own < count), own, count)


def _or_zero(form: _Form, y: Float[Array, "b t k *n"], experts: Int[Array, "b t k"], count: int) -> Array:
    """The result y of each choice, with zeros for missing choices."""
    if not form.partial:
        return y
    return jnp.where((experts < count).reshape(*experts.shape, *[1] * (y.ndim - 3)), y, 0)


# ---- On one device, with derivatives ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(form: _Form, x: Array, experts: Array, weight: Array, scale: Array | None) -> Float[Array, "b t k a f"]:
    y = _linear_pairs(form, x, experts, weight, scale) if form.few else _linear_blocks(x, experts, weight, scale)
    return _or_zero(form, y, experts, weight.shape[0])


def _linear_forward(form: _Form, *operands: Any) -> tuple[Array, tuple]:
    return _linear(form, *operands), operands


def _linear_backward(form: _Form, operands: tuple, change: Float[Array, "b t k a f"]) -> tuple:
    x, experts, weight, scale = operands
    rows = weight.reshape(weight.shape[0], -1, weight.shape[-1])
    row_scale = None if scale is None else scale.reshape(*rows.shape[:2], -1)
    change = change.reshape(*experts.shape, -1).astype(x.dtype)
    of_x: Array = _matmul(form, change, experts, rows, None, row_scale)
    of_x = of_x.astype(x.dtype)
    of_matrix = _sums_of_experts(change, x[:, :, None], experts, weight.shape[0]).reshape(weight.shape)
    if scale is None:
        return of_x, None, of_matrix.astype(weight.dtype), None
    (of_scale,) = jax.vjp(functools.partial(dequantise, weight), scale)[1](of_matrix)
    return of_x, None, None, of_scale


_linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(
    form: _Form, z: Array, experts: Array, weight: Array, scale: Array | None, row_scale: Array | None
) -> Float[Array, "b t d"]:
    z = _or_zero(form, z, experts, weight.shape[0])
    return (_matmul_pairs if form.few else _matmul_blocks)(form, z, experts, weight, scale, row_scale)


def _matmul_forward(form: _Form, *operands: Any) -> tuple[Array, tuple]:
    return _matmul(form, *operands), operands


def _matmul_backward(form: _Form, operands: tuple, change: Float[Array, "b t d"]) -> tuple:
    z, experts, weight, scale, row_scale = operands
    change = change[:, :, None]
    # If experts have scales, these differ between the choices of a token, and each choice is treated as a token.
    scaled = change if scale is None else change * _chosen(scale, experts)
    b, t, each, d = scaled.shape
    tokens, choices = scaled.reshape(b, t * each, d).astype(z.dtype), experts.reshape(b, t * each, -1)
    rows = weight[:, None]
    of_z: Array = _linear(form, tokens, choices, rows, None if row_scale is None else row_scale[:, None])
    of_z = of_z.reshape(z.shape).astype(z.dtype)
    of_matrix = _sums_of_experts(z, change.astype(z.dtype), experts, weight.shape[0])
    if scale is None and row_scale is None:
        return of_z, None, of_matrix.astype(weight.dtype), None, None
    of_scales = jax.vjp(functools.partial(floating_rows, weight), scale, row_scale)[1](of_matrix)
    return of_z, None, None, *of_scales


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _sums_of_experts(
    left: Float[Array, "b t k m"], right: Float[Array, "b t each n"], experts: Int[Array, "b t k"], count: int
) -> Float[Array, "e m n"]:
    """For each expert, the sum of left^T right over its pairs, float32.

    Args:
        left: a row for each pair.
        right: a row for each pair, or for each token (`each` is 1).
        experts: numbers of the experts that each token chose.
        count: number of experts.
    """
    k, m, each, n = left.shape[2], left.shape[3], right.shape[2], right.shape[3]
    at = _Sorted.of(experts, count)
    pairs, others = left.reshape(-1, m)[at.order], right.reshape(-1, n)[at.order // (k // each)]

    def ragged(pairs: Array, others: Array) -> Array:
        numbers = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        return jax.lax.ragged_dot_general(pairs, others, at.counts, numbers, preferred_element_type=jnp.float32)

    def in_blocks(pairs: Array, others: Array) -> Array:
        blocks = _Blocks.of(at, BLOCK_TOKENS)
        padded = [jnp.pad(array, ((0, BLOCK_TOKENS), (0, 0))) for array in (pairs, others)]

        def block(number: Array, sums: Array) -> Array:
            start, owner = blocks.starts[number], blocks.owners[number]
            # Places that belong to the next expert do not count, whatever they hold.
            own = (jnp.arange(BLOCK_TOKENS) < blocks.counts[number])[:, None]
            mine, theirs = (
                jnp.where(own, jax.lax.dynamic_slice_in_dim(array, start, BLOCK_TOKENS), 0) for array in padded
            )
            product = jnp.einsum("tm,tn->mn", mine, theirs, preferred_element_type=jnp.float32)
            return sums.at[owner].add(product)

        return jax.lax.fori_loop(0, blocks.number, block, jnp.zeros((count, m, n), jnp.float32))

    return jax.lax.platform_dependent(pairs, others, tpu=ragged, default=in_blocks)


# ---- Few pairs ----


def _linear_pairs(form: _Form, x: Array, experts: Array, weight: Array, scale: Array | None) -> Array:
    def one_by_one(x: Array, weight: Array, scale: Array | None) -> Array:
        b, t, k = experts.shape
        e, a, f, d = weight.shape
        tokens, chosen = x.reshape(b * t, d).astype(jnp.float32), experts.reshape(-1)
        per_row = scale is not None and scale.shape[-1] == 1

        def product(number: Array) -> Array:
            # As everywhere on CPUs: if its use could move, XLA would convert the whole matrix before the loop.
            token, matrices, scales = here(tokens[number // k], weight, scale)
            expert = chosen[number]
            own_scale = None if scales is None else scales[expert].reshape(a * f, -1)
            inside = None if per_row else own_scale
            row = _one_expert(token, matrices.reshape(e, a * f, d), expert, inside)
            return row * own_scale[:, 0] if per_row and own_scale is not None else row

        return _filled(form, chosen, e, a * f, tokens, product).reshape(b, t, k, a, f)

    def at_once(x: Array, weight: Array, scale: Array | None) -> Array:
        # On GPUs XLA makes one kernel of this sum, with the look-up of the matrices and their conversion. Seen in
        # programs compiled for H100 (jax 0.10.2). For products it would write the chosen matrices to memory,
        # transposed.
        rows = _chosen(weight, experts)
        token = x.astype(jnp.float32)[:, :, None, None, None]
        if scale is None or scale.shape[-1] == 1:
            y = jnp.sum(rows.astype(jnp.float32) * token, axis=-1)
            return y if scale is None else y * _chosen(scale, experts)[..., 0]
        matrix = grouped(rows, _chosen(scale, experts))
        return jnp.sum(matrix * token.reshape(*token.shape[:-1], *matrix.shape[-2:]), axis=(-2, -1))

    def in_turn(x: Array, weight: Array, scale: Array | None) -> Array:
        # On TPUs XLA fuses the look-up of one matrix into its product. It turns the look-up of several into slices of
        # the columns of all matrices, which it writes to memory. Seen in programs compiled for TPU v5e (jax 0.10.2).
        b, t, k = experts.shape
        e, a, f, d = weight.shape
        tokens, chosen = x.reshape(b * t, d), experts.reshape(-1)
        per_row = scale is not None and scale.shape[-1] == 1

        def product(number: Array) -> Array:
            own, own_scale = weight[chosen[number]], None if scale is None else scale[chosen[number]]
            matrix = own.astype(x.dtype)
            if own_scale is not None and not per_row:
                matrix = dequantise(own, own_scale, x.dtype)
            rows = jnp.einsum("d,afd->af", tokens[number // k], matrix, preferred_element_type=jnp.float32)
            return (rows * own_scale[..., 0] if per_row and own_scale is not None else rows).reshape(-1)

        return _filled(form, chosen, e, a * f, tokens, product).reshape(b, t, k, a, f)

    return jax.lax.platform_dependent(x, weight, scale, cpu=one_by_one, tpu=in_turn, default=at_once)


def _one_expert(
    x: Float[Array, "d"], weight: Num[Array, "e r d"], expert: Int[Array, ""], scale: Array | None
) -> Float[Array, "r"]:
    """One token times the rows of one expert, on CPUs; `scale` is None, or has the scales of groups of this expert's
    rows."""
    parts = parts_of(x)
    if parts is not None and scale is None:
        if DOTS_FUSE and weight.dtype == jnp.bfloat16 and weight.shape[0] <= MOST_BRANCHES:
            return bfloat16_token(x, weight, expert, parts)
        if not DOTS_FUSE or (parts > 1 and weight.dtype in (jnp.int8, jnp.float32)):
            rows = weight.shape[1]
            return long_token(x, weight.reshape(-1, weight.shape[2]), expert * rows, rows, parts)
    return one_token(x, weight[expert], scale)


def _matmul_pairs(
    form: _Form, z: Array, experts: Array, weight: Array, scale: Array | None, row_scale: Array | None
) -> Float[Array, "b t d"]:
    def one_by_one(z: Array, weight: Array, row_scale: Array | None) -> Array:
        b, t, k, f = z.shape
        e, _, d = weight.shape
        each, chosen = z.reshape(b * t * k, f).astype(jnp.float32), experts.reshape(-1)

        def product(number: Array) -> Array:
            own, matrices, scales = here(each[number], weight, row_scale)
            expert = chosen[number]

            def rows(start: int, size: int) -> tuple[Array, Array | None]:
                # Rows of all experts: XLA would copy a part of one expert's matrix, after copying the whole matrix.
                # Seen in timings: 60 ms instead of 13 for four layers of eight experts in int8 (768 x 2,048).
                some = jax.lax.dynamic_slice_in_dim(matrices.reshape(e * f, d), expert * f + start, size)
                if scales is None:
                    return some, None
                return some, jax.lax.dynamic_slice_in_dim(scales.reshape(e * f, -1), expert * f + start, size)

            return sum_of_rows(own, rows)

        y = _filled(form, chosen, e, d, each, product).reshape(b, t, k, d)
        return _over_choices(_or_zero(form, y, experts, e), experts, scale)

    def at_once(z: Array, weight: Array, row_scale: Array | None) -> Array:
        rows = _chosen(weight, experts)
        if row_scale is None:
            matrix = rows.astype(jnp.float32)
        else:
            matrix = grouped(rows, _chosen(row_scale, experts)).reshape(rows.shape)
        products = matrix * z.astype(jnp.float32)[..., None]
        b, t, k, f, d = products.shape
        parts = math.gcd(f, max(ROW_PARTS // k, 1))
        sums = jnp.sum(products.reshape(b, t, k, parts, f // parts, d), axis=4)
        if scale is not None:
            sums = sums * _chosen(scale, experts)[:, :, :, None]
        # In two passes, as `griffin_jax.model.products` adds up rows.
        return jnp.sum(jax.lax.optimization_barrier(sums), axis=(2, 3))

    def in_turn(z: Array, weight: Array, row_scale: Array | None) -> Array:
        b, t, k, f = z.shape
        e, _, d = weight.shape
        each, chosen = z.reshape(b * t * k, f), experts.reshape(-1)

        def product(number: Array) -> Array:
            expert = chosen[number]
            own = weight[expert]
            matrix = own.astype(z.dtype) if row_scale is None else dequantise(own, row_scale[expert], z.dtype)
            return jnp.einsum("f,fd->d", each[number], matrix, preferred_element_type=jnp.float32)

        y = _filled(form, chosen, e, d, each, product).reshape(b, t, k, d)
        return _over_choices(_or_zero(form, y, experts, e), experts, scale)

    return jax.lax.platform_dependent(z, weight, row_scale, cpu=one_by_one, tpu=in_turn, default=at_once)


def _filled(
    form: _Form,
    chosen: Int[Array, "p"],
    count: int,
    width: int,
    given: Array,
    product: Callable[[Array], Float[Array, "d"]],
) -> Float[Array, "p d"]:
    """The results of `product` for all pairs, computed one after the other; missing choices get arbitrary values.

    Args:
        form: the form, which says whether choices are missing.
        chosen: number of the expert of each pair.
        count: number of experts.
        width: length of each result.
        given: the array that `product` reads; see `_empty`.
        product: function of the number of a pair.
    """

    def fill(pair: Array, y: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(y, product(pair)[None], pair, 0)

    y = _empty(chosen.shape[0], width, given)
    if not form.partial:
        return jax.lax.fori_loop(0, chosen.shape[0], fill, y)
    some = chosen < count
    order = jnp.argsort(~some, stable=True)
    return jax.lax.fori_loop(0, jnp.sum(some), lambda number, y: fill(order[number], y), y)


def _empty(rows: int, width: int, given: Array) -> Float[Array, "p d"]:
    """An array of arbitrary values, to be overwritten. It depends on `given`, since zeros of all layers would be in
    memory at once."""
    return jnp.broadcast_to(given[0, 0].astype(jnp.float32), (rows, width))


def _over_choices(
    y: Float[Array, "b t k d"], experts: Int[Array, "b t k"], scale: Float[Array, "e d"] | None
) -> Float[Array, "b t d"]:
    """The sum over the choices of each token, each multiplied by the scales of its expert, if there are any."""
    return jnp.sum(y if scale is None else y * _chosen(scale, experts), axis=2)


def _chosen(arrays: Array, experts: Int[Array, "b t k"]) -> Array:
    """The entries of an array (E, ...) that belong to the expert of each pair."""
    return jnp.take(arrays, experts, axis=0, mode="clip")


# ---- Many pairs ----


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Sorted:
    """Pairs in the order of their experts.

    Attributes:
        order: number of the pair at each place.
        counts: number of pairs of each expert; pairs whose choice is missing come after all others.
    """

    order: Int[Array, "p"]
    counts: Int[Array, "e"]

    @classmethod
    def of(cls, experts: Int[Array, "b t k"], count: int) -> _Sorted:
        chosen = experts.reshape(-1)
        counts = jnp.sum(chosen[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
        return cls(jnp.argsort(chosen, stable=True).astype(jnp.int32), counts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Blocks:
    """Sorted pairs in blocks, each of which has pairs of one expert only.

    Attributes:
        number: number of blocks.
        starts: the place at which each block begins. The last block of an expert may reach into the places of the next
            expert, whose own block is computed later.
        owners: number of the expert of each block.
        counts: how many pairs of each block belong to its expert.
    """

    number: Int[Array, ""]
    starts: Int[Array, "m"]
    owners: Int[Array, "m"]
    counts: Int[Array, "m"]

    @classmethod
    def of(cls, at: _Sorted, size: int) -> _Blocks:
        """Blocks of `size` pairs; the last block of each expert may have fewer."""
        pairs, experts = at.order.shape[0], at.counts.shape[0]
        blocks = -(-at.counts // size)
        ends = jnp.cumsum(blocks)
        number = jnp.arange(pairs // size + min(experts, pairs), dtype=jnp.int32)
        owners = jnp.minimum(jnp.searchsorted(ends, number, side="right"), experts - 1).astype(jnp.int32)
        before = (number - (ends - blocks)[owners]) * size
        starts = (jnp.cumsum(at.counts) - at.counts)[owners] + before
        return cls(ends[-1], starts, owners, jnp.minimum(at.counts[owners] - before, size))


_Product = Callable[[Array, Array, Array], Array]
"""A function of a block of pairs, the number of their expert, and the number of pairs in the block, which are its first
rows."""


def _through_blocks(
    given: Float[Array, "r n"], rows: Int[Array, "p"], at: _Sorted, product: _Product, width: int, size: int
) -> Float[Array, "q w"]:
    """Multiply each sorted pair by its expert's matrix, block by block.

    Args:
        given: the rows to multiply.
        rows: for each pair in the order of `at`, the number of its row in `given`.
        at: the order of the pairs.
        product: multiplies a block by its expert's matrix.
        width: number of columns of the result.
        size: the largest number of pairs of a block.

    Returns:
        One row for each pair in the order of `at`, followed by as many more rows as a block has.
    """
    # The last block may reach beyond the last pair.
    padded, blocks = given[jnp.pad(rows, (0, size))], _Blocks.of(at, size)

    def block(number: Array, y: Array) -> Array:
        start = blocks.starts[number]
        own = jax.lax.dynamic_slice_in_dim(padded, start, size)
        rows = product(own, blocks.owners[number], blocks.counts[number])
        return jax.lax.dynamic_update_slice_in_dim(y, rows, start, 0)

    return jax.lax.fori_loop(0, blocks.number, block, _empty(padded.shape[0], width, padded))


def _of_first(count: Array, product: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """`product` for the first `count` rows of a block, on CPUs; the other rows of the result are arbitrary.

    Programs have fixed shapes, so there is a branch for each size of `CPU_BLOCKS`.
    """
    size = jnp.searchsorted(jnp.asarray(CPU_BLOCKS), count)

    def of(size: int, rows: Array, matrix: Array) -> Array:
        return jnp.pad(product(rows[:size], matrix), ((0, rows.shape[0] - size), (0, 0)))

    return functools.partial(jax.lax.switch, size, [functools.partial(of, size) for size in CPU_BLOCKS])


def _linear_blocks(x: Array, experts: Array, weight: Array, scale: Array | None) -> Array:
    b, t, k = experts.shape
    e, a, f, d = weight.shape
    at = _Sorted.of(experts, e)
    rows = weight.reshape(e, a * f, d)
    row_scale = None if scale is None else scale.reshape(e, a * f, -1)
    per_row = scale is not None and scale.shape[-1] == 1
    inside = None if per_row else row_scale

    def on_cpu(tokens: Array, expert: Array, count: Array) -> Array:
        tokens, rows_, scales = here(tokens, rows, inside)
        product, own = _of_first(count, rows_first), rows_[expert]
        if own.dtype == jnp.float32:
            return product(tokens, own)
        return blocks_of_rows(tokens.astype(jnp.float32), own, None if scales is None else scales[expert], product)

    def as_it_is(tokens: Array, expert: Array, _: Array) -> Array:
        own = rows[expert] if inside is None else dequantise(rows[expert], inside[expert], x.dtype)
        return jnp.einsum("td,fd->tf", tokens, own.astype(x.dtype), preferred_element_type=jnp.float32)

    def ragged(tokens: Array) -> Array:
        own = rows.astype(x.dtype) if inside is None else dequantise(rows, inside, x.dtype)
        numbers = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
        )
        return jax.lax.ragged_dot_general(tokens, own, at.counts, numbers, preferred_element_type=jnp.float32)

    y = _by_platform(x.reshape(b * t, d), at.order // k, at, on_cpu, as_it_is, ragged, a * f)
    y = y.reshape(b, t, k, a, f)
    return y * _chosen(scale, experts)[..., 0] if per_row and scale is not None else y


def _matmul_blocks(
    form: _Form, z: Array, experts: Array, weight: Array, scale: Array | None, row_scale: Array | None
) -> Array:
    b, t, k, f = z.shape
    e, _, d = weight.shape
    at = _Sorted.of(experts, e)

    def on_cpu(pairs: Array, expert: Array, count: Array) -> Array:
        pairs, matrices, scales = here(pairs, weight, row_scale)
        product, own = _of_first(count, jnp.matmul), matrices[expert]
        if own.dtype == jnp.float32:
            return product(pairs, own)
        return blocks_of_sums(pairs.astype(jnp.float32), own, None if scales is None else scales[expert], product)

    def as_it_is(pairs: Array, expert: Array, _: Array) -> Array:
        own = weight[expert] if row_scale is None else dequantise(weight[expert], row_scale[expert], z.dtype)
        return jnp.einsum("tf,fd->td", pairs, own.astype(z.dtype), preferred_element_type=jnp.float32)

    def ragged(pairs: Array) -> Array:
        own = weight.astype(z.dtype) if row_scale is None else dequantise(weight, row_scale, z.dtype)
        return jax.lax.ragged_dot(pairs, own, at.counts, preferred_element_type=jnp.float32)

    y = _by_platform(z.reshape(b * t * k, f), at.order, at, on_cpu, as_it_is, ragged, d)
    return _over_choices(_or_zero(form, y.reshape(b, t, k, d), experts, e), experts, scale)


def _by_platform(
    given: Array,
    rows: Int[Array, "p"],
    at: _Sorted,
    on_cpu: _Product,
    as_it_is: _Product,
    ragged: Callable[[Array], Array],
    width: int,
) -> Float[Array, "p w"]:
    """Multiply each pair's row of `given` by its expert's matrix, and return the results in the original order of the
    pairs.

    Args:
        given: the rows to multiply.
        rows: for each pair in the order of `at`, the number of its row in `given`.
        at: the order of the pairs.
        on_cpu: multiplies a block on CPUs.
        as_it_is: multiplies a block on GPUs.
        ragged: multiplies all sorted rows at once on TPUs.
        width: number of columns of the result.
    """
    inverse = jnp.argsort(at.order)
    return jax.lax.platform_dependent(
        given,
        cpu=lambda given: _through_blocks(given, rows, at, on_cpu, width, CPU_BLOCKS[-1])[inverse],
        tpu=lambda given: ragged(given[rows])[inverse],
        default=lambda given: _through_blocks(given, rows, at, as_it_is, width, BLOCK_TOKENS)[inverse],
    )
