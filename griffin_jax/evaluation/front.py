"""Quality against bytes: for a given number of bytes per token, is it better to use fewer bits, or to prune?

Every format of the weights is combined with every density. All combinations are compared with one reference, the model
as it is, on the same given tokens. In each row, the full model in the row's own format reads the prompt and provides
GRIFFIN's statistic.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from griffin_jax.evaluation.batches import Batch, Item, batches
from griffin_jax.evaluation.drafts import Drafter, continued, counts
from griffin_jax.evaluation.forced import score_models
from griffin_jax.evaluation.front_report import DRAFTED
from griffin_jax.evaluation.grid import DEFAULTS, DENSE, HEALING, RECONSTRUCTION, Variant, models, rows_of
from griffin_jax.evaluation.journal import Journal
from griffin_jax.evaluation.report import Figures, forced_figures
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.drafter import step_bytes
from griffin_jax.extensions.mixed import MixedFormat, MixedSizes, coarse
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import bucket
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.llm.llm import LLM
from griffin_jax.llm.results import Generation
from griffin_jax.model.assembly import assemble, disassemble
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.parallel.mesh import to_host

EVERY = GriffinConfig(1.0)
"""The config that keeps all neurons."""

Format = WeightFormat | MixedFormat
"""What is compared: one format for all neurons, or two."""


def check_variants(
    config: ModelConfig, variants: Sequence[Variant], formats: Sequence[Format], extensions: Extensions
) -> None:
    """Raise `ValueError` unless every variant is possible in every format."""
    mixed = [each for each in formats if isinstance(each, MixedFormat)]
    if mixed and any(HEALING in variant.steps for variant in variants):
        raise ValueError(
            f"{mixed[0]} has rows in two formats, which are not healed: give no --healing, or other formats"
        )
    shared = [each for each in mixed if each.share is not None]
    if shared and any(RECONSTRUCTION in variant.steps for variant in variants):
        raise ValueError(
            f"{shared[0]} has rows in two formats, which are not refitted: give --quality griffin, or both formats"
            " without a part"
        )
    of_bytes = [each for each in mixed if each.share is None]
    if of_bytes and all(variant.method == DENSE for variant in variants):
        raise ValueError(
            f"{of_bytes[0]} is what densities below 1 count bytes of: give one, or a part that is precise, such as"
            f" {of_bytes[0]}@0.25"
        )
    for weights, variant in compared(formats, variants):
        found, kept = resolved(weights, variant)
        if not isinstance(found, MixedFormat):
            continue
        try:
            found.counts(_config(kept, extensions), config.neuron_ranges)
        except ValueError as error:
            raise ValueError(f"of {weights} the precise neurons at {variant.name}: {error}") from error


def compared(formats: Sequence[Format], variants: Sequence[Variant]) -> list[tuple[Format, Variant]]:
    """All pairs of a format and a variant.

    The dense model is left out for two formats without a share of precise neurons, where a density counts bytes: it is
    the dense model in the first format.
    """
    return [
        (weights, variant)
        for weights, variant in itertools.product(formats, variants)
        if variant.method != DENSE or not isinstance(weights, MixedFormat) or weights.share is not None
    ]


def resolved(weights: Format, variant: Variant) -> tuple[Format, Variant]:
    """The format with its share of precise neurons, and the variant with a density that counts neurons, not bytes."""
    if not isinstance(weights, MixedFormat):
        return weights, variant
    found, density = weights.at(variant.density)
    return found, dataclasses.replace(variant, density=density)


def _config(variant: Variant, extensions: Extensions) -> GriffinConfig:
    """The config by which a variant keeps neurons."""
    return EVERY if variant.method == DENSE else variant.pruner(extensions).config


def fine_format(weights: Format) -> WeightFormat:
    """The format of the parts that have only one: attention, embedding, head, and the precise neurons."""
    return weights.fine if isinstance(weights, MixedFormat) else weights


def stored_as(model: Transformer, weights: WeightFormat) -> Transformer:
    """The model with its matrices in another format; the same model if it has that format already.

    Args:
        model: a model with floating weights. It is left unchanged, so memory must hold both.
        weights: the format.

    Raises:
        ValueError: groups of the format do not divide the model's rows.
    """
    if weights == model.weights:
        return model
    return assemble(model.config, disassemble(model), model.dtype, weights)


def bytes_per_token(
    config: ModelConfig,
    dtype: np.dtype,
    weights: Format,
    slots: int,
    variant: Variant,
    extensions: Extensions = DEFAULTS,
) -> int:
    """Bytes that a decode step must read for one sequence: the kept weights, an adapter next to them, and the cache.

    Args:
        config: config of the model.
        dtype: dtype of the computation and the cache.
        weights: format of the model's matrices.
        slots: number of slots of the cache.
        variant: how the model is pruned.
        extensions: options of the variant's steps.
    """

    def sizes(weights: WeightFormat) -> Sizes:
        one = dataclasses.replace(config, kv_copies=1)
        return Sizes(one, 1, slots, Precision.of(dtype, weights), shared=True)

    weights, variant = resolved(weights, variant)
    kept = _config(variant, extensions)
    if not isinstance(weights, MixedFormat):
        counts = kept.kept(config.neuron_ranges)
        read = sizes(weights).step(counts)
        if HEALING in variant.steps and extensions.healing is not None:
            read += extensions.healing.step_bytes(config, counts, quantised=weights.quantised)
        return read
    return MixedSizes(weights, kept, config.neuron_ranges, sizes).step


def compare_formats(
    llm: LLM,
    items: Sequence[Item],
    variants: Sequence[Variant],
    formats: Sequence[Format],
    journal: Journal,
    *,
    new: int,
    size: int,
    seed: int,
    extensions: Extensions = DEFAULTS,
) -> dict[str, dict[str, Any]]:
    """Scores what follows every prompt with every variant in every format, against the model as it is.

    Only one quantised model at a time is held next to the model. The residual streams by which the model itself
    predicts the scored tokens are kept in host memory.

    Args:
        llm: the model, with floating weights.
        items: the texts.
        variants: the variants, the dense one among them.
        formats: formats of the matrices.
        journal: the scores that exist already.
        new: number of tokens scored, at most.
        size: number of texts in a batch.
        seed: seed of all draws.
        extensions: options of the steps beyond GRIFFIN. All formats use the same prior, that of the model as it is.

    Returns:
        For each format, by its name, and each text, what `score_answers` returns for a single length.
    """
    model, rows = llm.model, rows_of(variants, extensions)
    missing = {each: [item for item in items if entry_name(each, item) not in journal.scores] for each in formats}
    streams: dict[str, Float[np.ndarray, "r d"]] = {}
    for batch in batches([item for item in items if any(item in texts for texts in missing.values())], size, seed):
        tokens = batch.answers, batch.answer_lengths
        hidden, _ = jitted.teacher_force(model, batch.prefill(model, _room(batch, new)), *tokens)
        streams |= {item.name: stream for item, stream in zip(batch.items, to_host(hidden), strict=False)}
    done = sum(len(items) - len(texts) for texts in missing.values())
    with tqdm(total=len(formats) * len(items), initial=done, unit="text", disable=None) as progress:
        for weights, texts in missing.items():
            if not texts:
                continue
            progress.set_description(str(weights))
            stored = stored_as(model, fine_format(weights))
            few = coarse_of(stored, weights)
            for batch in batches(texts, size, seed):
                room = _room(batch, new)
                prefilled = batch.prefill(stored, room, rows)

                def every(answers: Statistics) -> Iterator[tuple[Variant, Transformer]]:
                    given = prefilled, answers, batch.seeds, extensions  # noqa: B023
                    return models_of(stored, few, weights, variants, *given, masked=True)  # noqa: B023

                # The batch is filled with repetitions of the last text.
                kept = [streams[item.name] for item in batch.items]
                reference = np.stack([*kept, *kept[-1:] * (size - len(kept))])
                scores = score_models(
                    stored, every, prefilled, batch.answers, batch.answer_lengths, [room], against=(model, reference)
                )
                named = zip(batch.items, scores, strict=False)
                journal.add({entry_name(weights, item): found for item, found in named})
                progress.update(len(batch.items))
            del stored, few
    return {str(each): {item.name: journal.scores[entry_name(each, item)] for item in items} for each in formats}


def pairs(formats: Sequence[Format], drafters: Sequence[Drafter]) -> list[tuple[WeightFormat, Drafter]]:
    """Formats of the full model with the drafters that suit them: those of fewer bits, and copies, which suit all."""
    found = itertools.product(formats, drafters)
    return [
        (weights, drafter)
        for weights, drafter in found
        if isinstance(weights, WeightFormat)
        and (drafter.only_copies or (drafter.weights is not None and drafter.weights.bits < weights.bits))
    ]


def compare_drafted(
    llm: LLM,
    items: Sequence[Item],
    drafted: Sequence[tuple[WeightFormat, Drafter]],
    journal: Journal,
    *,
    new: int,
    ignore_eos: bool = True,
    found: Callable[[Item, Generation], dict[str, Any]] = lambda _, out: counts(out),
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measures what speculative decoding needs. Its answers are those of the dense model in a format.

    Args:
        llm: the model, with floating weights if there are several formats.
        items: the texts; only their prompts are read, and the model itself continues them.
        drafted: the pairs, from `pairs`.
        journal: the scores that exist already.
        new: number of tokens of each continuation, at most.
        ignore_eos: whether each continuation goes on to `new` tokens, even after one that would end it.
        found: returns what is recorded of an answer; `drafts.counts` by default.

    Returns:
        For each pair, by its `drafted_name`, and each text, what `found` returned.
    """
    names = {pair: drafted_name(*pair) for pair in drafted}
    todo = [(pair, item) for pair in drafted for item in items if f"{names[pair]}: {item.name}" not in journal.scores]
    stored: LLM | None = None
    for (weights, drafter), item in tqdm(todo, unit="text", desc="drafts", disable=None):
        if stored is None or stored.model.weights != weights:
            stored = LLM(stored_as(llm.model, weights), llm.tokenizer, llm.name)
        out = continued(stored, item, drafter, new, DEFAULTS, ignore_eos=ignore_eos)
        journal.add({f"{names[weights, drafter]}: {item.name}": found(item, out)})
    return {name: {item.name: journal.scores[f"{name}: {item.name}"] for item in items} for name in names.values()}


def drafted_name(weights: WeightFormat, drafter: Drafter) -> str:
    """The name of a model with its drafter in files."""
    return f"{weights} with {drafter.name}"


def drafted_head(weights: WeightFormat, drafter: Drafter, read: float) -> dict[str, Any]:
    """The beginning of an entry of the figures for a model with a drafter; `read` is its `drafted_bytes`."""
    return {
        "weights": f"{weights} ({drafter.format} drafts)",
        "quality": DRAFTED,
        "method": DRAFTED,
        "density": drafter.variant.density,
        "bytes_per_token": read,
    }


def drafted_bytes(
    config: ModelConfig,
    dtype: np.dtype,
    weights: WeightFormat,
    drafter: Drafter,
    slots: int,
    written: int,
    needed: Iterable[Mapping[str, int]],
) -> float:
    """Bytes that speculative decoding read for each token, by drafts and passes of the full model together.

    Args:
        config: config of the model.
        dtype: dtype of the computation and the cache.
        weights: format of the full model's matrices.
        drafter: the drafter.
        slots: number of slots of the cache.
        written: number of tokens of all answers, without the first of each, which needs no step.
        needed: the `drafts.counts` of every answer.
    """
    kept = _config(drafter.variant, DEFAULTS).kept(config.neuron_ranges)
    draft, step = step_bytes(config, Precision.of(dtype, weights), slots, kept, drafter.weights)
    read = sum(each["passes"] * step + each["drafted"] * draft for each in needed)
    return read / written


def coarse_of(model: Transformer, weights: Format) -> Transformer | None:
    """The model's neurons in the second of two formats; None if there is only one format."""
    return coarse(model, weights.coarse) if isinstance(weights, MixedFormat) else None


def models_of(
    model: Transformer,
    few: Transformer | None,
    weights: Format,
    variants: Sequence[Variant],
    prompts: Prefilled,
    answers: Statistics,
    seeds: Int[np.ndarray, "b"],
    extensions: Extensions,
    *,
    masked: bool = False,
) -> Iterator[tuple[Variant, Transformer]]:
    """Yields the models of `grid.models` in a format, for the variants that are `compared` in it.

    Args:
        model: the full model in the format, or in the first of two.
        few: what `coarse_of` returned for the model and the format.
        weights: the format.
        variants: variants of `grid.grid`.
        prompts: as for `grid.models`.
        answers: as for `grid.models`.
        seeds: as for `grid.models`.
        extensions: as for `grid.models`.
        masked: as for `grid.models`.
    """
    if few is None:
        return models(model, variants, prompts, answers, seeds, extensions, masked=masked)
    here = [variant for _, variant in compared([weights], variants)]
    return mixed_models(model, few, weights, here, prompts, extensions, masked=masked)


def mixed_models(
    model: Transformer,
    few: Transformer,
    weights: Format,
    variants: Sequence[Variant],
    prompts: Prefilled,
    extensions: Extensions,
    *,
    masked: bool = False,
) -> Iterator[tuple[Variant, Transformer]]:
    """Yields the models of `grid.models` with rows in two formats; the dense model reads all neurons.

    Args:
        model: the full model in the first format.
        few: what `coarse_of` returned for the model and the formats.
        weights: both formats.
        variants: variants of method `topk`, and the dense one only for formats with a share.
        prompts: the prompts, with statistics and rows.
        extensions: options of the steps beyond GRIFFIN.
        masked: whether the models are masked, so that no weights are copied.
    """
    for variant in variants:
        formats, kept = resolved(weights, variant)
        assert isinstance(formats, MixedFormat)
        pruner = Pruner(EVERY) if kept.method == DENSE else kept.pruner(extensions)
        yield variant, pruner.mix(model, few, formats, prompts.statistics, prompts.rows, masked=masked)


def entry_name(weights: Format, item: Item) -> str:
    """The name of the scores of a text in a format, in a journal."""
    return f"{weights}: {item.name}"


def row_head(
    weights: str, variant: Variant, qualities: Mapping[str, str], bytes_of: Mapping[tuple[str, Variant], int]
) -> dict[str, Any]:
    """The beginning of an entry of the figures."""
    return {
        "weights": weights,
        "quality": qualities.get(variant.method, variant.method),
        "method": variant.method,
        "density": variant.density,
        "bytes_per_token": bytes_of[weights, variant],
    }


def _room(batch: Batch, new: int) -> int:
    """The number of tokens that the answers of a batch may have."""
    return bucket(max(new, batch.answers.shape[1]))


def figures(
    scores: Mapping[str, Mapping[str, Any]],
    variants: Sequence[Variant],
    qualities: Mapping[str, str],
    bytes_of: Mapping[tuple[str, Variant], int],
    seed: int,
    drafted: Mapping[tuple[WeightFormat, Drafter], float] = MappingProxyType({}),
) -> Figures:
    """One entry for each format and variant, and for each model with a drafter; those that read least come first.

    Args:
        scores: what `compare_formats` returned.
        variants: the variants that were compared.
        qualities: the quality that each method stands for.
        bytes_of: bytes per token of each format and variant that are `compared`.
        seed: seed of the bootstrap.
        drafted: the `drafted_bytes` of models with drafters, whose predictions are those of the dense model in the same
            format.
    """
    found = [
        row_head(weights, variant, qualities, bytes_of) | forced_figures(list(texts.values()), variant, 0, seed)
        for weights, texts in scores.items()
        for variant in variants
        if (weights, variant) in bytes_of
    ]
    for (weights, drafter), read in drafted.items():
        full = next(entry for entry in found if entry["weights"] == str(weights) and entry["method"] == DENSE)
        found.append(full | drafted_head(weights, drafter, read))
    found.sort(key=lambda entry: (entry["bytes_per_token"], _kl(entry)))
    marked = on_front([(entry["bytes_per_token"], _kl(entry)) for entry in found])
    return [entry | {"front": mark} for entry, mark in zip(found, marked, strict=True)]


def _kl(entry: Mapping[str, Any]) -> float:
    value = entry["kl"]["value"]
    return math.inf if value is None else value


def on_front(costs: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each pair of bytes and KL is on the Pareto front: no other is better in one and no worse in the other."""

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    return [not any(beats(other, cost) for other in costs) for cost in costs]
