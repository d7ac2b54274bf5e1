"""Sequences to train on: texts, packed, in an order that a seed determines."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """The sequences of one update.

    Attributes:
        tokens: token ids, padded on the right with any token.
        lengths: number of real tokens of each sequence.
    """

    tokens: Int[Array | np.ndarray, "*n b t"]
    lengths: Int[Array | np.ndarray, "*n b"]


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Texts as sequences of one length.

    Attributes:
        tokens: token ids, one text after the other; only the last sequence may be shorter, and is then padded.
        lengths: number of real tokens of each sequence.
    """

    tokens: Int[np.ndarray, "n t"]
    lengths: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def digest(self) -> str:
        """A hash of all tokens."""
        whole = hashlib.sha256(repr(self.tokens.shape).encode())
        whole.update(self.tokens.tobytes())
        whole.update(self.lengths.tobytes())
        return whole.hexdigest()[:16]

    def batches(self, size: int, *, seed: int) -> Callable[[int], Batch]:
        """A function that returns the batch of a step. All sequences come in one order, then all in another, and so on.

        A batch depends only on the seed and the number of its step, so nothing has to be stored to resume a training.

        Args:
            size: number of sequences in a batch; if there are fewer in all, some of them are in it several times.
            seed: seed of the orders.
        """

        def row(number: int) -> int:
            epoch, place = divmod(number, len(self))
            return int(np.random.default_rng([seed, epoch]).permutation(len(self))[place])

        def batch(step: int) -> Batch:
            rows = [row(step * size + number) for number in range(size)]
            return Batch(jnp.asarray(self.tokens[rows]), jnp.asarray(self.lengths[rows]))

        return batch


def pack(documents: Sequence[Sequence[int]], length: int, end: int | None = None) -> Packed:
    """Join texts one after the other, and cut them into sequences.

    Args:
        documents: token ids of each text.
        length: number of tokens in a sequence.
        end: token that is put after each text; None for no such token.

    Raises:
        ValueError: the texts have fewer than two tokens together.
    """
    stream = [token for tokens in documents for token in (*tokens, *([] if end is None else [end]))]
    # A single token at the end predicts nothing.
    if len(stream) % length == 1 and len(stream) > 1:
        stream.pop()
    if len(stream) < 2:
        raise ValueError(f"{len(documents)} texts have {len(stream)} tokens together; at least 2 are needed")
    count = -(-len(stream) // length)
    lengths = np.full(count, length, np.int32)
    lengths[-1] = len(stream) - (count - 1) * length
    tokens = np.zeros((count, length), np.int32)
    tokens.reshape(-1)[: len(stream)] = stream
    return Packed(tokens, lengths)
