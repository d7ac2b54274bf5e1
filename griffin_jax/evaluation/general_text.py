"""Measures a model's prior: how its neurons behave in general text.

The text comes from files, which are cut into windows, or is written by the dense model itself, at temperature 1, after
the token that begins a text, or after a random one if the model has none. The prior belongs to this model in this
dtype. It holds

- the statistic of all tokens,
- a few rows that stand for the relative activations of all tokens: the calibration rows,
- how sensitive predictions are to each neuron, from which follows how many of its neurons each layer should keep. These
  shares are used only if they helped in texts that were held out of all this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from griffin_jax.evaluation.batches import Item, batches
from griffin_jax.evaluation.forced import score_answers
from griffin_jax.evaluation.grid import BUDGETS, CALIBRATION, DEFAULTS, DENSE, PRIOR, RECONSTRUCTION, Variant
from griffin_jax.evaluation.journal import Journal
from griffin_jax.extensions import sketch
from griffin_jax.extensions.prior import Prior
from griffin_jax.extensions.reconstruction import DEFAULT_CALIBRATION, DEFAULT_ROWS
from griffin_jax.extensions.sensitivity import sensitivity
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import bucket, pad
from griffin_jax.generation.sampling import Sample
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import to_host
from griffin_jax.text.tokenizer import Tokenizer

TRIAL_DENSITY = 0.5
"""Density at which the strengths of the budgets are tried."""

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Strengths of the budgets that are tried; see `Prior.strength`."""

MOST_SKETCHED = 512
"""Number of tokens of each text, at most, from which the calibration rows are computed."""

LEAST_TEXTS, MOST_HELD_OUT = 5, 8
"""The fewest texts of which a fifth can be held out for a trial, and the most that are held out."""


def windows(tokenizer: Tokenizer, text: str, length: int) -> Iterator[list[int]]:
    """Yields windows of at most `length` tokens of a text; each begins with the special tokens that begin a text.

    Raises:
        ValueError: the length leaves no room for text after these tokens.
    """
    plain, first = tokenizer.encode(text, special=False), tokenizer.beginning
    if length <= len(first):
        raise ValueError(f"windows of {length} tokens have no room after the {len(first)} that a text begins with")
    step = length - len(first)
    for start in range(0, len(plain), step):
        yield [*first, *plain[start : start + step]]


def self_generated(
    model: Transformer,
    count: int,
    length: int,
    *,
    size: int,
    seed: int = 0,
    quiet: bool = False,
    journal: Journal | None = None,
) -> list[list[int]]:
    """Texts that a model writes without a prompt, at temperature 1. They do not depend on the batch.

    Args:
        model: the full model.
        count: number of texts.
        length: number of tokens of each text, at most; a text that ends early is shorter.
        size: number of texts in a batch.
        seed: seed of the draws.
        quiet: whether to show no progress bar.
        journal: the texts that were written before an interruption; further texts are added to it.

    Raises:
        ValueError: a text would be longer than the model's context.
    """
    config = model.config
    if not 2 <= length <= config.max_positions:
        raise ValueError(
            f"texts must have from 2 tokens to the model's context of {config.max_positions}, got {length}"
        )
    seeds = [np.random.default_rng([seed, number]) for number in range(count)]
    init_decode = config.bos_token_id
    firsts = [int(rng.integers(config.vocab_size)) if init_decode is None else init_decode for rng in seeds]
    draws = np.asarray([rng.integers(1 << 31) for rng in seeds], np.int32)
    texts: dict[str, list[int]] = dict(journal.scores) if journal is not None else {}
    left = [number for number in range(count) if str(number) not in texts]
    with tqdm(total=count, initial=count - len(left), unit="text", desc="writing", disable=quiet or None) as progress:
        for start in range(0, len(left), size):
            # The last batch is filled with its last text, so that it has the shape of the others.
            rows = np.asarray(left)[np.minimum(np.arange(start, start + size), len(left) - 1)]
            tokens, lengths = pad([[firsts[row]] for row in rows], bucket(1))
            prefilled = jitted.prefill(
                model, tokens, lengths, max_new_tokens=bucket(length - 1), longest=length - 1, collect=False
            )
            draw = {"sampler": Sample(temperature=1.0), "eos": config.eos_token_ids}
            answer = jitted.init_decode(prefilled, seed=jnp.asarray(draws[rows]), **draw)
            answer = jitted.decode(model, answer, np.int32(length - 1), **draw)
            written = to_host(answer.tokens)[: len(left) - start]
            more = {
                str(row): [firsts[row], *row_tokens[row_tokens >= 0].tolist()]
                for row, row_tokens in zip(rows, written, strict=False)
            }
            if journal is not None:
                journal.add(more)
            texts |= more
            progress.update(len(written))
    return [texts[str(number)] for number in range(count)]


def measure(
    model: Transformer,
    texts: Sequence[Sequence[int]],
    *,
    size: int,
    rows: int = DEFAULT_CALIBRATION,
    seed: int = 0,
    quiet: bool = False,
) -> Prior:
    """Measures the prior of a model: its statistic over texts, and a few rows that stand for its relative activations.

    Args:
        model: the full model.
        texts: token ids of each text, at least one and at most the model's context. The result for a text does not
            depend on its batch.
        size: number of texts in a batch.
        rows: number of calibration rows of every layer, at most; see `griffin_jax.extensions.sketch`. Up to
            `MOST_SKETCHED` tokens of each text go into them.
        seed: seed of the random columns from which the sketch of these rows starts.
        quiet: whether to show no progress bar.
    """
    squares = [np.zeros(neurons, np.float64) for neurons in model.neurons]
    bases = sketch.random_bases(model.neurons, rows, seed) if rows else ()
    products: sketch.Bases = ()
    passes = sketch.PASSES if rows else 1
    with tqdm(total=passes * len(texts), unit="text", desc="reading", disable=quiet or None) as progress:
        for turn in range(passes):
            bases = sketch.next_bases(products) if turn else bases
            products = tuple(map(jnp.zeros_like, bases))
            for tokens, lengths, count in _alike(texts, size):
                wanted = min(tokens.shape[1], MOST_SKETCHED) if rows else 0
                read = jitted.prefill(model, tokens, lengths, max_new_tokens=0, rows=wanted)
                if not turn:
                    for total, layer in zip(squares, read.statistics.squares, strict=True):
                        total += to_host(layer)[:count].astype(np.float64).sum(axis=0)
                if rows:
                    products = sketch.add_products(products, bases, read.rows, np.arange(size) < count)
                progress.update(count)
    sketched = sum(min(len(text), MOST_SKETCHED) for text in texts)
    return Prior(
        tuple(jnp.asarray(total, jnp.float32) for total in squares),
        sketch.leading_rows(products, bases, sketched, rows) if rows else (),
        fingerprint(model),
        sum(map(len, texts)),
        ranges=() if model.config.routing is None else model.config.neuron_ranges,
    )


def _alike(
    texts: Sequence[Sequence[int]], size: int
) -> Iterator[tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b"], int]]:
    """Yields batches of texts of one padded length, the longest first: tokens, lengths, and the number of texts.

    The last text is repeated until the batch is full.
    """
    shapes: dict[int, list[Sequence[int]]] = {}
    for text in texts:
        shapes.setdefault(bucket(len(text)), []).append(text)
    for width, alike in sorted(shapes.items(), reverse=True):
        for start in range(0, len(alike), size):
            batch = alike[start : start + size]
            yield *pad([*batch, *[batch[-1]] * (size - len(batch))], width), len(batch)


def with_budgets(
    model: Transformer,
    prior: Prior,
    texts: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    *,
    size: int,
    seed: int = 0,
    quiet: bool = False,
) -> Prior:
    """Adds to a prior the sensitivity of neurons, and the outcome of a trial of the budgets that follow from it.

    In the trial, the first half of each text is the prompt. The divergence of pruned models, with the prior and a
    reconstruction, is measured over the rest, at `TRIAL_DENSITY` and for each of `STRENGTHS`.

    Args:
        model: the full model.
        prior: a prior that was measured on other texts than those held out.
        texts: token ids of the texts on which the sensitivity is measured.
        held_out: token ids of the texts for the trial, at least two of each.
        size: number of texts in a batch of the trial.
        seed: seed of the draws.
        quiet: whether to show no progress bars.
    """
    prior = dataclasses.replace(prior, sensitivity=sensitivity(model, texts, seed=seed, quiet=quiet))
    steps = (PRIOR, BUDGETS, RECONSTRUCTION, *([CALIBRATION] if prior.rows else []))
    variant = Variant("+".join(["topk", *steps]), TRIAL_DENSITY)
    items = [Item(str(number), text[: len(text) // 2], text[len(text) // 2 :]) for number, text in enumerate(held_out)]
    losses: dict[float, list[float]] = {strength: [] for strength in STRENGTHS}
    with tqdm(total=len(items), unit="text", desc="trying budgets", disable=quiet or None) as progress:
        for batch in batches(items, size, seed):
            width = batch.answers.shape[1]
            prefilled = batch.prefill(model, width, DEFAULT_ROWS)
            answers = batch.answers, batch.answer_lengths, batch.seeds
            for strength in STRENGTHS:
                extensions = dataclasses.replace(DEFAULTS, prior=dataclasses.replace(prior, strength=strength))
                scores = score_answers(model, [Variant(DENSE, 1.0), variant], prefilled, *answers, [width], extensions)
                losses[strength] += [text[variant.name]["kl"][0] for text in scores[: len(batch.items)]]
            progress.update(len(batch.items))
    tokens = sum(len(item.answer) for item in items)
    strength = least_strength(losses)
    equal = sum(losses[0.0]) / tokens
    uniform = "" if strength else f"KL was {equal:.3f} nats per token, and with shares of their own not clearly less"
    return dataclasses.replace(prior, strength=strength, uniform=uniform)


def least_strength(losses: Mapping[float, Sequence[float]]) -> float:
    """The lowest strength that is not clearly worse than the best one: within one standard error of the difference.

    Args:
        losses: for each strength, the loss of each text; the texts are the same for all strengths.
    """
    best = min(losses, key=lambda strength: sum(losses[strength]))

    def close(strength: float) -> bool:
        differences = np.subtract(losses[strength], losses[best])
        return bool(differences.sum() <= np.sqrt(len(differences)) * differences.std(ddof=min(1, len(differences) - 1)))

    return min(strength for strength in losses if strength == best or close(strength))
