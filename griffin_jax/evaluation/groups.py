"""What it costs to let each of several groups keep its own best neurons, instead of the best of all.

The rule is that of `GriffinConfig.groups`, which needs no devices: every text's continuation is scored by the model
with either set of experts, and the sets are compared.
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
"""Columns of the tables. `overlap` is the share of a text's experts among the best of all, a mean over layers."""

Rules = Mapping[Variant, GriffinConfig]


def rules(densities: Sequence[float], groups: Sequence[int], widths: Sequence[int | Sequence[int]]) -> Rules:
    """For every density the best of all neurons, and of each number of groups.

    Args:
        densities: shares of neurons kept.
        groups: numbers of groups.
        widths: neurons of each layer, or of the ranges that they lie in, such as those of routed experts.

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
    """Scores of what follows every prompt, and how many experts are among the best of all.

    Args:
        llm: the model.
        items: the texts.
        rules: from the function of this name.
        journal: what is done already.
        new: tokens scored, at most.
        size: texts in a batch.
        seed: of the batches; nothing is drawn.

    Returns:
        For each text what `score_answers` has with one length, of every rule's variant, with `overlap` there.
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
    """The share of experts that are among the best, a mean over layers."""
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
