"""Statistic, select and prune against NumPy, and their properties."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import oracle_squares, oracle_topk

import griffin_jax as gj
from griffin_jax.generation import jitted
from griffin_jax.model.assembly import disassemble


def statistics(squares: np.ndarray, tokens: list[int]) -> gj.Statistics:
    return gj.Statistics((jnp.asarray(squares, jnp.float32),), jnp.asarray(tokens, jnp.int32))


def choose(scores: np.ndarray, k: int, seed: int = 0, **options) -> np.ndarray:
    """Indices selected from one layer of scores s (not s^2)."""
    scores = np.atleast_2d(scores)
    config = gj.GriffinConfig(min(1.0, (k + 0.5) / scores.shape[1]), **options)
    return np.asarray(gj.select(statistics(scores**2, [9] * len(scores)), config, seed=seed)[0])


@pytest.fixture
def as_on_gpus(monkeypatch):
    """What is chosen for GPUs, on this machine."""

    def chosen_form(*operands, default, **others):
        return others.get("cuda", default)(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen_form)


class TestStatistic:
    def test_equals_the_equation(self, rng):
        z = rng.normal(size=(3, 11, 13)).astype(np.float32)
        got = gj.token_statistic(jnp.asarray(z), jnp.ones((3, 11), bool))
        np.testing.assert_allclose(got, [oracle_squares(row) for row in z], rtol=1e-5)

    def test_tokens_without_any_activation_count_nothing(self, rng):
        z = rng.normal(size=(1, 6, 5)).astype(np.float32)
        z[0, 2] = 0
        got = gj.token_statistic(jnp.asarray(z), jnp.ones((1, 6), bool))
        np.testing.assert_allclose(got[0], oracle_squares(z[0]), rtol=1e-5)
        np.testing.assert_allclose(got.sum(), 5, rtol=1e-6)

    def test_padding_counts_nothing_and_sum_is_the_number_of_tokens(self, rng):
        z = rng.normal(size=(2, 9, 7)).astype(np.float32)
        real = np.arange(9) < np.array([[4], [9]])
        got = np.asarray(gj.token_statistic(jnp.asarray(z), jnp.asarray(real)))
        np.testing.assert_allclose(got[0], oracle_squares(z[0, :4]), rtol=1e-5)
        np.testing.assert_allclose(got.sum(axis=1), [4, 9], rtol=1e-6)

    def test_scale_of_a_token_changes_nothing(self, rng):
        z = rng.normal(size=(1, 9, 7)).astype(np.float32)
        scaled = z * rng.uniform(0.01, 100, size=(1, 9, 1)).astype(np.float32)
        real = jnp.ones((1, 9), bool)
        np.testing.assert_allclose(
            gj.token_statistic(jnp.asarray(z), real), gj.token_statistic(jnp.asarray(scaled), real), rtol=1e-5
        )

    def test_narrow_intermediates_are_summed_in_float32(self, rng):
        z = jnp.asarray(rng.normal(size=(1, 2000, 4)), jnp.bfloat16)
        got = gj.token_statistic(z, jnp.ones((1, 2000), bool))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got[0], oracle_squares(np.asarray(z[0], np.float32)), rtol=1e-5)

    @pytest.mark.usefixtures("as_on_gpus")
    @pytest.mark.parametrize("tokens", [1, 15, 16, 50])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_as_gpus_sum_it(self, rng, tokens, dtype):
        z = jnp.asarray(rng.normal(size=(2, tokens, 7)), dtype).at[1, tokens // 2].set(0)
        real = np.arange(tokens) < np.array([[tokens - tokens // 3], [tokens]])
        got = gj.token_statistic(z, jnp.asarray(real))
        assert got.dtype == jnp.float32
        exact = np.asarray(z, np.float64)
        np.testing.assert_allclose(got, [oracle_squares(row[own]) for row, own in zip(exact, real, strict=True)], 1e-5)

    def test_additive_over_chunks(self, tiny, rng):
        tokens, lengths = rng.integers(0, 101, (2, 30)).astype(np.int32), np.array([30, 17], np.int32)
        whole = jitted.prefill(tiny.llm.model, tokens, lengths, max_new_tokens=0)
        chunked = jitted.prefill(tiny.llm.model, tokens, lengths, max_new_tokens=0, chunk=7)
        for a, b in zip(whole.statistics.squares, chunked.statistics.squares, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(a.sum(axis=1), lengths, rtol=1e-5)
        np.testing.assert_allclose(whole.logits, chunked.logits, rtol=1e-4, atol=1e-5)


class TestSelect:
    @pytest.mark.parametrize("method", ["topk", "sample", "topk_sample", "random"])
    @pytest.mark.parametrize("k", [1, 2, 7, 16, 17])
    @pytest.mark.parametrize("shared", [False, True])
    def test_exactly_k_different_neurons_in_order(self, rng, method, k, shared):
        got = choose(rng.uniform(size=(3, 17)), k, method=method, shared=shared)
        assert got.shape == ((k,) if shared else (3, k))
        assert (np.diff(got, axis=-1) > 0).all()
        assert got.min() >= 0
        assert got.max() < 17

    def test_topk_is_the_oracle(self, rng):
        scores = rng.uniform(size=(4, 50)).astype(np.float32)
        np.testing.assert_array_equal(choose(scores, 20), [oracle_topk(row, 20) for row in scores])

    def test_each_sequence_weighs_the_same_in_shared_experts(self, rng):
        scores, tokens = rng.uniform(size=(3, 40)).astype(np.float32), np.array([5, 50, 500])
        scores *= np.sqrt(tokens)[:, None]
        got = gj.select(statistics(scores**2, tokens.tolist()), gj.GriffinConfig(0.5, shared=True))
        expected = (np.sqrt(scores.astype(np.float64) ** 2) / np.sqrt(tokens)[:, None]).sum(axis=0)
        np.testing.assert_array_equal(got[0], oracle_topk(expected, 20))

    def test_ties_and_dead_neurons_still_give_k(self):
        scores = np.zeros((1, 10), np.float32)
        scores[0, 3] = 1
        for method in ("topk", "sample", "topk_sample"):
            got = choose(scores, 6, method=method)[0]
            assert len(set(got.tolist())) == 6
            assert 3 in got

    @pytest.mark.thorough
    @pytest.mark.usefixtures("as_on_gpus")
    def test_gpus_choose_the_same(self, rng):
        """Layers of several widths and densities with many ties, all tied, and with every kind of number."""
        scores = [rng.integers(0, 4, (3, width)).astype(np.float32) for width in (40, 24, 40)]
        scores.append(np.ones((3, 24), np.float32))
        scores.append(np.resize(np.float32([1, -1, 0, -0.0, np.inf, -np.inf, 1e-40, -1e-40, 3e38, 1]), (3, 40)))
        config = gj.GriffinConfig((0.5, 0.25, 0.3, 0.5, 0.6))
        # What is fused with the scores may be of any sign.
        given = gj.Statistics(tuple(jnp.ones_like(jnp.asarray(s)) for s in scores), jnp.full(3, 9))
        found = gj.select(given, config, fuse=lambda _: tuple(map(jnp.asarray, scores)))
        for got, layer, k in zip(found, scores, found.kept, strict=True):
            # As `jax.lax.top_k` has them, 0 comes before -0.
            np.testing.assert_array_equal(got, [np.sort(np.lexsort((np.signbit(row), -row))[:k]) for row in layer])

    @pytest.mark.usefixtures("as_on_gpus")
    def test_gpus_choose_the_same_in_groups(self, rng):
        scores = rng.integers(0, 3, (2, 40)).astype(np.float32)
        expected = [
            np.concatenate([20 * g + oracle_topk(row[20 * g : 20 * g + 20], 5) for g in (0, 1)]) for row in scores
        ]
        np.testing.assert_array_equal(choose(scores, 10, groups=2), expected)

    @pytest.mark.parametrize("k", [6, 7])
    def test_topk_sample_is_sure_of_the_better_half(self, rng, k):
        scores = rng.uniform(0.1, 1, size=40).astype(np.float32)
        seen = [set(choose(scores, k, method="topk_sample", seed=seed)[0].tolist()) for seed in range(30)]
        sure = set(oracle_topk(scores, k // 2).tolist())
        assert set.intersection(*seen) == sure
        assert len(set.union(*seen)) > 20

    @pytest.mark.thorough
    def test_sample_draws_in_proportion_to_the_statistic(self):
        scores = np.array([1, 2, 3, 4], np.float32)
        draws = np.array([choose(scores, 1, method="sample", seed=seed)[0, 0] for seed in range(600)])
        counts = np.bincount(draws, minlength=4)
        expected = 600 * scores / scores.sum()
        assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees, p = 0.001

    @pytest.mark.thorough
    def test_random_is_uniform_and_ignores_the_statistic(self):
        scores = np.array([1000, 1, 1, 1], np.float32)
        counts = np.bincount([choose(scores, 1, method="random", seed=s)[0, 0] for s in range(600)], minlength=4)
        assert ((counts - 150) ** 2 / 150).sum() < 16.3

    def test_seed_repeats_and_changes_the_draw(self, rng):
        scores = rng.uniform(size=100)
        first, again, other = (choose(scores, 50, method="random", seed=s) for s in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()

    def test_magnitude(self, tiny):
        ff = tiny.torch.model.layers[1].mlp
        expected = (ff.gate_proj.weight.norm(dim=1) * ff.up_proj.weight.norm(dim=1)).numpy()
        np.testing.assert_allclose(gj.magnitude(tiny.llm.model)[1], expected, rtol=1e-5)
        experts = tiny.llm.experts([[5, 6, 7], [8]], density=0.25, method="magnitude")
        np.testing.assert_array_equal(experts[1], [oracle_topk(expected, 12)] * 2)
        with pytest.raises(ValueError, match="pass the model"):
            gj.select(statistics(np.ones((1, 48)), [1]), gj.GriffinConfig(method="magnitude"))

    def test_one_density_per_layer(self, tiny):
        assert tiny.llm.experts([[5, 6, 7]], density=[0.25, 1.0]).kept == (12, 48)
        with pytest.raises(ValueError, match="3 densities for 2 layers"):
            tiny.llm.experts([[5]], density=[0.5, 0.5, 0.5])

    def test_usable_under_jit_and_vmap(self, rng):
        squares = jnp.asarray(rng.uniform(size=(4, 1, 30)), jnp.float32)
        config = gj.GriffinConfig(0.5)

        def pick(s):
            return gj.select(gj.Statistics((s,), jnp.ones((1,), jnp.int32)), config)[0]

        got = jax.jit(jax.vmap(pick))(squares)[:, 0]
        np.testing.assert_array_equal(got, [oracle_topk(row, 15) for row in np.asarray(squares[:, 0])])


class TestKeptNeurons:
    @pytest.mark.parametrize(
        ("width", "density", "round_to", "expected"),
        [
            (1536, 0.5, 1, 768), (100, 0.29, 1, 29), (7, 0.5, 1, 3), (10, 1, 1, 10), (1536, 0.3, 128, 512),
            (100, 0.99, 128, 100), (3, 0.34, 1, 1),
        ],
    )  # fmt: skip
    def test_floor_rounded_up_to_the_multiple(self, width, density, round_to, expected):
        assert gj.kept_neurons(width, density, round_to) == expected

    @pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), float("inf"), True, "0.5", None])
    def test_density_outside_its_range(self, density):
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
            gj.GriffinConfig(density)

    def test_keeping_nothing(self):
        with pytest.raises(ValueError, match="keeps 0 of 10 neurons"):
            gj.kept_neurons(10, 0.05)


class TestPrune:
    def test_rows_follow_their_neurons(self, tmp_path, rng):
        from reference import TinyLlama

        model = TinyLlama.build(tmp_path, mlp_bias=True).llm.model
        experts = gj.ExpertNeurons.from_indices([rng.permutation(48)[:20] for _ in range(2)], model.neurons)
        pruned = gj.prune(model, experts)
        whole, parts = dict(disassemble(model)), dict(disassemble(pruned))
        for layer, indices in enumerate(experts):
            for name in ("gate", "up", "down", "gate_bias", "up_bias"):
                path = f"layers.{layer}.ff.{name}"
                np.testing.assert_array_equal(parts[path], whole[path][indices])
            assert pruned.layers[layer].ff.down_bias[...] is model.layers[layer].ff.down_bias[...]
            assert pruned.layers[layer].attention.qkv[...] is model.layers[layer].attention.qkv[...]
        assert pruned.neurons == (20, 20)
        assert model.neurons == (48, 48)

    def test_is_masking(self, tiny, rng):
        """Gathered weights, shared or one set for every row, give what zeroing the other neurons gives."""
        model = tiny.llm.model
        ff = model.layers[0].ff
        x = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32)
        masks = rng.permuted(np.tile(np.arange(48) < 20, (2, 1)), axis=1)
        per_row = gj.prune(model, gj.ExpertNeurons.from_masks([masks] * 2)).layers[0].ff(x)
        np.testing.assert_allclose(per_row, ff.project(ff.intermediate(x) * masks[:, None]), rtol=1e-4, atol=1e-5)
        shared = gj.prune(model, gj.ExpertNeurons.from_masks([masks[0]] * 2)).layers[0].ff(x)
        np.testing.assert_allclose(shared, ff.project(ff.intermediate(x) * masks[:1, None]), rtol=1e-4, atol=1e-5)

    def test_refuses_experts_of_another_model(self, tiny):
        experts = gj.ExpertNeurons.from_indices([[1, 2]] * 3, (50, 50, 50))
        with pytest.raises(ValueError, match=r"50 neurons.*48 neurons"):
            gj.prune(tiny.llm.model, experts)

    def test_reuses_memory(self, tiny, rng):
        model = tiny.llm.model
        first, second = (
            gj.ExpertNeurons.from_indices([rng.permutation(48)[:20] for _ in range(2)], model.neurons) for _ in range(2)
        )
        expected = [np.asarray(array) for _, array in disassemble(gj.prune(model, second))]
        old = gj.prune(model, first)
        places = [layer.ff.gate_up[...].unsafe_buffer_pointer() for layer in old.layers]
        new = gj.prune(model, second, reuse=old)
        assert [layer.ff.gate_up[...].unsafe_buffer_pointer() for layer in new.layers] == places
        assert all(layer.ff.gate_up[...].is_deleted() for layer in old.layers)
        for array, (_, other) in zip(expected, disassemble(new), strict=True):
            np.testing.assert_array_equal(array, other)
        smaller = gj.prune(model, gj.ExpertNeurons.from_indices([[1, 2]] * 2, model.neurons), reuse=new)
        assert smaller.neurons == (2, 2)
        assert not new.layers[0].ff.gate_up[...].is_deleted()

    def test_does_not_take_the_models_own_memory(self, tiny):
        model = tiny.llm.model
        everything = gj.ExpertNeurons.from_indices([range(48)] * 2, model.neurons)
        with pytest.raises(ValueError, match="shares its weights"):
            gj.prune(model, everything, reuse=model)
        assert not model.layers[0].ff.down[...].is_deleted()


class TestExperts:
    def test_masks_and_back(self, rng):
        masks = [rng.permuted(np.tile(np.arange(9) < k, (2, 1)), axis=1) for k in (3, 4)]
        experts = gj.ExpertNeurons.from_masks(masks)
        assert experts.kept == (3, 4)
        assert not experts.shared
        for mask, back in zip(masks, experts.masks(), strict=True):
            np.testing.assert_array_equal(mask, back)

    def test_saved_and_loaded(self, tmp_path):
        experts = gj.ExpertNeurons.from_indices([[4, 1], [0, 2, 3]], (5, 6))
        experts.save(tmp_path / "e.safetensors")
        again = gj.ExpertNeurons.load(tmp_path / "e.safetensors")
        assert again.neurons == (5, 6)
        for a, b in zip(experts, again, strict=True):
            np.testing.assert_array_equal(a, b)
        assert [file.name for file in tmp_path.iterdir()] == ["e.safetensors"]
        with pytest.raises(OSError, match="cannot be written"):
            experts.save(tmp_path / "no folder" / "e.safetensors")

    def test_damaged_or_missing_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            gj.ExpertNeurons.load(tmp_path / "none")
        gj.ExpertNeurons.from_indices([[4, 1]], (5,)).save(tmp_path / "e")
        (tmp_path / "cut").write_bytes((tmp_path / "e").read_bytes()[:-3])
        with pytest.raises(ValueError, match="damaged"):
            gj.ExpertNeurons.load(tmp_path / "cut")

    @pytest.mark.parametrize(
        ("indices", "message"),
        [
            ([], "of 0 layers"), ([[1], [2]], "of 2 layers"), ([[5]], r"neurons are \[0, 4\]"), ([[-1]], "neurons are"),
            ([[1, 1]], "twice"), ([[0.5]], "whole numbers"), ([[]], "whole numbers"), ([[[[1]]]], "whole numbers"),
        ],
    )  # fmt: skip
    def test_bad_indices(self, indices, message):
        with pytest.raises(ValueError, match=message):
            gj.ExpertNeurons.from_indices([np.asarray(i) for i in indices], (5,))

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (np.ones(5), "must be boolean"),
            (np.array([[True, False], [True, True]]), "as many"),
            (np.zeros(5, bool), "K >= 1"),
        ],
    )
    def test_bad_masks(self, mask, message):
        with pytest.raises(ValueError, match=message):
            gj.ExpertNeurons.from_masks([mask])
