"""Token sequences as arrays of few different shapes, so that little is compiled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

DEFAULT_CHUNK = 1024
"""Tokens that prefill reads at a time, which bounds the size of its attention scores and intermediates."""


def bucket(length: int) -> int:
    """The padded length: 16, 24, 32, 48, 64, ... up to 1,024, and then four lengths up to each doubling.

    Few lengths mean few compilations: a second prompt of the same bucket compiles nothing. Less than a fifth of a long
    prompt is padding.
    """
    below = 1 << max(4, (length - 1).bit_length() - 1)
    step = below // (2 if length <= DEFAULT_CHUNK else 4)
    return max(16, -(-length // step) * step)


def chunk_count(length: int, chunk: int) -> int:
    """The number of chunks of at most `chunk` tokens that a length is read in; equal ones, where that is possible."""
    fewest = -(-length // chunk)
    return next((count for count in range(fewest, 2 * fewest) if length % count == 0), fewest)


def by_chunk(x: Array, chunks: int) -> Array:
    """An array (B, T, ...) cut along T into equal chunks, which come first: (chunks, B, T / chunks, ...)."""
    return x.reshape(x.shape[0], chunks, -1, *x.shape[2:]).swapaxes(0, 1)


def pad(
    sequences: Sequence[Sequence[int] | Int[np.ndarray, "_n"]], length: int
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b"]]:
    """Token sequences as one array, padded on the right with 0 to `length`, and their lengths.

    Raises:
        ValueError: a sequence is longer than `length`.
    """
    if (longest := max(map(len, sequences), default=0)) > length:
        raise ValueError(f"a sequence of {longest} tokens does not fit into {length}")
    tokens = np.zeros((len(sequences), length), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return tokens, np.asarray([len(sequence) for sequence in sequences], np.int32)
