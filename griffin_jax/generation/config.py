"""What an answer is to be like: `GenerationConfig`."""

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
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the most probable token; above, tokens are drawn.
        top_k: draw from the k most probable tokens.
        top_p: draw from the fewest tokens that hold this probability.
        min_p: draw from tokens of at least this share of the largest probability.
        seed: of all randomness, of the neurons that are drawn, too; the same seed gives the same answers. One for the
            whole batch, or one for each prompt, whose answer then does not depend on its batch, unless it is sampled
            and drafted: where a round of drafts ends depends on all rows.
        stop: an answer ends before the first of these strings. One with a special token in it is looked for in the
            text with special tokens, as `stop_strings` of transformers are.
        stop_token_ids: tokens that end an answer as the model's own do, also with `ignore_eos`.
        ignore_eos: go on after the end-of-text token.
        chat: strings are a user's message; the tokenizer's chat template is put around them.

    Raises:
        ValueError: a value is outside its range.
    """

    max_new_tokens: int = option(128, "longest answer", metavar="N")
    temperature: float = option(0.0, "0 takes the most probable token", metavar="T")
    top_k: int | None = option(None, "draw from the K most probable tokens", type=int, metavar="K")
    top_p: float | None = option(None, "draw from the fewest tokens that hold probability P", type=float, metavar="P")
    min_p: float | None = option(
        None, "draw from tokens of at least P times the largest probability", type=float, metavar="P"
    )
    seed: int | Sequence[int] = option(0, "the same seed gives the same answer", type=int)
    stop: str | Sequence[str] = option((), "end before this text; may be repeated", action="append", metavar="TEXT")
    stop_token_ids: int | Sequence[int] = option(
        (), "end after this token, too; may be repeated", action="append", type=int, metavar="ID"
    )
    ignore_eos: bool = option(False, "go on after the end-of-text token")
    chat: bool = option(False, "the prompt is a user's message to a chat model")

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
        """How the next token is drawn.

        Raises:
            ValueError: a value is outside its range.
        """
        return sampler(self.temperature, self.top_k, self.top_p, self.min_p)

    def seeds(self, batch: int) -> int | Int[Array, "b"]:
        """The seed of a batch: one, or an array of one for each sequence.

        Raises:
            ValueError: there are others than as many as sequences.
        """
        if not isinstance(self.seed, tuple):
            return cast(int, self.seed)
        if len(self.seed) != batch:
            raise ValueError(f"{len(self.seed)} seeds for {batch} prompts; give one, or one for each")
        return jnp.asarray(self.seed, jnp.int32)


def as_seed(seed: object) -> int:
    """The Python integer of a seed: a whole number that an int32 holds.

    Raises:
        ValueError: it is none.
    """
    found = plain(seed)
    if isinstance(found, bool) or not isinstance(found, int) or not -(2**31) <= found < 2**31:
        raise ValueError(f"seed must be a whole number in [-2**31, 2**31), got {seed!r}")
    return found
