"""A model of fewer bits that drafts, for speculative decoding.

    drafter = drafter_of(model, "int4")
    pruned = prune(drafter, select(prefilled.statistics, GriffinConfig(0.5)))
    state, drafting = decode_speculative(model, pruned, state, N, drafts=4)

What a draft costs is what it reads. A pruned model reads fewer neurons, but attention and head as they are: with half
of its neurons it still reads more than half of a step. In fewer bits it reads less of everything. Whatever it drafts,
answers are those of the full model; see `griffin_jax.extensions.speculative`.

The drafter's matrices are held in addition to the model's; embedding, norms and biases are the model's own.
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
"""Numbers of a matrix that are floating together while it is rounded, on one device."""


def draft_format(weights: str | WeightFormat) -> WeightFormat:
    """A format to draft in.

    Raises:
        ValueError: it is none of integers.
    """
    try:
        found = WeightFormat.parse(weights)
    except ValueError:
        found = None
    if found is None or not found.quantised:
        raise ValueError(f"draft_weights are {str(weights)!r}; allowed are int8 and int4, also with a group: int4:32")
    return found


def drafter_of(model: Transformer, weights: str | WeightFormat = "int4") -> Transformer:
    """The same model with all matrices in another format, and all other arrays those of the model.

    The embedding, of which a step reads one row, stays as it is. Where it makes the logits, too, the drafter has a head
    of its own.

    Args:
        model: the full one, in any format. It stays as it is.
        weights: an integer format, for the head, too.

    Raises:
        ValueError: the format is no integer one or does not fit the model's rows, or the model is no full one.
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
    """Bytes on each device of what a drafter holds in addition to its model.

    Args:
        config: of the model.
        precision: how the model computes, and what the drafter's matrices are stored as.
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
    """Bytes that a draft reads for one sequence, and those that a step of the full model does; each with its cache.

    Args:
        config: of the model.
        precision: of the model.
        slots: of the cache.
        kept: neurons of each layer that the drafter keeps; all if None.
        weights: what the drafter's matrices are stored as; None for those of the model.
    """
    one = dataclasses.replace(config, kv_copies=1)
    full = Sizes(one, 1, slots, precision, shared=True)
    if weights is None:
        return full.step(kept), full.step(None)
    few = Sizes(one, 1, slots, Precision(precision.dtype, weights), shared=True)
    return drafter_bytes(one, few.precision) - few.ff(None) + few.read(kept) + few.cache, full.step(None)


def _is_of_a_matrix(path: str, arrays: Mapping[str, jax.ShapeDtypeStruct]) -> bool:
    """Whether an array holds integers, or the scales of integers."""
    matrix = arrays.get(matrix_of(path))
    return matrix is not None and jnp.issubdtype(matrix.dtype, jnp.integer)


def round_feed_forward(ff: FeedForward | RoutedFeedForward, weights: WeightFormat) -> None:
    """Store the matrices of a feed-forward layer, or of its experts, in an integer format."""
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
    """A stored matrix in an integer format.

    Args:
        values: its numbers.
        row_scale: the scales of its rows or of groups of them, if there are any.
        weights: the format.
        outputs: which axes count the outputs of its product.
        scale: the scales of its outputs, where the last axis counts them.
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
