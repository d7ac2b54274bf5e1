"""Beyond GRIFFIN: a draft model of fewer bits, for speculative decoding.

    drafter = drafter_of(model, "int4")
    pruned = prune(drafter, select(prefilled.statistics, GriffinConfig(0.5)))
    state, drafting = decode_speculative(model, pruned, state, N, drafts=4)

The cost of a draft is what it reads. A pruned model reads fewer neurons, but all of attention and the head: with half
of its neurons, it still reads more than half of what a dense step does. A copy in fewer bits reads less of everything.
Whatever is drafted, the answers are those of the full model; see `griffin_jax.extensions.speculative`.

The drafter's matrices are held in addition to the model's. Embedding, norms and biases are shared with the model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from griffin_jax.griffin.prune import check_whole
from griffin_jax.model.assembly import matrix_of
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.feed_forward import FeedForward
from griffin_jax.model.parameters import Matrix, array_of
from griffin_jax.model.routed import RoutedFeedForward
from griffin_jax.model.sharding import VOCABULARY, divided
from griffin_jax.model.sizes import Sizes, bytes_of, local_arrays
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import Outputs, Precision, WeightFormat, floating_rows, held, quantise
from griffin_jax.parallel.mesh import mesh_of

BLOCK = 1 << 22
"""Largest number of values of a matrix that are in floating point at a time while it is rounded, on one device."""


def draft_format(weights: str | WeightFormat) -> WeightFormat:
    """The format of a draft model's matrices.

    Args:
        weights: the format or its name, such as `int4:32`.

    Raises:
        ValueError: it is not an integer format.
    """
    try:
        found = WeightFormat.parse(weights)
    except ValueError:
        found = None
    if found is None or not found.quantised:
        raise ValueError(f"draft_weights are {str(weights)!r}; allowed are int8 and int4, also with a group: int4:32")
    return found


def drafter_of(model: Transformer, weights: str | WeightFormat = "int4") -> Transformer:
    """A copy of the model with all matrices in another format; it shares all other arrays with the model.

    The embedding, of which a step reads one row per token, is shared as well. If it also serves as the head, the
    drafter gets a separate head in its own format.

    Args:
        model: the full model, in any format. It stays as it is.
        weights: the integer format of all matrices, including the head.

    Raises:
        ValueError: the format is not an integer format or does not fit the model's rows; or the model is pruned for
            every sequence, masked or held in two groups of rows.
    """
    check_whole(model)
    weights = draft_format(weights)
    weights.check(model.config.width, model.config.embedding_width)
    few: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for layer in few.layers:
        round_feed_forward(layer.ff, weights)
        attention = layer.attention
        qkv = _rounded(attention.qkv, attention.qkv_scale, weights, "first")
        out = _rounded(attention.out, attention.out_row_scale, weights, "last", attention.out_scale)
        attention.qkv, attention.qkv_scale = qkv.values, nnx.data(qkv.scale)
        attention.out = out.values
        attention.out_scale, attention.out_row_scale = nnx.data(out.scale), nnx.data(out.row_scale)
    head = (model.embedding, model.embedding_scale) if model.head is None else (model.head, model.head_scale)
    rounded = _rounded(*head, weights, "first")
    few.head, few.head_scale = nnx.data(rounded.values), nnx.data(rounded.scale)
    few.weights = weights
    return few


def drafter_bytes(config: ModelConfig, precision: Precision, devices: int = 1) -> int:
    """The bytes on each device that a drafter holds in addition to its model.

    Args:
        config: the architecture of the model.
        precision: how the model computes, and how the drafter's matrices are stored.
        devices: number of devices that the model is divided among.
    """
    arrays = local_arrays(config, devices, precision)
    layers = [array for path, array in arrays.items() if path.startswith("layers.") and _is_of_a_matrix(path, arrays)]
    vocabulary = config.vocab_size // (devices if divided(config, devices)[VOCABULARY] else 1)
    head = vocabulary * (config.embedding_width or config.width) * precision.weights.bits / 8
    scales = 0 if precision.weights.group else 4 * vocabulary
    return sum(map(bytes_of, layers)) + math.ceil(head) + scales


def step_bytes(
    config: ModelConfig, precision: Precision, slots: int, kept: Sequence[int] | None, weights: WeightFormat | None
) -> tuple[int, int]:
    """The bytes that a draft reads for one sequence, and those that a step of the full model reads.

    Both include the cache.

    Args:
        config: the architecture of the model.
        precision: how the model computes, and how its matrices are stored.
        slots: number of slots of the cache.
        kept: number of neurons that the drafter keeps in each layer; all if None.
        weights: the format of the drafter's matrices; None if it reads the model's own.
    """
    one = dataclasses.replace(config, kv_copies=1)
    full = Sizes(one, 1, slots, precision, shared=True)
    if weights is None:
        return full.step(kept), full.step(None)
    few = Sizes(one, 1, slots, Precision(precision.dtype, weights), shared=True)
    return drafter_bytes(one, few.precision) - few.ff(None) + few.read(kept) + few.cache, full.step(None)


def _is_of_a_matrix(path: str, arrays: Mapping[str, jax.ShapeDtypeStruct]) -> bool:
    """Whether an array holds the integers of a matrix, or their scales."""
    matrix = arrays.get(matrix_of(path))
    return matrix is not None and jnp.issubdtype(matrix.dtype, jnp.integer)


def round_feed_forward(ff: FeedForward | RoutedFeedForward, weights: WeightFormat) -> None:
    """Store the matrices of a feed-forward layer, or of its routed and shared experts, in an integer format."""
    for part in ff.parts():
        gate_up = _rounded(part.gate_up, part.gate_up_scale, weights, "first")
        down = _rounded(part.down, part.down_row_scale, weights, part.down_outputs, part.down_scale)
        part.weights = weights
        part.gate_up, part.gate_up_scale = gate_up.values, nnx.data(gate_up.scale)
        part.down = down.values
        part.down_scale, part.down_row_scale = nnx.data(down.scale), nnx.data(down.row_scale)


def _rounded(
    values: nnx.Param,
    row_scale: nnx.Param | None,
    weights: WeightFormat,
    outputs: Outputs,
    scale: nnx.Param | None = None,
) -> Matrix:
    """Converts a stored matrix to an integer format.

    Args:
        values: the stored values of the matrix.
        row_scale: the scales of its rows, or of groups within them; None if it has none.
        weights: the format to convert to.
        outputs: which axes of the matrix count the outputs of its product.
        scale: the scales of its outputs, if the last axis counts outputs; None if it has none.
    """
    matrix, rows, last = values[...], array_of(row_scale), array_of(scale)
    count = matrix.shape[-2]
    alone = mesh_of(matrix) is None and (outputs == "first" or weights.group is not None)
    size = max(1, BLOCK * count // matrix.size) if alone else count
    pieces = []
    for start in range(0, count, size):
        some = (..., slice(start, start + size), slice(None))
        wide = floating_rows(matrix[some], last, None if rows is None else rows[some])
        pieces.append(quantise(wide, weights, outputs))
    numbers, scales = (
        part[0] if len(part) == 1 else jnp.concatenate(part, axis=-2) for part in zip(*pieces, strict=True)
    )
    return Matrix.of_integers(held(numbers), scales, weights, outputs)
