"""Log-likelihoods of given tokens, some of which the full model reads, and the others the pruned one.

Each `Passage` has three consecutive parts: a prompt and more tokens, which the full model reads, and an answer, which
is read by the model pruned for what stands before it. (The full model predicts the answer's first token.) The last
tokens of the passage are scored:

    continuation   the context is the prompt, the continuation is the answer
    last_token     only the last token that is read at all is read by the pruned model (arXiv 2404.01365)
    window         a share of a text is read by the full model, the rest by the pruned one; all of it is scored
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from griffin_jax.evaluation.grid import seed_of
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import bucket, pad
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Passage:
    """Tokens, the last of which are scored.

    Attributes:
        prompt: at least one token, which the full model reads, once for all passages that begin with this prompt.
        more: further tokens that the full model reads.
        answer: at least one token, which the pruned model reads.
        scored: number of tokens that are scored, counted from the end of `more` and `answer` together.
    """

    prompt: tuple[int, ...]
    more: tuple[int, ...]
    answer: tuple[int, ...]
    scored: int


def continuation(context: Sequence[int], tokens: Sequence[int]) -> Passage:
    """A passage that scores a continuation as if it had been generated; it and its context have at least one token."""
    return Passage(tuple(context), (), tuple(tokens), len(tokens))


def last_token(context: Sequence[int], tokens: Sequence[int]) -> Passage:
    """A passage that scores a continuation, only the last token of which is predicted by the pruned model.

    The model's input is all tokens but the last. Its neurons are chosen by the whole input but the last token, and that
    token alone is read with them. An input of one token has nothing to choose neurons by, so the full model reads it.
    """
    whole = (*context, *tokens)
    # All continuations of a context have in common what stands before the context's last token.
    shared = max(1, len(context) - 1)
    end = max(shared, len(whole) - 2)
    return Passage(whole[:shared], whole[shared:end], whole[end:], len(tokens))


def window(context: Sequence[int], tokens: Sequence[int], share: float) -> Passage:
    """A passage that scores all tokens after a context: the full model the first part, and the pruned one the rest.

    Args:
        context: at least one token.
        tokens: at least one token, all of them scored.
        share: share of all tokens that are read, including the context, that the full model reads, in [0, 1). It always
            reads at least the context.
    """
    whole = (*context, *tokens)
    end = max(len(context), math.floor(share * (len(whole) - 1)))
    return Passage(tuple(context), whole[len(context) : end], whole[end:], len(tokens))


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How probable a passage's scored tokens are.

    Attributes:
        log: the sum of the tokens' log p, in nats.
        greedy: whether each token is the most probable one.
    """

    log: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class _Row:
    """A prompt, and the numbers of the passages that begin with it."""

    prompt: tuple[int, ...]
    passages: list[int]


def likelihoods(
    model: Transformer,
    passages: Sequence[Passage],
    pruner: Pruner,
    *,
    size: int,
    seed: int = 0,
) -> Iterator[tuple[int, Likelihood]]:
    """Yields the number of each passage with its score, longest first.

    Prompts are padded to few lengths, and a batch always has `size` rows, so that nothing is compiled for a single
    passage. If each sequence keeps its own neurons, a score does not depend on what else is in the batch.

    Args:
        model: the full model.
        passages: the passages to score.
        pruner: how to prune. If neurons are shared, each batch keeps one set. The newest tokens that the full model
            reads after a prompt are among the rows that kept neurons are refitted to.
        size: number of different prompts in a batch.
        seed: seed of the methods that draw. Each sequence draws with its own seed, made of this one and the tokens by
            which its neurons are chosen, so equal contexts keep equal neurons; with `shared`, each batch draws with
            this seed itself.

    Raises:
        ValueError: the density does not fit the model, or rows would be refitted with method "magnitude".
    """
    if pruner.rows and pruner.config.method == "magnitude":
        raise ValueError('rows are refitted to what the prompt chooses; method "magnitude" chooses by weights alone')
    is_pruned = pruner.config.kept(model.config.neuron_ranges) != model.neurons
    pruning = _Batches(model, pruner, seed) if is_pruned else None
    if pruning is None:
        passages = [dataclasses.replace(p, more=(), answer=p.more + p.answer) for p in passages]
    prompts: dict[tuple[int, ...], _Row] = {}
    for number, passage in enumerate(passages):
        prompts.setdefault(passage.prompt, _Row(passage.prompt, [])).passages.append(number)
    shapes: dict[tuple[int, int, int], list[_Row]] = {}
    for row in prompts.values():
        more = max(len(passages[number].more) for number in row.passages)
        answer = max(len(passages[number].answer) for number in row.passages)
        shapes.setdefault((bucket(len(row.prompt)), _width(more), _width(answer)), []).append(row)
    for shape, members in sorted(shapes.items(), reverse=True):
        members.sort(key=lambda row: len(row.passages), reverse=True)
        for start in range(0, len(members), size):
            yield from _score(model, pruning, passages, members[start : start + size], shape, size)


def _width(length: int) -> int:
    """The padded length of tokens after a prompt; lengths of one and two are so common that they are not padded."""
    return length if length <= 2 else bucket(length)


def _score(
    model: Transformer,
    pruning: _Batches | None,
    passages: Sequence[Passage],
    rows: Sequence[_Row],
    shape: tuple[int, int, int],
    size: int,
) -> Iterator[tuple[int, Likelihood]]:
    """Reads prompts once, and then scores the passages that begin with them, one of each prompt at a time."""
    width, more_width, answer_width = shape
    filled = [*rows, *[rows[-1]] * (size - len(rows))]
    prompts, lengths = pad([row.prompt for row in filled], width)
    # The last token of an answer is predicted, but not read.
    longest = [max(len(passages[n].more) + len(passages[n].answer) - 1 for n in row.passages) for row in filled]
    # The prompt's last token predicts an answer of one token.
    chooser = pruning if answer_width > 1 else None
    prefilled = jitted.prefill(
        model, prompts, lengths,
        max_new_tokens=more_width + (answer_width if answer_width > 1 else 0),
        longest=jnp.asarray(longest, jnp.int32),
        collect=chooser is not None,
        rows=0 if chooser is None else chooser.rows(size),
    )  # fmt: skip
    answering = model
    for turn in range(max(len(row.passages) for row in rows)):
        present = np.asarray([turn < len(row.passages) for row in rows] + [False] * (size - len(rows)))
        numbers = [row.passages[min(turn, len(row.passages) - 1)] for row in filled]
        batch = [passages[number] for number in numbers]
        more, more_lengths = pad([passage.more for passage in batch], more_width)
        answers, answer_lengths = pad([passage.answer for passage in batch], answer_width)

        read, parts = prefilled, []
        if more_width:
            hidden, read = jitted.extend(model, prefilled, more, more_lengths)
            parts.append((jitted.losses(model, hidden, more), more_lengths))
        if answer_width == 1:
            hidden = read.hidden[:, None]
        else:
            if chooser is not None and (turn == 0 or more_width):
                answering = chooser.scorer(read, batch, present)
            hidden, _ = jitted.teacher_force(answering, read, answers, answer_lengths - 1)
        parts.append((jitted.losses(model, hidden, answers), answer_lengths))

        scores = [(np.asarray(part.loss), np.asarray(part.greedy), ends) for part, ends in parts]
        for index in np.flatnonzero(present):
            scored = passages[numbers[index]].scored
            loss = np.concatenate([loss[index, : ends[index]] for loss, _, ends in scores])[-scored:]
            greedy = np.concatenate([greedy[index, : ends[index]] for _, greedy, ends in scores])[-scored:]
            yield numbers[index], Likelihood(-float(loss.sum(dtype=np.float64)), bool(greedy.all()))


class _Batches:
    """Chooses neurons for one batch after another."""

    def __init__(self, model: Transformer, pruner: Pruner, seed: int):
        self._model, self._pruner, self._seed = model, pruner, seed

    def rows(self, size: int) -> int:
        """The number of tokens of each prompt whose activations must be recorded."""
        return self._pruner.rows_of_each(size)

    def scorer(self, read: Prefilled, batch: Sequence[Passage], present: np.ndarray) -> Transformer:
        """The model that scores the answers of a batch."""
        statistics, rows = read.statistics, read.rows
        if self._pruner.config.shared:
            # Rows that only fill the batch must not influence which neurons are kept.
            squares = tuple(jnp.where(present[:, None], square, 0) for square in statistics.squares)
            statistics = dataclasses.replace(statistics, squares=squares)
            rows = tuple(jnp.where(present[:, None, None], layer, 0) for layer in rows)
            seed = self._seed
        else:
            seeds = [seed_of(self._seed, " ".join(map(str, passage.prompt + passage.more))) for passage in batch]
            seed = jnp.asarray(seeds, jnp.int32)
        return self._pruner.scorer(self._model, statistics, rows, seed=seed)
