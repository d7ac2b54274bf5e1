"""The options of an answer: `GenerationConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from griffin_jax.generation.sampling import Sampler, sampler
from griffin_jax.utils.options import flag, option, plain, whole


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How answers are written.

    Attributes:
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 is greedy decoding; above 0, tokens are sampled.
        top_k: sample from the k most probable tokens only.
        top_p: sample from the smallest set of most probable tokens whose probabilities add up to at least this.
        min_p: sample from tokens that are at least this many times as probable as the most probable one.
        seed: seed of everything random, including neurons that are drawn; the same seed gives the same answers. One for
            the whole batch, or one for each prompt. In the latter case an answer does not depend on the rest of its
            batch, unless it is both sampled and drafted, because the end of a round of drafts depends on all sequences.
        stop: strings that end an answer; it is cut off before the first of them. A string that contains a special token
            is searched for in the text with special tokens, like `stop_strings` in transformers.
        stop_token_ids: further tokens that end an answer, even with `ignore_eos`.
        ignore_eos: do not stop at the model's end-of-text tokens.
        chat: treat each string as a user's message, and apply the tokenizer's chat template.

    Raises:
        ValueError: a value is outside its range.
    """

    max_new_tokens: int = option(128, "longest answer, in tokens", metavar="N")
    temperature: float = option(0.0, "0 is greedy decoding; above 0, tokens are sampled", metavar="T")
    top_k: int | None = option(None, "sample from the K most probable tokens", type=int, metavar="K")
    top_p: float | None = option(
        None, "sample from the most probable tokens that add up to probability P", type=float, metavar="P"
    )
    min_p: float | None = option(
        None, "sample from tokens that are at least P times as probable as the best", type=float, metavar="P"
    )
    seed: int | Sequence[int] = option(0, "random seed; the same seed gives the same answer", type=int)
    stop: str | Sequence[str] = option(
        (), "end the answer before this text; may be repeated", action="append", metavar="TEXT"
    )
    stop_token_ids: int | Sequence[int] = option(
        (), "end the answer at this token as well; may be repeated", action="append", type=int, metavar="ID"
    )
    ignore_eos: bool = option(False, "do not stop at the end-of-text token")
    chat: bool = option(False, "apply the chat template: the prompt is a user's message")

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_new_tokens", whole("max_new_tokens", self.max_new_tokens, 1))
        for name in ("ignore_eos", "chat"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        for name in ("temperature", "top_k", "top_p", "min_p"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise ValueError(f"stop strings must not be empty, got {list(stops)}")
        object.__setattr__(self, "stop", stops)
        given = plain(self.stop_token_ids)
        ids = tuple(given) if isinstance(given, Sequence | np.ndarray) else () if given is None else (given,)
        object.__setattr__(self, "stop_token_ids", tuple(whole("stop_token_ids", token, 0) for token in ids))
        seed: Any = plain(self.seed)
        each = isinstance(seed, Sequence | np.ndarray | jax.Array) and not isinstance(seed, str | bytes)
        object.__setattr__(self, "seed", tuple(map(as_seed, cast(Any, seed))) if each else as_seed(seed))
        _ = self.sampler

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop)

    @property
    def sampler(self) -> Sampler:
        """How the next token is chosen.

        Raises:
            ValueError: a value is outside its range.
        """
        return sampler(self.temperature, self.top_k, self.top_p, self.min_p)

    def seeds(self, batch: int) -> int | Int[Array, "b"]:
        """The seed of a batch: one integer, or an int32 array (B,) with one for each sequence.

        Raises:
            ValueError: the number of seeds is not the number of sequences.
        """
        if not isinstance(self.seed, tuple):
            return cast(int, self.seed)
        if len(self.seed) != batch:
            raise ValueError(f"{len(self.seed)} seeds for {batch} prompts; give one, or one for each")
        return jnp.asarray(self.seed, jnp.int32)


def as_seed(seed: object) -> int:
    """Returns a seed as a Python integer.

    Raises:
        ValueError: `seed` is not a whole number that an int32 can hold.
    """
    found = plain(seed)
    if isinstance(found, bool) or not isinstance(found, int) or not -(2**31) <= found < 2**31:
        raise ValueError(f"seed must be a whole number in [-2**31, 2**31), got {seed!r}")
    return found
