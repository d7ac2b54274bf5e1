"""Sequences to train on, from texts: packed, and in an order that a seed decides."""

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
    """Sequences of one update.

    Attributes:
        tokens: padded on the right with any token.
        lengths: number of real tokens of each.
    """

    tokens: Int[Array | np.ndarray, "*n b t"]
    lengths: Int[Array | np.ndarray, "*n b"]


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Texts as sequences of one length.

    Attributes:
        tokens: one text after the other; only the last sequence may be shorter, and is padded.
        lengths: number of real tokens of each.
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
        """The batch of every step: all sequences in one order, then all of them in another one, ...

        A batch is a function of the seed and the number of its step alone, so that nothing has to be remembered for
        going on.

        Args:
            size: sequences of a batch; where there are fewer, some of them are in it several times.
            seed: of the orders.
        """

        def row(number: int) -> int:
            epoch, place = divmod(number, len(self))
            return int(np.random.default_rng([seed, epoch]).permutation(len(self))[place])

        def batch(step: int) -> Batch:
            rows = [row(step * size + number) for number in range(size)]
            return Batch(jnp.asarray(self.tokens[rows]), jnp.asarray(self.lengths[rows]))

        return batch


def pack(documents: Sequence[Sequence[int]], length: int, end: int | None = None) -> Packed:
    """Texts one after the other, cut into sequences.

    Args:
        documents: token ids of each text.
        length: tokens of a sequence.
        end: token that ends a text; None for none.

    Raises:
        ValueError: there are fewer than two tokens.
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
