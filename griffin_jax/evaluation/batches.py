"""Texts in batches of few shapes, so that nothing is compiled for a single text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from griffin_jax.evaluation.grid import seed_of
from griffin_jax.evaluation.journal import Journal
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import bucket, pad
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Item:
    """A text to evaluate on.

    Attributes:
        name: where it is from, once only in an evaluation.
        prompt: token ids that are read densely, at least one.
        answer: token ids that really follow; may be empty where answers are generated.
        reference: the text that an answer is compared with.
    """

    name: str
    prompt: Sequence[int]
    answer: Sequence[int] = ()
    reference: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """Padded lengths of prompt and answer."""
        return bucket(len(self.prompt)), bucket(len(self.answer)) if self.answer else 0


@dataclasses.dataclass(frozen=True)
class Batch:
    """Texts of one padded shape, and rows that repeat the last of them until the batch is full.

    Attributes:
        items: the texts.
        prompts: token ids.
        prompt_lengths: real ones of each row.
        answers: token ids that really follow.
        answer_lengths: real ones of each row.
        seeds: of the draws for each row.
    """

    items: Sequence[Item]
    prompts: Int[np.ndarray, "b t"]
    prompt_lengths: Int[np.ndarray, "b"]
    answers: Int[np.ndarray, "b r"]
    answer_lengths: Int[np.ndarray, "b"]
    seeds: Int[np.ndarray, "b"]

    def prefill(self, model: Transformer, max_new_tokens: int, rows: int = 0, last: int = 0) -> Prefilled:
        """The prompts, read by the full model with room for an answer, with rows for a `Reconstruction`, and with what
        a trial on their last tokens needs."""
        return jitted.prefill(
            model,
            self.prompts,
            self.prompt_lengths,
            max_new_tokens=max_new_tokens,
            longest=max_new_tokens,
            rows=rows,
            last=last,
        )


def batch_of(items: Sequence[Item], size: int, seed: int) -> Batch:
    """At most `size` texts of one shape as a batch of that size."""
    (prompt, answer) = items[0].shape
    rows = [*items, *[items[-1]] * (size - len(items))]
    prompts, prompt_lengths = pad([item.prompt for item in rows], prompt)
    answers, answer_lengths = pad([item.answer for item in rows], answer)
    seeds = np.asarray([seed_of(seed, item.name) for item in rows], np.int32)
    return Batch(items, prompts, prompt_lengths, answers, answer_lengths, seeds)


def batches(items: Sequence[Item], size: int, seed: int) -> Iterator[Batch]:
    """Texts of equal shapes together, `size` in each batch."""
    shapes: dict[tuple[int, int], list[Item]] = {}
    for item in items:
        shapes.setdefault(item.shape, []).append(item)
    for _, members in sorted(shapes.items()):
        for start in range(0, len(members), size):
            yield batch_of(members[start : start + size], size, seed)


def evaluate(
    items: Sequence[Item],
    score: Callable[[Batch], Sequence[Any]],
    journal: Journal,
    *,
    size: int,
    seed: int,
) -> dict[str, Any]:
    """Scores of every text, in the order of the texts: those in the journal are taken from it, the others go there.

    Args:
        items: the texts.
        score: scores of each text of a batch, as JSON holds them.
        journal: what is done already.
        size: texts in a batch.
        seed: of all draws.
    """
    missing = [item for item in items if item.name not in journal.scores]
    with tqdm(total=len(items), initial=len(items) - len(missing), unit="text", disable=None) as progress:
        for batch in batches(missing, size, seed):
            found = score(batch)
            journal.add({item.name: scores for item, scores in zip(batch.items, found, strict=True)})
            progress.update(len(batch.items))
    return {item.name: journal.scores[item.name] for item in items}
