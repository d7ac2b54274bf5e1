"""What texts say of experts, against straightforward NumPy on tiny models, with planted structure and at random."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import oracle_squares, oracle_topk
from scipy.stats import spearmanr

import griffin_jax as gj
from griffin_jax.analysis.experts import claims, texts
from griffin_jax.analysis.experts.choices import evenness, most_chosen, repetition
from griffin_jax.analysis.experts.outputs import Answers, active_share, compare
from griffin_jax.analysis.experts.sets import overlaps, own_and_others
from griffin_jax.analysis.experts.texts import Measured, Reading
from griffin_jax.analysis.experts.watching import watch
from griffin_jax.analysis.flocking import expected_jaccard
from griffin_jax.evaluation.intervals import Interval
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig, Routing

LAYERS, EXPERTS, ACTIVE, NEURONS, LENGTH = 2, 4, 2, 12, 14
CONFIG = ModelConfig(
    family="mixtral", vocab_size=50, width=16, ff_width=40, num_layers=LAYERS, num_heads=2, num_kv_heads=2, head_dim=8,
    max_positions=64,
)  # fmt: skip
ROUTED = dataclasses.replace(CONFIG, routing=Routing(EXPERTS, ACTIVE, NEURONS, router_bias=True))
TEXTS = np.random.default_rng(7).integers(0, 50, (3, LENGTH)).tolist()
READING = Reading(density=0.5, size=2, sets=3)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def seen_by(model: gj.Transformer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Input and intermediates of every layer for each text: (texts, tokens, ...)."""

    def look(layer, ff, seen):
        z = seen.z if isinstance(seen.z, jax.Array) else seen.z.everywhere()
        return seen.x, z

    lengths = jnp.full(len(TEXTS), LENGTH, jnp.int32)
    seen = jax.jit(lambda model: watch(model, jnp.asarray(TEXTS), lengths, look))(model)
    return [(np.asarray(x, np.float64), np.asarray(z, np.float64)) for x, z in seen]


def answers_by_numpy(ff, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of every expert for some tokens, (E, t, d), and act(Wg x), (E, t, f)."""
    gate_up, down = np.asarray(ff.experts.gate_up[...], np.float64), np.asarray(ff.experts.down[...], np.float64)
    gates = silu(np.einsum("td,efd->etf", x, gate_up[:, 0]))
    return np.einsum("etf,etf,efd->etd", gates, np.einsum("td,efd->etf", x, gate_up[:, 1]), down), gates


def angular(outputs: np.ndarray) -> np.ndarray:
    """1 - arccos(cosine) / pi of all pairs for each token, (t, E, E)."""
    unit = outputs / np.linalg.norm(outputs, axis=-1, keepdims=True)
    return 1 - np.arccos(np.clip(np.einsum("etd,ftd->tef", unit, unit), -1, 1)) / np.pi


def similarity_of_sets(first, second) -> float:
    first, second = set(map(int, first)), set(map(int, second))
    return len(first & second) / len(first | second)


@pytest.fixture(scope="module")
def routed():
    """A random model with routers, what was measured with it, and its layers' inputs."""
    model = random_model(ROUTED, seed=3)
    for layer in model.layers:
        layer.ff.router_bias[...] = jnp.asarray([0.3, 0.0, -0.2, 0.1])
    return model, texts.measure(model, TEXTS, range(LAYERS), READING), seen_by(model)


@pytest.fixture(scope="module")
def dense():
    """The same of a model without routers."""
    model = random_model(CONFIG, seed=4)
    return model, texts.measure(model, TEXTS, range(LAYERS), READING), seen_by(model)


class TestWatching:
    def test_a_layer_s_output_follows_from_what_was_seen(self, dense):
        model, _, seen = dense
        ff = model.layers[1].ff
        x, z = seen[1]
        np.testing.assert_allclose(ff.intermediate(jnp.asarray(x, jnp.float32)), z, rtol=1e-5, atol=1e-6)
        assert type(model.layers[0].ff) is type(ff)

    def test_the_first_layer_s_input_is_that_of_the_model(self, dense):
        """The second layer's shows that reading went on as without anybody watching."""
        model, _, seen = dense
        cache = gj.empty_cache(CONFIG, len(TEXTS), LENGTH, jnp.float32)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), (len(TEXTS), LENGTH))

        @jax.jit
        def usual(model):
            return model(jnp.asarray(TEXTS), positions, cache, read_slots=0, observe=lambda layer, z, real: z)[2]

        found = usual(model)
        for layer, (_, z) in enumerate(seen):
            np.testing.assert_allclose(found[layer], z, rtol=1e-5, atol=1e-6)


class TestOutputs:
    @pytest.mark.thorough
    def test_similarity_norms_and_ranks(self, routed):
        model, measured, seen = routed
        pairs = list(itertools.combinations(range(EXPERTS), 2))
        for layer, (x, _) in enumerate(seen):
            ff = model.layers[layer].ff
            ranks = np.zeros((EXPERTS, EXPERTS))
            matrices = []
            for text in range(len(TEXTS)):
                outputs, gates = answers_by_numpy(ff, x[text])
                similar, norms = angular(outputs), np.linalg.norm(outputs, axis=-1).T
                logits = x[text] @ np.asarray(ff.router[...], np.float64).T + np.asarray(ff.router_bias[...])
                chosen = np.argsort(-logits, axis=1)[:, :ACTIVE]
                matrices.append(similar.mean(axis=0))
                both, other, own_norm, other_norm, own_active = [], [], [], [], []
                for token in range(LENGTH):
                    picked = set(chosen[token].tolist())
                    both.append(np.mean([similar[token][a, b] for a, b in pairs if {a, b} <= picked]))
                    other.append(np.mean([similar[token][a, b] for a, b in pairs if not {a, b} <= picked]))
                    own_norm.append(norms[token][list(picked)].mean())
                    other_norm.append(norms[token][[e for e in range(EXPERTS) if e not in picked]].mean())
                    squares = gates[sorted(picked), token] ** 2
                    own_active.append(np.mean(squares.sum(axis=1) ** 2 / (NEURONS * (squares**2).sum(axis=1))))
                    by_norm, by_score = np.argsort(-norms[token]), np.argsort(-logits[token])
                    for expert in range(EXPERTS):
                        ranks[by_norm.tolist().index(expert), by_score.tolist().index(expert)] += 1
                expected = {
                    "similarity": np.mean([similar[:, a, b] for a, b in pairs]),
                    "similarity_chosen": np.mean(both),
                    "similarity_others": np.mean(other),
                    "chosen_over_other_norm": np.sum(own_norm) / np.sum(other_norm),
                    "chosen_active": np.mean(own_active),
                    "largest_chosen": np.mean([norms[t].argmax() in chosen[t] for t in range(LENGTH)]),
                    "top_is_largest": np.mean(norms.argmax(axis=1) == logits.argmax(axis=1)),
                    "rank_correlation": np.mean(
                        [spearmanr(n, s).statistic for n, s in zip(norms, logits, strict=True)]
                    ),
                }
                for name, value in expected.items():
                    assert measured.compared[name][layer, text] == pytest.approx(value, rel=1e-4), name
                if text == 0:
                    unit = np.cos(np.pi * (1 - similar))
                    cosines = [np.mean([token[a, b] for a, b in pairs]) for token in unit]
                    np.testing.assert_allclose(measured.token_cosines[layer], cosines, rtol=1e-3, atol=1e-5)
                    for token in range(LENGTH):
                        assert set(np.flatnonzero(measured.chosen[layer, token])) == set(chosen[token].tolist())
            np.testing.assert_array_equal(measured.ranks[layer], ranks)
            np.testing.assert_allclose(measured.similarity[layer], np.mean(matrices, axis=0), atol=2e-4)

    def test_states_of_the_first_neurons(self, routed):
        model, _, seen = routed
        states = texts.gate_states(model, TEXTS[0], [1])[1]
        _, gates = answers_by_numpy(model.layers[1].ff, seen[1][0][0])
        np.testing.assert_allclose(states, gates.swapaxes(0, 1), rtol=1e-4, atol=1e-6)

    def test_sets_of_a_dense_model(self, dense):
        """The sets are those that first halves keep; they answer second halves."""
        model, measured, seen = dense
        half = LENGTH // 2
        for layer, (_, z) in enumerate(seen):
            down = np.asarray(model.layers[layer].ff.down[...], np.float64)
            kept = [oracle_topk(oracle_squares(text[:half]), 20) for text in z]
            for text in range(len(TEXTS)):
                late = z[text, half:]
                outputs = np.stack([late[:, own] @ down[own] for own in kept])
                scores = np.stack([(late[:, own] ** 2).sum(axis=1) for own in kept])
                norms = np.linalg.norm(outputs, axis=-1)
                other = [number for number in range(3) if number != text]
                expected = {
                    "similarity": np.mean([angular(outputs)[:, a, b] for a, b in ((0, 1), (0, 2), (1, 2))]),
                    "largest_chosen": np.mean(norms.argmax(axis=0) == text),
                    "chosen_over_other_norm": norms[text].sum() / norms[other].mean(axis=0).sum(),
                    "rank_correlation": np.mean(
                        [spearmanr(n, s).statistic for n, s in zip(norms.T, scores.T, strict=True)]
                    ),
                }
                for name, value in expected.items():
                    assert measured.compared[name][layer, text] == pytest.approx(value, rel=1e-4), name
        assert measured.chance["largest_chosen"] == pytest.approx(1 / 3)

    def test_a_router_that_follows_norms(self):
        """Experts that differ in their size only, chosen by it: every finding about norms is as clear as can be."""
        count, tokens = 5, 30
        rng = np.random.default_rng(0)
        size = np.asarray([3.0, 1.0, 5.0, 2.0, 4.0])
        outputs = size[:, None, None, None] * rng.standard_normal((1, 1, tokens, 8))
        scores = np.broadcast_to(size, (1, tokens, count))
        chosen = np.broadcast_to(size >= 4, (1, tokens, count))
        active = np.broadcast_to(np.where(size >= 4, 0.5, 0.25), (1, tokens, count))
        answers = Answers(*map(jnp.asarray, (outputs.astype(np.float32), scores, chosen, active)))
        real = jnp.arange(tokens)[None] < 20
        found = jax.jit(compare)(answers, real)
        np.testing.assert_array_equal(found.ranks[0], 20 * np.eye(count))
        assert texts.rank_correlation(np.asarray(found.ranks))[0] == pytest.approx(1)
        assert int(found.tokens[0]) == int(found.largest_chosen[0]) == 20
        assert float(found.chosen_norm[0] / found.other_norm[0]) == pytest.approx(4.5 / 2, rel=1e-5)
        np.testing.assert_allclose(found.similarity[0], 20, rtol=1e-3)
        np.testing.assert_allclose([found.chosen_active[0], found.other_active[0]], [10, 5], rtol=1e-6)

    def test_a_router_at_random(self):
        rng = np.random.default_rng(1)
        shape = (1, 2000, 4)
        outputs, scores = rng.standard_normal((4, 1, 2000, 8)), rng.standard_normal(shape)
        chosen = scores >= np.sort(scores, axis=-1)[..., 2:3]
        answers = Answers(*map(jnp.asarray, (outputs.astype(np.float32), scores, chosen, np.ones(shape))))
        found = jax.jit(compare)(answers, jnp.ones(shape[:2], bool))
        assert abs(texts.rank_correlation(np.asarray(found.ranks))[0]) < 0.05
        assert int(found.largest_chosen[0]) / 2000 == pytest.approx(2 / 4, abs=0.04)
        assert int(found.ranks[0, 0, 0]) / 2000 == pytest.approx(1 / 4, abs=0.04)
        assert float(found.similarity[0][1, 0]) / 2000 == pytest.approx(0.5, abs=0.02)
        assert float(found.chosen_norm[0] / found.other_norm[0]) == pytest.approx(1, abs=0.03)

    def test_active_share(self):
        a = jnp.asarray([[1.0, -1, 1, 1], [0, 3e20, 0, 0], [0, 0, 0, 0], [2, 1, 0, 0]])
        np.testing.assert_allclose(active_share(a), [1, 1 / 4, 0, 25 / (4 * 17)], rtol=1e-6)


class TestSets:
    def test_halves(self, dense):
        model, measured, seen = dense
        half = LENGTH // 2
        for layer, (_, z) in enumerate(seen):
            down = np.linalg.norm(np.asarray(model.layers[layer].ff.down[...], np.float64), axis=1)
            first, second = (
                [oracle_topk(oracle_squares(text[part]), 20) for text in z] for part in (slice(half), slice(half, None))
            )
            for text in range(len(TEXTS)):
                added = np.abs(z[text, half:]).mean(axis=0) * down
                dropped = np.setdiff1d(np.arange(40), first[text])
                expected = {
                    "overlap_own": similarity_of_sets(first[text], second[text]),
                    "overlap_others": np.mean(
                        [similarity_of_sets(first[text], second[n]) for n in range(3) if n != text]
                    ),
                    "kept_over_dropped_norm": added[first[text]].mean() / added[dropped].mean(),
                    "kept_over_dropped_weight": down[first[text]].mean() / down[dropped].mean(),
                }
                for name, value in expected.items():
                    assert measured.numbers[name][layer, text] == pytest.approx(value, rel=1e-4), name
        assert measured.chance["overlap"] == pytest.approx(expected_jaccard(20, 40))

    def test_random_sets_have_nothing_of_their_text(self, dense):
        model, measured, _ = dense
        drawn = texts.measure_random_sets(model, TEXTS, range(LAYERS), READING, 1)
        assert not drawn.numbers
        assert not np.allclose(drawn.compared["similarity"], measured.compared["similarity"])
        gain = measured.compared["chosen_over_other_norm"].mean()
        assert gain > 1.1
        assert drawn.compared["chosen_over_other_norm"].mean() == pytest.approx(1, abs=0.1)

    def test_overlaps_count_what_both_used(self, rng):
        """Two experts of 6 and 4 neurons; the second text did not choose the second of them."""
        first, second = rng.random((2, 3, 10)) < 0.5
        used = np.ones((3, 10), bool)
        used[1, 6:] = False
        found = overlaps(first, used, second, np.ones_like(used), [6, 4])
        for i, j in itertools.product(range(3), repeat=2):
            parts = [slice(0, 6)] if i == 1 else [slice(0, 6), slice(6, 10)]
            of_parts = [(first[i, p] & second[j, p]).sum() / max(1, (first[i, p] | second[j, p]).sum()) for p in parts]
            assert found[i, j] == pytest.approx(np.mean(of_parts))
        assert np.isnan(overlaps(first, ~used & False, second, used, [6, 4])).all()

    def test_own_and_others(self):
        own, others = own_and_others(np.asarray([[0.9, 0.2, 0.4], [0.3, 0.8, np.nan], [np.nan, np.nan, 0.7]]))
        np.testing.assert_array_equal(own, [0.9, 0.8, 0.7])
        np.testing.assert_allclose(others, [0.3, 0.3, np.nan])

    def test_experts_that_no_token_chose_are_left_out(self, routed):
        _, measured, _ = routed
        assert np.isfinite(measured.numbers["overlap_own"]).all()
        assert measured.chance["overlap"] == pytest.approx(expected_jaccard(6, 12))


class TestChoices:
    def test_evenness(self):
        assert evenness(np.asarray([5, 5, 5, 5])) == pytest.approx(1)
        assert evenness(np.asarray([0, 8, 0, 0])) == pytest.approx(0)
        assert evenness(np.asarray([4, 4, 0, 0])) == pytest.approx(0.5)

    def test_repetition_and_its_mean_over_orders(self):
        chosen = np.asarray([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]], bool)
        found, permuted = repetition(chosen)
        assert found == pytest.approx((2 + 1 + 1) / 6)
        orders = [repetition(chosen[list(order)])[0] for order in itertools.permutations(range(4))]
        assert permuted == pytest.approx(np.mean(orders))

    def test_most_chosen(self):
        np.testing.assert_array_equal(most_chosen(np.asarray([[3, 5, 3, 0]]), 2), [[True, True, False, False]])

    def test_of_a_model(self, routed):
        _, measured, _ = routed
        for layer in range(LAYERS):
            counts = measured.chosen[layer].sum(axis=0)
            assert measured.numbers["evenness"][layer, 0] == pytest.approx(evenness(counts))
            first, second = (
                set(np.argsort(-measured.chosen[layer, part].sum(axis=0), kind="stable")[:2].tolist())
                for part in (slice(LENGTH // 2), slice(LENGTH // 2, None))
            )
            assert measured.numbers["choice_overlap_own"][layer, 0] == pytest.approx(similarity_of_sets(first, second))
        assert measured.chance["choice_overlap"] == pytest.approx(expected_jaccard(2, 4))


def measured_with(similarity: np.ndarray, **numbers: float) -> Measured:
    """Six texts, in which a number is the same in every layer, with little noise."""
    rng = np.random.default_rng(0)
    shape = similarity.shape

    def values(value: float) -> np.ndarray:
        return value + 0.01 * rng.standard_normal(shape)

    defaults = {
        "overlap_own": 0.5, "overlap_others": 0.5, "kept_over_dropped_norm": 1.0, "largest_chosen": 0.25,
        "rank_correlation": 0.0, "chosen_over_other_norm": 1.0,
    }  # fmt: skip
    every = {name: values(value) for name, value in (defaults | numbers).items()}
    empty = np.zeros((shape[0], 0, 0), int)
    chance = {name: defaults[name] for name in list(defaults)[2:]}
    return Measured(
        tuple(range(shape[0])), every, {"similarity": similarity}, chance, empty, empty,
        empty.astype(bool), np.zeros((shape[0], 0)),
    )  # fmt: skip


class TestClaims:
    def test_planted_findings_hold_and_random_ones_do_not(self):
        rng = np.random.default_rng(0)
        falling = np.asarray([0.9, 0.8, 0.7, 0.6, 0.9])[:, None] + 0.01 * rng.standard_normal((5, 6))
        planted = measured_with(
            falling, overlap_own=0.7, overlap_others=0.4, kept_over_dropped_norm=2.0, largest_chosen=0.9,
            rank_correlation=0.8, chosen_over_other_norm=1.5,
        )  # fmt: skip
        random = measured_with(0.5 + 0.01 * rng.standard_normal((5, 6)))
        evidence = claims.evidence_of_texts(planted, {"random": random}, True, 0)
        assert {each.verdict for each in evidence} == {"holds"}
        assert set(claims.verdicts(evidence).values()) == {"holds"}
        # What a random model has as well is no finding.
        evidence = claims.evidence_of_texts(planted, {"random": random, "same": planted}, True, 0)
        assert {each.verdict for each in evidence} == {"no proof"}
        assert "holds" not in claims.verdicts(claims.evidence_of_texts(random, {}, True, 0)).values()
        against = measured_with(1 - falling, overlap_own=0.3, kept_over_dropped_norm=0.5, largest_chosen=0.1,
                                rank_correlation=-0.5, chosen_over_other_norm=0.9)  # fmt: skip
        assert set(claims.verdicts(claims.evidence_of_texts(against, {}, False, 0)).values()) == {"fails"}

    def test_evidence_of_weights(self):
        layers = 12
        rng = np.random.default_rng(0)

        def of_kind(r2: float, similarity: np.ndarray) -> dict[str, list[float]]:
            noise = 0.01 * rng.standard_normal(layers)
            return {
                "router_r2": (r2 + noise).tolist(), "router_r2_permuted": [0.04] * layers,
                "mean_similarity": similarity.tolist(),
            }  # fmt: skip

        falling = np.linspace(0.8, 0.2, layers)
        found = {"layers": list(range(layers)), "up": of_kind(0.05, falling), "gate": of_kind(0.35, falling),
                 "down": of_kind(0.05, falling)}  # fmt: skip
        evidence = claims.evidence_of_weights(found, 0)
        assert len(evidence) == 3
        assert {each.verdict for each in evidence} == {"holds"}
        assert evidence[2].found.value == pytest.approx(-1)
        flat = {kind: of_kind(0.04, rng.random(layers)) for kind in ("up", "gate", "down")}
        evidence = claims.evidence_of_weights({"layers": list(range(layers)), **flat}, 0)
        assert {each.verdict for each in evidence} == {"open"}

    def test_without_an_interval_nothing_is_decided(self):
        lonely = claims.Evidence(claims.DEPTH, "", Interval(0.9, math.nan, math.nan), 0.0, True, "texts")
        assert lonely.verdict == "open"

    def test_summary(self, routed):
        _, measured, _ = routed
        found = claims.summary(measured, 0)
        assert json.dumps(found, allow_nan=False)
        for name, values in (measured.numbers | measured.compared).items():
            entry = found["numbers"][name]
            assert entry["mean"]["value"] == pytest.approx(values.mean())
            assert len(entry["layers"]) == LAYERS
            assert entry["layers"][1]["low"] <= values[1].mean() + 1e-12
