"""Measures what drafts are worth: how many are accepted, and how many bytes are read for each token of the answer.

Every text is continued greedily by the dense model, and by speculative decoding with drafters of several formats,
densities and numbers of drafts. All of them write the dense model's tokens, but they read different numbers of bytes
for it. A round of n drafts reads the drafter n times and the full model once, however many of the drafts are accepted.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from griffin_jax.evaluation import intervals
from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.front_report import MARKERS
from griffin_jax.evaluation.grid import DENSE, Variant
from griffin_jax.evaluation.journal import Journal
from griffin_jax.evaluation.report import Figures, Metric, as_json, cells, draw_legend, draw_line, titles, width_of
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.drafter import draft_format, step_bytes
from griffin_jax.griffin.config import GriffinConfig, check_density
from griffin_jax.llm.llm import LLM
from griffin_jax.llm.results import Generation
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.utils.figures import new_figure

OWN = "own"
"""The name of the format of a drafter that reads the model's own weights."""

LOOKUP = "lookup"
"""The name of drafts that are copied."""

AUTO = "auto"
"""The name of an adaptive number of drafts in a round: as many as are worth it."""

ACCEPTED = Metric("accepted", "accepted", 3)
TOKENS = Metric("tokens_per_pass", "tokens/pass", 2)
BYTES = Metric("bytes", "bytes/token (of dense)", 3)
TIME = Metric("time", "time/token (of dense)", 3)
METRICS = (ACCEPTED, TOKENS, BYTES, TIME)


@dataclasses.dataclass(frozen=True)
class Drafter:
    """What drafts, and how many tokens at a time.

    Attributes:
        weights: format of the drafter's matrices; None if they are the model's own.
        variant: how the drafter is pruned.
        quality: the `quality` of `LLM.generate`.
        drafts: number n of tokens that are drafted in a round; True for as many as are worth it.
        lookup: whether tokens are also copied. If the variant is the dense model in the model's own format, all drafts
            are copies.
    """

    weights: WeightFormat | None
    variant: Variant
    quality: str
    drafts: int | bool
    lookup: bool = False

    @classmethod
    def parse(cls, text: str) -> Drafter:
        """Parses `int4@0.5`, `int4@0.5+lookup` or `lookup`, with as many drafts in a round as are worth it.

        `int4@0.5` drafts in int4, with the half of the neurons that GRIFFIN keeps. With `+lookup`, it also copies
        drafts; `lookup` only copies them.

        Raises:
            ValueError: the text describes no drafter.
        """
        dense = Variant(DENSE, 1.0)
        if text.strip() == LOOKUP:
            return cls(None, dense, "griffin", True, lookup=True)
        model, _, more = text.strip().partition("+")
        name, _, share = model.partition("@")
        try:
            density = float(share)
        except ValueError:
            density = None
        if density is None or more not in ("", LOOKUP):
            raise ValueError(
                f"a drafter is a format with a density, such as int4@0.5, also int4@0.5+{LOOKUP}, or {LOOKUP}; got"
                f" {text!r}"
            )
        check_density(density)
        variant = dense if density == 1 else Variant("topk", density)
        return cls(draft_format(name), variant, "griffin", True, lookup=more == LOOKUP)

    @property
    def only_copies(self) -> bool:
        """Whether all drafts are copies."""
        return self.lookup and self.weights is None and self.variant.method == DENSE

    @property
    def format(self) -> str:
        """The format, and whether there are copies, for people."""
        if self.only_copies:
            return LOOKUP
        return _name(self.weights) + (f"+{LOOKUP}" if self.lookup else "")

    @property
    def name(self) -> str:
        """The drafter's name in files."""
        model = "" if self.only_copies else f" {self.variant.name}"
        return f"{self.format}{model}, {self.rounds} drafts"

    @property
    def rounds(self) -> str:
        """The number of drafts in a round, for people."""
        return AUTO if self.drafts is True else str(self.drafts)


def drafters(
    formats: Sequence[WeightFormat | None],
    variants: Sequence[Variant],
    qualities: Mapping[str, str],
    drafts: Sequence[int | bool],
    *,
    lookup: bool = False,
) -> list[Drafter]:
    """All drafters with these formats, variants and numbers of drafts.

    The dense model in the model's own format is not among them.

    Args:
        formats: formats of the drafters; None for the model's own.
        variants: how the drafters are pruned.
        qualities: the quality that each method stands for.
        drafts: numbers of drafts in a round, True for as many as are worth it.
        lookup: whether to add each drafter once more with copies, and copies alone.
    """
    every = itertools.product(formats, variants, drafts)
    models = [
        Drafter(weights, variant, qualities[variant.method], number)
        for weights, variant, number in every
        if weights is not None or variant.method != DENSE
    ]
    if not lookup:
        return models
    alone = [dataclasses.replace(Drafter.parse(LOOKUP), drafts=number) for number in drafts]
    return [*models, *(dataclasses.replace(each, lookup=True) for each in models), *alone]


def compare_drafters(
    llm: LLM,
    items: Sequence[Item],
    every: Sequence[Drafter],
    journal: Journal,
    *,
    new: int,
    extensions: Extensions,
) -> dict[str, dict[str, Any]]:
    """Measures what speculative decoding needs for the answer to every prompt, with every drafter.

    Only the drafters of one format at a time are held next to the model.

    Args:
        llm: the model.
        items: the texts; only their prompts are read.
        every: the drafters.
        journal: the scores that exist already.
        new: number of tokens of each answer.
        extensions: options of quality best.

    Returns:
        For each text and each format of drafters: `dense`, with the seconds of a dense answer that was timed together
        with these drafters; and for each drafter, by its name, passes, drafts, accepted drafts, tokens that equal
        those of the dense answer, and seconds.
    """
    formats = list(dict.fromkeys(drafter.weights for drafter in every))
    todo = [(weights, item) for weights in formats for item in items if _entry(weights, item) not in journal.scores]
    warm: set[Drafter | None] = set()

    def timed(item: Item, drafter: Drafter | None) -> Generation:
        if drafter not in warm:
            # What is compiled or prepared only once must not count for this answer.
            continued(llm, item, drafter, new, extensions)
            warm.add(drafter)
        return continued(llm, item, drafter, new, extensions)

    for weights, item in tqdm(todo, unit="text", disable=None):
        dense = timed(item, None)
        found: dict[str, Any] = {DENSE: {"seconds": dense.seconds["decode"]}}
        for drafter in (each for each in every if each.weights == weights):
            out = timed(item, drafter)
            same = sum(map(int.__eq__, out.tokens[0], dense.tokens[0]))
            found[drafter.name] = {**counts(out), "same": same, "seconds": out.seconds["decode"]}
        journal.add({_entry(weights, item): found})
    return {item.name: {_name(weights): journal.scores[_entry(weights, item)] for weights in formats} for item in items}


def continued(
    llm: LLM, item: Item, drafter: Drafter | None, new: int, extensions: Extensions, *, ignore_eos: bool = True
) -> Generation:
    """The model's own greedy continuation of a prompt, by speculative decoding if there is a drafter.

    Args:
        llm: the model.
        item: the text; only its prompt is read.
        drafter: the drafter; None for dense decoding.
        new: number of tokens of the answer, at most.
        extensions: options of quality best.
        ignore_eos: whether the answer goes on to `new` tokens, even after one that would end it.
    """
    return llm.generate(
        [list(item.prompt)],
        griffin=GriffinConfig(1.0 if drafter is None else drafter.variant.density),
        extensions=Extensions() if drafter is None else options_of(drafter, extensions),
        max_new_tokens=new,
        ignore_eos=ignore_eos,
    )


def counts(out: Generation) -> dict[str, int]:
    """What an answer by speculative decoding needed: see `griffin_jax.extensions.speculative.Drafting.counts`."""
    assert out.drafting is not None
    return out.drafting.counts()


def options_of(drafter: Drafter, extensions: Extensions) -> Extensions:
    """The options by which `LLM.generate` uses a drafter."""
    own: dict[str, Any] = {
        "speculative": drafter.drafts,
        "lookup": drafter.lookup,
        "draft_weights": None if drafter.weights is None else str(drafter.weights),
    }
    if drafter.quality != "best":
        return Extensions(**own)
    return dataclasses.replace(extensions, quality="best", refit=extensions.rows, refresh_every=None, **own)


def _accepted(text: Mapping[str, int]) -> tuple[int, int]:
    """How many drafts and copies were accepted, and how many there were (at least 1). Older files count no copies."""
    number = text["drafted"] + text.get("copied", 0)
    return text["accepted"] + text.get("copies_accepted", 0), max(number, 1)


def _name(weights: WeightFormat | None) -> str:
    return OWN if weights is None else str(weights)


def _entry(weights: WeightFormat | None, item: Item) -> str:
    return f"{_name(weights)}: {item.name}"


def read_bytes(llm: LLM, drafter: Drafter, slots: int, extensions: Extensions) -> tuple[int, int]:
    """Bytes that a draft reads, and bytes that a dense step reads: the weights and the cache. Copies read none.

    Args:
        llm: the model.
        drafter: the drafter.
        slots: number of slots of the cache.
        extensions: options of quality best.
    """
    kept = None
    if drafter.variant.method != DENSE:
        kept = drafter.variant.pruner(extensions).config.kept(llm.model.config.neuron_ranges)
    precision = Precision.of(llm.model.dtype, llm.model.weights)
    draft, step = step_bytes(llm.config, precision, slots, kept, drafter.weights)
    return 0 if drafter.only_copies else draft, step


def figures(
    scores: Mapping[str, Mapping[str, Any]],
    every: Sequence[Drafter],
    llm: LLM,
    *,
    slots: int,
    new: int,
    seed: int,
    extensions: Extensions,
) -> Figures:
    """One entry for each drafter; the one that reads the fewest bytes for a token comes first.

    Args:
        scores: what `compare_drafters` returned.
        every: the drafters that were compared.
        llm: the model.
        slots: number of slots of the cache.
        new: number of tokens of each answer; the first of them needs no step.
        seed: seed of the bootstrap.
        extensions: options of quality best.
    """

    def entries() -> Iterator[dict[str, Any]]:
        for drafter in every:
            alike = [score[_name(drafter.weights)] for score in scores.values()]
            texts, dense = ([score[name] for score in alike] for name in (drafter.name, DENSE))
            draft, step = read_bytes(llm, drafter, slots, extensions)
            written = [float(new - 1)] * len(texts)

            def ratio(above: Sequence[float], below: Sequence[float]) -> Mapping[str, float | None]:
                return as_json(intervals.ratio_of_sums(above, below, seed))

            passes = [text["passes"] for text in texts]
            yield {
                "weights": drafter.format,
                "quality": drafter.quality if drafter.variant.method != DENSE else "-",
                "density": drafter.variant.density,
                "drafts": drafter.rounds,
                "draft_bytes": draft,
                "step_bytes": step,
                "accepted": ratio(*zip(*map(_accepted, texts), strict=True)),
                "tokens_per_pass": ratio(written, passes),
                "bytes": ratio([text["passes"] + text["drafted"] * draft / step for text in texts], written),
                "time": ratio([t["seconds"] for t in texts], [d["seconds"] for d in dense]),
                "same": sum(t["same"] for t in texts) / (new * len(texts)),
            }

    return sorted(entries(), key=lambda entry: entry["bytes"]["value"])


def table(found: Figures) -> str:
    """A table of the figures with their intervals."""
    width = width_of(found, "weights")
    lines = [f"{'drafter':{width}}{'quality':>8}{'density':>8}{'drafts':>7}{'a draft':>9}" + titles(METRICS)]
    for entry in found:
        draft = entry["draft_bytes"] / entry["step_bytes"]
        lines.append(
            f"{entry['weights']:{width}}{entry['quality']:>8}{entry['density']:>8g}{entry['drafts']:>7}{draft:>9.2f}"
            f"{cells(entry, METRICS)}"
        )
    same = min(entry["same"] for entry in found)
    lines.append(
        f"\na draft: bytes of one, of those of a dense step. Tokens as the dense model's: at least {same:.2%}."
    )
    return "\n".join(lines)


def plot(found: Figures, title: str, file: str | os.PathLike[str]) -> None:
    """Draws bytes per token against the drafter's density, with a line for each format, quality and number of drafts.

    Args:
        found: what `figures` returned.
        title: title of the plot.
        file: the PNG file that is written.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = new_figure(7.2, 5.2)
    figure.suptitle(title, fontsize="medium")
    axis = figure.subplots()
    pruned = {entry["weights"] for entry in found if entry["quality"] != "-"}
    shown = [entry for entry in found if entry["quality"] != "-" or entry["weights"] not in pruned]
    kinds = list(dict.fromkeys((entry["weights"], entry["quality"], entry["drafts"]) for entry in shown))
    formats = list(dict.fromkeys(weights for weights, _, _ in kinds))
    numbers = list(dict.fromkeys(drafts for _, _, drafts in kinds))
    for weights, quality, drafts in sorted(kinds):
        alike = (weights, (quality, "-"), drafts)
        line = [e for e in found if e["weights"] == alike[0] and e["quality"] in alike[1] and e["drafts"] == drafts]
        line.sort(key=lambda entry: entry["density"])
        draw_line(
            axis, [entry["density"] for entry in line], [entry["bytes"] for entry in line], elinewidth=0.8,
            marker=MARKERS[numbers.index(drafts) % len(MARKERS)], linewidth=1.2,
            linestyle="-" if quality == "griffin" else "--",
            color=f"C{formats.index(weights) % 10}", label=f"{weights}, {quality}, {drafts} drafts",
        )  # fmt: skip
    axis.axhline(1, color="black", linewidth=1, linestyle=":", label="dense")
    axis.set_xlabel("density of the drafter")
    axis.set_ylabel(BYTES.title)
    axis.grid(alpha=0.3)
    draw_legend(figure, axis, columns=3)
    figure.savefig(file, format="png")
