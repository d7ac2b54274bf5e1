"""The way of the data: prefill -> select -> prune -> decode.

Four pure functions over pytrees (`select` and `prune` live in `griffin_jax.griffin.select`), each of which
can be called alone, under `jax.jit` or inside a user's own pipeline:

    prefilled = prefill(model, tokens, lengths, room=N)
    experts = select(prefilled.statistics, GriffinConfig(density=0.5))
    pruned = prune(model, experts)
    answer = decode(pruned, begin(prefilled), N)

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answer:
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


def begin(
    prefilled: Prefilled,
    *,
    sampler: Sampler = Greedy(),
    eos: tuple[int, ...] = (),
    seed: int | Int[Array, "*b"] = 0,
) -> Answer:
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
    answer = Answer(
        tokens=jnp.full((batch, prefilled.room), EMPTY, jnp.int32),
        count=jnp.zeros((), jnp.int32),
        done=jnp.zeros((batch,), bool),
        lengths=prefilled.statistics.tokens,
        cache=prefilled.cache,
        key=jax.vmap(jax.random.key)(seed) if jnp.ndim(seed) else jax.random.key(seed),
    )
    return append_token(answer, prefilled.logits, prefilled.cache, sampler, eos)


def decode(
    model: Transformer,
    answer: Answer,
    until: int | Int[Array, ""],
    *,
    sampler: Sampler = Greedy(),
    eos: tuple[int, ...] = (),
) -> Answer:
    """Goes on until every row holds `until` tokens or has ended: one loop on the device.

    Called again with a larger `until` it goes on where it stopped, with the same tokens as in one
    call. The model may be full or pruned.

    Args:
        model: what the next tokens are computed with.
        answer: from `begin` or `decode`. Donate it where it is not used again.
        until: tokens of the longest row, those before included; no more than there is room for.
        sampler: how to draw.
        eos: any of these tokens ends a row; static.

    Returns:
        The longer answers.
    """
    until = jnp.minimum(until, answer.tokens.shape[1])

    def unfinished(answer: Answer) -> Bool[Array, ""]:
        return (answer.count < until) & ~jnp.all(answer.done)

    def step(answer: Answer) -> Answer:
        newest = jax.lax.dynamic_slice_in_dim(answer.tokens, answer.count - 1, 1, axis=1)
        positions = jnp.where(answer.done, EMPTY, answer.lengths + answer.count - 1)[:, None]
        x, cache, _ = model(jnp.maximum(newest, 0), positions, answer.cache)
        return append_token(answer, model.logits(x)[:, 0], cache, sampler, eos)

    return jax.lax.while_loop(unfinished, step, answer)


def column_keys(answer: Answer, column: int | Int[Array, ""]) -> Key[Array, "b"]:
    """What the tokens of a column are drawn with, one key for each row."""
    if answer.key.ndim:
        return jax.vmap(jax.random.fold_in, in_axes=(0, None))(answer.key, column)
    key = jax.random.fold_in(answer.key, column)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(answer.done.shape[0]))


def append_token(
    answer: Answer, logits: Float[Array, "b v"], cache: KVCache, sampler: Sampler, eos: tuple[int, ...]
) -> Answer:
    token = jnp.where(answer.done, EMPTY, sampler(logits, column_keys(answer, answer.count)))
    ended = jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros_like(answer.done)
    return dataclasses.replace(
        answer,
        tokens=jax.lax.dynamic_update_slice(answer.tokens, token[:, None], (0, answer.count)),
        count=answer.count + 1,
        done=answer.done | ended,
        cache=cache,
    )
