"""Perplexity of libraries of adapters on held-out texts.

The first tokens of each text are its prompt, by which a library chooses an adapter. The tokens after it are scored by
the base model, without and with that adapter. Two rows are bounds: `oracle` takes for each text the adapter that scores
it best, and a library whose texts were assigned to clusters at random shows what the clusters are worth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from griffin_jax.adapters.adapter import Adapter, attach, stack
from griffin_jax.adapters.library import Library
from griffin_jax.evaluation.batches import Item, batches
from griffin_jax.evaluation.forced import score_answers
from griffin_jax.evaluation.grid import DEFAULTS, DENSE, PRIOR, RECONSTRUCTION, Variant
from griffin_jax.evaluation.intervals import Interval, ratio_of_sums
from griffin_jax.extensions.prior import combined
from griffin_jax.extensions.reconstruction import DEFAULT_ROWS
from griffin_jax.generation.padding import pad
from griffin_jax.model.transformer import Transformer
from griffin_jax.text.tokenizer import Tokenizer
from griffin_jax.training.data import Batch
from griffin_jax.training.loss import next_token_losses
from griffin_jax.utils import programs

BASE = "base"


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one model on every text.

    Attributes:
        name: the model's name: `base`, or a library's folder.
        losses: for each text, the loss of all scored tokens together, in nats.
        chosen: the cluster chosen for each text; empty for the base.
        parameters: number of parameters of one adapter.
    """

    name: str
    losses: tuple[float, ...]
    chosen: tuple[int, ...] = ()
    parameters: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """All models on the same texts.

    Attributes:
        tokens: number of tokens of each text that are scored.
        scores: scores of each model, the base first.
    """

    tokens: tuple[int, ...]
    scores: tuple[Scores, ...]

    def perplexity(self, scores: Scores, seed: int = 0) -> Interval:
        """The perplexity of a model, with a 95% interval over texts."""
        found = ratio_of_sums(scores.losses, self.tokens, seed)
        return Interval(*(math.exp(value) for value in (found.value, found.low, found.high)))

    def difference(self, scores: Scores, other: Scores, seed: int = 0) -> Interval:
        """How many more nats per token a model loses than another one, with a 95% interval over texts."""
        return ratio_of_sums(np.subtract(scores.losses, other.losses).tolist(), self.tokens, seed)


@programs.jit
def _losses(model: Transformer, batch: Batch, prompt: Int[Array, ""]) -> Float[Array, "b"]:
    losses, _ = next_token_losses(model, batch)
    # The prompt's last token predicts the first scored token.
    return jnp.sum(jnp.where(jnp.arange(losses.shape[1]) >= prompt - 1, losses, 0), axis=1)


def score(
    model: Transformer,
    sequences: Sequence[Sequence[int]],
    adapters: Sequence[Adapter | None],
    *,
    prompt: int,
    length: int,
    size: int,
    quiet: bool = False,
    description: str = "scoring",
) -> list[float]:
    """The loss of the tokens after each text's prompt, in nats, with an adapter for each text.

    One compiled step scores a batch, in which each text has its own adapter.

    Args:
        model: the base model.
        sequences: token ids of each text, more than `prompt` and at most `length`.
        adapters: the adapter of each text; None for the base.
        prompt: number of tokens at the beginning of each text that are not scored.
        length: length to which texts are padded, in tokens.
        size: number of texts in a batch.
        quiet: whether to show no progress bar.
        description: label of the progress bar.
    """
    found: list[float] = []
    with tqdm(total=len(sequences), unit="text", desc=description, disable=quiet or None) as progress:
        for start in range(0, len(sequences), size):
            few = range(start, min(start + size, len(sequences)))
            rows = [*few, *[few[-1]] * (size - len(few))]
            batch = Batch(*map(jnp.asarray, pad([sequences[row] for row in rows], length)))
            chosen = [adapters[row] for row in rows]
            model_of_batch = model
            if any(adapter is not None for adapter in chosen):
                model_of_batch = attach(model, stack(chosen), np.arange(size))
            losses = _losses(model_of_batch, batch, jnp.int32(prompt))
            found += np.asarray(losses, np.float64)[: len(few)].tolist()
            progress.update(len(few))
    return found


def compare(
    model: Transformer,
    libraries: Sequence[Library],
    sequences: Sequence[Sequence[int]],
    *,
    prompt: int,
    length: int,
    size: int,
    oracle: bool = False,
    tokenizer: Tokenizer | None = None,
    quiet: bool = False,
) -> Comparison:
    """Scores the base and every library, each with the adapters that it chooses.

    Args:
        model: the base model.
        libraries: libraries, all of whose adapters are trained.
        sequences: token ids of each text; only the first `length` tokens are used, and texts with no more than `prompt`
            are left out.
        prompt: number of tokens by which a library chooses.
        length: as for `score`.
        size: number of texts in a batch.
        tokenizer: as for `Library.embedder`.
        oracle: whether to also score every text with every adapter of a library, and take the best.
        quiet: whether to show no progress bars.

    Raises:
        FileNotFoundError: an adapter is not trained.
        ValueError: no text has more tokens than the prompt.
    """
    texts = _longer(sequences, prompt, length)
    options = {"prompt": prompt, "length": length, "size": size, "quiet": quiet}
    rows = [Scores(BASE, tuple(score(model, texts, [None] * len(texts), description=BASE, **options)))]
    for library in libraries:
        name = str(library.folder)
        adapters = [library.adapter(number, model.config) for number in range(len(library))]
        parameters = max(adapter.parameters for adapter in adapters)
        chosen = library.route(library.embedder(model, tokenizer), [text[:prompt] for text in texts])
        own = [adapters[number] for number in chosen]
        losses = score(model, texts, own, description=name, **options)
        rows.append(Scores(name, tuple(losses), tuple(map(int, chosen)), parameters))
        if oracle and len(library) > 1:
            every = [
                score(model, texts, [adapter] * len(texts), description=f"{name}, adapter {number}", **options)
                for number, adapter in enumerate(adapters)
            ]
            best = np.argmin(every, axis=0)
            losses = np.min(every, axis=0)
            rows.append(Scores(f"{name}, oracle", tuple(losses.tolist()), tuple(map(int, best)), parameters))
    return Comparison(tuple(len(text) - prompt for text in texts), tuple(rows))


def _longer(sequences: Sequence[Sequence[int]], prompt: int, length: int) -> list[list[int]]:
    """The first `length` tokens of each text that has more tokens than the prompt.

    Raises:
        ValueError: no text has more tokens than the prompt.
    """
    texts = [list(sequence[:length]) for sequence in sequences if len(sequence) > prompt]
    if not texts:
        raise ValueError(f"no text has more than {prompt} tokens")
    return texts


PRIORS = ("no prior", "one prior", "priors of clusters")


def compare_priors(
    model: Transformer,
    library: Library,
    sequences: Sequence[Sequence[int]],
    *,
    prompt: int,
    length: int,
    size: int,
    density: float = 0.5,
    steps: str = "",
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    quiet: bool = False,
) -> dict[str, Interval]:
    """KL(dense || pruned) per token of the base model, whose neurons are chosen with each of `PRIORS`.

    Args:
        model: the base model.
        library: a library with the prior of every cluster; `one prior` combines all of them.
        sequences: as for `compare`; the prompt chooses the cluster and, together with the prior, the neurons.
        prompt: number of tokens of each text that the dense model reads.
        length: number of tokens of a text that are used, at most.
        size: number of texts in a batch.
        density: share of neurons that are kept.
        steps: further steps beyond GRIFFIN, as in `griffin-jax eval`, such as `+reconstruction`.
        seed: seed of the draws.
        tokenizer: as for `Library.embedder`.
        quiet: whether to show no progress bar.

    Raises:
        FileNotFoundError: the prior of a cluster was not measured.
        ValueError: no text has more tokens than the prompt.
    """
    texts = _longer(sequences, prompt, length)
    priors = [library.prior(number) for number in range(len(library))]
    one = combined(priors)
    chosen = library.route(library.embedder(model, tokenizer), [text[:prompt] for text in texts])
    kl: dict[str, list[float]] = {name: [] for name in PRIORS}
    tokens: list[float] = []
    with tqdm(total=len(texts), unit="text", desc="pruning", disable=quiet or None) as progress:
        for cluster, prior in enumerate(priors):
            items = [
                Item(str(number), texts[number][:prompt], texts[number][prompt:])
                for number in np.flatnonzero(chosen == cluster).tolist()
            ]
            for batch in batches(items, size, seed) if items else ():
                width = batch.answers.shape[1]
                prefilled = batch.prefill(model, width, DEFAULT_ROWS if RECONSTRUCTION in steps else 0)
                for name, of_name in zip(PRIORS, (None, one, prior), strict=True):
                    variant = Variant(f"topk{'' if of_name is None else f'+{PRIOR}'}{steps}", density)
                    extensions = dataclasses.replace(DEFAULTS, prior=of_name)
                    answers = batch.answers, batch.answer_lengths, batch.seeds
                    variants = [Variant(DENSE, 1.0), variant]
                    found = score_answers(model, variants, prefilled, *answers, [width], extensions)
                    kl[name] += [text[variant.name]["kl"][0] for text in found[: len(batch.items)]]
                tokens += batch.answer_lengths[: len(batch.items)].tolist()
                progress.update(len(batch.items))
    return {name: ratio_of_sums(found, tokens, seed) for name, found in kl.items()} | {
        f"{PRIORS[2]} less {PRIORS[1]}": ratio_of_sums(np.subtract(kl[PRIORS[2]], kl[PRIORS[1]]).tolist(), tokens, seed)
    }


def table(comparison: Comparison) -> str:
    """A table for people: the perplexity of each row, and how many fewer nats per token it loses than the base and
    than the first library."""
    base, *others = comparison.scores
    lines = [["model", "perplexity", "nats/token less than base"]]
    low_high = "{:.3f} ({:.3f} to {:.3f})"

    def shown(interval: Interval) -> str:
        return low_high.format(interval.value, interval.low, interval.high)

    for scores in comparison.scores:
        found = comparison.difference(base, scores)
        lines.append([scores.name, shown(comparison.perplexity(scores)), "0" if scores is base else shown(found)])
    if others:
        lines[0].append(f"than {others[0].name}")
        for line, scores in zip(lines[1:], comparison.scores, strict=True):
            same = scores is others[0]
            line.append("0" if same else shown(comparison.difference(others[0], scores)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def as_json(comparison: Comparison) -> Mapping[str, object]:
    """Everything that was found."""
    return {
        "tokens": comparison.tokens,
        "scores": [dataclasses.asdict(scores) for scores in comparison.scores],
        "perplexity": {scores.name: comparison.perplexity(scores).value for scores in comparison.scores},
    }
