"""Counts how many problems a model solves, and how many of those that the dense model solves.

Every format of the weights is combined with every density, as in `griffin_jax.evaluation.front`, but verdicts on greedy
answers are compared instead of distributions. Models with drafters stand next to them: they give the answers of the
dense model, and read less for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from scipy import stats
from tqdm import tqdm

from griffin_jax.evaluation.batches import Batch, Item, batches
from griffin_jax.evaluation.drafts import Drafter, counts
from griffin_jax.evaluation.front import (
    Format,
    coarse_of,
    compare_drafted,
    compared,
    drafted_head,
    entry_name,
    fine_format,
    models_of,
    row_head,
    stored_as,
)
from griffin_jax.evaluation.front_report import DRAFTED, STYLES, draw_drafted
from griffin_jax.evaluation.grid import DEFAULTS, DENSE, Variant, rows_of
from griffin_jax.evaluation.intervals import mean
from griffin_jax.evaluation.journal import Journal
from griffin_jax.evaluation.problems import Problem
from griffin_jax.evaluation.report import Figures, as_json, cell, draw_legend, draw_line, width_of
from griffin_jax.evaluation.tasks import generate
from griffin_jax.extensions.config import Extensions
from griffin_jax.generation.padding import bucket
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.llm.llm import LLM
from griffin_jax.llm.results import Generation
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import WeightFormat
from griffin_jax.utils.figures import new_figure


def solve(
    llm: LLM,
    items: Sequence[Item],
    problems: Mapping[str, Problem],
    variants: Sequence[Variant],
    formats: Sequence[Format],
    journal: Journal,
    *,
    new: int,
    size: int,
    seed: int,
    extensions: Extensions = DEFAULTS,
) -> dict[str, dict[str, Any]]:
    """Writes every variant's greedy answers in every format, and decides whether they are right.

    Args:
        llm: the model, with floating weights if there are several formats.
        items: the questions as prompts.
        problems: the problem of each item, by the item's name.
        variants: the variants, without the oracle and without refreshes.
        formats: formats of the matrices; the dense model that is compared with has the first.
        journal: the scores that exist already.
        new: length of the longest answer, in tokens.
        size: number of questions in a batch.
        seed: seed of all draws.
        extensions: options of the steps beyond GRIFFIN.

    Returns:
        For each format, by its name, each item and each variant: `text`, the answer up to where it is complete, and
        `solved`.
    """
    assert llm.tokenizer is not None
    tokenizer, eos = llm.tokenizer, llm.config.eos_token_ids

    def answers(
        model: Transformer,
        few: Transformer | None,
        weights: Format,
        wanted: Sequence[Variant],
        batch: Batch,
        prefilled: Prefilled,
    ) -> list[dict[str, Any]]:
        asked = [problems[item.name] for item in batch.items]
        asked += asked[-1:] * (size - len(asked))

        def ended(row: int, tokens: Sequence[int]) -> bool:
            return asked[row].end(tokenizer.decode(tokens)) is not None

        found: list[dict[str, Any]] = [{} for _ in batch.items]
        each = models_of(model, few, weights, wanted, prefilled, prefilled.statistics, batch.seeds, extensions)
        for variant, pruned in each:
            written = generate(pruned, prefilled, new, eos, ended)
            for verdicts, problem, tokens in zip(found, asked, written, strict=False):
                text = tokenizer.decode(tokens)
                text = text[: problem.end(text)]
                verdicts[variant.name] = {"text": text, "solved": problem.solved(text)}
        return found

    def missing(weights: Format, some: Sequence[Item]) -> list[Variant]:
        """The variants that have not answered all of some items."""
        entries = [journal.scores.get(entry_name(weights, item), {}) for item in some]
        here = [variant for _, variant in compared([weights], variants)]
        return [variant for variant in here if any(variant.name not in entry for entry in entries)]

    done = sum(not missing(weights, [item]) for weights in formats for item in items)
    with tqdm(total=len(formats) * len(items), initial=done, unit="problem", disable=None) as progress:
        # Formats that read prompts with the same model take turns at each problem, so that they can be compared before
        # all problems are done.
        for fine in dict.fromkeys(map(fine_format, formats)):
            alike = [weights for weights in formats if fine_format(weights) == fine]
            texts = [item for item in items if any(missing(weights, [item]) for weights in alike)]
            if not texts:
                continue
            progress.set_description(str(fine))
            stored = stored_as(llm.model, fine)
            few = {weights: coarse_of(stored, weights) for weights in alike}
            for batch in batches(texts, size, seed):
                prefilled = batch.prefill(stored, bucket(new), rows_of(variants, extensions))
                for weights in alike:
                    if not (left := missing(weights, batch.items)):
                        continue
                    unanswered = [item for item in batch.items if missing(weights, [item])]
                    found = zip(
                        batch.items, answers(stored, few[weights], weights, left, batch, prefilled), strict=True
                    )
                    # Old answers are kept, even if they were written again along with the rest of the batch.
                    named = ((entry_name(weights, item), verdicts) for item, verdicts in found if item in unanswered)
                    journal.add({name: verdicts | journal.scores.get(name, {}) for name, verdicts in named})
                    progress.update(len(unanswered))
            del stored, few
    return {str(each): {item.name: journal.scores[entry_name(each, item)] for item in items} for each in formats}


def solve_drafted(
    llm: LLM,
    items: Sequence[Item],
    problems: Mapping[str, Problem],
    drafted: Sequence[tuple[WeightFormat, Drafter]],
    journal: Journal,
    *,
    new: int,
) -> dict[str, dict[str, Any]]:
    """Writes greedy answers by speculative decoding, up to the token that ends them, and decides which are right.

    Args:
        llm: the model, with floating weights if there are several formats.
        items: the questions as prompts.
        problems: the problem of each item, by the item's name.
        drafted: the pairs, from `griffin_jax.evaluation.front.pairs`.
        journal: the scores that exist already.
        new: length of the longest answer, in tokens.

    Returns:
        For each pair, by its `drafted_name`, and each item: `text` and `solved` as from `solve`; `tokens`, the number
        of tokens that were written; and the `griffin_jax.evaluation.drafts.counts`.
    """

    def verdict(item: Item, out: Generation) -> dict[str, Any]:
        text, problem = out.texts[0], problems[item.name]
        text = text[: problem.end(text)]
        return {"text": text, "solved": problem.solved(text), "tokens": len(out.tokens[0]), **counts(out)}

    return compare_drafted(llm, items, drafted, journal, new=new, ignore_eos=False, found=verdict)


def figures(
    scores: Mapping[str, Mapping[str, Any]],
    variants: Sequence[Variant],
    qualities: Mapping[str, str],
    bytes_of: Mapping[tuple[str, Variant], int],
    seed: int,
    drafted: Mapping[tuple[WeightFormat, Drafter], tuple[Mapping[str, Any], float]] = MappingProxyType({}),
) -> Figures:
    """One entry for each format and variant, against the dense model in the first format.

    Args:
        scores: what `solve` returned.
        variants: the variants that were compared, the dense one first.
        qualities: the quality that each method stands for.
        bytes_of: bytes per token of each format and variant that are `griffin_jax.evaluation.front.compared`.
        seed: seed of the bootstrap.
        drafted: for models with drafters, what `solve_drafted` returned and their bytes per token.

    Returns:
        Entries with `solved`, `problems`, the intervals `share` (of all problems) and `kept` (of those that the dense
        model solves; None if it solves none), `lost` and `gained` (problems that only the dense model, or only this
        one, solves), and `p` of McNemar's exact test of whether both solve equally many.
    """
    dense = [text[DENSE]["solved"] for text in next(iter(scores.values())).values()]
    found = []
    for weights, texts in scores.items():
        for variant in (variant for variant in variants if (weights, variant) in bytes_of):
            solved = [text[variant.name]["solved"] for text in texts.values()]
            found.append(row_head(weights, variant, qualities, bytes_of) | _against(solved, dense, seed))
        for (full, drafter), (answers, read) in drafted.items():
            if str(full) != weights:
                continue
            solved = [answer["solved"] for answer in answers.values()]
            found.append(drafted_head(full, drafter, read) | _against(solved, dense, seed))
    return found


def _against(solved: Sequence[bool], dense: Sequence[bool], seed: int) -> dict[str, Any]:
    """The part of an entry that compares a model's verdicts with the dense model's."""
    kept = [float(here) for here, there in zip(solved, dense, strict=True) if there]
    lost, gained = len(kept) - int(sum(kept)), sum(solved) - int(sum(kept))
    return {
        "problems": len(solved),
        "solved": sum(solved),
        "share": as_json(mean([float(value) for value in solved], seed)),
        "kept": as_json(mean(kept, seed)) if kept else None,
        "lost": lost,
        "gained": gained,
        "p": mcnemar(lost, gained),
    }


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p-value of McNemar's test, from how many problems only one of two models solves."""
    return float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def table(figures: Figures) -> str:
    """A table of the figures with their intervals."""
    width, kind = width_of(figures, "weights"), width_of(figures, "quality")
    problems = figures[0]["problems"]
    lines = [
        f"greedy answers to {problems} problems, against the dense model of the first row:",
        f"{'weights':{width}}{'quality':{kind}}{'density':>8}{'MB/token':>9}{'solved':>7}{'of all':>21}"
        f"{'kept of dense':>21}{'lost':>5}{'gained':>7}{'p':>8}",
    ]
    for entry in figures:
        share, kept = (_share(entry[name]) for name in ("share", "kept"))
        lines.append(
            f"{entry['weights']:{width}}{entry['quality']:{kind}}{entry['density']:>8g}"
            f"{entry['bytes_per_token'] / 1e6:>9,.1f}{entry['solved']:>7}{share:>21}{kept:>21}"
            f"{entry['lost']:>5}{entry['gained']:>7}{entry['p']:>8.2g}"
        )
    return "\n".join(
        [*lines, "", "p: McNemar's exact test that both solve equally many; lost, gained: solved by one of both"]
    )


def _share(figure: Mapping[str, float | None] | None) -> str:
    return "-" if figure is None else cell(figure, 3)


def plot(figures: Figures, title: str, file: str | os.PathLike[str]) -> None:
    """Draws the share of solved problems against megabytes per token.

    There is a line for each format and quality, and for models with drafters.

    Args:
        figures: what the function `figures` returned.
        title: title of the plot.
        file: the PNG file that is written.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = new_figure(6.4, 4.6)
    figure.suptitle(title, fontsize="medium")
    axis = figure.subplots()
    alone = [entry for entry in figures if entry["method"] != DRAFTED]
    formats = list(dict.fromkeys(entry["weights"] for entry in alone))
    qualities = list(dict.fromkeys(entry["quality"] for entry in alone if entry["method"] != DENSE))
    # If nothing is pruned, all rows are dense.
    names = qualities or list(dict.fromkeys(entry["quality"] for entry in alone))
    for number, weights in enumerate(formats):
        for quality, style in zip(names, STYLES, strict=False):
            line = [
                entry
                for entry in alone
                if entry["weights"] == weights and (entry["quality"] == quality or entry["method"] == DENSE)
            ]
            draw_line(
                axis, [entry["bytes_per_token"] / 1e6 for entry in line], [entry["share"] for entry in line],
                elinewidth=0.8, marker="o", linewidth=1.2, linestyle=style, color=f"C{number % 10}",
                label=f"{weights}, {quality}",
            )  # fmt: skip
    draw_drafted(axis, figures, formats, "share")
    for entry in figures:
        axis.annotate(
            f"{entry['density']:g}", (entry["bytes_per_token"] / 1e6, entry["share"]["value"]), fontsize=7,
            color="0.2", xytext=(5, 4), textcoords="offset points",
        )  # fmt: skip
    axis.set_xlabel("MB read per token (points: density)")
    axis.set_ylabel("share of problems solved")
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)
    draw_legend(figure, axis, columns=3)
    figure.savefig(file, format="png")
