"""Three evaluations, which score every text with every variant:

    divergence   how far the pruned models' predictions are from the dense one's
    perplexity   how probable texts are after prompts of several lengths, for several lengths of answers
    summarize    how good the answers are, by ROUGE

Each takes texts as `Item`s, goes through them in batches, and writes the scores of each text to a `Journal`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from griffin_jax.evaluation.batches import Batch, Item, batch_of, evaluate
from griffin_jax.evaluation.factored import Answers, Factored
from griffin_jax.evaluation.forced import score_answers
from griffin_jax.evaluation.grid import DEFAULTS, DENSE, Variant, models, rows_of
from griffin_jax.evaluation.journal import Journal
from griffin_jax.extensions.config import Extensions
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import bucket, pad
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.llm.llm import LLM
from griffin_jax.model.cache import KVCache
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import to_host
from griffin_jax.text.stops import StopStrings
from griffin_jax.utils import programs

REAL, OWN = "real", "own"
"""The two continuations of a text: what really follows, and what the dense model itself would write."""

CHUNK = 16
"""The number of tokens decoded before it is checked again whether all answers have ended."""


def divergence(
    llm: LLM,
    items: Sequence[Item],
    variants: Sequence[Variant],
    journal: Journal,
    *,
    new: int,
    size: int,
    seed: int,
    extensions: Extensions = DEFAULTS,
    factored: Sequence[Factored] = (),
) -> dict[str, Any]:
    """Scores the real continuation and the dense model's own one (greedy, at most `new` tokens).

    Factored models, if there are any, are scored on the same tokens.

    Returns:
        For each text, `real` and `own`, each with what `score_answers` returns for a single length.
    """
    model, eos = llm.model, llm.config.eos_token_ids

    def score(batch: Batch) -> list[dict[str, Any]]:
        length = max(new, batch.answers.shape[1])
        prefilled = batch.prefill(model, bucket(length), rows_of(variants, extensions))
        own = pad(generate(model, prefilled, new, eos), bucket(new))
        found = {
            kind: score_answers(model, variants, prefilled, *answers, batch.seeds, [length], extensions)
            for kind, answers in {REAL: (batch.answers, batch.answer_lengths), OWN: own}.items()
        }
        for kind, (tokens, lengths) in (
            {REAL: (batch.answers, batch.answer_lengths), OWN: own}.items() if factored else ()
        ):
            hidden, _ = jitted.teacher_force(model, prefilled, jnp.asarray(tokens), jnp.asarray(lengths))
            for other in factored:
                scores = other.score(model, batch, Answers(tokens, lengths, length, hidden), bucket(length))
                for whole, more in zip(found[kind], scores, strict=True):
                    whole |= more
        return [{kind: found[kind][index] for kind in found} for index in range(len(batch.items))]

    return evaluate(items, score, journal, size=size, seed=seed)


def perplexity(
    llm: LLM,
    items: Sequence[Item],
    variants: Sequence[Variant],
    journal: Journal,
    *,
    prompts: Sequence[int],
    news: Sequence[int],
    size: int,
    seed: int,
    extensions: Extensions = DEFAULTS,
    lead: int = 0,
) -> dict[str, Any]:
    """Scores the same tokens after the last P tokens of what stands before them, for every P.

    Args:
        llm: the model.
        items: the texts, with prompts of at least max(prompts) tokens and answers of max(news) tokens.
        variants: the variants to compare.
        journal: the scores that exist already.
        prompts: prompt lengths P.
        news: answer lengths G; a shorter answer is the beginning of a longer one.
        size: number of texts in a batch.
        seed: seed of all draws.
        extensions: options of the steps beyond GRIFFIN.
        lead: number of tokens with which every text begins; shorter prompts begin with all of them, too.

    Returns:
        For each text and P (as a string), what `score_answers` returns for the lengths `news`.
    """

    def score(batch: Batch) -> list[dict[str, Any]]:
        found = []
        for length in prompts:
            shortened = [_shortened(item, length, lead) for item in batch.items]
            short = batch_of(shortened, size, seed)
            prefilled = short.prefill(llm.model, batch.answers.shape[1], rows_of(variants, extensions))
            answers = batch.answers, batch.answer_lengths, batch.seeds
            found.append(score_answers(llm.model, variants, prefilled, *answers, news, extensions))
        return [
            {str(length): scores[index] for length, scores in zip(prompts, found, strict=True)}
            for index in range(len(batch.items))
        ]

    return evaluate(items, score, journal, size=size, seed=seed)


def _shortened(item: Item, length: int, lead: int) -> Item:
    """The text with a shorter prompt: the `lead` tokens with which it begins, then its last tokens."""
    return dataclasses.replace(item, prompt=[*item.prompt[:lead], *item.prompt[lead:][-(length - lead) :]])


def summarize(
    llm: LLM,
    items: Sequence[Item],
    variants: Sequence[Variant],
    journal: Journal,
    *,
    new: int,
    stop: Sequence[str],
    stem: bool,
    size: int,
    seed: int,
    extensions: Extensions = DEFAULTS,
) -> dict[str, Any]:
    """Writes every variant's greedy answers, and computes their ROUGE against the references.

    The oracle selects by the statistic of the dense model's own answer.

    Returns:
        For each text and variant, the answer `text` and the F-measures `rouge1`, `rouge2` and `rougeL`.

    Raises:
        ImportError: the package rouge-score is not installed.
    """
    rouge = rouge_scorer(stem)
    assert llm.tokenizer is not None
    model, tokenizer, eos = llm.model, llm.tokenizer, llm.config.eos_token_ids

    strings = StopStrings(tokenizer, stop)

    def cut(tokens: Sequence[int]) -> str:
        text = strings.cut(tokens)
        return tokenizer.decode(tokens) if text is None else text

    def ended(_: int, tokens: Sequence[int]) -> bool:
        return strings.cut(tokens) is not None

    def until_its_end(tokens: list[int]) -> list[int]:
        # The answer may have gone on while others of the batch had not ended.
        return next((tokens[:n] for n in range(1, len(tokens)) if ended(0, tokens[:n])), tokens)

    def score(batch: Batch) -> list[dict[str, Any]]:
        prefilled = batch.prefill(model, bucket(new), rows_of(variants, extensions))
        dense = [until_its_end(tokens) for tokens in generate(model, prefilled, new, eos, ended)]
        answers, lengths = pad(dense, bucket(new))
        _, following = jitted.teacher_force(model, prefilled, answers, lengths, collect=True)
        found: list[dict[str, Any]] = [{} for _ in batch.items]
        for variant, pruned in models(model, variants, prefilled, following, batch.seeds, extensions, masked=False):
            written = dense if variant.method == DENSE else generate(pruned, prefilled, new, eos, ended)
            for scores, item, tokens in zip(found, batch.items, written, strict=False):
                text = cut(tokens)
                measures = rouge.score(item.reference, text)
                scores[variant.name] = {"text": text} | {name: measure.fmeasure for name, measure in measures.items()}
        return found

    return evaluate(items, score, journal, size=size, seed=seed)


ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge_scorer(stem: bool) -> Any:
    """The scorer that compares an answer with a reference, by words or (with `stem`) by their stems.

    Raises:
        ImportError: the package rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs the package rouge-score: pip install 'griffin-jax[eval]'") from error
    return RougeScorer(list(ROUGE), use_stemmer=stem)


def generate(
    model: Transformer,
    prefilled: Prefilled,
    new: int,
    eos: tuple[int, ...],
    ended: Callable[[int, Sequence[int]], bool] = lambda row, tokens: False,
) -> list[list[int]]:
    """Writes greedy answers to prompts, whose cache is left unchanged.

    Args:
        model: the full model or a pruned one.
        prefilled: the prompts, with room for the answers.
        new: length of the longest answer, in tokens.
        eos: tokens that end an answer; the answer includes the one that ends it.
        ended: returns whether the unfinished answer of a row needs no more tokens.
    """
    cache = _copy(prefilled.cache)
    statistics = Statistics((), prefilled.statistics.tokens)
    answer = jitted.init_decode(dataclasses.replace(prefilled, cache=cache, statistics=statistics, rows=()), eos=eos)
    until = 1
    while True:
        tokens, done = to_host((answer.tokens, answer.done))
        rows = [[int(token) for token in row if token >= 0] for row in tokens]
        if until >= new or all(end or ended(*row) for end, row in zip(done, enumerate(rows), strict=True)):
            return rows
        until = min(until + CHUNK, new)
        answer = jitted.decode(model, answer, np.int32(until), eos=eos)


@programs.jit
def _copy(cache: KVCache) -> KVCache:
    return jax.tree.map(jnp.copy, cache)
