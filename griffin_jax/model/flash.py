"""Attention as one kernel for NVIDIA GPUs: scores, softmax and mixed values of a block never leave the processor.

    decode_step(...)       one token of each sequence; also writes its key and value into the cache
    read_few(...)          some tokens, as the full model reads drafts; the cache holds their keys and values already
    read_prompt(...)       many tokens, likewise

They are written in Pallas and compiled by Triton, and read the cache as it lies. Which slots a query may read follows
from positions, as in `griffin_jax.model.positions.attention_mask`; that of a token with no position (`EMPTY`) means
nothing. The softmax goes on from block to block (FlashAttention, arXiv 2205.14135); for few tokens, where there are
fewer heads than processors, ranges of slots are read side by side and put together at the end (Flash-Decoding).

Without these kernels XLA (jax 0.10.2) makes seven of a token's attention, and writes the scores of a prompt to memory.
Seen in programs compiled for H100. JAX 0.12 announces that a later version will lack Triton's backend of Pallas. There
attention is computed as on all other platforms.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from griffin_jax.model.cache import EMPTY
from griffin_jax.model.norm import softcap
from griffin_jax.model.positions import attention_mask

BLOCK_SLOTS, FEWEST_SLOTS = 64, 16
"""Slots of the cache that a program reads at a time, at most and at least; tensor cores take no fewer."""

SHARED_MEMORY = 101_376
"""Bytes of shared memory that a program can have on every GPU that Triton compiles for. Compute capabilities 8.6,
8.9 and 12.0 have no more; A100 and H100 do."""

DECODE_PROGRAMS = 264
"""Programs that `decode_step` is divided into, if there are not more heads: two for each processor of an H100."""

PROMPT_QUERIES = 128
"""Tokens of a block of `read_prompt`; half as many for heads of more than 128."""

DOT_ROWS = 16
"""Rows that a product on tensor cores has at least."""

FEW_ROWS, FEW_NUMBERS = 128, 128 * 128
"""The most rows that a program of `read_few` has, and the most numbers in all of them: the sums of more do not fit into
the registers of its threads. Seen in machine code for H100 and RTX 4090 (jax 0.10.2): with twice as many numbers, a
kilobyte and more of each thread is in memory."""

VECTOR = 8
"""Numbers of 16 bits that a thread loads together."""

MASKED = -1e30
"""The score of a slot that may not be read. Not an infinity, of which differences are NaN."""

TINY = float(jnp.finfo(jnp.float32).tiny)
"""What is divided by where nothing may be read."""

_Options = tuple[float, float | None, int, bool]
"""scale, cap, window and interpret, as of `read_prompt`."""

_Softmax = tuple[Array, Array, Array]
"""The largest score so far, the sum of weights and the mixed values, of each row."""


def _product(a: Array, b: Array) -> Array:
    return triton.dot(a, b)


def _readable(slots: Array, query: Array, window: int) -> Array:
    """`attention_mask` of positions that broadcast."""
    readable = (slots != EMPTY) & (slots <= query)
    return readable & (slots > query - window) if window else readable


def _capped(scores: Array, cap: float | None) -> Array:
    if cap is None:
        return scores
    # Triton has no tanh.
    return cap * (1.0 - 2.0 / (jnp.exp(2.0 * scores / cap) + 1.0))


def _nothing_seen(rows: int, dims: int) -> _Softmax:
    """The softmax before the first block."""
    largest, total = jnp.full((rows,), MASKED, jnp.float32), jnp.zeros(rows, jnp.float32)
    return largest, total, jnp.zeros((rows, dims), jnp.float32)


def _seen(state: _Softmax, scores: Array, values: Array) -> _Softmax:
    """The softmax after a block of slots, of which `MASKED` ones count nothing."""
    largest, total, mixed = state
    above = jnp.maximum(largest, jnp.max(scores, axis=1))
    kept, weights = jnp.exp(largest - above), jnp.exp(scores - above[:, None])
    weights = jnp.where(scores > MASKED, weights, 0.0)
    total = total * kept + jnp.sum(weights, axis=1)
    return above, total, mixed * kept[:, None] + _product(weights.astype(values.dtype), values)


def _below(first: Array, count: int, stop: int | Array, there: int) -> Array:
    """Which of the numbers from `first` on are below `stop`, or below the next multiple of `VECTOR` where an array of
    `there` numbers has such.

    A thread loads neighbours together only if Triton sees that one condition holds for all of them. Seen in machine
    code for H100 (jax 0.11.2): with a condition for each slot `decode_step` loads its keys two bytes at a time and
    waits for them, with this one 16 bytes at a time and ahead.
    """
    each = np.int32(math.gcd(there, VECTOR))
    numbers = jax.lax.div(first, each) + jax.lax.div(jnp.arange(count, dtype=jnp.int32), each)
    return numbers < (stop + each - 1) // each


def _block_slots(rows: int, dims: int) -> int:
    """Slots that a program with this many queries (rows) of this many dimensions reads at a time.

    Triton (jax 0.10.2) holds the queries, the keys and values of the slots and the weights in shared memory, in 16 bits
    each, and the positions in 32. Seen in programs compiled for RTX 4090: 106,752 bytes with 64 queries, 64 slots and
    256 dimensions, which is more than there is. For H100 it holds keys and values twice, and there is room for that.
    """
    slots = BLOCK_SLOTS
    while slots > FEWEST_SLOTS and 2 * (rows * (dims + slots) + 2 * slots * dims) + 4 * slots > SHARED_MEMORY:
        slots //= 2
    return slots


def _over_slots(
    q: Array, at: Array, keys: Any, values: Any, positions: Any, start: int | Array, count: Array, stop: Array,
    state: _Softmax, *, size: int, scale: float, cap: float | None, window: int,
) -> _Softmax:  # fmt: skip
    """The softmax after `count` slots from `start` on, of which those before `stop` are filled.

    Args:
        q: queries, (rows, dims).
        at: their positions, which broadcast to (rows, 1).
        keys: of the cache; this and the next two are references.
        values: likewise.
        positions: likewise.
        start: number of the first slot.
        count: of slots.
        stop: number of the first slot that holds nothing.
        state: the softmax before.
        size: dimensions of a head that are there.
        scale: as of `read_prompt`, like the rest.
        cap: likewise.
        window: likewise.
    """
    rows, dims = q.shape
    slots = _block_slots(rows, dims)
    at_dims, is_dim = pl.ds(0, dims), _below(jnp.int32(0), dims, size, size)

    def block(number: Array, state: _Softmax) -> _Softmax:
        first = start + number * slots
        at_slots = pl.ds(first, slots)
        inside = first + jnp.arange(slots, dtype=jnp.int32) < stop
        places = triton.load(positions.at[at_slots], mask=inside, other=EMPTY)
        readable = _readable(places[None], at, window)
        # Keys of slots that hold nothing do no harm: their scores are masked.
        loaded = _below(first, slots, stop, keys.shape[1])

        def read(state: _Softmax) -> _Softmax:
            k = triton.load(keys.at[at_dims, at_slots], mask=is_dim[:, None] & loaded[None], other=0)
            v = triton.load(values.at[at_slots, at_dims], mask=inside[:, None] & is_dim[None], other=0)
            scores = _capped(_product(q, k) * scale, cap)
            return _seen(state, jnp.where(readable, scores, MASKED), v)

        if not window:
            return read(state)
        # Windows leave out whole blocks, which are not read.
        return jax.lax.cond(jnp.sum(readable.astype(jnp.int32)) > 0, read, lambda state: state, state)

    return jax.lax.fori_loop(0, pl.cdiv(count, slots), block, state)


def _decode_kernel(
    token: Any, keys: Any, values: Any, position: Any, positions: Any, cursor: Any,
    mixed: Any, largest: Any, total: Any, new_keys: Any, new_values: Any,
    *, heads: int, size: int, scale: float, cap: float | None, window: int, share: int,
) -> None:  # fmt: skip
    """One program: all queries of a key/value head, and a range of `share` slots.

    Blocks have as many rows and dimensions as products take; those beyond `heads` and `size` are not there.
    """
    part = pl.program_id(2)
    rows, dims = mixed.shape
    at_dims = pl.ds(0, dims)
    is_head, is_dim = jnp.arange(rows, dtype=jnp.int32) < heads, jnp.arange(dims, dtype=jnp.int32) < size
    at, now = position[0], cursor[0]
    q = triton.load(token.at[pl.ds(0, rows), at_dims], mask=is_head[:, None] & is_dim[None], other=0)
    own_key = triton.load(token.at[np.int32(heads), at_dims], mask=is_dim, other=0)
    own_value = triton.load(token.at[np.int32(heads + 1), at_dims], mask=is_dim, other=0)

    # The token reads itself in the first range only, which also writes it. Its slot is `EMPTY` for all others.
    is_first = part == 0
    own = jnp.sum(q.astype(jnp.float32) * own_key.astype(jnp.float32)[None], axis=1)
    reads_itself = jnp.broadcast_to(is_first & (at != EMPTY), (rows,))
    score = jnp.where(reads_itself, _capped(own * scale, cap), MASKED)
    mix = jnp.where(reads_itself[:, None], own_value.astype(jnp.float32)[None], 0.0)
    state = score, jnp.where(reads_itself, 1.0, 0.0), mix

    options = {"size": size, "scale": scale, "cap": cap, "window": window}
    left = jnp.clip(now - part * share, 0, share)
    state = _over_slots(q, at, keys, values, positions, part * share, left, now, state, **options)

    triton.store(mixed.at[pl.ds(0, rows), at_dims], state[2], mask=is_head[:, None] & is_dim[None])
    triton.store(largest.at[pl.ds(0, rows)], state[0], mask=is_head)
    triton.store(total.at[pl.ds(0, rows)], state[1], mask=is_head)

    @pl.when(is_first)
    def _() -> None:
        triton.store(new_keys.at[at_dims, now], own_key, mask=is_dim)
        triton.store(new_values.at[now, at_dims], own_value, mask=is_dim)


@functools.partial(jax.jit, static_argnames=("scale", "cap", "window", "interpret"))
def decode_step(
    query: Float[Array, "b g r h"],
    key: Float[Array, "b g h"],
    value: Float[Array, "b g h"],
    keys: Float[Array, "b g h s"],
    values: Float[Array, "b g s h"],
    position: Int[Array, "b"],
    positions: Int[Array, "b s"],
    cursor: Int[Array, ""],
    *,
    scale: float,
    cap: float | None = None,
    window: int = 0,
    interpret: bool = False,
) -> tuple[Float[Array, "b g r h"], Float[Array, "b g h s"], Float[Array, "b g s h"]]:
    """Attention of one token of each sequence to itself and to the cache, and the cache with this token in it.

    Args:
        query: queries of the token, in a floating dtype of 16 bits.
        key: its keys, of the same dtype.
        value: its values.
        keys: keys of the cache.
        values: values of the cache.
        position: position of the token; `EMPTY` for one that is padding.
        positions: position of each slot; `EMPTY` from the cursor on.
        cursor: the slot that the token is written to.
        scale: factor of the scores.
        cap: soft cap of the scores, if there is one.
        window: tokens that a query reads back, itself included; 0 for all.
        interpret: run without a GPU, slowly.

    Returns:
        The mixed values, and the cache with the token.
    """
    b, g, r, h = query.shape
    slots = keys.shape[3]
    parts, share = _ranges(slots, b * g)
    rows, dims = max(DOT_ROWS, pl.next_power_of_2(r)), pl.next_power_of_2(h)

    # As one array they are computed in one kernel.
    token = jnp.concatenate([query, key[:, :, None], value[:, :, None]], axis=2)
    row = pl.BlockSpec((1,), lambda i, j, p: (i,))
    cache = [_of_head(dims, slots), _of_head(slots, dims)]
    options = {"heads": r, "size": h, "scale": scale, "cap": cap, "window": window, "share": share}
    mixed, largest, total, keys, values = pl.pallas_call(
        functools.partial(_decode_kernel, **options),
        grid=(b, g, parts),
        in_specs=[
            _of_head(max(rows, r + 2), dims), *cache,
            row, pl.BlockSpec((None, slots), lambda i, j, p: (i, 0)), pl.BlockSpec((1,), lambda i, j, p: (0,)),
        ],
        out_specs=[_of_range(rows, dims), _of_range(rows), _of_range(rows), *cache],
        out_shape=[
            *_of_ranges(b, g, parts, r, h),
            jax.ShapeDtypeStruct(keys.shape, keys.dtype),
            jax.ShapeDtypeStruct(values.shape, values.dtype),
        ],
        input_output_aliases={1: 3, 2: 4},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(token, keys, values, position, positions, cursor[None])  # fmt: skip
    return _joined(mixed, largest, total, query, interpret), keys, values


def _of_head(*shape: int, blocks: int = 1) -> pl.BlockSpec:
    """What a program reads of an array (B, G, ...): all that belongs to its sequence and key/value head. Each head has
    as many programs as there are blocks of its rows."""
    return pl.BlockSpec((None, None, *shape), lambda i, j, p: (i, j // blocks, *[0] * len(shape)))


def _of_range(*shape: int, blocks: int = 1) -> pl.BlockSpec:
    """What a program writes of an array (B, G, ranges, ...): all that belongs to its range of slots, too."""
    return pl.BlockSpec((None, None, None, *shape), lambda i, j, p: (i, j // blocks, p, *[0] * len(shape)))


def _of_ranges(b: int, g: int, parts: int, r: int, h: int) -> list[jax.ShapeDtypeStruct]:
    """`_Softmax` of each range, as it is put together by `_joined`: mixed values, largest scores, sums of weights."""
    return [jax.ShapeDtypeStruct((b, g, parts, *shape), jnp.float32) for shape in ((r, h), (r,), (r,))]


def _ranges(slots: int, heads: int) -> tuple[int, int]:
    """Into how many ranges the slots are divided where there are so many key/value heads, and the slots of each."""
    parts = min(-(-DECODE_PROGRAMS // heads), -(-slots // (2 * BLOCK_SLOTS)))
    share = BLOCK_SLOTS * math.ceil(slots / parts / BLOCK_SLOTS)
    return math.ceil(slots / share), share


def _joined(
    mixed: Float[Array, "b g p r h"],
    largest: Float[Array, "b g p r"],
    total: Float[Array, "b g p r"],
    query: Float[Array, "b g r h"],
    interpret: bool,
) -> Float[Array, "b g r h"]:
    """The mixed values of all ranges together, of the dtype of the queries."""
    b, g, parts, r, h = mixed.shape
    block_parts, dims = pl.next_power_of_2(parts), pl.next_power_of_2(h)
    return pl.pallas_call(
        functools.partial(_join_kernel, parts=parts, size=h),
        grid=(b, g, r),
        in_specs=[
            pl.BlockSpec((None, None, block_parts, None, dims), lambda i, j, p: (i, j, 0, p, 0)),
            *[pl.BlockSpec((None, None, block_parts, None), lambda i, j, p: (i, j, 0, p))] * 2,
        ],
        out_specs=pl.BlockSpec((None, None, None, dims), lambda i, j, p: (i, j, p, 0)),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="attention_join",
    )(mixed, largest, total)


def _join_kernel(mixed: Any, largest: Any, total: Any, joined: Any, *, parts: int, size: int) -> None:
    """One program: the ranges of slots of one query head, put together."""
    rows, dims = mixed.shape
    is_part, is_dim = jnp.arange(rows, dtype=jnp.int32) < parts, jnp.arange(dims, dtype=jnp.int32) < size
    at_parts, at_dims = pl.ds(0, rows), pl.ds(0, dims)
    scores = triton.load(largest.at[at_parts], mask=is_part, other=MASKED)
    weights = jnp.exp(scores - jnp.max(scores))
    divisor = jnp.sum(triton.load(total.at[at_parts], mask=is_part, other=0) * weights)
    each = triton.load(mixed.at[at_parts, at_dims], mask=is_part[:, None] & is_dim[None], other=0)
    out = jnp.sum(each * weights[:, None], axis=0) / jnp.maximum(divisor, TINY)
    triton.store(joined.at[at_dims], out.astype(joined.dtype), mask=is_dim)


def _few_kernel(
    query: Any, keys: Any, values: Any, queries: Any, positions: Any, cursor: Any, mixed: Any, largest: Any, total: Any,
    *, block: int, tokens: int, size: int, scale: float, cap: float | None, window: int, share: int,
) -> None:  # fmt: skip
    """One program: a block of the rows of a key/value head, and a range of `share` slots.

    The rows are all tokens of all query heads of the key/value head; `size` as in `_decode_kernel`.
    """
    start = pl.program_id(2) * share
    rows, dims = mixed.shape
    first = jax.lax.rem(pl.program_id(1), np.int32(pl.cdiv(rows, block))) * block
    at_rows, at_dims = pl.ds(first, block), pl.ds(0, dims)
    is_row, is_dim = first + jnp.arange(block, dtype=jnp.int32) < rows, jnp.arange(dims, dtype=jnp.int32) < size
    q = triton.load(query.at[at_rows, at_dims], mask=is_row[:, None] & is_dim[None], other=0)
    at = triton.load(queries.at[at_rows], mask=is_row, other=EMPTY)
    stop = cursor[0] + tokens

    options = {"size": size, "scale": scale, "cap": cap, "window": window}
    left, state = jnp.clip(stop - start, 0, share), _nothing_seen(block, dims)
    state = _over_slots(q, at[:, None], keys, values, positions, start, left, stop, state, **options)
    triton.store(mixed.at[at_rows, at_dims], state[2], mask=is_row[:, None] & is_dim[None])
    triton.store(largest.at[at_rows], state[0], mask=is_row)
    triton.store(total.at[at_rows], state[1], mask=is_row)


@functools.partial(jax.jit, static_argnames=("scale", "cap", "window", "interpret"))
def read_few(
    query: Float[Array, "b n t h"],
    keys: Float[Array, "b g h s"],
    values: Float[Array, "b g s h"],
    queries: Int[Array, "b t"],
    positions: Int[Array, "b s"],
    cursor: Int[Array, ""],
    *,
    scale: float,
    cap: float | None = None,
    window: int = 0,
    interpret: bool = False,
) -> Float[Array, "b n t h"]:
    """`read_prompt` for few tokens: a program reads those of all query heads of a key/value head, or a block of these
    rows where they are many.

    It has no gradients.
    """
    b, n, t, h = query.shape
    g, slots = keys.shape[1], keys.shape[3]
    r, dims = n // g * t, pl.next_power_of_2(h)
    block = min(max(DOT_ROWS, pl.next_power_of_2(r)), FEW_ROWS, FEW_NUMBERS // dims)
    blocks = pl.cdiv(r, block)
    parts, share = _ranges(slots, b * g * blocks)
    grouped = query.reshape(b, g, r, h)

    of_head, of_range = functools.partial(_of_head, blocks=blocks), functools.partial(_of_range, blocks=blocks)
    row = functools.partial(pl.BlockSpec, index_map=lambda i, j, p: (i, 0))
    options = {"block": block, "tokens": t, "size": h, "scale": scale, "cap": cap, "window": window, "share": share}
    mixed, largest, total = pl.pallas_call(
        functools.partial(_few_kernel, **options),
        grid=(b, g * blocks, parts),
        in_specs=[
            of_head(r, dims), of_head(dims, slots), of_head(slots, dims), row((None, r)), row((None, slots)),
            pl.BlockSpec((1,), lambda i, j, p: (0,)),
        ],
        out_specs=[of_range(r, dims), of_range(r), of_range(r)],
        out_shape=_of_ranges(b, g, parts, r, h),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="few_attention",
    )(grouped, keys, values, jnp.tile(queries, (1, n // g)), positions, cursor[None])  # fmt: skip
    return _joined(mixed, largest, total, grouped, interpret).reshape(query.shape)


def _prompt_kernel(
    query: Any, keys: Any, values: Any, queries: Any, positions: Any, cursor: Any, mixed: Any,
    *, size: int, scale: float, cap: float | None, window: int, block: int,
) -> None:  # fmt: skip
    """One program: a block of tokens of a query head; `size` as in `_decode_kernel`."""
    start = pl.program_id(2) * block
    tokens, dims = query.shape
    at_dims, at_tokens = pl.ds(0, dims), pl.ds(start, block)
    is_token, is_dim = start + jnp.arange(block, dtype=jnp.int32) < tokens, jnp.arange(dims, dtype=jnp.int32) < size
    filled = is_token[:, None] & is_dim[None]
    q = triton.load(query.at[at_tokens, at_dims], mask=filled, other=0)
    at = triton.load(queries.at[at_tokens], mask=is_token, other=EMPTY)
    # Of the slots from the cursor on, the first of a block's tokens has that of its number, and so on.
    stop = cursor[0] + jnp.minimum(start + block, tokens)

    options = {"size": size, "scale": scale, "cap": cap, "window": window}
    state = _nothing_seen(block, dims)
    _, total, out = _over_slots(q, at[:, None], keys, values, positions, 0, stop, stop, state, **options)
    out = out / jnp.maximum(total, TINY)[:, None]
    triton.store(mixed.at[at_tokens, at_dims], out.astype(mixed.dtype), mask=filled)


@functools.partial(jax.jit, static_argnames=("scale", "cap", "window", "interpret"))
def read_prompt(
    query: Float[Array, "b n t h"],
    keys: Float[Array, "b g h s"],
    values: Float[Array, "b g s h"],
    queries: Int[Array, "b t"],
    positions: Int[Array, "b s"],
    cursor: Int[Array, ""],
    *,
    scale: float,
    cap: float | None = None,
    window: int = 0,
    interpret: bool = False,
) -> Float[Array, "b n t h"]:
    """Attention of T tokens to themselves and to all before them, which are in the cache.

    Args:
        query: queries, in a floating dtype of 16 bits.
        keys: keys of the cache; those of the T tokens are in the slots from the cursor on.
        values: values of the cache.
        queries: position of each token; `EMPTY` for padding.
        positions: position of each slot, those of the T tokens included.
        cursor: slot of the first of the T tokens.
        scale: factor of the scores.
        cap: soft cap of the scores, if there is one.
        window: tokens that a query reads back, itself included; 0 for all.
        interpret: run without a GPU, slowly.

    Returns:
        The mixed values. Their gradients, with respect to queries, keys and values, are those of XLA's operations,
        which write the scores to memory.
    """
    options = scale, cap, window, interpret
    return _differentiable(options, query, keys, values, queries, positions, cursor)


def _scores_in_memory(
    options: _Options, query: Array, keys: Array, values: Array, queries: Array, positions: Array
) -> Array:
    """`read_prompt` in operations of XLA."""
    scale, cap, window, _ = options
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, *query.shape[2:])
    scores = jnp.einsum("bgrth,bghs->bgrts", grouped, keys, preferred_element_type=jnp.float32) * scale
    readable = attention_mask(queries, positions, window)
    weights = jax.nn.softmax(jnp.where(readable, softcap(scores, cap), MASKED), axis=-1, where=readable)
    mixed = jnp.einsum("bgrts,bgsh->bgrth", weights.astype(query.dtype), values, preferred_element_type=jnp.float32)
    return mixed.reshape(query.shape).astype(query.dtype)


def _read_prompt(
    options: _Options, query: Array, keys: Array, values: Array, queries: Array, positions: Array, cursor: Array
) -> Array:
    scale, cap, window, interpret = options
    b, n, t, h = query.shape
    g, slots = keys.shape[1], keys.shape[3]
    block, dims = PROMPT_QUERIES if h <= 128 else PROMPT_QUERIES // 2, pl.next_power_of_2(h)

    def cached(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda i, j, p: (i, j // (n // g), 0, 0))

    own = pl.BlockSpec((None, None, t, dims), lambda i, j, p: (i, j, 0, 0))
    row = functools.partial(pl.BlockSpec, index_map=lambda i, j, p: (i, 0))
    return pl.pallas_call(
        functools.partial(_prompt_kernel, size=h, scale=scale, cap=cap, window=window, block=block),
        grid=(b, n, pl.cdiv(t, block)),
        in_specs=[
            own, cached(dims, slots), cached(slots, dims), row((None, t)), row((None, slots)),
            pl.BlockSpec((1,), lambda i, j, p: (0,)),
        ],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=triton.CompilerParams(num_warps=8 if h >= 128 else 4, num_stages=2),
        interpret=interpret,
        name="prompt_attention",
    )(query, keys, values, queries, positions, cursor[None])  # fmt: skip


def _forwards(
    options: _Options, query: Array, keys: Array, values: Array, queries: Array, positions: Array, cursor: Array
) -> tuple[Array, tuple[Array, ...]]:
    mixed = _read_prompt(options, query, keys, values, queries, positions, cursor)
    return mixed, (query, keys, values, queries, positions)


def _backwards(options: _Options, operands: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    query, keys, values, queries, positions = operands

    def again(query: Array, keys: Array, values: Array) -> Array:
        return _scores_in_memory(options, query, keys, values, queries, positions)

    return *jax.vjp(again, query, keys, values)[1](gradient), None, None, None


_differentiable = jax.custom_vjp(_read_prompt, nondiff_argnums=(0,))
_differentiable.defvjp(_forwards, _backwards)
