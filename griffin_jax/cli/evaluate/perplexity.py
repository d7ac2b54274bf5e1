"""`griffin-jax eval perplexity`: perplexity against the lengths of prompt and answer."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from griffin_jax.cli.evaluate.arguments import add_common
from griffin_jax.cli.evaluate.running import Evaluation
from griffin_jax.cli.evaluate.texts import check_lengths
from griffin_jax.cli.options import numbers
from griffin_jax.evaluation import report, tasks
from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.general_text import windows
from griffin_jax.evaluation.grid import Variant
from griffin_jax.evaluation.samples import Skipped, read_texts
from griffin_jax.extensions.config import Extensions
from griffin_jax.llm.llm import LLM


def add(kinds: Any) -> None:
    """Declare the evaluation."""
    kind = kinds.add_parser(
        "perplexity",
        help="perplexity against the lengths of prompt and answer",
        description="Texts are cut into windows. In each window, the same tokens are scored after prompts of every"
        " length.",
    )
    kind.add_argument("files", metavar="FILE", nargs="+", type=Path, help="text files (UTF-8)")
    kind.add_argument(
        "--prompt-tokens",
        metavar="P",
        default="32,64,128,256,512",
        help="lengths of prompts, in tokens, separated by commas (default: %(default)s)",
    )
    kind.add_argument(
        "--new-tokens",
        metavar="G",
        default="32,64,128,256",
        help="numbers of tokens scored after the prompt, separated by commas (default: %(default)s)",
    )
    add_common(kind, size=4)
    kind.set_defaults(prepare=prepare)


def prepare(
    options: argparse.Namespace, llm: LLM, variants: Sequence[Variant], extensions: Extensions, skipped: Skipped
) -> Evaluation:
    prompts = sorted(numbers("--prompt-tokens", options.prompt_tokens, int))
    news = sorted(numbers("--new-tokens", options.new_tokens, int))
    for length in (prompts[0], news[0]):
        if length < 1:
            raise ValueError(f"lengths are at least 1 token, got {length}")
    check_lengths(llm, prompts[-1], news[-1])
    assert llm.tokenizer is not None
    lead = len(llm.tokenizer.beginning)
    if prompts[0] <= lead:
        raise ValueError(
            f"--prompt-tokens {prompts[0]} leaves no room for text after the {lead} that every text begins with"
        )
    items = list(itertools.islice(_windows(options.files, llm, prompts[-1], news[-1], skipped), options.limit))
    return Evaluation(
        items,
        {"prompts": prompts, "new": news} | ({"lead": lead} if lead else {}),
        lambda journal: tasks.perplexity(
            llm,
            items,
            variants,
            journal,
            prompts=prompts,
            news=news,
            size=options.batch,
            seed=options.seed,
            extensions=extensions,
            lead=lead,
        ),
        lambda scores: report.perplexity_figures(scores, variants, prompts, news, options.seed),
        lambda figures: report.perplexity_table(figures, prompts, news),
        lambda figures, title, file: report.plot_by_length(figures, prompts, news, title, file),
    )


def _windows(files: Sequence[Path], llm: LLM, prompt: int, new: int, skipped: Skipped) -> Iterator[Item]:
    """Yields consecutive windows of prompt + new tokens; a shorter rest at the end of a file is left out."""
    assert llm.tokenizer is not None
    for name, text in read_texts(files, skipped):
        every = windows(llm.tokenizer, text, prompt + new)
        whole = [window for window in every if len(window) == prompt + new]
        if not whole:
            skipped.add(f"shorter than a window of {prompt} + {new} tokens", name)
        for number, window in enumerate(whole):
            yield Item(f"{name}, window {number + 1}", window[:prompt], window[prompt:])
