"""Reconstruction of the down projection against closed forms in float64, and what must change nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_and_slow
from reference import load_torch, oracle_positions, oracle_squares, oracle_topk, torch_intermediates

import griffin_jax as gj
from griffin_jax.generation import jitted
from griffin_jax.griffin.statistic import spread

PROMPTS = [[5, 6, 7], list(range(3, 40)), [9, 8, 7, 60, 61, 62, 63, 64, 65, 5]]
HALF = gj.GriffinConfig(0.5)


def oracle_rows(z: np.ndarray, rows: int) -> np.ndarray:
    """(T, F) -> relative activations of the chosen tokens in float64."""
    z = z[oracle_positions(len(z), rows)].astype(np.float64)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def oracle_change(
    rows: np.ndarray, down: np.ndarray, kept: np.ndarray, ridge: float, calibration: np.ndarray | None = None
) -> np.ndarray:
    """Delta, as the equation says: rows (S, F), down (F, D) -> (K, D) in float64."""
    others = np.setdiff1d(np.arange(down.shape[0]), kept)
    mu = ridge * np.mean(np.sum(rows[:, kept] ** 2, axis=1))
    if calibration is not None:
        rows = np.concatenate([rows, calibration])
    a, residuals = rows[:, kept], rows[:, others] @ down[others].astype(np.float64)
    return a.T @ np.linalg.solve(a @ a.T + mu * np.eye(len(a)), residuals)


def prefilled(model: gj.Transformer, prompts: list[list[int]], rows: int = 16, **options) -> gj.Prefilled:
    width = options.pop("width", max(map(len, prompts)))
    tokens, lengths = map(jnp.asarray, gj.pad(prompts, width))
    return jitted.prefill(model, tokens, lengths, max_new_tokens=0, rows=rows, **options)


def downs(model: gj.Transformer) -> list[np.ndarray]:
    return [np.asarray(layer.ff.down[...], np.float32) for layer in model.layers]


def changes(model: gj.Transformer, experts: gj.ExpertNeurons, reconstruction: gj.Reconstruction) -> list[np.ndarray]:
    """What reconstruction adds to the kept rows."""
    plain, refitted = gj.prune(model, experts), gj.prune(model, experts, refit=reconstruction)
    return [new - old for new, old in zip(downs(refitted), downs(plain), strict=True)]


class TestRows:
    @pytest.mark.parametrize("rows", [1, 7, 16, 64])
    def test_are_those_of_torch(self, tiny, rows):
        got = prefilled(tiny.llm.model, PROMPTS, rows).rows
        for index, prompt in enumerate(PROMPTS):
            for layer, z in zip(got, torch_intermediates(tiny.torch, prompt), strict=True):
                expected = oracle_rows(z, rows)
                assert layer.shape == (3, rows, 48)
                np.testing.assert_allclose(layer[index, : len(expected)], expected, rtol=1e-4, atol=1e-5)
                assert not np.any(layer[index, len(expected) :])

    @pytest.mark.parametrize("options", [{"chunk": 7}, {"chunk": 1}, {"width": 64}, {"collect": False}])
    def test_neither_chunks_nor_padding_change_them(self, tiny, options):
        plain, other = prefilled(tiny.llm.model, PROMPTS), prefilled(tiny.llm.model, PROMPTS, **options)
        for a, b in zip(plain.rows, other.rows, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert bool(other.statistics.squares) == options.get("collect", True)

    def test_are_not_kept_unless_asked_for(self, tiny):
        assert prefilled(tiny.llm.model, PROMPTS, rows=0).rows == ()

    @pytest.mark.parametrize("length", [1, 255, 256, 257, 1000, 1 << 20])
    def test_are_spread_evenly_over_any_length(self, length):
        got = np.asarray(spread(jnp.asarray([length]), 256))[0]
        np.testing.assert_array_equal(got[: min(length, 256)], oracle_positions(length, 256))
        assert (got[length:] == gj.EMPTY).all()


class TestChange:
    @pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
    @pytest.mark.parametrize("calibrated", [False, True])
    def test_each_sequence_has_its_closed_form(self, tiny, rng, ridge, calibrated):
        model = tiny.llm.model
        state = prefilled(model, PROMPTS)
        experts = gj.select(state.statistics, HALF)
        more = rng.normal(size=(2, 20, 48)) if calibrated else ()
        more = tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in more)
        calibration = tuple(jnp.asarray(x, jnp.float32) for x in more)
        got = changes(model, experts, gj.Reconstruction(state.rows, ridge, calibration, weight=0.3))
        for index, prompt in enumerate(PROMPTS):
            for layer, z in enumerate(torch_intermediates(tiny.torch, prompt)):
                kept = oracle_topk(oracle_squares(z), 24)
                np.testing.assert_array_equal(experts[layer][index], kept)
                weighted = np.sqrt(0.3) * more[layer] if calibrated else None
                expected = oracle_change(oracle_rows(z, 16), downs(model)[layer], kept, ridge, weighted)
                scale = np.abs(expected).max()
                np.testing.assert_allclose(got[layer][index], expected, rtol=1e-4, atol=2e-5 * scale)

    @pytest.mark.parametrize("one_set_for_three", [False, True])
    def test_shared_experts_are_fitted_to_all_sequences(self, tiny, one_set_for_three):
        model = tiny.llm.model
        state = prefilled(model, PROMPTS)
        experts = gj.select(state.statistics, gj.GriffinConfig(0.5, shared=True))
        if one_set_for_three:
            experts = gj.ExpertNeurons(tuple(indices[None] for indices in experts), experts.neurons)
        got = changes(model, experts, gj.Reconstruction(state.rows))
        z = [torch_intermediates(tiny.torch, prompt) for prompt in PROMPTS]
        for layer, indices in enumerate(experts):
            rows = np.concatenate([oracle_rows(sequence[layer], 16) for sequence in z])
            expected = oracle_change(rows, downs(model)[layer], np.asarray(indices).reshape(-1), 1.0)
            np.testing.assert_allclose(got[layer], expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())

    def test_residuals_of_the_prompt_shrink(self, tiny):
        """Of every column of every layer; with little ridge and fewer tokens than neurons, to almost nothing."""
        model, prompt = tiny.llm.model, PROMPTS[2]
        state = prefilled(model, [prompt])
        experts = gj.select(state.statistics, HALF)
        for layer, rows in enumerate(np.asarray(state.rows, np.float64)[:, 0]):
            down, kept = downs(model)[layer], np.asarray(experts[layer][0])
            target = rows @ down
            before = np.linalg.norm(target - rows[:, kept] @ down[kept], axis=0)
            for ridge, share in ((100.0, 1.0), (1.0, 1.0), (0.001, 0.02)):
                refitted = downs(gj.prune(model, experts, refit=gj.Reconstruction(state.rows, ridge)))[layer]
                after = np.linalg.norm(target - rows[:, kept] @ refitted, axis=0)
                assert (after < share * before).all()

    def test_nothing_changes_where_every_neuron_is_kept(self, tiny):
        state = prefilled(tiny.llm.model, PROMPTS)
        everything = gj.select(state.statistics, gj.GriffinConfig(1.0))
        assert not np.any(changes(tiny.llm.model, everything, gj.Reconstruction(state.rows)))

    def test_a_large_ridge_leaves_plain_griffin(self, tiny):
        state = prefilled(tiny.llm.model, PROMPTS)
        experts = gj.select(state.statistics, HALF)
        for change in changes(tiny.llm.model, experts, gj.Reconstruction(state.rows, 1e9)):
            assert np.abs(change).max() < 1e-7

    @pytest.mark.parametrize("rows", first_and_slow(1, 16, 64))
    def test_a_row_of_a_batch_is_the_row_alone(self, tiny, rows):
        """However much padding it has there."""
        model = tiny.llm.model
        state = prefilled(model, PROMPTS, rows)
        together = changes(model, gj.select(state.statistics, HALF), gj.Reconstruction(state.rows))
        for index, prompt in enumerate(PROMPTS):
            alone = prefilled(model, [prompt], rows)
            own = changes(model, gj.select(alone.statistics, HALF), gj.Reconstruction(alone.rows))
            for a, b in zip(together, own, strict=True):
                np.testing.assert_allclose(a[index], b, rtol=1e-3, atol=1e-5)

    def test_neurons_that_never_take_part_give_no_change(self, tiny):
        """Instead of a system that cannot be solved."""
        state = prefilled(tiny.llm.model, PROMPTS[:1])
        silent = tuple(rows.at[..., :24].set(0) for rows in state.rows)
        experts = gj.ExpertNeurons.from_indices([range(24)] * 2, tiny.llm.model.neurons)
        assert not np.any(changes(tiny.llm.model, experts, gj.Reconstruction(silent)))
        assert not np.any(changes(tiny.llm.model, experts, gj.Reconstruction(jax.tree.map(jnp.zeros_like, silent))))

    def test_plain_layers_keep_the_bias_behind_them(self, tmp_path):
        torch = load_torch()
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        config = GPTNeoXConfig(
            vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, initializer_range=0.3, attn_implementation="eager",
        )  # fmt: skip
        torch.manual_seed(0)
        reference = GPTNeoXForCausalLM(config).eval()
        for name, parameter in reference.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        reference.save_pretrained(tmp_path)
        model, prompt = gj.load(tmp_path, "float32").model, PROMPTS[2]
        state = prefilled(model, [prompt])
        experts = gj.select(state.statistics, HALF)
        pruned = gj.prune(model, experts, refit=gj.Reconstruction(state.rows))
        intermediates = torch_intermediates(reference, prompt, "mlp.dense_4h_to_h")
        for layer, (indices, z) in enumerate(zip(experts, intermediates, strict=True)):
            kept = np.asarray(indices[0])
            expected = downs(model)[layer][kept] + oracle_change(oracle_rows(z, 16), downs(model)[layer], kept, 1.0)
            np.testing.assert_allclose(downs(pruned)[layer], expected, rtol=1e-4, atol=1e-5)
            assert pruned.layers[layer].ff.down_bias[...] is model.layers[layer].ff.down_bias[...]
            assert pruned.layers[layer].ff.gate_up.shape == (1, 24, 32)


class TestSteps:
    def test_bfloat16(self, tiny):
        """Its residuals shrink as those of float32 do, up to what rounding adds."""
        narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), tiny.llm.model)
        state = prefilled(narrow, PROMPTS)
        assert state.rows[0].dtype == jnp.bfloat16
        experts = gj.select(state.statistics, HALF)
        refitted = gj.prune(narrow, experts, refit=gj.Reconstruction(state.rows))
        assert refitted.layers[0].ff.down.dtype == jnp.bfloat16
        for layer, down in enumerate(downs(narrow)):
            for index in range(3):
                kept, rows = np.asarray(experts[layer][index]), np.asarray(state.rows[layer][index], np.float64)
                expected = down[kept] + oracle_change(rows[np.any(rows, axis=1)], down, kept, 1.0)
                np.testing.assert_allclose(downs(refitted)[layer][index], expected, atol=2**-8 * np.abs(expected).max())

    def test_under_jit_and_into_reused_memory(self, tiny):
        model = tiny.llm.model
        state = prefilled(model, PROMPTS)
        experts = gj.select(state.statistics, HALF)
        reconstruction = gj.Reconstruction(state.rows, 0.5)
        expected = downs(gj.prune(model, experts, refit=reconstruction))

        @jax.jit
        def refit(
            model: gj.Transformer, experts: gj.ExpertNeurons, reconstruction: gj.Reconstruction
        ) -> gj.Transformer:
            return gj.prune(model, experts, refit=reconstruction)

        old = gj.prune(model, experts)
        places = [layer.ff.down[...].unsafe_buffer_pointer() for layer in old.layers]
        reused = gj.prune(model, experts, reuse=old, refit=reconstruction)
        assert [layer.ff.down[...].unsafe_buffer_pointer() for layer in reused.layers] == places
        for found in (refit(model, experts, reconstruction), reused):
            for a, b in zip(downs(found), expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    def test_decoding_is_the_same_program(self, tiny, compiled):
        """A refitted model after a plain one compiles nothing, for another ridge neither."""
        model = tiny.llm.model
        tokens, lengths = map(jnp.asarray, gj.pad(PROMPTS, 40))

        def answer(reconstruct: bool, ridge: float = 1.0) -> np.ndarray:
            state = jitted.prefill(model, tokens, lengths, max_new_tokens=24, rows=16)
            experts = jitted.select(state.statistics, HALF)
            reconstruction = gj.Reconstruction(state.rows, ridge) if reconstruct else None
            pruned = gj.prune(model, experts, refit=reconstruction)
            jax.block_until_ready(pruned)
            before = len(compiled)
            tokens_written = jitted.decode(pruned, jitted.init_decode(state), 24).tokens
            programs.append(len(compiled) - before)
            return np.asarray(tokens_written)

        programs: list[int] = []
        plain, refitted = answer(False), answer(True)
        before = len(compiled)
        answer(True, 3.0)
        assert len(compiled) == before
        assert programs[1:] == [0, 0]
        np.testing.assert_array_equal(plain[:, 0], refitted[:, 0])
        assert (plain != refitted).any()


class TestRefusals:
    @pytest.mark.parametrize(
        "options", [{"ridge": 0.0}, {"ridge": float("inf")}, {"ridge": float("nan")}, {"weight": -1.0}]
    )
    def test_values(self, options):
        with pytest.raises(ValueError, match="must be at least"):
            gj.Reconstruction((), **options)

    def test_rows_of_something_else(self, tiny):
        model = tiny.llm.model
        state = prefilled(model, PROMPTS)
        experts = gj.select(state.statistics, HALF)
        for reconstruction, message in (
            (gj.Reconstruction(()), "prefill with rows=N"),
            (gj.Reconstruction(state.rows[:1]), r"rows are of 1 layers .* the model has 2"),
            (gj.Reconstruction(tuple(r[..., :9] for r in state.rows)), r"\[9\] neurons, the model has 2 with \[48\]"),
            (gj.Reconstruction(state.rows, calibration=(jnp.ones((2, 9)),) * 2), r"calibration rows are of .*\[9\]"),
            (gj.Reconstruction(tuple(r[:2] for r in state.rows)), "rows are of 2 sequences, experts of 3"),
        ):
            with pytest.raises(ValueError, match=message):
                gj.prune(model, experts, refit=reconstruction)
