"""Token sequences as arrays of few different shapes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

DEFAULT_CHUNK = 1024
"""Most tokens that prefill reads at a time, which bounds the size of its attention scores and intermediates."""


def bucket(length: int) -> int:
    """The length that a sequence is padded to: 16, 24, 32, 48, 64, ... up to 1,024, then four lengths per doubling.

    Few lengths mean few compilations: a second prompt of the same bucket compiles nothing. Less than a fifth of a long
    prompt's bucket is padding.
    """
    below = 1 << max(4, (length - 1).bit_length() - 1)
    step = below // (2 if length <= DEFAULT_CHUNK else 4)
    return max(16, -(-length // step) * step)


def chunk_count(length: int, chunk: int) -> int:
    """The number of chunks of at most `chunk` tokens that `length` tokens are read in.

    It is the smallest number, less than twice the fewest chunks, that divides the length evenly; if there is none, the
    fewest chunks.
    """
    fewest = -(-length // chunk)
    return next((count for count in range(fewest, 2 * fewest) if length % count == 0), fewest)


def by_chunk(x: Array, chunks: int) -> Array:
    """Cuts an array (B, T, ...) along T into equal chunks, with their axis first: (chunks, B, T / chunks, ...)."""
    return x.reshape(x.shape[0], chunks, -1, *x.shape[2:]).swapaxes(0, 1)


def pad(
    sequences: Sequence[Sequence[int] | Int[np.ndarray, "_n"]], length: int
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b"]]:
    """Pads token sequences on the right with 0.

    Args:
        sequences: the token ids of each sequence.
        length: T, the length to pad to.

    Returns:
        The tokens, (B, T), and the number of tokens of each sequence, (B,), both int32.

    Raises:
        ValueError: a sequence is longer than `length`.
    """
    if (longest := max(map(len, sequences), default=0)) > length:
        raise ValueError(f"a sequence of {longest} tokens does not fit into {length}")
    tokens = np.zeros((len(sequences), length), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return tokens, np.asarray([len(sequence) for sequence in sequences], np.int32)
