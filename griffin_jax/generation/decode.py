"""Decoding: one loop on the device that writes answers token by token, with the full model or a pruned one.

    state = init_decode(prefilled)                 the first token, from the full model's logits
    state = decode(pruned, state, N)               up to N tokens

To stream answers, call `decode` again with a larger N: it continues where it stopped.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from griffin_jax.generation.prefill import Prefilled
from griffin_jax.generation.sampling import Greedy, Sampler
from griffin_jax.model.cache import EMPTY, KVCache
from griffin_jax.model.transformer import Transformer
from griffin_jax.utils.deprecation import renamed_arguments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Unfinished answers, with everything that `decode` needs to continue them.

    Attributes:
        tokens: the answers so far, (B, N), where N is the room for tokens. Columns that are not written yet are
            `EMPTY`, and so are all columns after the end of a row.
        count: number of columns of `tokens` that are written.
        done: which rows have ended, (B,).
        lengths: number of real tokens of each prompt, (B,).
        cache: keys and values of the prompts and of all answer tokens but the newest.
        key: random key or keys. From a single key, the key of each token is derived with the token's column and row.
            From one key per row, (B,), it is derived with the token's column alone.
    """

    tokens: Int[Array, "b n"]
    count: Int[Array, ""]
    done: Bool[Array, "b"]
    lengths: Int[Array, "b"]
    cache: KVCache
    key: Key[Array, "*b"]


def init_decode(
    prefilled: Prefilled,
    *,
    sampler: Sampler = Greedy(),
    eos: tuple[int, ...] = (),
    seed: int | Int[Array, "*b"] = 0,
) -> DecodeState:
    """Write the first token of each answer, from the full model's logits after the prompts.

    Args:
        prefilled: the prompts. Donate the cache, which the answers continue.
        sampler: how tokens are drawn from the logits.
        eos: ids of the tokens that end a row; static.
        seed: seed of all random draws of the answers; or one seed for each row, (B,), so that the draws of a row do not
            depend on the batch.

    Returns:
        Answers of one token each, with room for `prefilled.max_new_tokens` tokens.
    """
    batch = prefilled.logits.shape[0]
    state = DecodeState(
        tokens=jnp.full((batch, prefilled.max_new_tokens), EMPTY, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        done=jnp.zeros((batch,), bool),
        lengths=prefilled.statistics.tokens,
        cache=prefilled.cache,
        key=keys_of(seed),
    )
    return append_token(state, prefilled.logits, prefilled.cache, sampler, eos)


@renamed_arguments(answer="state")
def decode(
    model: Transformer,
    state: DecodeState,
    until: int | Int[Array, ""],
    *,
    sampler: Sampler = Greedy(),
    eos: tuple[int, ...] = (),
) -> DecodeState:
    """Write tokens until every row has `until` of them or has ended, in one loop on the device.

    Calling it again with a larger `until` continues the answers, with the same tokens as a single call.

    Args:
        model: the model that computes the next tokens, full or pruned.
        state: the answers so far, from `init_decode` or `decode`. Donate it if it is not used again.
        until: total number of tokens to write in each row, earlier ones included; limited by the room in `state`.
        sampler: how tokens are drawn from the logits.
        eos: ids of the tokens that end a row; static.

    Returns:
        The longer answers.
    """
    until = jnp.minimum(until, state.tokens.shape[1])

    def unfinished(state: DecodeState) -> Bool[Array, ""]:
        return (state.count < until) & ~jnp.all(state.done)

    def step(state: DecodeState) -> DecodeState:
        newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
        positions = jnp.where(state.done, EMPTY, state.lengths + state.count - 1)[:, None]
        x, cache, _ = model(jnp.maximum(newest, 0), positions, state.cache)
        return append_token(state, model.logits(x)[:, 0], cache, sampler, eos)

    return jax.lax.while_loop(unfinished, step, state)


TOKENS = 0x70C5
"""Number folded into a sequence's key for drawing its tokens, so that they are independent of the neurons drawn with
the same seed."""


def keys_of(seed: int | Int[Array, "*b"]) -> Key[Array, "*b"]:
    """The random key of a seed, or one key for each of several seeds; the same with or without 64-bit integers in JAX.

    Args:
        seed: one seed, or several, (B,).
    """
    seed = jnp.asarray(seed, jnp.int32)
    return jax.vmap(jax.random.key)(seed) if seed.ndim else jax.random.key(seed)


def column_keys(state: DecodeState, column: int | Int[Array, ""]) -> Key[Array, "b"]:
    """The keys with which the tokens of a column are drawn, one for each row, (B,)."""
    if state.key.ndim:
        # `select` folds the number of the layer into the key of the same seed.
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.key, TOKENS)
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, column)
    key = jax.random.fold_in(state.key, column)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(state.done.shape[0], dtype=jnp.int32))


def append_token(
    state: DecodeState, logits: Float[Array, "b v"], cache: KVCache, sampler: Sampler, eos: tuple[int, ...]
) -> DecodeState:
    """Append one token to each row, drawn from `logits`, (B, V), and replace the cache by the one that came with them.

    Rows that have ended get `EMPTY`.
    """
    token = jnp.where(state.done, EMPTY, sampler(logits, column_keys(state, state.count)))
    ended = jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros_like(state.done)
    return dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.count, axis=1),
        count=state.count + 1,
        done=state.done | ended,
        cache=cache,
    )
