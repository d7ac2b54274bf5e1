"""Samplers: how the next token is drawn from the logits.

They are pytrees. Which filters are on is static, but their values are not, so that another temperature compiles
nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """Takes the most probable token; of equally probable ones the first."""

    def __call__(self, logits: Float[Array, "b v"], keys: Key[Array, "b"]) -> Int[Array, "b"]:
        del keys
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def distribution(self, logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
        """The probability with which each token is taken, float32: 1 or 0."""
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])


@jax.tree_util.register_dataclass
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
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        def check(name: str, allowed: str, valid: bool) -> None:
            if not valid:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        if self.top_k is not None:
            whole = isinstance(self.top_k, int | np.integer) and not isinstance(self.top_k, bool)
            check("top_k", "a whole number of at least 1", whole and self.top_k >= 1)
        # Under jit the values are tracers, which cannot be compared.
        if isinstance(self.temperature, float | int):
            check("temperature", "a finite number above 0", 0 < self.temperature < float("inf"))
        if isinstance(self.top_p, float | int):
            check("top_p", "in (0, 1]", 0 < self.top_p <= 1)
        if isinstance(self.min_p, float | int):
            check("min_p", "in [0, 1]", 0 <= self.min_p <= 1)

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
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
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
    if temperature == 0:
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        if given := [name for name, value in filters.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} need a temperature above 0; at 0 the most probable token is taken")
        return Greedy()
    return Sample(temperature, top_k, top_p, min_p)
