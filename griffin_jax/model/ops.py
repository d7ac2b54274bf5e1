"""Operations that must be written in a special way for XLA to make them fast, small or local.

Each of them computes what its plain form computes. The docstrings say what XLA makes of the plain form, with which
version and on which platform, and how that was seen, so that the special form can be removed once XLA does better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num

from griffin_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS, dividing, mesh_of


def lookup(table: Num[Array, "v e"], tokens: Int[Array, "b t"]) -> Num[Array, "b t e"]:
    """The rows of `table` for these tokens; a single token is looked up twice.

    XLA for GPUs (jax 0.10.2) turns a single look-up into a slice. If the table is divided by its rows, XLA gathers it
    on every device to slice it. Seen in programs compiled for eight GPUs: an all-gather of the table for one token, an
    all-reduce of the looked-up rows for two.
    """
    b, t = tokens.shape
    return table[tokens] if b * t > 1 else table[jnp.broadcast_to(tokens, (2, 1))][:1]


def of_one_row(function: Callable[[Array], Array], x: Float[Array, "1 *n"]) -> tuple[Array, Array]:
    """x and function(x), for a function that treats each row separately and an x of one row. In 16-bit dtypes, GPUs
    compute two equal rows.

    XLA for GPUs (jax 0.10.2) makes one kernel of a norm of several rows, but two of a norm of a single row: one for the
    sum of squares and one for the rest. Seen in programs compiled for H100. The second row is written where x is
    computed. Callers must go on with the x that is returned: otherwise XLA computes x a second time, with all sums that
    led to it.
    """

    if x.dtype.itemsize > 2:
        # CPUs compute in these dtypes, and a choice of platforms around each norm makes int8 models a seventh slower
        # there. Seen in timings of decoding.
        return x, function(x)

    def twice(x: Array) -> tuple[Array, Array]:
        rows = jax.lax.optimization_barrier(jnp.broadcast_to(x, (2, *x.shape[1:])))
        return rows[:1], function(rows)[:1]

    return jax.lax.platform_dependent(x, cuda=twice, default=lambda x: (x, function(x)))


def with_gradients_of(plain: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel, which has no gradients, with the gradients of a function that computes the same in XLA's operations.

    Args:
        plain: the function in XLA's operations.
        kernel: the kernel, with the same arguments and results.
    """
    both = jax.custom_vjp(kernel)
    both.defvjp(
        lambda *operands: (kernel(*operands), operands),
        lambda operands, gradients: jax.vjp(plain, *operands)[1](gradients),
    )
    return both


def ordered_after(
    read: Float[Array, "b g t h"], *writes: Float[Array, "b g t h"]
) -> tuple[Float[Array, "b g t h"], ...]:
    """Return the arrays `writes` with the same values, but depending on `read`.

    XLA (jax 0.10.2) copies a whole cache at every step if nothing orders the write into it after the reads. An
    optimisation barrier does not help, since it is dropped before copies are decided on. A data dependency does: zero
    times a number is not folded away, since it is NaN for infinities. Seen in the compiled decode loop on CPUs: copies
    of every layer's keys and values without the dependency and with a barrier, none with the dependency.
    """
    return tuple(write + 0 * read for write in writes)


def together(x: Any, observed: Any) -> tuple[Any, Any]:
    """Return the same pytrees, and make GPUs go on with x only after they have computed `observed`.

    XLA for GPUs (jax 0.11.2) computes what nothing waits for at the end. Seen in programs compiled for H100: what
    observers compute from each layer's z comes after the last layer, and all z stay in memory until then, 28 MB for
    each layer of Llama-2-13B and 1,024 tokens.
    """
    return jax.lax.platform_dependent(
        x, observed, cuda=lambda *arrays: jax.lax.optimization_barrier(arrays), default=lambda *arrays: arrays
    )


def computed_once(*arrays: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], ...]:
    """Return the same arrays, written into a table that every use reads.

    Otherwise XLA's CPU code (jax 0.10.2) fuses cheap-looking operations, such as cosines, into everything that uses
    them, and computes them again for the queries and the keys of every layer. Seen in compiled prefill and decoding:
    with the table one fusion has a cosine, without it two for each layer do.
    """
    table = jnp.zeros((len(arrays), *arrays[0].shape), arrays[0].dtype)
    for number, array in enumerate(arrays):
        table = table.at[number].set(array)
    return tuple(table[number] for number in range(len(arrays)))


def sum_over_tokens(values: Float[Array, "b t f"], real: Bool[Array, "b t"]) -> Float[Array, "b f"]:
    """The sum of float32 `values` over the real tokens, written as a product with ones and zeros.

    XLA's CPU code (jax 0.10.2) sums over a middle axis many times slower than it multiplies matrices. Seen in timings
    of prefill.

    Args:
        values: a value for each token and neuron.
        real: which tokens are real; the others are padding.
    """
    return jnp.einsum("bt,btf->bf", real.astype(jnp.float32), values, precision=jax.lax.Precision.HIGHEST)


TOKENS_OF_A_SUM = 16
"""Tokens that `sum_in_two_steps` adds up in each sum of the first step: fewer than 32, so that XLA starts a thread for
each sum."""


def sum_in_two_steps(values: Float[Array, "b t f"]) -> Float[Array, "b f"]:
    """The sum over all tokens, written as sums of a few tokens each and the sum of these; meant for GPUs.

    XLA for GPUs (jax 0.11.2) sums 1,024 tokens in one reduction of columns, whose parallelism is the number of neurons.
    Seen in programs compiled for H100. The barrier keeps XLA from joining both steps into one sum. The first sums pass
    it as rows; otherwise they would be written transposed, or gathered from all devices of a mesh.
    """
    b, t, f = values.shape
    size = min(t, TOKENS_OF_A_SUM)
    padded = jnp.pad(values, ((0, 0), (0, -t % size), (0, 0)))
    sums = jnp.sum(padded.reshape(b, -1, size, f), axis=2)
    written = jax.lax.optimization_barrier(sums.reshape(-1, f))
    return jnp.sum(written.reshape(sums.shape), axis=1)


def take_rows(weight: Array, indices: Int[Array, "*b k"], axis: int) -> Array:
    """`jnp.take` along `axis`, 0 or 1; an index outside of the axis takes the nearest row.

    XLA's CPU code (jax 0.10.2) gathers along the first axis twice as fast as along the second, so on CPUs a gather
    along the second axis is done separately for each entry of the first. Seen in timings of pruning. Other platforms
    gather at once, since on a mesh of GPUs the parts took more memory; seen in the sizes of compiled programs.

    Args:
        weight: the array, whose `axis` counts rows.
        indices: numbers of the rows to take.
        axis: 0 or 1.
    """

    def at_once(weight: Array, indices: Array) -> Array:
        return jnp.take(weight, indices, axis=axis, mode="clip")

    def part_by_part(weight: Array, indices: Array) -> Array:
        return jnp.stack([jnp.take(part, indices, axis=0, mode="clip") for part in weight])

    if axis == 0:
        return at_once(weight, indices)
    return jax.lax.platform_dependent(weight, indices, cpu=part_by_part, default=at_once)


def top_k(values: Float[Array, "*b s f"], k: int) -> tuple[Float[Array, "*b s {k}"], Int[Array, "*b s {k}"]]:
    """`jax.lax.top_k` of each of s ranges of f values; on a mesh, each device chooses within the ranges that it has.

    XLA (jax 0.10.2) does not divide `top_k` along its other axes, but gathers the values on every device. Seen as an
    all-gather in programs compiled for eight GPUs and for eight CPU devices.
    """
    mesh = mesh_of(values)

    def largest(values: Array) -> tuple[Array, Array]:
        found, at = jax.lax.top_k(values, k)
        return found, at

    if mesh is None:
        return largest(values)
    spec = _spec_of_ranges(values, mesh)
    return jax.shard_map(largest, mesh=mesh, in_specs=spec, out_specs=spec)(values)


def places_of_largest(
    values: Sequence[Float[Array, "*_b _s _f"]], counts: Sequence[int]
) -> tuple[Int[Array, "*_b _s _k"], ...]:
    """Where the largest values of each range are, in rising order; among equal values, the first ones count as larger.

    XLA for GPUs (jax 0.11.2) sorts one array after the other, each too short to keep a GPU busy. Seen in timings on an
    H100: 0.2 to 0.3 ms for each layer of Llama-2-13B. GPUs therefore count instead, for all arrays of a shape at once.
    On a mesh, each device chooses within the ranges that it has, as in `top_k`.

    Args:
        values: arrays of s ranges of f values each, such as the scores of each layer's neurons.
        counts: for each array, how many of the largest values of a range are wanted.

    Returns:
        For each array, the indices of these values within their range, int32.
    """

    def by_sorting(*values: Array) -> tuple[Array, ...]:
        found = (jax.lax.top_k(own, k)[1] for own, k in zip(values, counts, strict=True))
        return tuple(jnp.sort(places, axis=-1).astype(jnp.int32) for places in found)

    def by_counting(*values: Array) -> tuple[Array, ...]:
        found = {}
        for shape in dict.fromkeys(own.shape for own in values):
            alike = [number for number, own in enumerate(values) if own.shape == shape]
            stacked = jnp.stack([values[number] for number in alike])
            found |= dict(zip(alike, _places_by_counting(stacked, [counts[n] for n in alike]), strict=True))
        return tuple(found[number] for number in range(len(values)))

    def largest(*values: Array) -> tuple[Array, ...]:
        return jax.lax.platform_dependent(*values, cuda=by_counting, default=by_sorting)

    mesh = mesh_of(values[0])
    if mesh is None:
        return largest(*values)
    specs = tuple(_spec_of_ranges(own, mesh) for own in values)
    return jax.shard_map(largest, mesh=mesh, in_specs=specs, out_specs=specs)(*values)


def _spec_of_ranges(values: Float[Array, "*b s f"], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    *batch, ranges, _ = values.shape
    return PartitionSpec(*(dividing(mesh, DATA_AXIS, b) for b in batch), dividing(mesh, MODEL_AXIS, ranges))


def _places_by_counting(values: Float[Array, "l *b f"], counts: Sequence[int]) -> list[Int[Array, "*b _k"]]:
    """What `places_of_largest` finds in l float32 arrays of one shape, each with its own count, without sorting."""
    # Whole numbers in the order in which top_k has the values. The barrier keeps XLA from stacking them anew for each
    # count.
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    order = jax.lax.optimization_barrier(jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31)))
    wanted = jnp.asarray(counts, jnp.int32).reshape(-1, *[1] * (values.ndim - 1))
    # The smallest whole number that is kept: the largest one that at least as many as wanted reach. It is found four
    # bits at a time.
    least = jnp.zeros((*values.shape[:-1], 1), jnp.uint32)
    for shift in range(28, -1, -4):
        steps = least + (jnp.arange(1, 16, dtype=jnp.uint32) << shift)
        reached = jnp.sum(order[..., None, :] >= steps[..., None], axis=-1, dtype=jnp.int32)
        least += jnp.sum(reached >= wanted, axis=-1, keepdims=True, dtype=jnp.uint32) << shift
    above, tied = order > least, order == least
    above_so_far, tied_so_far = jnp.cumsum(jnp.stack([above, tied]), axis=-1, dtype=jnp.int32)
    room = wanted - above_so_far[..., -1:]
    kept = above | (tied & (tied_so_far <= room))
    place = jnp.where(kept, above_so_far + jnp.minimum(tied_so_far, room) - 1, max(counts))
    place = place.reshape(-1, place.shape[-1])
    rows = jnp.arange(len(place), dtype=jnp.int32)[:, None]
    numbers = jnp.broadcast_to(jnp.arange(place.shape[-1], dtype=jnp.int32), place.shape)
    found = jnp.zeros((len(place), max(counts)), jnp.int32).at[rows, place].set(numbers, mode="drop")
    found = found.reshape(*values.shape[:-1], -1)
    return [own[..., :k] for own, k in zip(found, counts, strict=True)]


def float32_product(equation: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum` with float32 operands, result and additions.

    XLA's CPU code (jax 0.10.2) lacks some batched products of bfloat16 with a float32 result. Seen for the rows of two
    sequences, each with the weights of neurons that were gathered for it: "UNIMPLEMENTED: Unsupported element type for
    DotThunk::Execute: BF16 x BF16 = F32"; with jax 0.12.0 also for the products of rows with each other. The operands
    therefore become float32 first, which changes no value.
    """
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def solve_positive_definite(
    systems: Float[Array, "l b s s"], targets: Float[Array, "l b s d"], *, on_mesh: bool
) -> Float[Array, "l b s d"]:
    """Solve A X = R for symmetric positive definite A, by Cholesky; on a mesh of CPU devices, by elimination.

    If several devices are parts of one processor (jaxlib 0.10), each of them waits in LAPACK's batched routines for
    threads that the others hold. Seen as a program on a mesh of CPU devices that never ended. There, XLA's own code
    eliminates row by row, which needs no pivots for such matrices.

    Args:
        systems: A, float32.
        targets: R, float32.
        on_mesh: whether the program runs on more than one device.
    """

    def by_cholesky(systems: Array, targets: Array) -> Array:
        factor = jax.lax.linalg.cholesky(systems)
        half = jax.lax.linalg.triangular_solve(factor, targets, left_side=True, lower=True)
        return jax.lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)

    def by_elimination(systems: Array, targets: Array) -> Array:
        size = systems.shape[-1]

        def eliminate(number: Array, joint: Array) -> Array:
            row = joint[:, :, number] / joint[:, :, number, number][..., None]
            joint -= joint[..., number][..., None] * row[:, :, None]
            return joint.at[:, :, number].set(row)

        joint = jnp.concatenate([systems, targets], axis=-1)
        return jax.lax.fori_loop(0, size, eliminate, joint)[..., size:]

    if not on_mesh:
        return by_cholesky(systems, targets)
    return jax.lax.platform_dependent(systems, targets, cpu=by_elimination, default=by_cholesky)
