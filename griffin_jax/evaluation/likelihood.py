"""Log-likelihoods of given tokens where some are read by the full model and the others by the pruned one.

Each `Passage` has three parts, one after the other: a prompt and more tokens, which are read by the full model, and
an answer, which is read by the model pruned for what stands before it. (The answer's first token is predicted by the
full model.) What is scored are the last tokens of the passage:

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
    """Tokens of which the last ones are scored.

    Attributes:
        prompt: read by the full model, once for all passages that have it in common; at least one token.
        more: read by the full model, too.
        answer: read by the pruned model; at least one token.
        scored: how many tokens of `more` and `answer` together, counted from the end.
    """

    prompt: tuple[int, ...]
    more: tuple[int, ...]
    answer: tuple[int, ...]
    scored: int


def continuation(context: Sequence[int], tokens: Sequence[int]) -> Passage:
    """A continuation after its context, each of at least one token, as if it had been generated."""
    return Passage(tuple(context), (), tuple(tokens), len(tokens))


def last_token(context: Sequence[int], tokens: Sequence[int]) -> Passage:
    """A continuation of which only the last token is predicted by the pruned model.

    The model's input is all but the last token. Neurons are chosen by all of the input but its last token, which is
    the one token that is read with them. An input of one token has nothing to choose by: it is read by the full model.
    """
    whole = (*context, *tokens)
    # What stands before the context's last token is what all continuations of the context have in common.
    shared = max(1, len(context) - 1)
    end = max(shared, len(whole) - 2)
    return Passage(whole[:shared], whole[shared:end], whole[end:], len(tokens))


def window(context: Sequence[int], tokens: Sequence[int], share: float) -> Passage:
    """Tokens after a context of which the first part is scored by the full model, the rest by the pruned one.

    Args:
        context: at least one token.
        tokens: at least one token, all of them scored.
        share: of the tokens that are read, context included, the part that the full model reads, in [0, 1); never less
            than the context.
    """
    whole = (*context, *tokens)
    end = max(len(context), math.floor(share * (len(whole) - 1)))
    return Passage(tuple(context), whole[len(context) : end], whole[end:], len(tokens))


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How probable a passage's scored tokens are.

    Attributes:
        log: the sum of their log p, in nats.
        greedy: whether each of them is the most probable token.
    """

    log: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class _Row:
    """A prompt, and which passages begin with it."""

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
    passage. Where each sequence keeps neurons of its own, a score does not depend on what else is in the batch.

    Args:
        model: the full model.
        passages: what to score.
        pruner: how to prune. If neurons are shared, each batch keeps one set. Of what is read whole after a prompt, the
            newest tokens are among the rows that kept neurons are refitted to.
        size: different prompts in a batch.
        seed: of the methods that draw. Each sequence draws with a seed of its own, made of this one and the tokens
            that its neurons are chosen by, so equal contexts keep equal neurons; with `shared`, each batch with this.

    Raises:
        ValueError: the density does not fit the model, or method "magnitude" is to refit rows.
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
    """The padded length of tokens after a prompt; one or two are so common that they are not padded."""
    return length if length <= 2 else bucket(length)


def _score(
    model: Transformer,
    pruning: _Batches | None,
    passages: Sequence[Passage],
    rows: Sequence[_Row],
    shape: tuple[int, int, int],
    size: int,
) -> Iterator[tuple[int, Likelihood]]:
    """Prompts that are read once, and then one passage of each after the other."""
    width, more_width, answer_width = shape
    filled = [*rows, *[rows[-1]] * (size - len(rows))]
    prompts, lengths = pad([row.prompt for row in filled], width)
    # The last token of an answer is predicted, but not read.
    longest = [max(len(passages[n].more) + len(passages[n].answer) - 1 for n in row.passages) for row in filled]
    # An answer of one token is predicted by the prompt's last.
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
    """Chooses neurons for one batch after the other."""

    def __init__(self, model: Transformer, pruner: Pruner, seed: int):
        self._model, self._pruner, self._seed = model, pruner, seed

    def rows(self, size: int) -> int:
        """Tokens of each prompt whose activations must be recorded."""
        return self._pruner.rows_of_each(size)

    def scorer(self, read: Prefilled, batch: Sequence[Passage], present: np.ndarray) -> Transformer:
        """What scores the answers of a batch."""
        statistics, rows = read.statistics, read.rows
        if self._pruner.config.shared:
            # Rows that only fill the batch have no say.
            squares = tuple(jnp.where(present[:, None], square, 0) for square in statistics.squares)
            statistics = dataclasses.replace(statistics, squares=squares)
            rows = tuple(jnp.where(present[:, None, None], layer, 0) for layer in rows)
            seed = self._seed
        else:
            seeds = [seed_of(self._seed, " ".join(map(str, passage.prompt + passage.more))) for passage in batch]
            seed = jnp.asarray(seeds, jnp.int32)
        return self._pruner.scorer(self._model, statistics, rows, seed=seed)
