"""Measures what it costs if each of several groups of neurons keeps its own best ones, instead of the best of all.

The rule is that of `GriffinConfig.groups`, which one device can apply, too. Every text's continuation is scored by the
model with either set of experts, and the two sets are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from griffin_jax.evaluation.batches import Batch, Item, evaluate
from griffin_jax.evaluation.forced import score_models
from griffin_jax.evaluation.grid import DENSE, Variant
from griffin_jax.evaluation.intervals import mean
from griffin_jax.evaluation.journal import Journal
from griffin_jax.evaluation.report import FORCED, Figures, Metric, as_json, forced_figures
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import bucket
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.masked import mask
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.llm.llm import LLM
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import to_host
from griffin_jax.utils import programs

METRICS = (Metric("overlap", "overlap", 3), *FORCED)
"""Columns of the tables. `overlap` is the share of a text's experts that are among the best of all, averaged over
layers."""

Rules = Mapping[Variant, GriffinConfig]


def rules(densities: Sequence[float], groups: Sequence[int], widths: Sequence[int | Sequence[int]]) -> Rules:
    """For every density, the config that keeps the best of all neurons, and one for each number of groups.

    Args:
        densities: shares of neurons that are kept.
        groups: numbers of groups.
        widths: number of neurons of each layer, or the sizes of the ranges into which its neurons are divided, such as
            routed experts.

    Raises:
        ValueError: a value is outside its range, or groups cannot have or keep equally many neurons.
    """
    found = {}
    for density in densities:
        for number in dict.fromkeys([1, *groups]):
            config = GriffinConfig(density, groups=number)
            config.kept(widths)
            found[Variant("topk" if number == 1 else f"topk, {number} groups", density)] = config
    return found


def compare_groups(
    llm: LLM, items: Sequence[Item], rules: Rules, journal: Journal, *, new: int, size: int, seed: int
) -> dict[str, Any]:
    """Scores what follows every prompt, and finds how many experts are among the best of all.

    Args:
        llm: the model.
        items: the texts.
        rules: what the function `rules` returned.
        journal: the scores that exist already.
        new: number of tokens scored, at most.
        size: number of texts in a batch.
        seed: seed of the batches; nothing is drawn.

    Returns:
        For each text, what `score_answers` returns for a single length, for the variant of every rule, with `overlap`
        among its scores.
    """
    model = llm.model

    def score(batch: Batch) -> list[dict[str, Any]]:
        prefilled = batch.prefill(model, bucket(new))
        given = {"magnitudes": jitted.magnitudes_of(model)}
        chosen = {variant: jitted.select(prefilled.statistics, config, **given) for variant, config in rules.items()}
        best = {variant.density: chosen[variant] for variant, config in rules.items() if config.groups == 1}

        def every(answers: Statistics) -> Iterator[tuple[Variant, Transformer]]:
            del answers
            yield Variant(DENSE, 1.0), model
            for variant, experts in chosen.items():
                yield variant, mask(model, experts)

        scores = score_models(model, every, prefilled, batch.answers, batch.answer_lengths, [new])
        for variant, experts in chosen.items():
            found = to_host(_overlap(experts, best[variant.density]))
            for text, share in zip(scores, found, strict=True):
                text[variant.name]["overlap"] = float(share)
        return scores[: len(batch.items)]

    return evaluate(items, score, journal, size=size, seed=seed)


@programs.jit
def _overlap(experts: ExpertNeurons, best: ExpertNeurons) -> Float[Array, "b"]:
    """The share of experts that are among the best, averaged over layers."""
    shares = [
        jnp.sum(own & other, axis=-1) / kept
        for own, other, kept in zip(experts.masks(), best.masks(), experts.kept, strict=True)
    ]
    return jnp.mean(jnp.stack(shares), axis=0)


def figures(scores: Mapping[str, Any], rules: Rules, seed: int) -> Figures:
    """One entry for each rule."""
    texts = list(scores.values())
    return [
        {"method": variant.method, "density": variant.density, "groups": config.groups}
        | {"overlap": as_json(mean([text[variant.name]["overlap"] for text in texts], seed))}
        | forced_figures(texts, variant, 0, seed)
        for variant, config in rules.items()
    ]
