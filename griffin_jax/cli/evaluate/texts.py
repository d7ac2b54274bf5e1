"""Cuts the texts that are continued into prompts and what follows them."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from griffin_jax.evaluation.batches import Item
from griffin_jax.evaluation.samples import Skipped, excerpt, read_jsonl
from griffin_jax.llm.llm import LLM
from griffin_jax.text.tokenizer import Tokenizer


def continued(options: argparse.Namespace, llm: LLM, skipped: Skipped) -> tuple[list[Item], dict[str, Any]]:
    """Texts, each a prompt followed by the tokens that are scored, and the settings that they depend on."""
    prompt, new = options.prompt_tokens, options.new_tokens
    check_lengths(llm, 1 if options.reference else prompt, new)
    columns = [options.column, *([options.reference] if options.reference else [])]
    items = first_items(options, llm, options.file, columns, skipped)
    settings = {"columns": columns, "after": options.after, "before": options.before, "prompt": prompt, "new": new}
    return items, settings


def first_items(
    options: argparse.Namespace, llm: LLM, file: Path, columns: Sequence[str], skipped: Skipped
) -> list[Item]:
    """The texts of a file that can be used, at most --limit of them.

    Each is cut in two by the lengths of the options; with --reference, a second column holds what follows the prompt.
    """
    return list(itertools.islice(_items(options, llm, file, columns, skipped), options.limit))


def _items(
    options: argparse.Namespace, llm: LLM, file: Path, columns: Sequence[str], skipped: Skipped
) -> Iterator[Item]:
    assert llm.tokenizer is not None
    cut = excerpt(options.after, options.before)
    prompt, new = options.prompt_tokens, options.new_tokens
    for record in read_jsonl(file, columns, skipped):
        if options.reference:
            tokens, following = divided(llm.tokenizer, cut(record.texts[0]), record.texts[1])
            item = Item(record.name, tokens, following)
        else:
            tokens = llm.tokenizer.encode(cut(record.texts[0]))
            item = Item(record.name, tokens[:prompt], tokens[prompt : prompt + new])
        if not item.prompt or (not options.reference and len(tokens) < prompt + new):
            skipped.add(f"shorter than {prompt} + {new} tokens" if not options.reference else "no tokens", record.name)
        elif not item.answer:
            skipped.add("the reference has no tokens of its own", record.name)
        elif len(item.prompt) + max(new, len(item.answer)) > llm.config.max_positions:
            skipped.add(f"longer than the model's context of {llm.config.max_positions} tokens", record.name)
        else:
            yield item


def divided(tokenizer: Tokenizer, text: str, reference: str) -> tuple[list[int], list[int]]:
    """The tokens of a text and those of the reference after it; together they are the tokens of both as one string.

    White space at the end of the text goes to the reference, since most tokenizers join it with the word that follows.
    A token that still crosses the boundary goes to the reference as a whole.
    """
    head = text.rstrip()
    whole = tokenizer.encode(head + text[len(head) :] + reference)
    alone = tokenizer.encode(head)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole, strict=False)))
    return whole[:common], whole[common:]


def too_long(options: argparse.Namespace, llm: LLM) -> str:
    """The reason why a prompt is left out if it leaves no room for an answer."""
    return f"prompt and {options.new_tokens} new tokens longer than the model's context of {llm.config.max_positions}"


def check_lengths(llm: LLM, prompt: int, new: int) -> None:
    """Raise `ValueError` unless prompt and continuation have at least 1 token each and fit into the model's context."""
    if min(prompt, new) < 1:
        raise ValueError(f"--prompt-tokens and --new-tokens must be at least 1, got {prompt} and {new}")
    if prompt + new > llm.config.max_positions:
        raise ValueError(
            f"{prompt} + {new} tokens are more than the model's context of {llm.config.max_positions}; give less of"
            " --prompt-tokens or --new-tokens"
        )
