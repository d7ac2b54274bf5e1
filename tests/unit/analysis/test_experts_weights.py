"""What experts' weights say, against straightforward NumPy and with planted structure; a layer's memory is enough."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from griffin_jax.analysis.experts import checkpoint, weights
from griffin_jax.analysis.experts.checkpoint import RandomExperts, StoredExperts
from griffin_jax.analysis.experts.components import neuron_components, principal_components
from griffin_jax.analysis.experts.matching import match
from griffin_jax.analysis.experts.routers import r_squared, router_against_experts
from griffin_jax.analysis.experts.similarity import cosines, cosines_of_rows, grams, mean_neurons, outlier, pairs_of
from griffin_jax.checkpoints.loading import open_source

EXPERTS, NEURONS, WIDTH = 5, 12, 8
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture
def matrix(rng) -> np.ndarray:
    """Experts that have something in common."""
    shared = rng.standard_normal((NEURONS, WIDTH))
    return (rng.standard_normal((EXPERTS, NEURONS, WIDTH)) + 0.7 * shared).astype(np.float32)


@pytest.fixture
def few_columns_at_a_time(monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 4 * EXPERTS * 7)


@pytest.mark.usefixtures("few_columns_at_a_time")
class TestSimilarity:
    @pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
    def test_cosines_of_flattened_experts(self, matrix, dtype):
        matrix = matrix.astype(dtype)
        expected = [[cosine(a, b) for a in matrix] for b in matrix]
        np.testing.assert_allclose(cosines(grams(matrix).plain), expected, rtol=1e-5, atol=1e-6)

    def test_identical_experts_and_one_outlier(self, rng):
        one = rng.standard_normal((NEURONS, WIDTH)).astype(np.float32)
        same = np.stack([one] * EXPERTS)
        np.testing.assert_allclose(cosines(grams(same).plain), 1, rtol=1e-6)
        assert outlier(np.ones((4, 4))) == (0, 0.0)
        same += 0.1 * rng.standard_normal(same.shape).astype(np.float32)
        same[3] = rng.standard_normal(one.shape)
        least, distance = outlier(cosines(grams(same).plain))
        assert least == 3
        assert distance > 10

    def test_random_experts_are_not_alike(self, rng):
        similarity = pairs_of(cosines(grams(rng.standard_normal((6, 400, 32)).astype(np.float32)).plain))
        assert len(similarity) == 15
        assert abs(similarity).max() < 5 / np.sqrt(400 * 32)

    def test_mean_neurons(self, matrix):
        expected = [[cosine(a.mean(axis=0), b.mean(axis=0)) for a in matrix] for b in matrix]
        np.testing.assert_allclose(cosines_of_rows(mean_neurons(matrix)), expected, rtol=1e-5, atol=1e-6)


class TestMatching:
    def test_a_permuted_copy_is_found(self, rng):
        from scipy.stats import kendalltau

        one = rng.standard_normal((40, WIDTH)).astype(np.float32)
        order = np.arange(40)
        order[5:25] = rng.permutation(order[5:25])
        other = np.empty_like(one)
        other[order] = 3 * one
        found = match(one, other, 40, rng)
        np.testing.assert_array_equal(found.partners, order)
        assert found.after == pytest.approx(1, abs=1e-6)
        assert found.before == pytest.approx(cosine(one, other), abs=1e-6)
        assert found.tau == pytest.approx(kendalltau(np.arange(40), order).statistic)
        assert 0.3 < found.tau < 0.9

    def test_of_a_sample_every_partner_is_found(self, rng):
        one = rng.standard_normal((200, 16)).astype(np.float32)
        order = rng.permutation(200)
        other = np.empty_like(one)
        other[order] = one
        found = match(one, other, 30, rng)
        assert len(set(found.neurons)) == 30
        np.testing.assert_array_equal(found.partners, order[found.neurons])
        assert found.before == pytest.approx(cosine(one[found.neurons], other[found.neurons]), abs=1e-6)
        assert found.after == pytest.approx(1, abs=1e-6)

    def test_no_assignment_is_better(self, rng):
        one, other = rng.standard_normal((2, 5, 3)).astype(np.float32)
        unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other)]
        best = max(itertools.permutations(range(5)), key=lambda order: np.sum(unit[0] * unit[1][list(order)]))
        found = match(one, other, 5, rng)
        assert tuple(found.partners) == best
        assert found.after == pytest.approx(cosine(one, other[list(best)]), abs=1e-6)

    def test_random_neurons_have_no_order(self, rng):
        one, other = rng.standard_normal((2, 300, 8)).astype(np.float32)
        found = match(one, other, 300, rng)
        assert abs(found.tau) < 0.15
        assert found.after > 0.5 > 0.1 > abs(found.before)


class TestRouters:
    def test_r_squared_is_that_of_a_fitted_line(self, rng):
        x, y = rng.standard_normal((2, 30))
        y += 0.4 * x
        residual = y - np.polyval(np.polyfit(x, y, 1), x)
        assert r_squared(x, y) == pytest.approx(1 - residual.var() / y.var())
        assert r_squared(np.ones(4), np.arange(4.0)) == 0

    def test_a_router_whose_rows_are_the_experts(self, rng):
        experts = cosines_of_rows(rng.standard_normal((8, 6)))
        found, permuted, p = router_against_experts(experts, experts, rng)
        assert found == pytest.approx(1)
        assert permuted < 0.2
        assert p == pytest.approx(1 / 201)

    def test_a_random_router_is_like_a_permuted_one(self):
        found = np.mean([self.of_random(seed) for seed in range(40)], axis=0)
        # Of 28 pairs, a line through noise explains 1 / 27.
        np.testing.assert_allclose(found[:2], 1 / 27, atol=0.02)
        assert 0.35 < found[2] < 0.65

    @staticmethod
    def of_random(seed: int) -> tuple[float, float, float]:
        rng = np.random.default_rng(seed)
        router, experts = (cosines_of_rows(rng.standard_normal((8, 30))) for _ in range(2))
        return router_against_experts(router, experts, rng)


class TestComponents:
    @pytest.mark.usefixtures("few_columns_at_a_time")
    def test_experts_as_by_singular_values(self, matrix):
        matrix[:, 0, 0] = 2
        flat = matrix.reshape(EXPERTS, -1).astype(np.float64)
        spread = flat.std(axis=0)
        standard = (flat - flat.mean(axis=0)) / np.where(spread > 0, spread, 1)
        left, values, _ = np.linalg.svd(standard, full_matrices=False)
        coordinates, explained = principal_components(grams(matrix).standardised, 2)
        np.testing.assert_allclose(explained, values[:2] ** 2 / np.sum(values**2), rtol=1e-5)
        np.testing.assert_allclose(np.abs(coordinates), np.abs(left[:, :2] * values[:2]), rtol=1e-3, atol=1e-3)
        assert (coordinates[np.abs(coordinates).argmax(axis=0), [0, 1]] > 0).all()

    def test_neurons(self, matrix, rng):
        points = matrix.reshape(-1, WIDTH).astype(np.float64)
        points = points - points.mean(axis=0)
        values = np.linalg.svd(points, compute_uv=False)
        coordinates, explained = neuron_components(matrix, 1000, 3, rng)
        assert coordinates.shape == (EXPERTS, NEURONS, 3)
        np.testing.assert_allclose(explained, values[:3] ** 2 / np.sum(values**2), rtol=1e-6)
        np.testing.assert_allclose((coordinates**2).sum(axis=(0, 1)), values[:3] ** 2, rtol=1e-6)
        assert neuron_components(matrix, 20, 2, rng)[0].shape == (EXPERTS, 4, 2)


def write_mixtral(folder: Path, layers: int, experts: int, neurons: int, width: int, dtype: np.dtype) -> Path:
    """A sharded checkpoint of Mixtral's architecture, a shard for each layer, with few distinct numbers."""
    folder.mkdir()
    config = {
        "model_type": "mixtral", "vocab_size": 64, "hidden_size": width, "intermediate_size": neurons,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "num_local_experts": experts, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    block = rng.standard_normal(neurons * width + experts, dtype=np.float32).astype(dtype)

    def numbers(expert: int, *shape: int) -> np.ndarray:
        return block[expert : expert + neurons * width].reshape(shape)

    def small(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    index: dict[str, str] = {}
    heads = width // 4
    for layer in range(layers + 1):
        name = f"model-{layer + 1:05}-of-{layers + 1:05}.safetensors"
        if layer == layers:
            tensors = {
                "model.embed_tokens.weight": small(64, width), "lm_head.weight": small(64, width),
                "model.norm.weight": small(width),
            }  # fmt: skip
        else:
            prefix = f"model.layers.{layer}."
            tensors = {
                f"{prefix}input_layernorm.weight": small(width),
                f"{prefix}post_attention_layernorm.weight": small(width),
                f"{prefix}self_attn.q_proj.weight": small(width, width),
                f"{prefix}self_attn.k_proj.weight": small(2 * heads, width),
                f"{prefix}self_attn.v_proj.weight": small(2 * heads, width),
                f"{prefix}self_attn.o_proj.weight": small(width, width),
                f"{prefix}block_sparse_moe.gate.weight": small(experts, width),
            }
            for expert in range(experts):
                own = f"{prefix}block_sparse_moe.experts.{expert}."
                tensors |= {
                    f"{own}w1.weight": numbers(expert, neurons, width),
                    f"{own}w3.weight": numbers(expert, neurons, width),
                    f"{own}w2.weight": numbers(expert, width, neurons),
                }
        save_file(tensors, folder / name)
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


MEASURED = """
import sys
from griffin_jax.analysis.experts import weights
from griffin_jax.analysis.experts.checkpoint import StoredExperts
from griffin_jax.checkpoints.loading import open_source
from griffin_jax.utils import memory

stored = StoredExperts(open_source(sys.argv[1]))
before = memory.peak()
weights.analyse(stored, stored.layers, weights.Sampling(neurons=256, pairs=1))
print(before, memory.peak())
"""
"""Peaks of a process of its own, before weights are read and after."""


class TestCheckpoint:
    def test_matrices_are_the_tensors(self, tmp_path):
        experts, neurons, width = 4, 24, 16
        source = open_source(write_mixtral(tmp_path / "model", 2, experts, neurons, width, BFLOAT16))
        stored = StoredExperts(source)
        assert stored.layers == (0, 1)
        assert stored.kinds == ("up", "gate", "down")
        block = stored.matrix(1, "gate")[0].ravel()
        for kind in ("up", "gate", "down"):
            matrix = stored.matrix(1, kind)
            assert matrix.dtype == BFLOAT16
            assert matrix.shape == (experts, neurons, width)
            if kind != "down":
                np.testing.assert_array_equal(matrix[1].ravel()[:-1], block[1:])
            else:
                np.testing.assert_array_equal(matrix[0].T.ravel(), block)
        assert stored.router(0).shape == (experts, width)
        assert stored.router(0).dtype == np.float32

    def test_a_dense_model_has_none(self, tiny):
        with pytest.raises(ValueError, match="has no routed experts"):
            StoredExperts(open_source(tiny.folder))

    @pytest.mark.thorough
    def test_reading_takes_less_than_two_layers(self, tmp_path, monkeypatch):
        experts, neurons, width = 8, 256, 512
        layer = experts * 3 * neurons * width * 2
        monkeypatch.setattr(checkpoint, "BLOCK_BYTES", layer // 32)
        folder = write_mixtral(tmp_path / "model", 3, experts, neurons, width, BFLOAT16)
        stored = StoredExperts(open_source(folder))
        few = weights.Sampling(neurons=32, pairs=1)
        monkeypatch.setattr(weights, "NEURON_POINTS", 64)
        weights.analyse(stored, (0,), few)
        tracemalloc.start()
        try:
            found = weights.analyse(stored, stored.layers, few)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert found["layers"] == [0, 1, 2]
        # One matrix of all experts is a third.
        assert layer // 3 < peak < 2 * layer

    @pytest.mark.slow
    def test_mixtral_in_true_shape(self, tmp_path):
        """Two layers of Mixtral-8x7B, 5.6 GB on the disk, in a process whose memory is read from the system."""
        experts, neurons, width = 8, 14336, 4096
        layer = experts * 3 * neurons * width * 2
        folder = write_mixtral(tmp_path / "model", 2, experts, neurons, width, BFLOAT16)
        done = subprocess.run([sys.executable, "-c", MEASURED, folder], capture_output=True, text=True, check=True)
        before, peak = map(int, done.stdout.split())
        assert layer // 3 < peak - before < 2 * layer


class TestAll:
    def test_numbers_are_those_of_each_analysis(self, matrix, rng):
        router = rng.standard_normal((EXPERTS, WIDTH)).astype(np.float32)
        found = weights.analyse_matrix(matrix, router, weights.Sampling(pairs=100), np.random.default_rng(0))
        similarity = [[cosine(a, b) for a in matrix] for b in matrix]
        np.testing.assert_allclose(found["similarity"], similarity, rtol=1e-5, atol=1e-6)
        pairs = list(itertools.combinations(range(EXPERTS), 2))
        assert found["mean_similarity"] == pytest.approx(np.mean([similarity[a][b] for a, b in pairs]), rel=1e-5)
        means = matrix.mean(axis=1)
        x = [cosine(router[a], router[b]) for a, b in pairs]
        y = [cosine(means[a], means[b]) for a, b in pairs]
        assert found["router_r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, rel=1e-4)
        matched = [match(matrix[a], matrix[b], 99, rng) for a, b in pairs]
        assert found["matched_tau"] == pytest.approx(np.mean([one.tau for one in matched]))
        assert found["matched_after"] == pytest.approx(np.mean([one.after for one in matched]))

    @pytest.mark.thorough
    def test_random_experts(self):
        from griffin_jax.model.config import ModelConfig, Routing

        config = ModelConfig(
            family="mixtral", vocab_size=8, width=32, ff_width=64, num_layers=3, num_heads=4, num_kv_heads=2,
            head_dim=8, max_positions=16, routing=Routing(6, 2, 64),
        )  # fmt: skip
        random = RandomExperts(config, 0)
        found = weights.analyse(random, random.layers, weights.Sampling(neurons=64))
        for kind, deviation in (("up", 32**-0.5), ("gate", 32**-0.5), ("down", 64**-0.5)):
            assert random.matrix(0, kind).astype(np.float32).std() == pytest.approx(deviation, rel=0.02)
            (similar,), (tau,) = found[kind]["mean_similarity"], found[kind]["matched_tau"]
            assert abs(similar) < 0.02
            assert abs(tau) < 0.15
            (before,), (after,) = found[kind]["matched_before"], found[kind]["matched_after"]
            assert abs(before) < 0.1 < after
        assert json.dumps(weights.numbers_of(found), allow_nan=False)
        assert {f"{kind} similarity" for kind in random.kinds} <= weights.arrays_of(found).keys()
