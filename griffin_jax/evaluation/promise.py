"""Measures how often the promise of `max_divergence` holds on the answer that follows, and at which densities.

Every density that may be taken is tried at the end of a text's prompt, and scored on what follows. The density that
would have been taken for a promise follows from the trials of two densities, by the rule of
`griffin_jax.extensions.promise`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from griffin_jax.evaluation.batches import Batch, Item, evaluate
from griffin_jax.evaluation.forced import score_answers, score_models
from griffin_jax.evaluation.front import coarse_of, mixed_models
from griffin_jax.evaluation.grid import DENSE, Variant, rows_of
from griffin_jax.evaluation.intervals import mean, share
from griffin_jax.evaluation.journal import Journal
from griffin_jax.evaluation.report import Figures, Metric, as_json, cells, draw_legend, draw_line, titles
from griffin_jax.evaluation.tasks import OWN, REAL, generate
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.mixed import MixedFormat
from griffin_jax.extensions.promise import MARGIN, Promised, choose, ends_of
from griffin_jax.extensions.trial import try_models, try_pruners
from griffin_jax.generation.padding import bucket, pad
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.llm.llm import LLM
from griffin_jax.model.transformer import Transformer
from griffin_jax.utils.figures import new_figure

TRIAL = "trial"
ALL = "all texts"

METRICS = (
    Metric("density", "density", 2),
    Metric("own_holds", "holds, own", 2),
    Metric("own", "KL, own", 3),
    Metric("real_holds", "holds, real", 2),
    Metric("real", "KL, real", 3),
)
"""Columns of the table: the density that was taken; then the share of texts for which the promise holds and the mean
divergence, first for the dense model's own answer, then for what really follows."""


def try_densities(
    llm: LLM,
    items: Sequence[Item],
    variants: Sequence[Variant],
    journal: Journal,
    *,
    trial: int,
    new: int,
    size: int,
    seed: int,
    extensions: Extensions,
    mixed: MixedFormat | None = None,
) -> dict[str, Any]:
    """Measures divergences for every text and variant, on the trial and on what follows the prompt.

    Args:
        llm: the model.
        items: the texts, with prompts and answers.
        variants: the variants that may be taken, and the dense model.
        journal: the scores that exist already.
        trial: number of tokens at the end of each prompt that are its trial.
        new: number of tokens of the dense model's own answer, at most.
        size: number of texts in a batch.
        seed: seed of all draws.
        extensions: options of the steps beyond GRIFFIN.
        mixed: the two formats of kept neurons, without a share, so that densities count bytes; None if all neurons have
            the model's format.

    Returns:
        For each text: `trial`, the divergences of single tokens, by the name of each variant but the dense one; and
        `real` and `own`, each with what `score_answers` returns for a single length.
    """
    model, eos = llm.model, llm.config.eos_token_ids
    pruned = [variant for variant in variants if variant.method != DENSE]
    few = None if mixed is None else coarse_of(model, mixed)

    def in_two_formats(prompts: Prefilled) -> Iterator[tuple[Variant, Transformer]]:
        assert few is not None
        assert mixed is not None
        return mixed_models(model, few, mixed, pruned, prompts, extensions, masked=True)

    def trials(prefilled: Prefilled, tokens: np.ndarray, seeds: jax.Array) -> dict[str, np.ndarray]:
        if few is None:
            tried = [try_pruners(model, prefilled, tokens, [each.pruner(extensions)], seeds)[:, 0] for each in pruned]
        else:
            together = try_models(model, prefilled, tokens, lambda before: (one for _, one in in_two_formats(before)))
            tried = together.swapaxes(0, 1)
        return {variant.name: found for variant, found in zip(pruned, tried, strict=True)}

    def scored(prefilled: Prefilled, batch: Batch, tokens: np.ndarray, lengths: np.ndarray, upto: int) -> list[Any]:
        if few is None:
            return score_answers(model, variants, prefilled, tokens, lengths, batch.seeds, [upto], extensions)
        dense = [(variant, model) for variant in variants if variant.method == DENSE]

        def every(_: Statistics) -> Iterator[tuple[Variant, Transformer]]:
            return itertools.chain(dense, in_two_formats(prefilled))

        return score_models(model, every, prefilled, tokens, lengths, [upto])

    def score(batch: Batch) -> list[dict[str, Any]]:
        length = max(new, batch.answers.shape[1])
        prefilled = batch.prefill(model, bucket(length), rows_of(variants, extensions), trial)
        ends = batch.prompt_lengths[:, None] - np.arange(trial, 0, -1)
        last, seeds = np.take_along_axis(batch.prompts, ends, axis=1), jnp.asarray(batch.seeds)
        tried = trials(prefilled, last, seeds)
        own = pad(generate(model, prefilled, new, eos), bucket(new))
        following = {REAL: (batch.answers, batch.answer_lengths), OWN: own}
        found = {kind: scored(prefilled, batch, *answers, length) for kind, answers in following.items()}
        return [
            {TRIAL: {name: divergences[index].tolist() for name, divergences in tried.items()}}
            | {kind: scores[index] for kind, scores in found.items()}
            for index in range(len(batch.items))
        ]

    return evaluate(items, score, journal, size=size, seed=seed)


def promised(text: Mapping[str, Any], variants: Sequence[Variant], most: float, margin: float = MARGIN) -> Promised:
    """What would have been taken for a text.

    Args:
        text: the scores of the text, from `try_densities`.
        variants: the variants of one method that may be taken.
        most: the promised divergence, in nats per token.
        margin: number of standard errors that are added to the mean of a trial.
    """
    ladder = sorted(variants, key=lambda variant: variant.density)
    densities, trials = [variant.density for variant in ladder], text[TRIAL]
    tried = {at: np.asarray([trials[Variant(ladder[0].method, at).name]]) for at in ends_of(densities)}
    return choose(densities, tried, most, margin)


def figures(
    scores: Mapping[str, Any],
    kinds: Mapping[str, str],
    variants: Sequence[Variant],
    qualities: Mapping[str, str],
    promises: Sequence[float],
    seed: int,
    margin: float = MARGIN,
) -> Figures:
    """One entry for each quality, promise and kind of text, and one for all texts together if there are several kinds.

    After these comes an entry for each density, as if it were taken for all texts.

    Args:
        scores: what `try_densities` returned.
        kinds: the kind of each text, by its name.
        variants: the variants that were tried.
        qualities: the quality that each method stands for.
        promises: the promised divergences, in nats per token.
        seed: seed of the bootstrap.
        margin: number of standard errors that are added to the mean of a trial.
    """
    groups = {kind: [name for name in scores if kinds[name] == kind] for kind in dict.fromkeys(kinds.values())}
    if len(groups) > 1:
        groups[ALL] = list(scores)

    def entries() -> Iterator[dict[str, Any]]:
        methods = dict.fromkeys(variant.method for variant in variants if variant.method != DENSE)
        for method in methods:
            own = [variant for variant in variants if variant.method == method]
            for most in promises:
                head = {"quality": qualities[method], "most": most}
                for kind, names in groups.items():
                    texts = [scores[name] for name in names]
                    densities = [promised(text, own, most, margin).density for text in texts]
                    yield {"kind": kind, **head} | _figures(texts, method, densities, most, seed)
                texts = list(scores.values())
                for density in sorted(variant.density for variant in own):
                    same = _figures(texts, method, [density] * len(texts), most, seed)
                    yield {"kind": f"{ALL} at {density:g}", **head} | same

    return list(entries())


def _figures(
    texts: Sequence[Mapping[str, Any]], method: str, densities: Sequence[float], most: float, seed: int
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "texts": len(texts),
        "density": as_json(mean(densities, seed)),
        "dense": sum(density == 1 for density in densities) / len(densities),
    }
    for kind in (OWN, REAL):
        divergences = [
            0.0 if density == 1 else text[kind][Variant(method, density).name]["kl"][0] / text[kind]["tokens"][0]
            for text, density in zip(texts, densities, strict=True)
        ]
        found[kind] = as_json(mean(divergences, seed))
        found[f"{kind}_holds"] = as_json(share([divergence <= most for divergence in divergences]))
    return found


def table(found: Figures) -> str:
    """A table of the figures with their intervals."""
    first = max([14, *(len(entry["kind"]) + 1 for entry in found)])
    lines = [f"{'texts':{first}}{'number':>7}{'quality':>8}{'promised':>9}{'dense':>7}" + titles(METRICS)]
    for entry in found:
        lines.append(
            f"{entry['kind']:{first}}{entry['texts']:>7}{entry['quality']:>8}{entry['most']:>9g}{entry['dense']:>7.0%}"
            f"{cells(entry, METRICS)}"
        )
    lines.append(
        "\npromised, KL: nats per token. dense: texts for which nothing was pruned. holds: share of texts whose answer"
        " keeps\nthe promise, with its Wilson interval. own: the dense model's own answer. real: what really follows."
        "\nat: the same density for all texts, whatever a trial says."
    )
    return "\n".join(lines)


def plot(found: Figures, title: str, file: str | os.PathLike[str]) -> None:
    """Draws how often promises hold, and the mean density taken, against what was promised.

    There is a line for each kind of text and each quality.

    Args:
        found: what `figures` returned.
        title: title of the plot.
        file: the PNG file that is written.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = new_figure(10.4, 4.0)
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots(1, 3)
    panels = {
        "density": "mean density",
        "own_holds": "holds for its own answer",
        "real_holds": "holds for what follows",
    }
    found = [entry for entry in found if not entry["kind"].startswith(f"{ALL} at")]
    lines = list(dict.fromkeys((entry["kind"], entry["quality"]) for entry in found))
    names = list(dict.fromkeys(kind for kind, _ in lines))
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for kind, quality in lines:
            line = [entry for entry in found if (entry["kind"], entry["quality"]) == (kind, quality)]
            line.sort(key=lambda entry: entry["most"])
            draw_line(
                axis, [entry["most"] for entry in line], [entry[key] for entry in line], marker="o", linewidth=1.2,
                linestyle="-" if quality == "griffin" else "--", color=f"C{names.index(kind) % 10}",
                label=f"{kind}, {quality}",
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("promised (nats/token)")
        axis.set_ylabel(label)
        ticks = sorted({entry["most"] for entry in found})
        axis.set_xticks(ticks, [f"{most:g}" for most in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    draw_legend(figure, axes[0])
    figure.savefig(file, format="png")
