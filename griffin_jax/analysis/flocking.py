"""Shows flocking for any model and texts (arXiv 2404.01365, section 3).

Within a text the same neurons are strong in most tokens, and in other texts other neurons are. This is what is drawn
and measured. Experts are, as in the paper, the neurons that are kept for a text.

    relative activations   |z| / ||z|| of the first tokens and neurons of some texts, in some layers
    similarity             Jaccard similarity of the experts of different texts, for every density and layer; the same
                           for these texts with their tokens permuted, and for random tokens
    stability              Jaccard similarity between a prompt's experts and those of the tokens that follow it, for
                           each window of tokens and for all tokens so far

As a baseline there is the similarity of sets of neurons chosen at random.

In models with routed experts, neurons are compared expert by expert, since each routed expert has the neurons that its
own tokens need. The similarity of a layer is the mean over the routed experts that both texts reach. Each is weighted
by the number of tokens it gets from the text that sends it fewer. Shared experts, which all tokens read, count as one
more.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from griffin_jax.analysis.flocking_report import KINDS, PERMUTED, RANDOM, STABILITY, TEXTS
from griffin_jax.evaluation.batches import Batch, Item, batches
from griffin_jax.evaluation.grid import seed_of
from griffin_jax.evaluation.tasks import generate
from griffin_jax.generation.padding import bucket, pad
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.select import select
from griffin_jax.griffin.statistic import Statistics, relative_activations, token_statistic
from griffin_jax.llm.llm import LLM
from griffin_jax.model.cache import EMPTY, empty_cache
from griffin_jax.model.routed import Activations, RoutedActivations
from griffin_jax.model.transformer import Transformer
from griffin_jax.utils import programs

Ranges = tuple[int, ...]
"""Sizes of the ranges of a layer's neurons; see `ModelConfig.neuron_ranges`."""

Similar = Callable[[Bool[Array, "*a e f"], Bool[Array, "*b e f"]], Float[Array, "*c e"]]
"""A function that says how similar sets of neurons are, expert by expert."""

SHOWN = 512
"""Number of tokens and of neurons in a heat map of relative activations, as in the paper."""


def jaccard(first: Bool[Array, "*#b f"], second: Bool[Array, "*#b f"]) -> Float[Array, "..."]:
    """|A & B| / |A | B| of non-empty sets of neurons, given as masks."""
    return jnp.sum(first & second, axis=-1) / jnp.sum(first | second, axis=-1)


def jaccard_of_pairs(masks: Bool[Array, "n f"]) -> Float[Array, "n n"]:
    """Jaccard similarity of every pair of sets, from one product of their masks."""
    members = masks.astype(jnp.float32)
    # Exact in any precision: products of 0 and 1 are exact, and sums are float32.
    both = jnp.einsum("nf,mf->nm", members, members, preferred_element_type=jnp.float32)
    size = jnp.diagonal(both)
    return both / (size[:, None] + size - both)


def mean_of_pairs(similarity: Float[Array, "n n"]) -> Float[Array, ""]:
    """The mean over pairs of different texts, ignoring pairs that are NaN; takes at least two texts."""
    return jnp.nanmean(jnp.where(jnp.eye(similarity.shape[0], dtype=bool), jnp.nan, similarity))


def by_expert(array: Array, ranges: Ranges) -> Iterator[Array]:
    """Values of a layer's neurons, (..., f), as (..., E, F_e): first those of its experts, then of the shared ones.

    Args:
        array: one value for each neuron.
        ranges: sizes of the layer's ranges; a dense layer has one range of all its neurons.
    """
    start = 0
    for size, alike in itertools.groupby(ranges):
        count = len(list(alike))
        own = array[..., start : start + count * size]
        yield own.reshape(*own.shape[:-1], count, size)
        start += count * size


def mean_over_experts(
    first: Float[Array, "*a f"], second: Float[Array, "*b f"], ranges: Ranges, similar: Similar, config: GriffinConfig
) -> Float[Array, "..."]:
    """How similar the neurons are that two texts choose in a layer, as a mean over the experts that both texts reach.

    Args:
        first: s^2 of one text, or of several.
        second: s^2 of other texts, with axes that broadcast with those of `first`.
        ranges: sizes of the layer's ranges.
        similar: function that gives the similarity of masks (..., E, F_e) for each expert.
        config: how neurons are chosen.

    Returns:
        The similarity; NaN for texts that have no expert in common.
    """
    chosen = (by_expert(expert_masks(squares, config, ranges), ranges) for squares in (first, second))
    found = jnp.concatenate([similar(*masks) for masks in zip(*chosen, strict=True)], axis=-1)
    if len(ranges) == 1:
        return found[..., 0]
    # A token adds 1 to the sum of s^2 over each of its experts, so these sums count tokens.
    tokens = (
        jnp.concatenate([part.sum(axis=-1) for part in by_expert(squares, ranges)], axis=-1)
        for squares in (first, second)
    )
    weights = jnp.minimum(*tokens)
    total = jnp.sum(weights, axis=-1)
    return jnp.where(total > 0, jnp.sum(weights * found, axis=-1) / jnp.where(total > 0, total, 1.0), jnp.nan)


def expected_jaccard(kept: int, neurons: int) -> float:
    """The expected Jaccard similarity of two sets of `kept` out of `neurons`, drawn independently at random.

    The size of their intersection is hypergeometric. With many neurons, the expectation approaches
    (k/F) / (2 - k/F), which is the similarity if the intersection has its expected size.
    """
    from scipy.stats import hypergeom

    shared = np.arange(kept + 1)
    return float(np.sum(hypergeom.pmf(shared, neurons, kept, kept) * shared / (2 * kept - shared)))


def expert_masks(squares: Float[Array, "*b f"], config: GriffinConfig, ranges: Ranges = ()) -> Bool[Array, "*b f"]:
    """Masks of the experts that s^2 of one layer selects, separately for every sequence."""
    rows = squares.reshape(-1, squares.shape[-1])
    statistics = Statistics((rows,), jnp.ones(rows.shape[0], jnp.int32), (ranges,) if len(ranges) > 1 else ())
    return select(statistics, config).masks()[0].reshape(squares.shape)


@programs.jit(static_argnames=("configs", "ranges"))
def similarity(
    squares: Float[Array, "n f"], configs: tuple[GriffinConfig, ...], ranges: Ranges
) -> Float[Array, "densities"]:
    """Mean Jaccard similarity of the experts of different texts in one layer, for each of `configs`."""

    def of_pairs(masks: Bool[Array, "n 1 e f"], _: Bool[Array, "n e f"]) -> Float[Array, "n n e"]:
        return jax.vmap(jaccard_of_pairs, in_axes=1, out_axes=-1)(masks[:, 0])

    return jnp.stack(
        [mean_of_pairs(mean_over_experts(squares[:, None], squares, ranges, of_pairs, config)) for config in configs]
    )


@programs.jit(static_argnames=("configs", "ranges"))
def similarities(
    first: Float[Array, "*#b f"], second: Float[Array, "*#b f"], configs: tuple[GriffinConfig, ...], ranges: Ranges
) -> Float[Array, "densities ..."]:
    """Jaccard similarity of the experts that two statistics of one layer select, for each of `configs`."""
    return jnp.stack([mean_over_experts(first, second, ranges, jaccard, config) for config in configs])


@programs.jit(static_argnames=("layers", "neurons"))
def activations(
    model: Transformer,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, "b"],
    layers: tuple[int, ...],
    neurons: int,
) -> tuple[Float[Array, "b t _n"], ...]:
    """|zbar| of the first neurons of some layers, in the model's dtype; in routed experts, relative to each expert's z.

    Args:
        model: the full model or a pruned one.
        tokens: token ids of the texts, padded on the right with any token.
        lengths: number of real tokens of each text; the result for padding is arbitrary.
        layers: numbers of the layers, from 0, each once; static.
        neurons: number of neurons of each layer, or all if it has fewer; static.

    Returns:
        One array for each layer, in the order of `layers`.
    """
    batch, length = tokens.shape

    def observe(layer: int, z: Activations, real: Array) -> Array | None:
        if layer not in layers:
            return None
        if isinstance(z, RoutedActivations):
            shared = None if z.shared is None else relative_activations(z.shared)
            z = dataclasses.replace(z, z=relative_activations(z.z), shared=shared)
            return jnp.abs(z.everywhere())[..., :neurons].astype(model.dtype)
        return jnp.abs(relative_activations(z))[..., :neurons].astype(z.dtype)

    positions = jnp.arange(length, dtype=jnp.int32)
    positions = jnp.where(positions < lengths[:, None], positions, EMPTY)
    cache = empty_cache(model.config, batch, length, model.dtype, context=jnp.asarray(lengths, jnp.int32))
    _, _, seen = model(tokens, positions, cache, read_slots=0, observe=observe)
    return tuple(seen[layer] for layer in layers)


@programs.jit(static_argnames="window")
def window_statistics(
    model: Transformer, prefilled: Prefilled, answers: Int[Array, "b r"], window: int
) -> tuple[Float[Array, "b windows _f"], ...]:
    """GRIFFIN's s^2 of every layer over successive windows of the tokens that follow a prompt, in one pass.

    Args:
        model: the full model.
        prefilled: the prompts, with room for R tokens; it is not changed.
        answers: token ids that follow the prompts, padded on the right with `EMPTY`.
        window: number of tokens in each window, a divisor of R; static. A window in which a text ends has fewer.
    """
    steps = jnp.arange(answers.shape[1], dtype=jnp.int32)
    positions = jnp.where(answers != EMPTY, prefilled.statistics.tokens[:, None] + steps, EMPTY)

    def observe(layer: int, z: Activations, real: Array) -> Array:
        masks = (steps // window == jnp.arange(answers.shape[1] // window)[:, None])[:, None] & real
        return jax.vmap(token_statistic, in_axes=(None, 0), out_axes=1)(z, masks)

    _, _, statistics = model(jnp.maximum(answers, 0), positions, prefilled.cache, observe=observe)
    return tuple(statistics)


def permuted(item: Item, lead: int, rng: np.random.Generator) -> Item:
    """The same prompt with its tokens in random order; the first `lead` tokens stay in place."""
    return dataclasses.replace(item, prompt=[*item.prompt[:lead], *rng.permutation(item.prompt[lead:]).tolist()])


def random_tokens(item: Item, lead: int, vocabulary: int, rng: np.random.Generator) -> Item:
    """A prompt of as many tokens, drawn uniformly from the vocabulary; the first `lead` tokens stay in place."""
    drawn = rng.integers(0, vocabulary, len(item.prompt) - lead).tolist()
    return dataclasses.replace(item, prompt=[*item.prompt[:lead], *drawn])


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a measurement, whose prompts all have the same length.

    Attributes:
        items: prompts, with the tokens that follow them unless the model is to write these.
        lead: number of tokens that the tokenizer puts in front of every text.
        vocabulary: upper limit of random tokens, which are below it.
    """

    items: Sequence[Item]
    lead: int
    vocabulary: int

    def of_kind(self, kind: str, seed: int) -> Sequence[Item]:
        """The texts unchanged, permuted, or random. Each depends on its own text and the seed, not on other texts."""
        rngs = [np.random.default_rng(seed_of(seed, f"{kind} {item.name}")) for item in self.items]
        if kind == PERMUTED:
            return [permuted(item, self.lead, rng) for item, rng in zip(self.items, rngs, strict=True)]
        if kind == RANDOM:
            return [
                random_tokens(item, self.lead, self.vocabulary, rng) for item, rng in zip(self.items, rngs, strict=True)
            ]
        return self.items


def measure(
    llm: LLM,
    texts: Texts,
    densities: Sequence[float],
    *,
    new: int,
    window: int,
    size: int,
    seed: int,
) -> dict[str, Any]:
    """Measures the similarity between texts, and the stability over the tokens that follow them.

    Args:
        llm: the full model.
        texts: at least two texts.
        densities: shares of neurons that are experts.
        new: number of tokens that follow a prompt; the model writes them if the texts have none.
        window: number of tokens in a window, a divisor of `new`.
        size: number of texts in a batch.
        seed: seed of permutations and random tokens.

    Returns:
        Plain numbers, with None instead of a mean over nothing. `similarity` has, for each of `KINDS`, one list over
        layers for each density, of means over pairs of texts. `own_permutation` has the same lists for a text and its
        permutation, of means over texts. `stability` compares the prompt's experts with those of a window (`windows`)
        and with those of all tokens up to the end of the window (`so_far`). `other_windows` and `other_so_far` are the
        same with the experts of the previous prompt, which the first prompt lacks. Each has, for each density, a list
        over layers of lists over windows, of means over the texts that reached the end of the window; `texts` counts
        these.
    """
    configs = tuple(GriffinConfig(density) for density in densities)
    ranges = llm.config.neuron_ranges
    # With routed experts this is the size of one expert; layers without them are fewer.
    neurons = max(ranges, key=len)[0]
    kept = [config.kept([neurons])[0] for config in configs]
    followed = _Followed(llm, configs, new, window)
    statistics: dict[str, list[np.ndarray]] = {}
    compared: dict[str, Any] = {}
    own_permutation: list[Any] = []
    with tqdm(total=len(KINDS) * len(texts.items), unit="text", desc="reading", disable=None, leave=False) as bar:
        for kind in KINDS:
            found = []
            for batch in batches(texts.of_kind(kind, seed), size, seed):
                prefilled = batch.prefill(llm.model, bucket(new))
                squares = prefilled.statistics.squares
                if kind == TEXTS:
                    followed.add(batch, prefilled, squares)
                found.append([np.asarray(layer[: len(batch.items)]) for layer in squares])
                bar.update(len(batch.items))
            statistics[kind] = [np.concatenate(layer) for layer in zip(*found, strict=True)]
            layers = zip(statistics[kind], ranges, strict=True)
            compared[kind] = _plain(np.stack([similarity(layer, configs, own) for layer, own in layers], axis=1))
            if kind == PERMUTED:
                pairs = zip(statistics.pop(TEXTS), statistics[PERMUTED], ranges, strict=True)
                layers = [np.asarray(similarities(text, other, configs, own)) for text, other, own in pairs]
                own_permutation = _means(np.stack(layers, axis=1))
            if kind != TEXTS:
                del statistics[kind]
    return {
        "densities": list(densities),
        "neurons": neurons,
        "kept": kept,
        "random_experts": [expected_jaccard(k, neurons) for k in kept],
        "similarity": compared,
        "own_permutation": own_permutation,
        "stability": followed.means(),
    }


class _Followed:
    """Collects over texts how stable their experts are."""

    def __init__(self, llm: LLM, configs: tuple[GriffinConfig, ...], new: int, window: int):
        self._llm, self._configs, self._new, self._window = llm, configs, new, window
        self._before: tuple[Array, ...] | None = None
        self._found: dict[str, list[np.ndarray]] = {name: [] for name in STABILITY}
        self._reached: list[np.ndarray] = []

    def add(self, batch: Batch, prefilled: Prefilled, squares: tuple[Float[Array, "b _f"], ...]) -> None:
        """Adds the texts of a batch."""
        rows, new = len(batch.items), self._new
        if batch.items[0].answer:
            answers = [item.answer for item in batch.items]
        else:
            answers = generate(self._llm.model, prefilled, new, self._llm.config.eos_token_ids)
        tokens = np.full((len(batch.prompts), new), EMPTY, np.int32)
        for row, answer in zip(tokens, answers, strict=False):
            row[: len(answer)] = answer[:new]
        windows = window_statistics(self._llm.model, prefilled, tokens, self._window)
        reached = np.cumsum(tokens[:rows] != EMPTY, axis=1)[:, self._window - 1 :: self._window]
        reached = reached == self._window * np.arange(1, new // self._window + 1)
        # For each text the text before it, also across batches.
        before = squares if self._before is None else self._before
        others = [jnp.concatenate([last[:1], layer[:-1]]) for last, layer in zip(before, squares, strict=True)]
        so_far = [jnp.cumsum(layer, axis=1) for layer in windows]
        for name, prompts, followed in (
            ("windows", squares, windows),
            ("so_far", squares, so_far),
            ("other_windows", others, windows),
            ("other_so_far", others, so_far),
        ):
            layers = zip(prompts, followed, self._llm.config.neuron_ranges, strict=True)
            each = [similarities(prompt[:, None], window, self._configs, ranges) for prompt, window, ranges in layers]
            values = np.stack(each, axis=1)[:, :, :rows]
            values = np.where(reached, values, np.nan)
            if name.startswith("other") and self._before is None:
                values[:, :, 0] = np.nan
            self._found[name].append(values)
        self._reached.append(reached)
        self._before = tuple(layer[rows - 1 : rows] for layer in squares)

    def means(self) -> dict[str, Any]:
        """The means over texts, for JSON."""
        return {
            "texts": np.concatenate(self._reached).sum(axis=0).tolist(),
            **{name: _means(np.concatenate(values, axis=2)) for name, values in self._found.items()},
        }


def _means(values: Float[np.ndarray, "densities layers n ..."]) -> list[Any]:
    """Means over texts, ignoring those that are NaN; None if all are."""
    known = ~np.isnan(values)
    count = known.sum(axis=2)
    return _plain(np.where(count, np.where(known, values, 0.0).sum(axis=2) / np.maximum(count, 1), np.nan))


def _plain(values: Float[np.ndarray, "..."]) -> list[Any]:
    """Nested lists for JSON, with None in place of NaN."""
    found = values.astype(object)
    found[np.isnan(values)] = None
    return found.tolist()


def heat_maps(model: Transformer, tokens: Sequence[int], layers: Sequence[int]) -> dict[int, Float[np.ndarray, "t f"]]:
    """|zbar| of the first tokens and neurons, by layer, float32."""
    length = min(len(tokens), SHOWN)
    padded, lengths = pad([tokens[:length]], bucket(length))
    found = activations(model, padded, lengths, tuple(layers), SHOWN)
    return {layer: np.asarray(array[0, :length], np.float32) for layer, array in zip(layers, found, strict=True)}
