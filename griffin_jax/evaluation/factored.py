"""Compares factored models (`griffin_jax.factor`) with the dense model they come from: what does dividing it cost?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from griffin_jax.evaluation.batches import Batch
from griffin_jax.evaluation.forced import score_models
from griffin_jax.evaluation.grid import Variant, models
from griffin_jax.factor.layer import in_training
from griffin_jax.factor.losses import Oracle
from griffin_jax.generation import jitted
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.sizes import part_read
from griffin_jax.model.transformer import Transformer

INSIDE = "topk"
"""GRIFFIN's own method, which is tried inside the experts."""


class Answers(NamedTuple):
    """The answers that are scored.

    Attributes:
        tokens: token ids of each answer, padded on the right.
        lengths: number of real tokens of each answer.
        upto: number of tokens of an answer that count, at most.
        hidden: the dense model's residual stream for these tokens, from `teacher_force`.
    """

    tokens: Int[np.ndarray, "b r"]
    lengths: Int[np.ndarray, "b"]
    upto: int
    hidden: Float[Array, "b r d"]


@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
    """A factored model that is compared.

    Attributes:
        name: the model's name in tables.
        model: the model.
        densities: shares of each expert's neurons that GRIFFIN keeps; each adds a row to the tables.
        oracles: oracles that choose the experts instead of the router; each adds a row to the tables. They are for
            models whose experts are not trained.
    """

    name: str
    model: Transformer
    densities: Sequence[float] = ()
    oracles: Sequence[Oracle] = ()

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The rows of this model; the density of a row is the share of all neurons that a token reads."""
        share = share_read(self.model.config)
        own = Variant(self.name, share)
        inside = [Variant(f"{self.name}+{INSIDE}", share * density) for density in self.densities]
        return (own, *inside, *(Variant(f"{self.name}, oracle {oracle}", share) for oracle in self.oracles))

    def score(self, dense: Transformer, batch: Batch, answers: Answers, room: int) -> list[dict[str, Any]]:
        """Scores given answers with every row, in the form that `score_models` returns.

        The factored model reads the prompts itself.

        Args:
            dense: the dense model, which the rows are compared with.
            batch: the texts.
            answers: the answers to their prompts.
            room: number of tokens that an answer may have.
        """
        prefilled = batch.prefill(self.model, room)
        own, *rest = self.variants
        inside, of_oracles = rest[: len(self.densities)], rest[len(self.densities) :]

        def rows(following: Statistics) -> Iterator[tuple[Variant, Transformer]]:
            yield own, self.model
            asked = [Variant(INSIDE, density) for density in self.densities]
            found = models(self.model, asked, prefilled, following, batch.seeds, masked=True)
            for variant, (_, pruned) in zip(inside, found, strict=True):
                yield variant, pruned

        scores = _scored(self.model, rows, prefilled, answers, dense)
        for oracle, variant in zip(self.oracles, of_oracles, strict=True):
            routed = in_training(self.model, routes="oracle", oracle=oracle)
            read = jitted.prefill(
                routed, batch.prompts, batch.prompt_lengths, max_new_tokens=room, longest=room, collect=False
            )
            more = _scored(dense, lambda _: [(variant, routed)], read, answers, dense)  # noqa: B023
            for whole, further in zip(scores, more, strict=True):
                whole |= further
        return scores


def _scored(model: Transformer, rows: Any, prefilled: Prefilled, answers: Answers, dense: Transformer) -> Any:
    return score_models(
        model, rows, prefilled, answers.tokens, answers.lengths, [answers.upto], against=(dense, answers.hidden)
    )


def share_read(config: ModelConfig) -> float:
    """The share of all feed-forward neurons that a token reads."""
    read = sum(part_read(config, layer) * neurons for layer, neurons in enumerate(config.neurons))
    return read / sum(config.neurons)


def check_comparable(dense: ModelConfig, config: ModelConfig, name: str) -> None:
    """Raise `ValueError` unless a model is the dense one divided into experts."""
    if config.routing is None:
        raise ValueError(f"{name} is not divided into experts; griffin-jax factorize makes such a model")
    if dataclasses.replace(config, routing=None) != dense:
        raise ValueError(f"{name} does not come from this model: its architecture is another one")
