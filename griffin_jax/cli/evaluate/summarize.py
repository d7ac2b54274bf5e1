"""`griffin-jax eval summarize`: ROUGE of summaries against references."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from griffin_jax.cli.evaluate.arguments import add_common, add_text_file
from griffin_jax.cli.evaluate.running import Evaluation
from griffin_jax.cli.evaluate.texts import too_long
from griffin_jax.evaluation import report, tasks
from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.grid import Variant
from griffin_jax.evaluation.prompts import SENTENCES, STOP, summarization_prompt
from griffin_jax.evaluation.samples import Skipped, excerpt, read_jsonl
from griffin_jax.extensions.config import Extensions
from griffin_jax.llm.llm import LLM


def add(kinds: Any) -> None:
    """Declare the evaluation."""
    kind = kinds.add_parser(
        "summarize",
        help="ROUGE of summaries against references",
        description="Every prompt is answered greedily, and the answer is compared with a reference by ROUGE-1, -2 and"
        " -L (F-measures of the package rouge-score). By default, the column holds whole prompts. With --format, it"
        " holds articles, and prompts are made from them as in the paper: one article with its summary, then the"
        " article to summarise.",
    )
    add_text_file(kind, "prompt")
    kind.add_argument(
        "--reference", metavar="COLUMN", default="summary",
        help="column that holds the reference (default: %(default)s)",
    )  # fmt: skip
    kind.add_argument("--format", choices=SENTENCES, help="make the paper's prompts from articles of this dataset")
    kind.add_argument(
        "--shots", type=int, metavar="N", default=1,
        help="with --format: the first N lines serve as examples and are not scored (default: %(default)s)",
    )  # fmt: skip
    kind.add_argument("--chat", action="store_true", help="put each prompt to a chat model as a user's message")
    kind.add_argument(
        "--stop", action="append", metavar="TEXT",
        help=f"end an answer before this text; may be repeated (default: {STOP})",
    )  # fmt: skip
    kind.add_argument("--stem", action="store_true", help="compare the stems of words (Porter) instead of the words")
    kind.add_argument(
        "--new-tokens", type=int, metavar="N", default=128,
        help="tokens of an answer, at most (default: %(default)s)",
    )  # fmt: skip
    # Decoding together gains little if each sequence keeps its own neurons, and all would wait for the longest answer.
    add_common(kind, size=1)
    kind.set_defaults(prepare=prepare)


def prepare(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    if options.new_tokens < 1:
        raise ValueError(f"--new-tokens must be at least 1, got {options.new_tokens}")
    if options.format and options.shots < 0:
        raise ValueError(f"--shots must be at least 0, got {options.shots}")
    stop = [STOP] if options.stop is None else options.stop
    if "" in stop:
        raise ValueError("--stop must not be empty")
    items = list(itertools.islice(_prompts(options, llm, skipped), options.limit))
    settings = {
        "columns": [options.column, options.reference], "after": options.after, "before": options.before,
        "format": options.format, "shots": options.shots if options.format else None, "chat": options.chat,
        "stop": stop, "stem": options.stem, "new": options.new_tokens,
    }  # fmt: skip
    return Evaluation(
        items,
        settings,
        lambda journal: tasks.summarize(
            llm, items, variants, journal,
            new=options.new_tokens, stop=stop, stem=options.stem, size=options.batch, seed=options.seed,
            extensions=extensions,
        ),
        lambda scores: report.summarize_figures(scores, variants, options.seed),
        lambda figures: report.table("ROUGE of greedy answers:", figures, report.ROUGES),
        lambda figures, title, file: report.plot_by_density({"": figures}, report.ROUGES, title, file),
    )  # fmt: skip


def _prompts(options: argparse.Namespace, llm: LLM, skipped: Skipped) -> Iterator[Item]:
    assert llm.tokenizer is not None
    cut = excerpt(options.after, options.before)
    examples: list[tuple[str, str]] = []
    for record in read_jsonl(options.file, [options.column, options.reference], skipped):
        text, reference = cut(record.texts[0]), record.texts[1]
        if not text.strip():
            skipped.add("nothing between --after and --before", record.name)
            continue
        if options.format and len(examples) < options.shots:
            examples.append((text, reference))
            continue
        if options.format:
            text = summarization_prompt(text, examples, options.format)
        tokens = llm.tokenizer.chat(text) if options.chat else llm.tokenizer.encode(text)
        if len(tokens) + options.new_tokens > llm.config.max_positions:
            skipped.add(too_long(options, llm), record.name)
        else:
            yield Item(record.name, tokens, reference=reference)
