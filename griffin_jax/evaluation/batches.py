"""Groups texts into batches of few shapes, so that nothing is compiled for a single text."""

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
        name: where the text comes from; unique within an evaluation.
        prompt: token ids of the prompt, at least one, which the full model reads.
        answer: token ids that really follow the prompt; may be empty if answers are generated.
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
    """Texts of one padded shape. The last text is repeated until the batch is full.

    Attributes:
        items: the texts, without repetitions.
        prompts: token ids of the prompts, padded on the right.
        prompt_lengths: number of real tokens of each prompt.
        answers: token ids that really follow, padded on the right.
        answer_lengths: number of real tokens of each answer.
        seeds: seed of the draws for each row.
    """

    items: Sequence[Item]
    prompts: Int[np.ndarray, "b t"]
    prompt_lengths: Int[np.ndarray, "b"]
    answers: Int[np.ndarray, "b r"]
    answer_lengths: Int[np.ndarray, "b"]
    seeds: Int[np.ndarray, "b"]

    def prefill(self, model: Transformer, max_new_tokens: int, rows: int = 0, last: int = 0) -> Prefilled:
        """Reads the prompts with the full model, with room for answers.

        Args:
            model: the full model.
            max_new_tokens: length of the longest answer, in tokens.
            rows: number of tokens of each prompt whose relative activations are kept for a `Reconstruction`.
            last: number of tokens at the end of each prompt on which densities are to be tried; 0 for no trial.
        """
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
    """A batch of `size` rows, from at most that many texts of one shape."""
    (prompt, answer) = items[0].shape
    rows = [*items, *[items[-1]] * (size - len(items))]
    prompts, prompt_lengths = pad([item.prompt for item in rows], prompt)
    answers, answer_lengths = pad([item.answer for item in rows], answer)
    seeds = np.asarray([seed_of(seed, item.name) for item in rows], np.int32)
    return Batch(items, prompts, prompt_lengths, answers, answer_lengths, seeds)


def batches(items: Sequence[Item], size: int, seed: int) -> Iterator[Batch]:
    """Yields batches of `size` rows, each with texts of one shape."""
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
    """Returns the scores of every text, in the order of the texts.

    Scores that the journal holds are taken from it; the others are computed and added to it.

    Args:
        items: the texts.
        score: returns the scores of each text of a batch, as values that JSON can hold.
        journal: the scores that exist already.
        size: number of texts in a batch.
        seed: seed of all draws.
    """
    missing = [item for item in items if item.name not in journal.scores]
    with tqdm(total=len(items), initial=len(items) - len(missing), unit="text", disable=None) as progress:
        for batch in batches(missing, size, seed):
            found = score(batch)
            journal.add({item.name: scores for item, scores in zip(batch.items, found, strict=True)})
            progress.update(len(batch.items))
    return {item.name: journal.scores[item.name] for item in items}
