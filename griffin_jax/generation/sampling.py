"""Samplers: how the next token is drawn from the logits.

They are pytrees. Which filters are on is static, but their values are not, so that another temperature compiles
nothing. Of `top_k` the next of a few numbers is static, which says how many tokens are sorted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from griffin_jax.utils.options import number, whole

LEAST_SORTED = 64
"""The `top_k` up to which one program serves them all; the next ones serve four times as many each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """Takes the most probable token; of equally probable ones the first."""

    def __call__(self, logits: Float[Array, "b v"], keys: Key[Array, "b"]) -> Int[Array, "b"]:
        del keys
        return first_largest(logits)

    def distribution(self, logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
        """The probability with which each token is taken, float32: 1 or 0."""
        return jax.nn.one_hot(first_largest(logits), logits.shape[-1], dtype=jnp.float32)


def first_largest(logits: Float[Array, "*b v"]) -> Int[Array, "*b"]:
    """The place of the largest number, of equally large ones the first: `jnp.argmax`, as int32.

    XLA's CPU code (jax 0.10.2) finds the place and the number together, one by one; the number alone, and then its
    place, many at a time. Seen in timings of 151,936 logits: 0.2 ms instead of 0.7.
    """

    def number_then_place(logits: Array) -> Array:
        smaller = logits < jnp.max(logits, axis=-1, keepdims=True)
        places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        return jnp.min(jnp.where(smaller, logits.shape[-1], places), axis=-1)

    def together(logits: Array) -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.platform_dependent(logits, cpu=number_then_place, default=together)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws from the tempered distribution after filters, which are applied in the order of the attributes.

    Attributes:
        temperature: number above 0 that logits are divided by.
        top_k: number of tokens to keep, the most probable ones; at least 1.
        top_p: probability in (0, 1] that the kept tokens reach together: the fewest that do are kept (nucleus
            sampling, arXiv 1904.09751). Here and in `top_k`, tokens equal to the last kept one are kept too.
        min_p: share in [0, 1] of the largest probability that kept tokens have at least (arXiv 2407.01082).

    Raises:
        ValueError: a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    _sorted: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("temperature", number("temperature", self.temperature, "a finite number above 0", lambda t: t > 0))
        if self.top_p is not None:
            put("top_p", number("top_p", self.top_p, "in (0, 1]", lambda p: 0 < p <= 1))
        if self.min_p is not None:
            put("min_p", number("min_p", self.min_p, "in [0, 1]", lambda p: 0 <= p <= 1))
        sorted_tokens = None
        if self.top_k is not None and not isinstance(self.top_k, Tracer):
            put("top_k", min(whole("top_k", self.top_k, 1), np.iinfo(np.int32).max))
            sorted_tokens = next(n for power in range(20) if (n := LEAST_SORTED * 4**power) >= self.top_k)
        put("_sorted", sorted_tokens)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], int | None]:
        """The values, which are traced under jit, and how many tokens are sorted, which is static."""
        names = [field.name for field in dataclasses.fields(self)]
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names), self._sorted

    @classmethod
    def tree_unflatten(cls, sorted_tokens: int | None, values: Sequence[Any]) -> Sample:
        """The inverse; the values may be anything, and are not checked."""
        found = object.__new__(cls)
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(found, field.name, value)
        object.__setattr__(found, "_sorted", sorted_tokens)
        return found

    def __call__(self, logits: Float[Array, "b v"], keys: Key[Array, "b"]) -> Int[Array, "b"]:
        logits = self.filter(logits)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def distribution(self, logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
        """The probability with which each token is drawn, float32."""
        return jax.nn.softmax(self.filter(logits), axis=-1)

    def filter(self, logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
        """Tempered logits, with -inf where a filter removes the token."""
        # Relative to the largest, so that no temperature makes two logits overflow to the same infinity.
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / self.temperature
        if self.top_k is not None:
            vocabulary = logits.shape[-1]
            largest = jax.lax.top_k(logits, min(self._sorted or vocabulary, vocabulary))[0]
            last = jnp.minimum(jnp.asarray(self.top_k, jnp.int32), vocabulary) - 1
            smallest = jnp.take(largest, last[None], axis=-1, mode="clip")
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
        if self.top_p is not None:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            probabilities = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            # The first token whose predecessors already reach top_p is the first to go.
            smallest = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
        if self.min_p is not None:
            probabilities = jax.nn.softmax(logits, axis=-1)
            largest = jnp.max(probabilities, axis=-1, keepdims=True)
            logits = jnp.where(probabilities < self.min_p * largest, -jnp.inf, logits)
        return logits


Sampler = Greedy | Sample


def sampler(
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Sampler:
    """The sampler with these settings; a temperature of 0 is greedy.

    Raises:
        ValueError: a value is outside its range, or a filter is given with a temperature of 0.
    """
    temperature = number("temperature", temperature, "a finite number of at least 0", lambda t: t >= 0)
    if temperature == 0:
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        if given := [name for name, value in filters.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} need a temperature above 0; at 0 the most probable token is taken")
        return Greedy()
    return Sample(temperature, top_k, top_p, min_p)
