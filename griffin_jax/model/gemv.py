"""Products of one token, or a few, with matrices of integers as one kernel for NVIDIA GPUs.

    rows_times(x, weight, scale)       x times every row, summed over the last axis of the matrix
    sums_of_rows(x, weight, scale)     x @ weight, summed over the first axis of it

Decoding is as fast as these matrices are read, and XLA's products read integers of 8 bits at a half to three quarters
of what an H100's memory gives, and of 4 bits at a sixth to two fifths (jax 0.11.2; see docs/gpu.md). Here a thread
reads 16 bytes at a time, as 32-bit words of four or eight numbers each, which become floating without a conversion: the
bits of a number, put into the last digits of 2^23, are that float32 but for a constant (as in Marlin, arXiv
2408.11743). Where they are put into higher digits they stand for the number times a power of two, by which the factor
is divided.

They are written in Pallas and compiled by Triton, like `griffin_jax.model.flash`, and need it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from griffin_jax.model.weights import bits_of

WORD = 32
"""Bits of a word."""

MOST_TOKENS = 4
"""Tokens, at most: each takes a multiplication for every number, and more of them are worth tensor cores."""

WARPS = 4
"""Of each program. Loads of fewer numbers than these have threads need no exchange between them."""

ROWS, ROW_WORDS = 32, 64
"""Rows of a program of `rows_times`, and words of each that it reads at a time."""

COLUMN_WORDS, COLUMN_ROWS = 32, 32
"""Words of each row that belong to a program of `sums_of_rows`, and rows that it reads at a time."""

PROGRAMS = 1056
"""Programs that `sums_of_rows` is divided into, if there are rows enough: eight for each processor of an H100."""

_DIGITS = 16
"""Bits of a word, from its end or its middle on, that are digits of one float32, which has 23."""

_MAGIC = 0x4B000000
"""The bits of 2^23 as a float32, the last digit of which is worth 1."""


def fits(tokens: int, weight: Array, groups: int) -> bool:
    """Whether the kernels take so many tokens and this matrix, (..., D), with scales of so many groups of its rows."""
    if tokens > MOST_TOKENS or weight.dtype not in (jnp.int8, jnp.int4):
        return False
    words, left = divmod(weight.shape[-1] * bits_of(weight.dtype), WORD)
    if left or words % groups:
        return False
    # A group's words are an axis of a block, whose sizes are powers of two.
    of_group = words // groups
    return groups == 1 or (of_group & (of_group - 1) == 0 and of_group <= min(ROW_WORDS, COLUMN_WORDS))


def words_of(weight: Int[Array, "r d"]) -> Int[Array, "r w"]:
    """The same bits as words, low digits first. XLA does not touch them: seen in programs compiled for H100."""
    each = WORD // bits_of(weight.dtype)
    return jax.lax.bitcast_convert_type(weight.reshape(weight.shape[0], -1, each), jnp.int32)


def _numbers(words: Array, bits: int, interpret: bool) -> Iterator[Array]:
    """The numbers in each word, first to last, as float32; the one with number i times 2 ** `_power(i, bits)`."""
    for half in range(WORD // _DIGITS):
        digits = jax.lax.shift_right_logical(words, np.int32(half * _DIGITS)) if half else words
        for power in range(0, _DIGITS, bits):
            # With its first bit turned around, a signed number is an unsigned one but for a constant.
            sign = 1 << (power + bits - 1)
            own = _cut_out(digits, ((1 << bits) - 1) << power, _MAGIC | sign, interpret)
            yield jax.lax.bitcast_convert_type(own, jnp.float32) - np.float32(2**23 + sign)


def _power(number: int, bits: int) -> int:
    return number * bits % _DIGITS


def _cut_out(words: Array, mask: int, others: int, interpret: bool) -> Array:
    """(words & mask) ^ others, which is one instruction."""
    if interpret:
        return (words & np.int32(mask)) ^ np.int32(others)
    # Its two constants cannot both be part of the instruction, and are not put together otherwise.
    (found,) = triton.elementwise_inline_asm(
        f"lop3.b32 $0, $1, {mask}, $2, 0x6A;",
        args=[words, jnp.full(words.shape, others, jnp.int32)],
        constraints="=r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, words.dtype)],
    )
    return found


def _plus_product(total: Array, a: Array, b: Array, interpret: bool) -> Array:
    """total + a * b, rounded once, which Triton makes two operations of."""
    b = jnp.broadcast_to(b, a.shape)
    if interpret:
        return total + a * b
    (found,) = triton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, b, total],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, total.dtype)],
    )
    return found


def _loaded(ref: Any, at: tuple[Any, ...], there: Array) -> Array:
    return triton.load(ref.at[at], mask=there, other=0)


def _rows_kernel(
    x: Any, words: Any, scale: Any, y: Any, *, bits: int, size: int, step: int, of_group: int, interpret: bool
) -> None:
    """One program: all tokens times a block of rows. `of_group` words share a scale; all of a row if 0."""
    (rows, count), tokens = words.shape, x.shape[0]
    at_rows = pl.ds(0, rows)
    inside = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32) < size
    blocks = step // of_group if of_group else step
    plus = functools.partial(_plus_product, interpret=interpret)

    def block(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        first = number * step
        is_word = first + jnp.arange(step, dtype=jnp.int32) < count
        own = _loaded(words, (at_rows, pl.ds(first, step)), inside[:, None] & is_word[None])
        found = [jnp.zeros((rows, step), jnp.float32) for _ in sums] if of_group else list(sums)
        for place, numbers in enumerate(_numbers(own, bits, interpret)):
            for token in range(tokens):
                factor = _loaded(x, (np.int32(token), np.int32(place), pl.ds(first, step)), is_word)
                factor = factor.astype(jnp.float32) * np.float32(2.0 ** -_power(place, bits))
                found[token] = plus(found[token], numbers, factor[None])
        if not of_group:
            return tuple(found)
        at_groups = number * blocks + jnp.arange(blocks, dtype=jnp.int32)
        is_group = inside[:, None] & (at_groups < scale.shape[1])[None]
        own_scale = _loaded(scale, (at_rows, pl.ds(number * blocks, blocks)), is_group).astype(jnp.float32)
        of_groups = [jnp.sum(each.reshape(rows, blocks, of_group), axis=2) for each in found]
        return tuple(plus(total, each, own_scale) for total, each in zip(sums, of_groups, strict=True))

    start = tuple(jnp.zeros((rows, blocks), jnp.float32) for _ in range(tokens))
    sums = jax.lax.fori_loop(0, pl.cdiv(count, step), block, start)
    for token, total in enumerate(sums):
        out = jnp.sum(total, axis=1)
        if not of_group:
            out = out * _loaded(scale, (at_rows, np.int32(0)), inside).astype(jnp.float32)
        triton.store(y.at[np.int32(token), at_rows], out, mask=inside)


@functools.partial(jax.jit, static_argnames=("interpret",))
def rows_times(
    x: Float[Array, "t d"], weight: Int[Array, "r d"], scale: Float[Array, "r n"], *, interpret: bool = False
) -> Float[Array, "t r"]:
    """x times every row of a matrix of integers, in float32.

    Args:
        x: a few tokens; see `fits`.
        weight: the integers, of 8 or 4 bits.
        scale: one for each row, or one for each of n groups of neighbours in a row.
        interpret: run without a GPU, slowly.
    """
    bits, tokens = bits_of(weight.dtype), x.shape[0]
    words = words_of(weight)
    size, count = words.shape
    of_group = count // scale.shape[1] if scale.shape[1] > 1 else 0
    rows, step = min(ROWS, pl.next_power_of_2(size)), min(ROW_WORDS, pl.next_power_of_2(count))
    # Numbers that are at the same place in their words lie together.
    arranged = x.reshape(tokens, count, WORD // bits).swapaxes(1, 2)
    options = {"bits": bits, "size": size, "step": step, "of_group": of_group, "interpret": interpret}
    return pl.pallas_call(
        functools.partial(_rows_kernel, **options),
        grid=(pl.cdiv(size, rows),),
        in_specs=[
            pl.BlockSpec(arranged.shape, lambda i: (0, 0, 0)),
            pl.BlockSpec((rows, count), lambda i: (i, 0)),
            pl.BlockSpec((rows, scale.shape[1]), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((tokens, rows), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((tokens, size), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="rows_times",
    )(arranged, words, scale)


def _columns_kernel(
    x: Any, words: Any, scale: Any, y: Any,
    *, bits: int, size: int, count: int, share: int, step: int, of_group: int, interpret: bool,
) -> None:  # fmt: skip
    """One program: all tokens times a range of `share` rows, of which it has some words each; `of_group` as in
    `_rows_kernel`."""
    part, column = pl.program_id(0), pl.program_id(1)
    width, tokens, each = words.shape[1], x.shape[0], WORD // bits
    inside = column * width + jnp.arange(width, dtype=jnp.int32) < count
    start, stop = part * share, jnp.minimum((part + 1) * share, size)
    blocks = width // of_group if of_group else 1
    plus = functools.partial(_plus_product, interpret=interpret)

    def block(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        first = start + number * step
        is_row = first + jnp.arange(step, dtype=jnp.int32) < stop
        at_rows = pl.ds(first, step)
        own = _loaded(words, (at_rows, pl.ds(0, width)), is_row[:, None] & inside[None])
        own = own.reshape(step, blocks, width // blocks)
        factors = [
            _loaded(x, (np.int32(token), at_rows), is_row).astype(jnp.float32)[:, None] for token in range(tokens)
        ]
        if of_group:
            is_group = column * blocks + jnp.arange(blocks, dtype=jnp.int32) < scale.shape[1]
            own_scale = _loaded(scale, (at_rows, pl.ds(column * blocks, blocks)), is_row[:, None] & is_group[None])
            factors = [factor * own_scale.astype(jnp.float32) for factor in factors]
        found = list(sums)
        for place, numbers in enumerate(_numbers(own, bits, interpret)):
            for token, factor in enumerate(factors):
                found[token * each + place] = plus(found[token * each + place], numbers, factor[..., None])
        return tuple(found)

    zeros = tuple(jnp.zeros((step, blocks, width // blocks), jnp.float32) for _ in range(tokens * each))
    sums = jax.lax.fori_loop(0, pl.cdiv(stop - start, step), block, zeros)
    for number, total in enumerate(sums):
        token, place = divmod(number, each)
        out = jnp.sum(total, axis=0).reshape(width) * np.float32(2.0 ** -_power(place, bits))
        triton.store(y.at[np.int32(token), pl.ds(0, width), np.int32(place)], out, mask=inside)


@functools.partial(jax.jit, static_argnames=("interpret",))
def sums_of_rows(
    x: Float[Array, "t k"],
    weight: Int[Array, "k d"],
    scale: Float[Array, "k n"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "t d"]:
    """x @ weight of integers, in float32.

    Ranges of rows are added up side by side, and the sums of the ranges by XLA.

    Args:
        x: a few tokens; see `fits`.
        weight: the integers, of 8 or 4 bits.
        scale: one for each of n groups of neighbours in a row; None for none.
        interpret: run without a GPU, slowly.
    """
    bits, tokens = bits_of(weight.dtype), x.shape[0]
    words = words_of(weight)
    size, count = words.shape
    # Scales of whole rows are factors of x.
    if scale is not None and scale.shape[1] == 1:
        x, scale = x * scale[:, 0].astype(jnp.float32), None
    of_group = 0 if scale is None else count // scale.shape[1]
    width, step = min(COLUMN_WORDS, pl.next_power_of_2(count)), min(COLUMN_ROWS, pl.next_power_of_2(size))
    columns = pl.cdiv(count, width)
    share = step * math.ceil(size / step / max(PROGRAMS // columns, 1))
    parts = pl.cdiv(size, share)
    scales = jnp.zeros((1, 1), jnp.float16) if scale is None else scale
    options = {"bits": bits, "size": size, "count": count, "share": share, "step": step, "of_group": of_group}
    sums = pl.pallas_call(
        functools.partial(_columns_kernel, **options, interpret=interpret),
        grid=(parts, columns),
        in_specs=[
            pl.BlockSpec(x.shape, lambda p, c: (0, 0)),
            pl.BlockSpec((size, width), lambda p, c: (0, c)),
            pl.BlockSpec(scales.shape, lambda p, c: (0, 0)),
        ],
        out_specs=pl.BlockSpec((None, tokens, width, WORD // bits), lambda p, c: (p, 0, c, 0)),
        out_shape=jax.ShapeDtypeStruct((parts, tokens, count, WORD // bits), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="sums_of_rows",
    )(x, words, scales)
    return jnp.sum(sums.reshape(parts, tokens, -1), axis=0)
