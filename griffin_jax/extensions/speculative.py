"""Beyond GRIFFIN: speculative decoding, in which the pruned model drafts and the answer is the full model's.

    state, drafting = decode_speculative(model, pruned, init_decode(prefilled), N, drafts=4)

In each round, the pruned model drafts a few tokens, one after the other. One pass of the full model then reads all
drafts and gives its own distribution for each of these positions and for the next one. At a position, let p be the
distribution of the full model and q that of the pruned one, both with the chosen sampler. A draft x is accepted with
probability min(1, p(x) / q(x)). The first draft that is not accepted is replaced by a token drawn from max(0, p - q),
normalised, and later drafts are dropped. If all drafts are accepted, one more token is drawn from p. Tokens drawn in
this way have exactly the full model's distribution (speculative sampling: Leviathan, Kalman, Matias, arXiv 2211.17192,
and Chen et al., arXiv 2302.01318). With the greedy sampler, p and q are 1 for a single token and 0 for all others.

Costs are counted in dense steps. If a draft costs c and is accepted with probability a, and the pass of the full model
costs v, then a round of n drafts costs n c + v and yields (1 - a^(n+1)) / (1 - a) tokens. It pays off if it yields more
tokens than it costs steps: for n = 1, if a > c + v - 1.

How many drafts are worth their cost differs from token to token. With `cost`, a round ends where the next draft would
probably be in vain. How sure the pruned model is of a token indicates how often the full model accepts it; acceptance
is counted in classes of certainty while decoding. The decision to stop is made before the full model has seen anything
of the round, and depends on nothing that is drawn again later. The distribution of the tokens therefore stays that of
the full model.

With `prompts`, drafts are also copied from earlier occurrences of the last tokens (`griffin_jax.extensions.lookup`),
for which no weights are read. A round switches to copies where a copy is at least as likely to be accepted as another
draft of the pruned model (acceptance of copies is counted by how many tokens before them agree), or where the pruned
model stops. The pruned model has not read the copied tokens, so it drafts nothing after them in that round. A copy has
probability 1 in the distribution q that it comes from, so the rule above holds for it, too. Without a pruned model, all
drafts are copies.
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
"""Number of tokens that are drafted for each pass of the full model by default."""

MOST_DRAFTS = 8
"""Largest number of drafts in a round if the number adapts to their worth."""

MOST_WITH_COPIES = FUSED_TOKENS - 1
"""Largest number of drafts in an adaptive round if drafts are also copied. Together with the token before them, it is
the largest number of tokens that GPUs multiply with a matrix of any format without converting the matrix in memory."""

CLASSES = 8
"""Number of classes of drafts by how sure the pruned model is of them. Class i has drafts of probability 1 - 2^-i to
1 - 2^-(i+1), and the last class all above. After them come the classes of copies, by how many tokens before the copy
agree, from 1 on."""

PRIOR = 2
"""Number of drafts of each class that count as if they had been seen before decoding starts. Their assumed rate of
acceptance is the probability that the pruned model gives them, and 1 - 1 / (2 m) for copies after m agreeing tokens."""

COPIES_FROM = 0.75
"""Rate of acceptance that a copy must have as long as that of the pruned model's drafts is not known yet."""


def most_drafts(drafts: int | bool, *, lookup: bool) -> int:
    """The largest number of drafts in a round.

    Args:
        drafts: the number that is asked for; True for an adaptive number.
        lookup: whether drafts are also copied.
    """
    return count_or(drafts, MOST_WITH_COPIES if lookup else MOST_DRAFTS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafting:
    """How many drafts were made and accepted. It is additive: results of several calls can be added up with `+`.

    C is the number of classes of drafts and copies, see `CLASSES`.

    Attributes:
        passes: number of passes of the full model.
        steps: number of steps of the pruned model, each of which drafts a token for every row.
        drafted: number of tokens that the pruned model drafted for each row before the row ended, (B,).
        accepted: number of these tokens that are in the row's answer, (B,).
        copied: number of tokens that were copied as drafts for each row before the row ended, (B,).
        copies_accepted: number of these tokens that are in the row's answer, (B,).
        tried: number of drafts of each class about which the full model decided, (C,): in each row those up to the
            first one that was not accepted, without those that are drafted again later.
        held: number of drafts in `tried` that were accepted, (C,).
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
        """The counts before anything is drafted for `batch` rows: all zero."""
        one, rows, classes = (jnp.zeros(shape, jnp.int32) for shape in ((), (batch,), (CLASSES + LONGEST,)))
        return cls(one, one, rows, rows, rows, rows, classes, classes)

    def __add__(self, other: Drafting) -> Drafting:
        return jax.tree.map(operator.add, self, other)

    def counts(self) -> dict[str, int]:
        """The numbers of passes, and of drafts and copies of all rows together, made and accepted; for files."""
        names = "drafted", "accepted", "copied", "copies_accepted"
        return {"passes": int(self.passes), **{name: int(getattr(self, name).sum()) for name in names}}

    def chances(self) -> Float[Array, "c"]:
        """The estimated rate of acceptance of each class, (C,), float32."""
        # The probability in the middle of each class.
        sure = 1 - 0.75 * 2.0 ** -jnp.arange(CLASSES, dtype=jnp.float32)
        agree = 1 - 0.5 / jnp.arange(1, LONGEST + 1, dtype=jnp.float32)
        return (self.held + PRIOR * jnp.concatenate([sure, agree])) / (self.tried + PRIOR)

    def chance(self, first: float = 1.0) -> Float[Array, ""]:
        """The estimated rate of acceptance of a draft of the pruned model whose class is not known yet.

        Args:
            first: the rate to assume before anything was drafted.
        """
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

    The last round may write up to `drafts` tokens more than `until`. Rounds, and thus tokens, do not depend on how
    many calls are made to reach a length. In each round, all rows of a batch advance by as many tokens as the row with
    the fewest accepted drafts, and the other rows draft the rest again. A round therefore takes cache slots only for
    the tokens that it yields, and the more rows there are, the fewer tokens it yields.

    A round holds the distributions of its drafts over the whole vocabulary, (2 n + 1) B V float32 numbers, in addition
    to the cache.

    Args:
        model: the full model, whose distribution the tokens have.
        pruned: the model that drafts; None if all drafts are copies, which needs `prompts`.
        state: the answers so far, from `init_decode`, `decode` or this function. Donate it.
        until: total number of tokens to write in each row, earlier ones included. The answers need room for `drafts`
            tokens more; if they have less, `until` is reduced accordingly.
        drafts: n, the number of tokens that are drafted in each round, or with `cost` the largest number; at least 1;
            static.
        cost: c, the cost of a draft relative to a pass of the full model. If given, each round makes as many drafts as
            are worth it, and at least 1.
        earlier: the sum of what this function returned for the answers so far, so that the rates of acceptance that
            were counted there are used further.
        prompts: the prompts, (B, P), from `griffin_jax.extensions.lookup.left_padded`, to draft by copying as well;
            None for no copies.
        sampler: how tokens are drawn from the logits.
        eos: ids of the tokens that end a row; static.

    Returns:
        The longer answers, with the full model's keys and values in the cache, and how many drafts were made and
        accepted in this call.

    Raises:
        ValueError: there is neither a pruned model nor `prompts`.
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
"""A function of the class of each row's newest draft, (B,), and of the chance that all drafts before them are accepted.

It returns the chance including the newest drafts, and whether another draft is worth its cost."""


def _worth(known: Drafting, state: DecodeState, cost: float | Float[Array, ""]) -> Worth:
    """The function that decides whether another draft is worth its cost.

    It is if the expected number of tokens that it adds to the answer, times the cost per token so far, exceeds `cost`.
    """
    chances, next_chance = known.chances(), known.chance() ** _rows(state)
    # One more pass: the first token counts as if a pass had written it.
    price = (1 + known.passes + cost * known.steps) / state.count

    def another(classes: Int[Array, "b"], chance: Float[Array, ""]) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        chance = chance * jnp.prod(jnp.where(state.done, 1, chances[classes]))
        return chance, chance * next_chance * price > cost

    return another


def _rows(state: DecodeState) -> Float[Array, ""]:
    """The number of rows that have not ended."""
    return jnp.sum(~state.done, dtype=jnp.float32)


class _Copying:
    """The tokens that can be copied in a round.

    Args:
        prompts: as in `decode_speculative`.
        state: the answers so far.
        drafts: n, the largest number of drafts in a round.
        known: the acceptance of drafts so far.
    """

    def __init__(self, prompts: Int[Array, "b p"], state: DecodeState, drafts: int, known: Drafting) -> None:
        room = jnp.full((len(prompts), drafts), EMPTY, jnp.int32)
        self._context = jnp.concatenate([prompts, state.tokens, room], axis=1)
        self._end, self._done, self._drafts = prompts.shape[1] + state.count, state.done, drafts
        # A less likely copy might save more than it loses, but after it the pruned model drafts no more in this round.
        self._chances, self._least = known.chances(), known.chance(COPIES_FROM) ** _rows(state)

    def are_better(self, drafted: Int[Array, "b n"], number: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether, after the first `number` drafts, a copy is at least as likely to be accepted as another draft."""
        _, classes, some = self._after(drafted, number)
        return some & (jnp.prod(jnp.where(self._done, 1, self._chances[classes[:, 0]])) >= self._least)

    def fill(
        self,
        number: Int[Array, ""],
        drafted: Int[Array, "b n"],
        q: Float[Array, "b n v"],
        classes: Int[Array, "b n"],
    ) -> tuple[Int[Array, ""], Int[Array, "b n"], Float[Array, "b n v"], Int[Array, "b n"]]:
        """Fills a round with copies after the first `number` drafts: as many as fit, since they cost nothing.

        Returns:
            The arguments with the copies added: the number of drafts, the drafts, their distributions and classes.
        """
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
        """The tokens to copy after the first `number` drafts, their classes, and whether every row has copies."""
        drafted = jnp.where(jnp.arange(self._drafts) < number, drafted, EMPTY)
        context = jax.lax.dynamic_update_slice_in_dim(self._context, drafted, self._end, axis=1)
        tokens, matched = look_up(context, self._end + number, self._drafts)
        ahead = jnp.arange(self._drafts, dtype=jnp.int32)
        classes = CLASSES - 1 + jnp.clip(matched[:, None] + ahead, 1, LONGEST)
        return tokens, classes, jnp.all((matched > 0) | self._done)


def _class_of(logits: Float[Array, "*b v"], tokens: Int[Array, "*b"]) -> Int[Array, "*b"]:
    """The class of each draft by its probability in the model that drafted it; see `CLASSES`."""
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
    """Draft tokens with the pruned model until a round is full, another draft is not worth it, or a copy is better.

    Returns:
        The number of drafts; the drafts, (B, n), their distributions, (B, n, V), and their classes, (B, n), which are
        zero after the last draft; and the cache, to which the pruned model's keys and values were added.
    """
    batch, most = positions.shape

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        number, goes_on = carry[:2]
        return (number < most) & goes_on

    def is_best(drafted: Array, number: Array) -> Bool[Array, ""]:
        """Whether another draft is better than a copy."""
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
    # The keys belong to the column, whichever round writes it. If a draft is dropped because of another row or of an
    # earlier draft, nothing that was kept depends on its keys, so they can be used again.
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
    # After the last draft there is no further one; that is the same as a draft whose q is zero everywhere.
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    p_first, q_first = (jnp.take_along_axis(x, first[:, None, None], axis=1)[:, 0] for x in (p, q))
    key = jnp.take_along_axis(to_correct.T, first[:, None], axis=1)[:, 0]
    corrected = jax.vmap(jax.random.categorical)(key, jnp.log(correction(p_first, q_first)))

    tokens = jnp.where(place < first[:, None], jnp.pad(drafted, ((0, 0), (0, 1))), corrected[:, None].astype(jnp.int32))
    ends = jnp.isin(tokens, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros_like(tokens, bool)
    ends &= place <= first[:, None]
    ended = jnp.cumsum(ends, axis=1, dtype=jnp.int32)
    # A row that has ended does not hold up the others.
    reach = jnp.where(state.done | (ended[:, -1] > 0), number + 1, first + 1)
    taken = jnp.min(reach)
    is_taken = (place < taken) & ~state.done[:, None] & (ended - ends == 0)
    # Drafts that will be drafted again with the same keys must not be counted yet: decisions based on them would favour
    # drafts that are accepted.
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
    """The values of x at the given tokens."""
    return jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]


def accept(chance: Float[Array, "*b"], p: Float[Array, "*b"], q: Float[Array, "*b"]) -> Bool[Array, "*b"]:
    """Whether each draft is accepted; its probability of being accepted is min(1, p / q).

    Args:
        chance: random numbers, uniform in [0, 1).
        p: probability of each draft in the full model.
        q: probability of each draft in the model that drafted it; above 0.
    """
    return chance * q < p


def correction(p: Float[Array, "*b v"], q: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
    """max(0, p - q): the weights with which the replacement of a rejected draft is drawn, not normalised.

    If rounding makes it zero everywhere, p and q are the same, and p is returned instead.
    """
    rest = jnp.maximum(p - q, 0)
    return jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, p)
