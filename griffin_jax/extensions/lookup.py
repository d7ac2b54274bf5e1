"""Drafts that cost nothing: tokens copied from where the last ones have stood before (prompt lookup decoding).

Answers often repeat their prompt: a function's signature and its examples, a name, the sentence that is asked about.
Where the last tokens of an answer occur earlier in the prompt or in the answer, what came next there is drafted. No
weights are read for such drafts, and the full model decides about them as about others; see
`griffin_jax.extensions.speculative`. The idea is Saxena's prompt lookup decoding
(https://github.com/apoorvumang/prompt-lookup-decoding), also known as n-gram speculation.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from griffin_jax.generation.padding import bucket
from griffin_jax.model.cache import EMPTY

LONGEST = 8
"""The most tokens that are compared with those before another place."""


def left_padded(prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, "b p"]:
    """Prompts as one array of a bucketed length, padded on the left with `EMPTY`, so that answers follow them."""
    context = np.full((len(prompts), bucket(max(map(len, prompts)))), EMPTY, np.int32)
    for row, prompt in zip(context, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return context


def look_up(context: Int[Array, "b c"], end: Int[Array, ""], count: int) -> tuple[Int[Array, "b n"], Int[Array, "b"]]:
    """What came next where the last tokens stood before: where the most of them did, and of such places the last.

    A place so near to the end that fewer than `count` tokens follow it is that of a repetition, which goes on.

    Args:
        context: tokens of each row, `EMPTY` before the first.
        end: number of columns that are known; what is in the others does not matter.
        count: n, number of tokens to draft.

    Returns:
        The tokens, and how many before them agree, at most `LONGEST`. Where that is 0, the tokens mean nothing.
    """
    columns = context.shape[1]
    place = jnp.arange(columns, dtype=jnp.int32)
    longer = jnp.pad(context, ((0, 0), (LONGEST, 0)), constant_values=EMPTY)
    last = jax.lax.dynamic_slice_in_dim(longer, end, LONGEST, axis=1)

    def agree(back: int) -> Array:
        """Whether tokens so far before each place are those so far before the end."""
        there = longer[:, LONGEST - back : LONGEST - back + columns]
        return (there == last[:, LONGEST - 1 - back, None]) & (there != EMPTY)

    agreeing = jnp.stack([agree(back) for back in range(LONGEST)])
    matched = jnp.sum(jnp.cumprod(agreeing, axis=0, dtype=jnp.int32), axis=0)
    matched = jnp.where(place < end - 1, matched, 0)
    best = jnp.argmax(matched * columns + place, axis=1).astype(jnp.int32)
    period = end - 1 - best
    following = best[:, None] + 1 + jnp.arange(count, dtype=jnp.int32) % jnp.maximum(period, 1)[:, None]
    return jnp.take_along_axis(context, following, axis=1), jnp.take_along_axis(matched, best[:, None], axis=1)[:, 0]
