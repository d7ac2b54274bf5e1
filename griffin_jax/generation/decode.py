"""The way of the data: prefill -> select -> prune -> decode.

Four pure functions over pytrees (`select` and `prune` live in `griffin_jax.griffin.select`), each of which
can be called alone, under `jax.jit` or inside a user's own pipeline:

    prefilled = prefill(model, tokens, lengths, max_new_tokens=N)
    experts = select(prefilled.statistics, GriffinConfig(density=0.5))
    pruned = prune(model, experts)
    answer = decode(pruned, init_decode(prefilled), N)

Decoding does not know whether the model it was handed is pruned, so dense decoding is the same code
with the prune step left out.

Beyond GRIFFIN, the full model may read every N tokens what the pruned one wrote:

    answer, statistics, _ = refresh(model, answer, statistics, N)
    pruned = prune(model, select(statistics, config), reuse=pruned)
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
    """Answers in the making: everything that `decode` needs to go on.

    Attributes:
        tokens: the answers so far, `EMPTY` behind them and behind the end of a row.
        count: columns of `tokens` that are written.
        done: rows that have ended.
        lengths: real tokens of the prompts.
        cache: of the prompts and of all answer tokens but the newest.
        key: each token is drawn with a key of its own, derived from this, its column and its row; or from its row's
            key and its column, if every row has one.
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
    """The answer's first token, from the full model's logits behind the prompt.

    Args:
        prefilled: the prompts. Donate the cache: the answer goes on in it.
        sampler: how to draw.
        eos: any of these tokens ends a row; static.
        seed: of all randomness in the answer; or one for each row, whose draws then do not depend on its batch.

    Returns:
        Answers of one token each, with room for as many as the cache has.
    """
    batch = prefilled.logits.shape[0]
    state = DecodeState(
        tokens=jnp.full((batch, prefilled.max_new_tokens), EMPTY, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        done=jnp.zeros((batch,), bool),
        lengths=prefilled.statistics.tokens,
        cache=prefilled.cache,
        key=jax.vmap(jax.random.key)(seed) if jnp.ndim(seed) else jax.random.key(seed),
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
    """Goes on until every row holds `until` tokens or has ended: one loop on the device.

    Called again with a larger `until` it goes on where it stopped, with the same tokens as in one
    call. The model may be full or pruned.

    Args:
        model: what the next tokens are computed with.
        state: from `init_decode` or `decode`. Donate it where it is not used again.
        until: tokens of the longest row, those before included; no more than there is room for.
        sampler: how to draw.
        eos: any of these tokens ends a row; static.

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


def column_keys(state: DecodeState, column: int | Int[Array, ""]) -> Key[Array, "b"]:
    """What the tokens of a column are drawn with, one key for each row."""
    if state.key.ndim:
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.key, column)
    key = jax.random.fold_in(state.key, column)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(state.done.shape[0]))


def append_token(
    state: DecodeState, logits: Float[Array, "b v"], cache: KVCache, sampler: Sampler, eos: tuple[int, ...]
) -> DecodeState:
    token = jnp.where(state.done, EMPTY, sampler(logits, column_keys(state, state.count)))
    ended = jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros_like(state.done)
    return dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.count)),
        count=state.count + 1,
        done=state.done | ended,
        cache=cache,
    )
