"""Beyond GRIFFIN: speculative decoding, in which the pruned model drafts and the answer is the full model's.

    state, drafting = decode_speculative(model, pruned, init_decode(prefilled), N, drafts=4)

In each round the pruned model drafts a few tokens, one after the other. One pass of the full model reads all drafts and
gives the distribution of each of them and of the token after them. Let p and q be the distributions of the full and the
pruned model, with the sampler that is asked for. A draft x is accepted with probability min(1, p(x) / q(x)). In place
of the first draft that is not accepted, a token is drawn from max(0, p - q), normalised; if all drafts are accepted,
one more token is drawn from p. Tokens drawn in this way have exactly the full model's distribution (speculative
sampling: Leviathan, Kalman, Matias, arXiv 2211.17192, and Chen et al., arXiv 2302.01318). With the greedy sampler p and
q are 1 for one token.

What it costs, in dense steps: if a draft takes c and is accepted with probability a, and the pass takes v, then a round
of n drafts takes n c + v and yields (1 - a^(n+1)) / (1 - a) tokens. It pays where the tokens are more than the steps:
for n = 1 where a > c + v - 1.
"""

from __future__ import annotations

import dataclasses
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.generation.decode import DecodeState, column_keys
from griffin_jax.generation.sampling import Greedy, Sampler
from griffin_jax.model.cache import EMPTY, KVCache
from griffin_jax.model.transformer import Transformer

DEFAULT_DRAFTS = 4
"""Number of tokens that are drafted for each pass of the full model."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafting:
    """How many drafts were accepted. Additive: those of several calls may be summed.

    Attributes:
        passes: number of passes of the full model.
        drafted: number of tokens drafted for each row before it ended.
        accepted: number of drafts of each row that are in its answer.
    """

    passes: Int[Array, ""]
    drafted: Int[Array, "b"]
    accepted: Int[Array, "b"]

    def __add__(self, other: Drafting) -> Drafting:
        return jax.tree.map(operator.add, self, other)


def decode_speculative(
    model: Transformer,
    pruned: Transformer,
    state: DecodeState,
    until: int | Int[Array, ""],
    *,
    drafts: int = DEFAULT_DRAFTS,
    sampler: Sampler = Greedy(),
    eos: tuple[int, ...] = (),
) -> tuple[DecodeState, Drafting]:
    """Write tokens with the full model's distribution until every row has at least `until` of them or has ended.

    The last round may end with up to `drafts` tokens more than `until`; rounds, and so tokens, do not depend on how
    often this is called to reach a length. All rows of a batch go on by as many tokens as the one with the fewest
    accepted drafts, and the others draft the rest again. So a round takes the cache slots of its tokens and no others,
    and the more rows there are, the fewer tokens a round yields.

    A round holds the distributions of its drafts over the whole vocabulary, (2 n + 1) B V float32 numbers, in addition
    to the cache.

    Args:
        model: the full model, whose distribution the tokens have.
        pruned: the model that drafts.
        state: the answers so far, from `init_decode`, `decode` or this function. Donate it.
        until: number of tokens that rows come to hold, earlier ones included. The answers need room for `drafts` more;
            where there is less room, `until` is smaller by as much.
        drafts: n, the number of tokens that are drafted in each round, at least 1; static.
        sampler: how tokens are drawn from the logits.
        eos: tokens that end a row; static.

    Returns:
        The longer answers, with the full model's keys and values for them in the cache, and how many drafts were
        accepted.
    """
    batch, columns = state.tokens.shape
    until = jnp.minimum(until, columns - drafts)

    def unfinished(carry: tuple[DecodeState, Drafting]) -> Bool[Array, ""]:
        return (carry[0].count < until) & ~jnp.all(carry[0].done)

    def step(carry: tuple[DecodeState, Drafting]) -> tuple[DecodeState, Drafting]:
        state, drafting = _round(model, pruned, carry[0], drafts, sampler, eos)
        return state, carry[1] + drafting

    none = jnp.zeros((batch,), jnp.int32)
    return jax.lax.while_loop(unfinished, step, (state, Drafting(jnp.zeros((), jnp.int32), none, none)))


def _round(
    model: Transformer, pruned: Transformer, state: DecodeState, drafts: int, sampler: Sampler, eos: tuple[int, ...]
) -> tuple[DecodeState, Drafting]:
    place = jnp.arange(drafts + 1, dtype=jnp.int32)
    # Each column has its own keys, whichever round it is written in. Where a draft is dropped because of another row or
    # of a draft before it, nothing that was kept depends on its keys.
    keys = jax.vmap(lambda column: jax.vmap(lambda key: jax.random.split(key, 3))(column_keys(state, column)))
    to_draft, to_accept, to_correct = jnp.moveaxis(keys(state.count + place), 2, 0)
    newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
    newest = jnp.maximum(newest, 0)
    positions = (state.lengths + state.count - 1)[:, None] + place
    positions = jnp.where(state.done[:, None], EMPTY, positions)

    def draft(carry: tuple[KVCache, Array], step: tuple[Array, Array]):
        cache, token = carry
        position, keys = step
        x, cache, _ = pruned(token, position[:, None], cache)
        logits = pruned.logits(x)[:, 0]
        drawn = sampler(logits, keys)
        return (cache, drawn[:, None]), (drawn, sampler.distribution(logits))

    steps = positions.T[:drafts], to_draft[:drafts]
    (cache, _), (drafted, q) = jax.lax.scan(draft, (state.cache, newest), steps)
    drafted, q = drafted.T, q.swapaxes(0, 1)

    cache = cache.without_last(drafts)
    x, cache, _ = model(jnp.concatenate([newest, drafted], axis=1), positions, cache)
    p = sampler.distribution(model.logits(x))

    chance = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32)))(to_accept[:drafts]).T
    accepted = accept(chance, *(_of(drafted, x) for x in (p[:, :drafts], q)))
    accepted = jnp.cumprod(accepted, axis=1, dtype=jnp.int32)
    first = jnp.sum(accepted, axis=1, dtype=jnp.int32)
    # After the last draft there is no other, which is the same as one that had no probability.
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    p_first, q_first = (jnp.take_along_axis(x, first[:, None, None], axis=1)[:, 0] for x in (p, q))
    key = jnp.take_along_axis(to_correct.T, first[:, None], axis=1)[:, 0]
    corrected = jax.vmap(jax.random.categorical)(key, jnp.log(correction(p_first, q_first)))

    tokens = jnp.where(place < first[:, None], jnp.pad(drafted, ((0, 0), (0, 1))), corrected[:, None].astype(jnp.int32))
    ends = jnp.isin(tokens, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros_like(tokens, bool)
    ends &= place <= first[:, None]
    ended = jnp.cumsum(ends, axis=1, dtype=jnp.int32)
    # A row that has ended does not hold the others up.
    reach = jnp.where(state.done | (ended[:, -1] > 0), drafts + 1, first + 1)
    taken = jnp.min(reach)
    is_taken = (place < taken) & ~state.done[:, None] & (ended - ends == 0)
    drafting = Drafting(
        passes=jnp.ones((), jnp.int32),
        drafted=jnp.where(state.done, 0, drafts),
        accepted=jnp.sum(is_taken & (place < first[:, None]), axis=1, dtype=jnp.int32),
    )
    state = dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice_in_dim(
            state.tokens, jnp.where(is_taken, tokens, EMPTY), state.count, axis=1
        ),
        count=state.count + taken,
        done=state.done | jnp.any(ends & is_taken, axis=1),
        cache=cache.without_last(drafts + 1 - taken),
    )
    return state, drafting


def _of(tokens: Int[Array, "b n"], x: Float[Array, "b n v"]) -> Float[Array, "b n"]:
    """The values of x for these tokens."""
    return jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]


def accept(chance: Float[Array, "*b"], p: Float[Array, "*b"], q: Float[Array, "*b"]) -> Bool[Array, "*b"]:
    """Whether drafts are accepted, which they are with probability min(1, p / q).

    Args:
        chance: random numbers, uniform in [0, 1).
        p: probability of each draft in the full model.
        q: probability of each draft in the model that drew it; above 0.
    """
    return chance * q < p


def correction(p: Float[Array, "*b v"], q: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
    """max(0, p - q), in proportion to which the token is drawn that replaces a draft that was not accepted.

    Where rounding leaves nothing of it, p and q are the same, and it is p.
    """
    rest = jnp.maximum(p - q, 0)
    return jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, p)
