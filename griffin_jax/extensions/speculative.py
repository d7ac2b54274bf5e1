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

How many drafts are worth their cost differs from one token to the next. With `cost`, a round ends where the next draft
would probably be in vain: how sure the pruned model is of a token tells how often it is accepted, which is counted as
decoding goes. Where to stop is decided before the full model has seen anything of the round, and by nothing that is
drawn again later, so the distribution of the tokens stays that of the full model.

With `prompts`, drafts are also copied from where the last tokens have stood before (`griffin_jax.extensions.lookup`),
for which nothing is read. A round goes over to them where a copy is accepted as often as a draft of the pruned model,
which is counted by how many tokens before it agree, and where the pruned model stops. After a copied token it drafts
nothing more in that round, as it has not read it. A copy has probability 1 in the model that it comes from, so the rule
above holds for it, too. Without a pruned model all drafts are copies.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from griffin_jax.extensions.lookup import LONGEST, look_up
from griffin_jax.generation.decode import DecodeState, column_keys
from griffin_jax.generation.sampling import Greedy, Sampler
from griffin_jax.model.cache import EMPTY, KVCache
from griffin_jax.model.products import FUSED_TOKENS
from griffin_jax.model.transformer import Transformer
from griffin_jax.utils.options import count_or

DEFAULT_DRAFTS = 4
"""Number of tokens that are drafted for each pass of the full model."""

MOST_DRAFTS = 8
"""The most of them where each round has as many as are worth it."""

MOST_WITH_COPIES = FUSED_TOKENS - 1
"""The most where drafts are also copied: with the token before them, as many as GPUs multiply without converting a
matrix in memory, whatever its format."""

CLASSES = 8
"""Classes of drafts by how sure the pruned model is of them: class i has probabilities from 1 - 2^-i to 1 - 2^-(i+1),
and the last one all above. After these come the classes of copies, by how many tokens before them agree, from 1 on."""

PRIOR = 2
"""Drafts of each class that count as if they had been seen: accepted as often as the pruned model is sure, and of
copies after m tokens that agree 1 - 1 / (2 m)."""

COPIES_FROM = 0.75
"""How often a copy must be accepted before it is known how often drafts of the pruned model are."""


def most_drafts(drafts: int | bool, *, lookup: bool) -> int:
    """Tokens of a round, at most.

    Args:
        drafts: how many are asked for; True for as many as are worth it.
        lookup: whether drafts are also copied.
    """
    return count_or(drafts, MOST_WITH_COPIES if lookup else MOST_DRAFTS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafting:
    """How many drafts were accepted. Additive: those of several calls may be summed.

    Attributes:
        passes: number of passes of the full model.
        steps: number of steps of the pruned model, each of which drafts a token of every row.
        drafted: number of tokens that the pruned model drafted for each row before it ended.
        accepted: number of these that are in its answer.
        copied: number of tokens that were copied as drafts for each row before it ended.
        copies_accepted: number of these that are in its answer.
        tried: number of drafts of each class that were the first one not to be accepted, or came before it.
        held: number of those that were accepted.
    """

    passes: Int[Array, ""]
    steps: Int[Array, ""]
    drafted: Int[Array, "b"]
    accepted: Int[Array, "b"]
    copied: Int[Array, "b"]
    copies_accepted: Int[Array, "b"]
    tried: Int[Array, "c"]
    held: Int[Array, "c"]

    @classmethod
    def none(cls, batch: int) -> Drafting:
        """Of nothing."""
        one, rows, classes = (jnp.zeros(shape, jnp.int32) for shape in ((), (batch,), (CLASSES + LONGEST,)))
        return cls(one, one, rows, rows, rows, rows, classes, classes)

    def __add__(self, other: Drafting) -> Drafting:
        return jax.tree.map(operator.add, self, other)

    def counts(self) -> dict[str, int]:
        """For files: passes, and drafts and copies of all rows together, with those that were accepted."""
        names = "drafted", "accepted", "copied", "copies_accepted"
        return {"passes": int(self.passes), **{name: int(getattr(self, name).sum()) for name in names}}

    def chances(self) -> Float[Array, "c"]:
        """How often a draft of each class is accepted, as far as is known."""
        # The middle of the class.
        sure = 1 - 0.75 * 2.0 ** -jnp.arange(CLASSES, dtype=jnp.float32)
        agree = 1 - 0.5 / jnp.arange(1, LONGEST + 1, dtype=jnp.float32)
        return (self.held + PRIOR * jnp.concatenate([sure, agree])) / (self.tried + PRIOR)

    def chance(self, first: float = 1.0) -> Float[Array, ""]:
        """How often a draft of the pruned model is accepted whose class is not known yet; `first` before any was."""
        return (jnp.sum(self.held[:CLASSES]) + PRIOR * first) / (jnp.sum(self.tried[:CLASSES]) + PRIOR)


def decode_speculative(
    model: Transformer,
    pruned: Transformer | None,
    state: DecodeState,
    until: int | Int[Array, ""],
    *,
    drafts: int = DEFAULT_DRAFTS,
    cost: float | Float[Array, ""] | None = None,
    earlier: Drafting | None = None,
    prompts: Int[Array, "b p"] | None = None,
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
        pruned: the model that drafts; None with `prompts`, if all drafts are copies.
        state: the answers so far, from `init_decode`, `decode` or this function. Donate it.
        until: number of tokens that rows come to hold, earlier ones included. The answers need room for `drafts` more;
            where there is less room, `until` is smaller by as much.
        drafts: n, the number of tokens that are drafted in each round, at least 1; static. The most, with `cost`.
        cost: c, what a draft costs, as part of a pass of the full model. If given, rounds have as many drafts as are
            worth it, at least 1.
        earlier: what this function returned for the answers so far, summed, to go on with what is known by then.
        prompts: from `griffin_jax.extensions.lookup.left_padded`, to draft also by copying; None for no copies.
        sampler: how tokens are drawn from the logits.
        eos: tokens that end a row; static.

    Returns:
        The longer answers, with the full model's keys and values for them in the cache, and how many drafts were
        accepted.
    """
    if pruned is None and prompts is None:
        raise ValueError("nothing drafts: give a pruned model, or prompts to copy from")
    batch, columns = state.tokens.shape
    until = jnp.minimum(until, columns - drafts)

    def unfinished(carry: tuple[DecodeState, Drafting]) -> Bool[Array, ""]:
        return (carry[0].count < until) & ~jnp.all(carry[0].done)

    def step(carry: tuple[DecodeState, Drafting]) -> tuple[DecodeState, Drafting]:
        state, drafting = carry
        known = drafting if earlier is None else earlier + drafting
        worth = None if cost is None else _worth(known, state, cost)
        copying = None if prompts is None else _Copying(prompts, state, drafts, known)
        state, more = _round(model, pruned, state, drafts, worth, copying, sampler, eos)
        return state, drafting + more

    return jax.lax.while_loop(unfinished, step, (state, Drafting.none(batch)))


Worth = Callable[[Int[Array, "b"], Float[Array, ""]], tuple[Float[Array, ""], Bool[Array, ""]]]
"""From the classes of drafts, and the chance that all before them are accepted: the chance with them, and whether
another draft is worth its cost."""


def _worth(known: Drafting, state: DecodeState, cost: float | Float[Array, ""]) -> Worth:
    """Whether another draft is worth its cost: what it probably adds to the answer, by what a token costs so far."""
    chances, next_chance = known.chances(), known.chance() ** _rows(state)
    # As if one token had been written by a pass of its own.
    price = (1 + known.passes + cost * known.steps) / state.count

    def another(classes: Int[Array, "b"], chance: Float[Array, ""]) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        chance = chance * jnp.prod(jnp.where(state.done, 1, chances[classes]))
        return chance, chance * next_chance * price > cost

    return another


def _rows(state: DecodeState) -> Float[Array, ""]:
    """How many rows have not ended."""
    return jnp.sum(~state.done, dtype=jnp.float32)


class _Copying:
    """What can be copied in a round.

    Args:
        prompts: as in `decode_speculative`.
        state: the answers so far.
        drafts: the most tokens to copy.
        known: how drafts have fared.
    """

    def __init__(self, prompts: Int[Array, "b p"], state: DecodeState, drafts: int, known: Drafting) -> None:
        room = jnp.full((len(prompts), drafts), EMPTY, jnp.int32)
        self._context = jnp.concatenate([prompts, state.tokens, room], axis=1)
        self._end, self._done, self._drafts = prompts.shape[1] + state.count, state.done, drafts
        # A worse copy may save more than it loses in this round, but then the round is over.
        self._chances, self._least = known.chances(), known.chance(COPIES_FROM) ** _rows(state)

    def are_better(self, drafted: Int[Array, "b n"], number: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether there is a copy after the first `number` drafts that is as likely to be accepted as another one."""
        _, classes, some = self._after(drafted, number)
        return some & (jnp.prod(jnp.where(self._done, 1, self._chances[classes[:, 0]])) >= self._least)

    def fill(
        self,
        number: Int[Array, ""],
        drafted: Int[Array, "b n"],
        q: Float[Array, "b n v"],
        classes: Int[Array, "b n"],
    ) -> tuple[Int[Array, ""], Int[Array, "b n"], Float[Array, "b n v"], Int[Array, "b n"]]:
        """Takes as many copies as there is room for, since they cost nothing: the same as given, with them."""
        tokens, own, some = self._after(drafted, number)
        behind = jnp.arange(self._drafts, dtype=jnp.int32) - number
        is_copy = some & (behind >= 0)
        behind = jnp.maximum(behind, 0)
        drafted = jnp.where(is_copy, tokens[:, behind], drafted)
        q = jnp.where(is_copy[:, None], jax.nn.one_hot(drafted, q.shape[-1], dtype=q.dtype), q)
        return jnp.where(some, self._drafts, number), drafted, q, jnp.where(is_copy, own[:, behind], classes)

    def _after(
        self, drafted: Int[Array, "b n"], number: Int[Array, ""]
    ) -> tuple[Int[Array, "b n"], Int[Array, "b n"], Bool[Array, ""]]:
        """Tokens to copy after the first `number` drafts, their classes, and whether every row has some."""
        drafted = jnp.where(jnp.arange(self._drafts) < number, drafted, EMPTY)
        context = jax.lax.dynamic_update_slice_in_dim(self._context, drafted, self._end, axis=1)
        tokens, matched = look_up(context, self._end + number, self._drafts)
        ahead = jnp.arange(self._drafts, dtype=jnp.int32)
        classes = CLASSES - 1 + jnp.clip(matched[:, None] + ahead, 1, LONGEST)
        return tokens, classes, jnp.all((matched > 0) | self._done)


def _class_of(logits: Float[Array, "*b v"], tokens: Int[Array, "*b"]) -> Int[Array, "*b"]:
    """The class of drafts, by the probability that they have in the model that drew them."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    unsure = 1 - jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))
    return jnp.sum(unsure[..., None] <= 2.0 ** -jnp.arange(1, CLASSES, dtype=jnp.float32), axis=-1, dtype=jnp.int32)


def _draft(
    pruned: Transformer,
    cache: KVCache,
    newest: Int[Array, "b 1"],
    positions: Int[Array, "b n"],
    keys: Key[Array, "n b"],
    worth: Worth | None,
    copying: _Copying | None,
    sampler: Sampler,
) -> tuple[Int[Array, ""], Int[Array, "b n"], Float[Array, "b n v"], Int[Array, "b n"], KVCache]:
    """How many tokens were drafted; the tokens, their distributions, and their classes, zero after the last; and the
    cache with them."""
    batch, most = positions.shape

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        number, goes_on = carry[:2]
        return (number < most) & goes_on

    def is_best(drafted: Array, number: Array) -> Bool[Array, ""]:
        """Whether there is no copy to take in place of another draft."""
        return jnp.array(True) if copying is None else ~copying.are_better(drafted, number)

    def draft(carry: tuple) -> tuple:
        number, _, chance, token, drafted, q, classes, cache = carry
        position = jax.lax.dynamic_slice_in_dim(positions, number, 1, axis=1)
        x, cache, _ = pruned(token, position, cache)
        logits = pruned.logits(x)[:, 0]
        drawn = sampler(logits, keys[number])
        goes_on = jnp.array(True)
        if worth is not None:
            own = _class_of(logits, drawn)
            chance, goes_on = worth(own, chance)
            classes = jax.lax.dynamic_update_slice_in_dim(classes, own[:, None], number, axis=1)
        drafted = jax.lax.dynamic_update_slice_in_dim(drafted, drawn[:, None], number, axis=1)
        q = jax.lax.dynamic_update_slice_in_dim(q, sampler.distribution(logits)[:, None], number, axis=1)
        goes_on &= is_best(drafted, number + 1)
        return number + 1, goes_on, chance, drawn[:, None], drafted, q, classes, cache

    none = jnp.zeros((batch, most), jnp.int32)
    q = jnp.zeros((batch, most, pruned.config.vocab_size), jnp.float32)
    start = jnp.int32(0), is_best(none, jnp.int32(0)), jnp.float32(1), newest, none, q, none, cache
    number, _, _, _, drafted, q, classes, cache = jax.lax.while_loop(unfinished, draft, start)
    return number, drafted, q, classes, cache


def _round(
    model: Transformer,
    pruned: Transformer | None,
    state: DecodeState,
    drafts: int,
    worth: Worth | None,
    copying: _Copying | None,
    sampler: Sampler,
    eos: tuple[int, ...],
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

    if pruned is None:
        steps, cache, drafted = jnp.int32(0), state.cache, jnp.zeros((len(newest), drafts), jnp.int32)
        classes, q = drafted, jnp.zeros((*drafted.shape, model.config.vocab_size), jnp.float32)
    else:
        given = positions[:, :drafts], to_draft[:drafts], worth, copying, sampler
        steps, drafted, q, classes, cache = _draft(pruned, state.cache, newest, *given)
        cache = cache.without_last(steps)
    number = steps
    if copying is not None:
        number, drafted, q, classes = copying.fill(steps, drafted, q, classes)
    x, cache, _ = model(jnp.concatenate([newest, drafted], axis=1), jnp.where(place <= number, positions, EMPTY), cache)
    p = sampler.distribution(model.logits(x))

    chance = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, dtype=jnp.float32)))(to_accept[:drafts]).T
    accepted = accept(chance, *(_of(drafted, x) for x in (p[:, :drafts], q)))
    accepted &= place[:drafts] < number
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
    reach = jnp.where(state.done | (ended[:, -1] > 0), number + 1, first + 1)
    taken = jnp.min(reach)
    is_taken = (place < taken) & ~state.done[:, None] & (ended - ends == 0)
    # What is drafted again later must not be known by then: it would be more often a draft that is accepted.
    tried = (is_taken & (place <= first[:, None]) & (place < number))[:, :drafts]
    of_class = classes[..., None] == jnp.arange(CLASSES + LONGEST, dtype=jnp.int32)
    in_answer = is_taken & (place < first[:, None])
    drafting = Drafting(
        passes=jnp.ones((), jnp.int32),
        steps=steps,
        drafted=jnp.where(state.done, 0, steps),
        accepted=jnp.sum(in_answer & (place < steps), axis=1, dtype=jnp.int32),
        copied=jnp.where(state.done, 0, number - steps),
        copies_accepted=jnp.sum(in_answer & (place >= steps), axis=1, dtype=jnp.int32),
        tried=jnp.sum(tried[..., None] & of_class, axis=(0, 1), dtype=jnp.int32),
        held=jnp.sum((tried & (accepted > 0))[..., None] & of_class, axis=(0, 1), dtype=jnp.int32),
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
