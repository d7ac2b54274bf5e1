"""Judges the three findings of "A Closer Look" by numbers with intervals.

By one number, a finding *holds* if the whole 95% interval of the number lies beyond chance, on the side that the
finding predicts, and if the number also lies beyond the same number of each null model: the interval of their
difference, text by text, lies beyond zero. If the number lies beyond chance but not beyond a null model, it *is no
proof*: in a random model, too, neurons differ from text to text. The finding *fails* if the interval lies on the other
side of chance. Otherwise it is *open*.

Numbers from texts have bootstrap intervals over texts. Numbers from weights alone have no texts, so their intervals are
over layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from griffin_jax.analysis.experts.texts import Measured
from griffin_jax.evaluation.intervals import Interval, mean
from griffin_jax.evaluation.report import as_json

HOLDS, NO_PROOF, FAILS, OPEN = "holds", "no proof", "fails", "open"

FINE_GRAINED = "Neurons act like fine-grained experts."
LARGE_NORMS = "Routers favour experts with large outputs."
DEPTH = "Diversity grows with depth, the last layer aside."

OVERLAP = "how much more the neurons of a text's two halves overlap than those of different texts"
KEPT = "norm of what the neurons kept for a first half add to the second one, over that of dropped ones"
OF_ROUTERS = {
    "largest_chosen": "share of tokens that choose the expert whose output is the largest",
    "rank_correlation": "rank correlation of the norms of experts' outputs and their gate scores",
    "chosen_over_other_norm": "norm of the outputs of chosen experts, over that of others",
}
OF_SETS = {
    "largest_chosen": "share of tokens for which the text's own neuron set gives the largest output of all sets",
    "rank_correlation": "rank correlation of the norms of sets' outputs and their shares of ||z||^2",
    "chosen_over_other_norm": "norm of the outputs of a text's own neuron set, over that of other texts' sets",
}
"""What each number says, for models with routers and without."""

LEAST_LAYERS = 3
"""With at most this many layers there is nothing to say about depth."""

Number = Callable[[Measured], Float[np.ndarray, "n"] | None]
"""A function that returns a number for each text, or None if the number is unknown."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One number that speaks for or against a finding.

    Attributes:
        claim: the finding.
        what: the number, in words.
        found: value and interval of the number.
        chance: value that the number would have if the finding were wrong.
        above: whether the number is larger than that, and not smaller, if the finding is right.
        over: what the interval is over.
        nulls: the number of each null model, by name.
        beyond: difference between the number and that of each null model on the same texts, by name.
    """

    claim: str
    what: str
    found: Interval
    chance: float
    above: bool
    over: str
    nulls: Mapping[str, Interval] = dataclasses.field(default_factory=dict)
    beyond: Mapping[str, Interval] = dataclasses.field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The verdict on the finding by this number."""
        side = _side(self.found, self.chance)
        if side == 0:
            return OPEN
        right = 1 if self.above else -1
        if side != right:
            return FAILS
        return HOLDS if all(_side(difference, 0.0) == right for difference in self.beyond.values()) else NO_PROOF

    def to_json(self) -> dict[str, Any]:
        """The evidence as it is written to the results."""
        return {
            "claim": self.claim, "what": self.what, **as_json(self.found), "chance": self.chance, "above": self.above,
            "over": self.over, "nulls": {name: as_json(found) for name, found in self.nulls.items()},
            "beyond": {name: as_json(found) for name, found in self.beyond.items()}, "verdict": self.verdict,
        }  # fmt: skip


def _side(interval: Interval, value: float) -> int:
    """1 if all of an interval is above a value, -1 if all of it is below, else 0; also 0 if there is no interval."""
    return int(interval.low > value) - int(interval.high < value)


def summary(measured: Measured, seed: int) -> dict[str, Any]:
    """Every number from texts for each layer, and its mean over layers, with intervals over texts; for JSON."""
    found: dict[str, Any] = {}
    for name, values in (measured.numbers | measured.compared).items():
        known = values[:, np.isfinite(values).all(axis=0)]
        found[name] = {
            "layers": [as_json(_mean(layer[np.isfinite(layer)], seed)) for layer in values],
            "mean": as_json(_mean(known.mean(axis=0), seed)),
        }
    return {"layers": list(measured.layers), "chance": measured.chance, "numbers": found}


def evidence_of_texts(
    measured: Measured, nulls: Mapping[str, Measured], routed: bool, seed: int
) -> list[Evidence]:  # fmt: skip
    """What texts say about the findings.

    Args:
        measured: numbers of the model.
        nulls: numbers of the null models on the same texts, by name.
        routed: whether the model has routers.
        seed: seed of the bootstrap.
    """

    def judged(claim: str, what: str, number: Number, chance: float, above: bool = True) -> Evidence:
        own = number(measured)
        others = {name: found for name, null in nulls.items() if (found := number(null)) is not None}
        assert own is not None
        return Evidence(
            claim, what, _mean_of_known(own, seed), chance, above, "texts",
            {name: _mean_of_known(values, seed) for name, values in others.items()},
            {name: _mean_of_known(own - values, seed) for name, values in others.items()},
        )  # fmt: skip

    def of_layers(name: str, less: str | None = None) -> Number:
        def number(found: Measured) -> Float[np.ndarray, "n"] | None:
            known = found.numbers | found.compared
            if name not in known:
                return None
            values = known[name] if less is None else known[name] - known[less]
            return values.mean(axis=0)

        return number

    names = OF_ROUTERS if routed else OF_SETS
    found = [
        judged(FINE_GRAINED, OVERLAP, of_layers("overlap_own", less="overlap_others"), 0.0),
        judged(FINE_GRAINED, KEPT, of_layers("kept_over_dropped_norm"), measured.chance["kept_over_dropped_norm"]),
        *(judged(LARGE_NORMS, what, of_layers(name), measured.chance[name]) for name, what in names.items()),
    ]
    if len(measured.layers) > LEAST_LAYERS:
        what = "rank correlation of depth and similarity of outputs, without the last layer"
        found.append(judged(DEPTH, what, _depth_of_texts, 0.0, above=False))
    return found


def _depth_of_texts(measured: Measured) -> Float[np.ndarray, "n"]:
    return np.asarray([with_depth(text[:-1]) for text in measured.compared["similarity"].T])


def evidence_of_weights(weights: dict[str, Any], seed: int) -> list[Evidence]:
    """What weights alone say about the findings."""
    found = []
    if "gate" in weights:
        gate = weights["gate"]
        beyond = np.subtract(gate["router_r2"], gate["router_r2_permuted"])
        others = np.mean([weights[kind]["router_r2"] for kind in ("up", "down")], axis=0)
        found += [
            Evidence(
                FINE_GRAINED, "R^2 of the experts' gates on the router's rows, above that of permuted experts",
                _mean(beyond, seed), 0.0, True, "layers",
            ),
            Evidence(
                FINE_GRAINED, "R^2 of the experts' gates on the router's rows, above that of up and down",
                _mean(np.subtract(gate["router_r2"], others), seed), 0.0, True, "layers",
            ),
        ]  # fmt: skip
    kinds = [kind for kind in ("up", "gate", "down") if kind in weights]
    if len(weights["layers"]) > LEAST_LAYERS:
        similar = np.mean([weights[kind]["mean_similarity"] for kind in kinds], axis=0)[:-1]
        found.append(
            Evidence(
                DEPTH, "rank correlation of depth and similarity of weights, without the last layer",
                _resampled_with_depth(similar, seed), 0.0, False, "layers",
            )
        )  # fmt: skip
    return found


def with_depth(values: Float[np.ndarray, "l"]) -> float:
    """Spearman's correlation of values with the numbers of their layers; 0 if all values are equal."""
    from scipy.stats import spearmanr

    if np.ptp(values) == 0:
        return 0.0
    found: Any = spearmanr(np.arange(len(values)), values)
    return float(found.statistic)


def _resampled_with_depth(values: Float[np.ndarray, "l"], seed: int, resamples: int = 2000) -> Interval:
    """The correlation of `with_depth`, with a bootstrap interval over layers."""
    from scipy.stats import rankdata

    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(values), (resamples, len(values)))
    depth, ranks = rankdata(drawn, axis=1), rankdata(values[drawn], axis=1)
    depth -= depth.mean(axis=1, keepdims=True)
    ranks -= ranks.mean(axis=1, keepdims=True)
    scale = np.sqrt((depth**2).sum(axis=1) * (ranks**2).sum(axis=1))
    found = np.where(scale > 0, (depth * ranks).sum(axis=1) / np.where(scale > 0, scale, 1), 0)
    low, high = np.percentile(found, (2.5, 97.5))
    return Interval(with_depth(values), float(low), float(high))


def verdicts(evidence: Sequence[Evidence]) -> dict[str, str]:
    """The verdict on each finding: that of its numbers if they agree, else open.

    A number that is no proof, or open, says nothing against another by which the finding holds or fails.
    """
    found: dict[str, str] = {}
    for claim in (FINE_GRAINED, LARGE_NORMS, DEPTH):
        said = {each.verdict for each in evidence if each.claim == claim}
        if said:
            decided = said & {HOLDS, FAILS} or said
            found[claim] = decided.pop() if len(decided) == 1 else OPEN
    return found


def _mean_of_known(values: Float[np.ndarray, "n"], seed: int) -> Interval:
    return _mean(values[np.isfinite(values)], seed)


def _mean(values: Any, seed: int) -> Interval:
    values = np.asarray(values, np.float64)
    return mean(values.tolist(), seed) if len(values) else Interval(math.nan, math.nan, math.nan)
