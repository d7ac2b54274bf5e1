"""Drafts that cost nothing: tokens copied from an earlier occurrence of the last ones (prompt lookup decoding).

Answers often repeat their prompt: a function's signature and its examples, a name, the sentence that is asked about.
If the last tokens of an answer occur earlier in the prompt or in the answer, the tokens that followed there are
drafted. No weights are read for such drafts, and the full model accepts or replaces them like others; see
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
"""Largest number of last tokens that are compared with the tokens of an earlier place."""


def left_padded(prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, "b p"]:
    """Prompts as one array of a bucketed length, padded on the left with `EMPTY`, so that answers follow them directly.

    Args:
        prompts: the token ids of each prompt.

    Returns:
        The token ids, (B, P), int32.
    """
    context = np.full((len(prompts), bucket(max(map(len, prompts)))), EMPTY, np.int32)
    for row, prompt in zip(context, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return context


def look_up(context: Int[Array, "b c"], end: Int[Array, ""], count: int) -> tuple[Int[Array, "b n"], Int[Array, "b"]]:
    """Find an earlier occurrence of the last tokens, and return the tokens that followed there.

    The place where most of the last tokens agree is taken; if there are several, the latest. If fewer than `count`
    tokens follow it, the text from there to the end is taken to repeat itself.

    Args:
        context: token ids of each row, (B, C), `EMPTY` before the first.
        end: number of columns that are known; the others are ignored.
        count: n, the number of tokens to draft.

    Returns:
        The tokens, (B, n), and how many tokens before them agree, (B,), at most `LONGEST`. If that is 0, the tokens of
        the row are meaningless.
    """
    columns = context.shape[1]
    place = jnp.arange(columns, dtype=jnp.int32)
    longer = jnp.pad(context, ((0, 0), (LONGEST, 0)), constant_values=EMPTY)
    last = jax.lax.dynamic_slice_in_dim(longer, end, LONGEST, axis=1)

    def agree(back: int) -> Array:
        """Whether the token `back` places before each place is the one `back` places before the last token."""
        there = longer[:, LONGEST - back : LONGEST - back + columns]
        return (there == last[:, LONGEST - 1 - back, None]) & (there != EMPTY)

    agreeing = jnp.stack([agree(back) for back in range(LONGEST)])
    matched = jnp.sum(jnp.cumprod(agreeing, axis=0, dtype=jnp.int32), axis=0)
    matched = jnp.where(place < end - 1, matched, 0)
    best = jnp.argmax(matched * columns + place, axis=1).astype(jnp.int32)
    period = end - 1 - best
    following = best[:, None] + 1 + jnp.arange(count, dtype=jnp.int32) % jnp.maximum(period, 1)[:, None]
    return jnp.take_along_axis(context, following, axis=1), jnp.take_along_axis(matched, best[:, None], axis=1)[:, 0]
