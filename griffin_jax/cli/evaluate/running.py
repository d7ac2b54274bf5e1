"""Runs one evaluation, from its options to the files and the table."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from griffin_jax.adapters.healing import Healing
from griffin_jax.adapters.peft import CONFIG, WEIGHTS
from griffin_jax.cli.options import (
    check_batch,
    check_files,
    check_folder,
    check_output,
    check_plot,
    chosen_batch,
    chosen_mesh,
    chosen_needs,
    load_reader,
    made_by,
    numbers,
    read_options,
)
from griffin_jax.evaluation import front, report, tasks
from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.grid import (
    BUDGETS,
    CALIBRATION,
    DENSE,
    HEALING,
    MEASURED,
    PRIOR,
    RECONSTRUCTION,
    REFRESH,
    Variant,
    grid,
    rows_of,
)
from griffin_jax.evaluation.journal import Journal, open_journal
from griffin_jax.evaluation.samples import Skipped, as_json, nothing_left, sha256_of_files
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.mixed import MixedFormat
from griffin_jax.extensions.prior import Prior, check_fusion
from griffin_jax.extensions.speculative import most_drafts
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.llm.memory import Needs, Parts, needs_of
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.parallel.distributed import is_first
from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size
from griffin_jax.utils.options import whole
from griffin_jax.utils.wholefile import write_text

FORMAT = "griffin_jax eval 1"
"""The name of the format of results.json."""

WRITTEN = ("summarize", "solve")
"""Evaluations in which the models write answers to whole prompts."""

COMPARED = ("rows", "weights")
"""Settings that no score depends on if the scores of each variant and format are kept apart."""

TOKENIZER = "tokenizer"
"""The name of the setting that holds the hash of the tokenizer."""

RESULTS, TABLE = "results.json", "table.txt"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A task that is ready to run.

    Attributes:
        items: the texts or problems.
        settings: what the scores depend on besides the model, the texts and the variants.
        run: scores the items, as far as the journal does not hold their scores already.
        figures: computes the figures from what `run` returned.
        tabulate: turns the figures into a table for people.
        plot: draws the figures, under a title, to a PNG file.
        grows: whether the scores of further variants and formats may be added to those in the output folder.
    """

    items: Sequence[Item]
    settings: Mapping[str, Any]
    run: Callable[[Journal], dict[str, Any]]
    figures: Callable[[dict[str, Any]], report.Figures]
    tabulate: Callable[[report.Figures], str]
    plot: Callable[[report.Figures, str, Path], None]
    grows: bool = False


def run(options: argparse.Namespace) -> None:
    """Runs one evaluation, from its options to the files and the table."""
    if options.choose is not None:
        options.choose(options)
    variants = grid(options.method.split(","), numbers("--density", options.density, float), options.baselines)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    extensions = _extensions(options, variants)
    folder = options.output or Path(f"eval-{options.task}")
    check_folder("--output", folder, RESULTS)
    if options.plot is not None:
        check_plot("--plot", options.plot)
    if options.json_file is not None:
        check_output("--json-file", options.json_file)
    if options.task == "summarize":
        tasks.rouge_scorer(options.stem)
    files = options.files if hasattr(options, "files") else [options.file]
    check_files(files, once=True, by_name=options.task == "promise")

    mesh = chosen_mesh(options)
    check_batch(options, mesh)
    wanted, lengths = options.batch, _lengths(options)
    needs = chosen_needs(options, mesh)
    if _has(variants, HEALING):
        extensions = dataclasses.replace(extensions, healing=Healing.load(options.healing, needs.config))
    if options.check is not None:
        options.check(options, needs, variants, extensions)
    options.batch = _batch(options, variants, extensions, needs, lengths, mesh)
    llm = load_reader(options, mesh)
    assert llm.tokenizer is not None
    model = fingerprint(llm.model)
    if extensions.prior is not None:
        extensions.prior.check(model)
    if extensions.healing is not None:
        extensions.healing.check(llm.config, model)
    skipped = Skipped()
    evaluation: Evaluation = options.prepare(options, llm, variants, extensions, skipped)
    skipped.report()
    if not evaluation.items:
        raise nothing_left(skipped, ", ".join(map(str, files)))
    longest = [max(max(map(len, texts)), known) for texts, known in zip(_texts(evaluation.items), lengths, strict=True)]
    if longest != lengths:
        # The lengths of the texts are known only now.
        options.batch = wanted
        options.batch = _batch(options, variants, extensions, needs_of(llm.model), longest, mesh)
    beyond = _beyond_settings(options, variants)
    settings = {
        "task": options.task,
        "model": model,
        "texts": sha256_of_files(files),
        TOKENIZER: llm.tokenizer.digest,
        "dtype": str(llm.model.dtype),
        "rows": [variant.name for variant in variants],
        "seed": options.seed,
        **beyond,
        **evaluation.settings,
    }
    # Folders of earlier versions do not name the tokenizer.
    known, unused = settings, (TOKENIZER,)
    if evaluation.grows:
        known = {name: value for name, value in settings.items() if name not in COMPARED}
        # Folders of earlier versions also name what was compared.
        unused = (TOKENIZER, *COMPARED, *beyond, "healing")
    journal = open_journal(folder, known, overwrite=options.overwrite, unused=unused)
    scores = evaluation.run(journal)
    figures = evaluation.figures(scores)
    results = {
        **made_by(FORMAT, options.model),
        **settings,
        "files": [str(file) for file in files],
        "used": len(evaluation.items),
        "left_out": as_json(skipped),
        "figures": figures,
    }
    precision = Precision.of(llm.model.dtype, llm.model.weights)
    head = (
        f"{options.model}, {precision}: {len(evaluation.items)} texts, {len(skipped)} left out;"
        " [95% bootstrap intervals over texts]"
    )
    shown = f"{head}\n\n{evaluation.tabulate(figures)}"
    if not is_first():
        return
    write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    write_text(folder / TABLE, shown + "\n")
    print(shown)
    if options.plot is not None:
        title = f"{options.model}, {len(evaluation.items)} texts, bars: 95% intervals"
        evaluation.plot(figures, title, options.plot)
    if options.json_file is not None:
        write_text(options.json_file, json.dumps(results) + "\n")
    if options.json:
        print(json.dumps(results))


def _lengths(options: argparse.Namespace) -> list[int]:
    """The numbers of tokens of the longest prompt and of what follows it, as far as the options determine them."""
    if options.task == "perplexity":
        return [max(numbers(f"--{name}-tokens", getattr(options, f"{name}_tokens"), int)) for name in ("prompt", "new")]
    return [1 if options.task in WRITTEN or options.reference else options.prompt_tokens, options.new_tokens]


def _texts(items: Sequence[Item]) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    return [item.prompt for item in items], [item.answer for item in items]


def _batch(
    options: argparse.Namespace,
    variants: Sequence[Variant],
    extensions: Extensions,
    needs: Needs,
    lengths: Sequence[int],
    mesh: Mesh | None,
) -> int:
    """The number of texts at a time, which fit into memory together."""
    prompt, new = (max(1, min(length, needs.config.max_positions)) for length in lengths)
    rows, prior = rows_of(variants, extensions), extensions.prior
    calibration = prior.rows[0].shape[0] if prior is not None and prior.rows and _has(variants, CALIBRATION) else 0
    density = max((variant.density for variant in variants if variant.method != DENSE), default=1.0)
    kept = GriffinConfig(density).kept(needs.config.neuron_ranges)
    models = len(variants) * (1 + len(options.groups.split(","))) if options.task == "groups" else len(variants)

    def needed(batch: int) -> Parts:
        if options.task in WRITTEN:
            parts = needs.generation(batch, prompt, new, kept, rows=rows, calibration=calibration, repeated=True)
            return parts | _beside(options, needs) if options.task == "solve" else parts
        if options.task == "drafts":
            formats = [weights for weights in options.formats if weights is not None]
            largest = max(formats, key=lambda weights: weights.bits, default=None)
            most = min(max(most_drafts(number, lookup=options.copies) for number in options.drafts), new - 1)
            return needs.generation(
                batch, prompt, new + most, kept, rows=rows, calibration=calibration, drafts=most, drafter=largest
            )
        answers = options.task in ("divergence", "promise")
        parts = needs.scoring(batch, prompt, new, models, rows=rows, calibration=calibration, answers=answers)
        if options.task == "promise" and options.mixed is not None:
            return parts | {"neurons in fewer bits": _coarse_bytes(needs, options.mixed)}
        return parts | _beside(options, needs) if options.task == "front" else parts

    return chosen_batch(options, needed, "--weights of fewer bits or shorter texts", mesh)


def _beside(options: argparse.Namespace, needs: Needs) -> Parts:
    """Bytes that are held next to the model: those of the largest model in another format, and the largest drafter."""

    def held(fine: WeightFormat) -> int:
        bits = 0 if fine == needs.precision.weights else needs.in_memory(_sizes(needs, fine).local, fine)
        mixed = [each for each in options.formats if isinstance(each, MixedFormat) and each.fine == fine]
        rows = [_coarse_bytes(needs, each) for each in mixed]
        return bits + (sum(rows) if options.task == "solve" else max(rows, default=0))

    parts = {"weights in another format": max(map(held, map(front.fine_format, options.formats)))}
    drafters = [needs.drafter(drafter.weights) for drafter in options.drafters if drafter.weights is not None]
    return parts | ({"drafter": max(drafters)} if drafters else {})


def _coarse_bytes(needs: Needs, mixed: MixedFormat) -> int:
    """Bytes of all neurons in the second of the two formats."""
    return needs.in_memory(_sizes(needs, mixed.coarse).ff(None), mixed.coarse)


def _sizes(needs: Needs, weights: WeightFormat) -> Sizes:
    devices = axis_size(needs.mesh, MODEL_AXIS)
    return Sizes(needs.config, 1, 1, Precision.of(needs.precision.dtype, weights), shared=True, devices=devices)


def _has(variants: Sequence[Variant], *steps: str) -> bool:
    return any(step in variant.steps for variant in variants for step in steps)


def _extensions(options: argparse.Namespace, variants: Sequence[Variant]) -> Extensions:
    """The options of the variants' steps, checked before the model is loaded."""
    check_fusion("topk", options.prior_weight)
    for name, value in (("--rows", options.rows), ("--refresh-every", options.refresh_every)):
        whole(name, value, 1)
    if options.task == "summarize" and _has(variants, REFRESH):
        raise ValueError(f"+{REFRESH} scores continuations that are given: evaluate divergence or perplexity")
    prior = None
    if _has(variants, *MEASURED):
        if options.prior is None:
            raise ValueError(f"+{' +'.join(MEASURED)} need --prior FILE; griffin-jax prior measures it")
        prior = Prior.load(options.prior)
        if _has(variants, BUDGETS) and not prior.strength:
            raise ValueError(f"{options.prior} has no budgets: {prior.uniform}")
        if _has(variants, CALIBRATION) and not prior.rows:
            raise ValueError(f"{options.prior} has no calibration rows; measure it with griffin-jax prior --rows")
    if _has(variants, HEALING) and options.healing is None:
        raise ValueError(f"+{HEALING} needs --healing FOLDER; griffin-jax heal trains it")
    return read_options(options, Extensions, prior=prior, refit=options.rows, healing=None)


def _beyond_settings(options: argparse.Namespace, variants: Sequence[Variant]) -> dict[str, Any]:
    """The settings beyond GRIFFIN that scores depend on; None for those that no variant uses."""
    uses_prior, uses_rows = _has(variants, *MEASURED), _has(variants, RECONSTRUCTION)
    return {
        "prior": sha256_of_files([options.prior]) if uses_prior else None,
        "prior_weight": options.prior_weight if _has(variants, PRIOR) else None,
        "reconstruction_rows": options.rows if uses_rows else None,
        "ridge": options.ridge if uses_rows else None,
        "calibration_weight": options.calibration_weight if _has(variants, CALIBRATION) else None,
        "refresh_every": options.refresh_every if _has(variants, REFRESH) else None,
        **({"healing": _digest_of_adapter(options.healing)} if _has(variants, HEALING) else {}),
    }


def _digest_of_adapter(folder: Path) -> str:
    """A hash of an adapter's numbers and of its config, which says what they are multiplied by."""
    return sha256_of_files([folder / WEIGHTS, folder / CONFIG])
