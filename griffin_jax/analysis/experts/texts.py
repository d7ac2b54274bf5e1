"""Analyses of texts (D5 to D8, and GRIFFIN's neuron sets): all numbers for each text and layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from griffin_jax.analysis.experts.choices import choice_counts, evenness, most_chosen, repetition
from griffin_jax.analysis.experts.outputs import (
    Comparison,
    answers_of_experts,
    answers_of_sets,
    compare,
    gates_only,
    of_each_expert,
)
from griffin_jax.analysis.experts.sets import Halves, halves, overlaps, own_and_others, second_half
from griffin_jax.analysis.experts.watching import Seen, watch
from griffin_jax.analysis.flocking import expected_jaccard
from griffin_jax.generation.padding import bucket, pad
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.select import select
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.routed import RoutedActivations, RoutedFeedForward
from griffin_jax.model.transformer import Transformer
from griffin_jax.utils import programs

SHOWN_NEURONS = 64
"""Number of neurons of each expert in a heat map of intermediate states."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found in texts.

    Attributes:
        layers: numbers of the layers.
        numbers: numbers for each text, by name, (layers, texts); NaN if a text has no such number.
        compared: numbers like these from comparing experts. Sets of neurons may be compared on fewer texts, and then
            these have fewer columns.
        chance: values that chance alone would give to these numbers, by name, if they can be computed.
        similarity: mean similarity of the outputs of each pair of experts, (layers, E, E).
        ranks: number of tokens by the ranks of an expert's norm and score, (layers, E, E).
        chosen: experts that the tokens of the first text chose, (layers, tokens, E); empty without a router.
        token_cosines: mean cosine of experts' outputs for the tokens of the first text, (layers, tokens).
    """

    layers: tuple[int, ...]
    numbers: dict[str, Float[np.ndarray, "l n"]]
    compared: dict[str, Float[np.ndarray, "l m"]]
    chance: dict[str, float]
    similarity: Float[np.ndarray, "l e e"]
    ranks: Int[np.ndarray, "l e e"]
    chosen: Bool[np.ndarray, "l t e"]
    token_cosines: Float[np.ndarray, "l t"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How texts are read.

    Attributes:
        density: share of neurons that GRIFFIN keeps for each half of a text, and share of experts that count as its
            most chosen ones.
        size: number of texts that are read at a time.
        sets: number of neuron sets that take the place of experts in a model without routers.
    """

    density: float = 0.5
    size: int = 1
    sets: int = 8

    @property
    def griffin(self) -> GriffinConfig:
        """The options by which GRIFFIN keeps neurons."""
        return GriffinConfig(self.density)


@programs.jit(static_argnames="layers")
def inputs(
    model: Transformer, tokens: Int[Array, "b t"], lengths: Int[Array, "b"], layers: tuple[int, ...]
) -> tuple[tuple[Float[Array, "b t d"], ...], Bool[Array, "b t"]]:
    """The input of the feed-forward module of each of `layers`, and a mask of the real tokens."""
    wanted = set(layers)
    seen = watch(model, tokens, lengths, lambda number, ff, seen: seen.x if number in wanted else None)
    return tuple(seen[layer] for layer in layers), jnp.arange(tokens.shape[1]) < lengths[:, None]


@programs.jit(static_argnames=("ranges", "config"))
def read_layer(
    ff: Any, x: Float[Array, "b t d"], real: Bool[Array, "b t"], ranges: tuple[int, ...], config: GriffinConfig
) -> tuple[Halves, Comparison | None, Bool[Array, "b t e"] | None]:
    """The halves of a layer and, if it has a router, the comparison of its experts and the choices of tokens.

    This is compiled once for all layers of a kind. The intermediates are computed a second time here, which is little
    work next to the answers of all experts.
    """
    seen = Seen(x, ff.intermediate(x), real)
    found = halves(ff, seen, ranges, config)
    if not isinstance(seen.z, RoutedActivations):
        return found, None, None
    answers = answers_of_experts(ff, seen)
    return found, compare(answers, real), answers.chosen


@programs.jit
def read_sets(
    ff: Any, x: Float[Array, "b t d"], real: Bool[Array, "b t"], sets: Bool[Array, "e f"], own: Int[Array, "b"]
) -> Comparison:
    """The comparison of sets of neurons on the second halves of texts; `own` is the number of each text's own set."""
    seen = Seen(x, ff.intermediate(x), real)
    return compare(answers_of_sets(ff, seen, sets, own), second_half(real))


@programs.jit
def states_of_layer(ff: Any, x: Float[Array, "1 t d"]) -> Float[Array, "t e f"]:
    """D7: act(Wg x) of the first neurons of every expert for the tokens of a text; z in a layer without experts."""
    if not isinstance(ff, RoutedFeedForward):
        return ff.intermediate(x)[0, :, None, :SHOWN_NEURONS]
    gates = gates_only(ff.experts)

    def states(expert: Array) -> Array:
        return gates.intermediate(x, *of_each_expert(x, expert))[0, :, 0, :SHOWN_NEURONS]

    return jnp.moveaxis(jax.lax.map(states, jnp.arange(ff.routing.experts)), 0, 1)


def gate_states(
    model: Transformer, text: Sequence[int], layers: Sequence[int]
) -> dict[int, Float[np.ndarray, "t e f"]]:
    """Intermediate states of a text in some layers; float32."""
    tokens, lengths = pad([text], bucket(len(text)))
    found, _ = inputs(model, tokens, lengths, tuple(layers))
    return {
        layer: np.asarray(states_of_layer(model.layers[layer].ff, x)[: len(text)], np.float32)
        for layer, x in zip(layers, found, strict=True)
    }


def layers_of(config: ModelConfig) -> tuple[int, ...]:
    """The layers in which texts are analysed: those with a router, or all if none has one."""
    routed = tuple(layer for layer in range(config.num_layers) if config.routed(layer))
    return routed or tuple(range(config.num_layers))


def measure(model: Transformer, texts: Sequence[Sequence[int]], layers: Sequence[int], reading: Reading) -> Measured:
    """Measures all numbers of some texts and layers.

    Args:
        model: the full model.
        texts: token ids of two or more texts, which all have the same length of at least two tokens.
        layers: numbers of layers that all have a router, or all have none.
        reading: how the texts are read.
    """
    config, layers = model.config, tuple(layers)
    found: list[list[Any]] = [[] for _ in layers]
    for tokens, lengths, count in _batches(texts, reading.size, "texts"):
        seen, real = inputs(model, tokens, lengths, layers)
        for parts, layer, x in zip(found, layers, seen, strict=True):
            of_layer = read_layer(model.layers[layer].ff, x, real, config.neuron_ranges[layer], reading.griffin)
            parts.append(jax.tree.map(lambda array, count=count: np.asarray(array)[:count], of_layer))
    joined = [jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts) for parts in found]
    of_halves = [layer[0] for layer in joined]
    ranges = [config.neuron_ranges[layer] for layer in layers]
    numbers = _numbers_of_halves(of_halves, ranges)
    chance = {"overlap": _expected_overlap(ranges[0], reading.griffin)}
    if config.routing is None:
        masks = tuple(layer.first[: reading.sets] for layer in of_halves)
        return _compared(_compare_sets(model, texts, layers, masks, reading.size), layers, numbers, chance, 1)
    every = np.stack([layer[2] for layer in joined])[:, :, : len(texts[0])]
    kept = max(1, int(reading.density * config.routing.experts))
    numbers |= _numbers_of_choices(every, kept)
    chance["choice_overlap"] = expected_jaccard(kept, config.routing.experts)
    comparisons = [layer[1] for layer in joined]
    measured = _compared(comparisons, layers, numbers, chance, config.routing.active)
    return dataclasses.replace(measured, chosen=every[:, 0], token_cosines=measured.token_cosines[:, : len(texts[0])])


def measure_random_sets(
    model: Transformer, texts: Sequence[Sequence[int]], layers: Sequence[int], reading: Reading, seed: int
) -> Measured:
    """Measures sets of neurons drawn at random, as many and as large as GRIFFIN's sets of the same texts."""
    layers = tuple(layers)
    count = min(reading.sets, len(texts))
    empty = tuple(jnp.zeros((count, model.config.neurons[layer])) for layer in layers)
    random = dataclasses.replace(reading.griffin, method="random")
    seeds = jnp.arange(seed, seed + count, dtype=jnp.int32)
    masks = select(Statistics(empty, jnp.ones(count, jnp.int32)), random, seed=seeds).masks()
    return _compared(_compare_sets(model, texts, layers, masks, reading.size), layers, {}, {}, 1)


def _compared(
    comparisons: Sequence[Comparison],
    layers: tuple[int, ...],
    numbers: dict[str, Any],
    chance: dict[str, float],
    active: int,
) -> Measured:
    """Joins numbers that are known already with those from comparing experts, of which each token chooses `active`."""
    experts = comparisons[0].ranks.shape[-1]
    tokens = np.stack([layer.tokens for layer in comparisons]).sum(axis=1)[:, None, None]
    return Measured(
        layers=layers,
        numbers=numbers,
        compared=_numbers_of_comparisons(comparisons, active),
        chance=chance
        | {"largest_chosen": active / experts, "top_is_largest": 1 / experts, "rank_correlation": 0.0}
        | {"chosen_over_other_norm": 1.0, "kept_over_dropped_norm": 1.0, "kept_over_dropped_weight": 1.0},
        similarity=np.stack([layer.similarity.sum(axis=0) for layer in comparisons]) / tokens,
        ranks=np.stack([layer.ranks.sum(axis=0) for layer in comparisons]),
        chosen=np.zeros((len(layers), 0, 0), bool),
        token_cosines=np.stack([layer.token_cosines[0] for layer in comparisons]),
    )


def _batches(
    texts: Sequence[Sequence[int]], size: int, what: str
) -> Iterator[tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b"], int]]:
    """Tokens and lengths of full batches, and how many of their texts are not repetitions."""
    length = bucket(max(map(len, texts)))
    for start in tqdm(range(0, len(texts), size), unit="batch", desc=what, disable=None, leave=False):
        batch = list(texts[start : start + size])
        yield (*pad([*batch, *[batch[-1]] * (size - len(batch))], length), len(batch))


def _compare_sets(
    model: Transformer, texts: Sequence[Sequence[int]], layers: tuple[int, ...], masks: tuple[Any, ...], size: int
) -> list[Comparison]:
    """Compares the neuron sets of the first texts, one for each, on the second halves of these texts."""
    texts = texts[: len(masks[0])]
    found: list[list[Any]] = [[] for _ in layers]
    start = 0
    for tokens, lengths, count in _batches(texts, size, "sets"):
        own = np.minimum(start + np.arange(size, dtype=np.int32), len(texts) - 1)
        seen, real = inputs(model, tokens, lengths, layers)
        for parts, layer, x, sets in zip(found, layers, seen, masks, strict=True):
            comparison = read_sets(model.layers[layer].ff, x, real, sets, jnp.asarray(own))
            parts.append(jax.tree.map(lambda array, count=count: np.asarray(array)[:count], comparison))
        start += count
    return [jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts) for parts in found]


def _expected_overlap(ranges: Sequence[int], config: GriffinConfig) -> float:
    """The expected overlap of sets that are drawn at random, as a mean over ranges."""
    (kept,) = config.kept_of_ranges([tuple(ranges)])
    by_size = {pair: expected_jaccard(pair[1], pair[0]) for pair in set(zip(ranges, kept, strict=True))}
    return float(np.mean([by_size[pair] for pair in zip(ranges, kept, strict=True)]))


def _numbers_of_halves(found: Sequence[Any], ranges: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    pairs = [
        own_and_others(overlaps(layer.first, layer.first_used, layer.second, layer.second_used, sizes))
        for layer, sizes in zip(found, ranges, strict=True)
    ]
    return {
        "overlap_own": np.stack([own for own, _ in pairs]),
        "overlap_others": np.stack([others for _, others in pairs]),
        "kept_over_dropped_norm": np.stack([_ratio(layer.kept_norm, layer.dropped_norm) for layer in found]),
        "kept_over_dropped_weight": np.stack([_ratio(layer.kept_weight, layer.dropped_weight) for layer in found]),
    }


def _numbers_of_choices(chosen: Bool[np.ndarray, "l n t e"], kept: int) -> dict[str, Any]:
    middle = chosen.shape[2] // 2
    found: dict[str, list[Any]] = {name: [] for name in _CHOICES}
    for of_layer in chosen:
        repeated = [repetition(text) for text in of_layer]
        halves_chosen = [most_chosen(half.sum(axis=1), kept) for half in np.split(of_layer, [middle], axis=1)]
        whole = np.ones_like(halves_chosen[0])
        own, others = own_and_others(
            overlaps(halves_chosen[0], whole, halves_chosen[1], whole, [chosen.shape[-1]])
        )  # fmt: skip
        evenly = [evenness(choice_counts(text)) for text in of_layer]
        values = (evenly, [found for found, _ in repeated], [mean for _, mean in repeated], own, others)
        for name, value in zip(_CHOICES, values, strict=True):
            found[name].append(value)
    return {name: np.asarray(values) for name, values in found.items()}


_CHOICES = ("evenness", "repetition", "repetition_permuted", "choice_overlap_own", "choice_overlap_others")


def _numbers_of_comparisons(found: Sequence[Comparison], active: int) -> dict[str, Any]:
    of_layers = [_of_texts(layer, active) for layer in found]
    return {name: np.stack([layer[name] for layer in of_layers]) for name in of_layers[0]}


def _of_texts(found: Any, active: int) -> dict[str, Float[np.ndarray, "n"]]:
    """The numbers of each text in one layer."""
    tokens, experts = found.tokens.astype(np.float64), found.ranks.shape[-1]
    below = np.tril_indices(experts, -1)
    numbers = {
        "similarity": found.similarity[:, *below].mean(axis=-1) / tokens,
        "largest_chosen": found.largest_chosen / tokens,
        "top_is_largest": found.ranks[:, 0, 0] / tokens,
        "rank_correlation": rank_correlation(found.ranks),
        "chosen_over_other_norm": _ratio(found.chosen_norm, found.other_norm),
        "chosen_active": found.chosen_active / tokens,
        "other_active": found.other_active / tokens,
    }
    if active > 1:
        numbers |= {"similarity_chosen": found.chosen / tokens, "similarity_others": found.others / tokens}
    return numbers


def rank_correlation(ranks: Int[np.ndarray, "n e e"]) -> Float[np.ndarray, "n"]:
    """Spearman's correlation between both ranks of a token's experts, averaged over tokens, from `Comparison.ranks`."""
    experts = ranks.shape[-1]
    distance = np.square(np.subtract.outer(np.arange(experts), np.arange(experts)))
    tokens = ranks.sum(axis=(1, 2)) / experts
    return 1 - 6 * (ranks * distance).sum(axis=(1, 2)) / (tokens * experts * (experts**2 - 1))


def _ratio(above: Any, below: Any) -> Float[np.ndarray, "n"]:
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)
