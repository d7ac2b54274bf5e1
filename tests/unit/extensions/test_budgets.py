"""Sensitivity of neurons against torch's gradients, and shares of layers against all possible ones."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import load_torch, torch_intermediates

import griffin_jax as gj
from griffin_jax.checkpoints.verification import dense_logits
from griffin_jax.cli.main import main
from griffin_jax.evaluation.general_text import least_strength, measure, with_budgets
from griffin_jax.evaluation.grid import DEFAULTS, Variant, models
from griffin_jax.extensions.prior import between, share_out
from griffin_jax.extensions.sensitivity import sensitivity, squared_gradients
from griffin_jax.generation import jitted
from griffin_jax.griffin.config import density_that_keeps
from griffin_jax.model.assembly import assemble, disassemble, random_model
from griffin_jax.model.config import Routing

TEXTS = [list(range(start, start + 12)) for start in range(10, 90, 11)]


@pytest.fixture(scope="module")
def prior(tiny) -> gj.Prior:
    plain = measure(tiny.llm.model, TEXTS, size=4, rows=20, quiet=True)
    found = with_budgets(tiny.llm.model, plain, TEXTS, TEXTS[:2], size=2, quiet=True)
    # Whatever the trial said: these tests are of what follows from a sensitivity.
    return dataclasses.replace(found, strength=1.0, uniform="")


def torch_squared_gradients(model: Any, tokens: list[int], drawn: list[int]) -> list[np.ndarray]:
    """sum_t (||z_t|| dl/dz_tj)^2 for each layer, over the second half of the tokens."""
    torch, inputs = load_torch(), []

    def keep(_module: object, arguments: tuple[Any, ...]) -> None:
        arguments[0].retain_grad()
        inputs.append(arguments[0])

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(keep) for layer in model.model.layers]
    try:
        with torch.enable_grad():
            logits = model(torch.tensor([tokens])).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(drawn), reduction="none")
            losses[len(tokens) // 2 :].sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for z in inputs:
        assert z.grad is not None
        relative = z.norm(dim=-1, keepdim=True) * z.grad
        found.append((relative[0, len(tokens) // 2 :] ** 2).sum(dim=0).detach().numpy())
    return found


class TestSensitivity:
    def test_is_torchs_gradient(self, tiny):
        model, text = tiny.llm.model, TEXTS[0]
        tokens, lengths = map(jnp.asarray, gj.pad([text], 16))
        key = jax.random.key(3)
        drawn = np.asarray(jax.random.categorical(key, dense_logits(model, tokens)))[0, : len(text)]
        got, counts = squared_gradients(model, tokens, lengths, key)
        assert all((count == len(text) // 2).all() for count in counts)
        for layer, expected in zip(got, torch_squared_gradients(tiny.torch, text, drawn.tolist()), strict=True):
            assert expected.max() > 0
            np.testing.assert_allclose(layer, expected, rtol=1e-4, atol=1e-5 * expected.max())

    def test_is_a_mean_over_tokens(self, tiny):
        model = tiny.llm.model
        got = sensitivity(model, [TEXTS[0], [5], TEXTS[1]], seed=7, quiet=True)
        parts = [
            squared_gradients(model, *gj.pad([text], 16), jax.random.key(7 + number))[0]
            for number, text in enumerate(TEXTS[:2])
        ]
        for layer, *sums in zip(got, *parts, strict=True):
            np.testing.assert_allclose(layer, sum(sums) / 12, rtol=1e-5)

    def test_refused_without_tokens_that_count(self, tiny):
        with pytest.raises(ValueError, match="texts of at least two tokens"):
            sensitivity(tiny.llm.model, [[1], [2]])

    @pytest.mark.slow
    def test_within_experts_that_all_tokens_read(self, tiny):
        """A dense model whose neurons four experts share: gradients are the same, norms are each expert's own."""
        dense, text = tiny.llm.model, TEXTS[0]
        routing = Routing(4, 4, 12, scores="equal")
        config = dataclasses.replace(dense.config, routing=routing)
        arrays = {}
        for path, array in disassemble(dense):
            layer, ff, name = path.rpartition(".ff.")
            arrays[f"{layer}.ff.experts.{name}" if ff else path] = array.reshape(4, 12, -1) if ff else array
        arrays |= {f"layers.{layer}.ff.router": jnp.zeros((4, config.width)) for layer in range(config.num_layers)}
        model = assemble(config, arrays.items(), np.float32)
        tokens, lengths = map(jnp.asarray, gj.pad([text], 16))
        found, counts = squared_gradients(model, tokens, lengths, jax.random.key(3))
        dense_found, _ = squared_gradients(dense, tokens, lengths, jax.random.key(3))
        assert all((count == len(text) // 2).all() for count in counts)
        half = slice(len(text) // 2, len(text))
        for ours, whole, z in zip(found, dense_found, torch_intermediates(tiny.torch, text), strict=True):
            parts = z[half].reshape(len(text) // 2, 4, 12)
            least, most = (each(np.sum(parts**2, axis=-1), axis=0) for each in (np.min, np.max))
            share = np.sum(parts**2, axis=-1) / np.sum(z[half] ** 2, axis=-1, keepdims=True)
            assert (most > 1.1 * least).all()
            ratio = np.asarray(ours / whole).reshape(4, 12)
            # Each token's square of the gradient is multiplied by the expert's share of its norm.
            assert (ratio >= share.min(axis=0)[:, None] * 0.999).all()
            assert (ratio <= share.max(axis=0)[:, None] * 1.001).all()

    @pytest.mark.slow
    def test_of_the_tokens_that_chose_an_expert(self, tiny):
        config = dataclasses.replace(tiny.llm.config, routing=Routing(4, 1, 12, shared_width=6))
        model = random_model(config)
        tokens, lengths = map(jnp.asarray, gj.pad([TEXTS[0]], 16))
        found, counts = squared_gradients(model, tokens, lengths, jax.random.key(3))
        prefilled = jitted.prefill(model, tokens[:, :12], lengths, max_new_tokens=0)
        first = jitted.prefill(model, tokens[:, :6], lengths // 2, max_new_tokens=0)
        for squares, count, whole, before in zip(
            found, counts, prefilled.statistics.squares, first.statistics.squares, strict=True
        ):
            # A token adds one to the statistic of its expert.
            own = np.asarray(whole - before)[0, :48].reshape(4, 12).sum(axis=1)
            np.testing.assert_allclose(count, [*np.repeat(own, 12), *[6] * 6], atol=1e-4)
            assert ((np.asarray(squares) > 0) == (np.asarray(count) > 0.5)).all()


class TestShares:
    @pytest.mark.parametrize("round_to", [1, 2])
    def test_best_of_all(self, rng, round_to):
        losses = [rng.gamma(0.5, scale, 8) for scale in (1.0, 3.0, 0.2)]
        found = share_out(losses, (4, 4, 4), round_to=round_to)

        def lost(kept: tuple[int, ...]) -> float:
            return sum(np.sort(loss)[: len(loss) - k].sum() for loss, k in zip(losses, kept, strict=True))

        allowed = [range(round_to, 9, round_to)] * 3
        best = min((kept for kept in itertools.product(*allowed) if sum(kept) == 12), key=lost)
        assert sum(found) == 12
        assert lost(found) == pytest.approx(lost(best))
        assert lost(found) < lost((4, 4, 4))

    @pytest.mark.parametrize(("kept", "round_to"), [((8, 8), 4), ((5, 5), 2), ((8, 4), 4)])
    def test_all_neurons_or_no_multiples_stay(self, rng, kept, round_to):
        assert share_out([rng.random(8), rng.random(8)], kept, round_to=round_to) == kept

    def test_no_layer_is_left_without(self):
        assert share_out([np.ones(16), np.zeros(16)], (8, 8)) == (15, 1)

    def test_widths_that_are_no_multiple(self):
        """The rest of a layer behind its last whole block is not to be had."""
        assert share_out([np.ones(10), np.zeros(10)], (4, 4), round_to=4) == (4, 4)
        assert share_out([np.ones(14), np.zeros(14)], (8, 8), round_to=4) == (12, 4)

    @pytest.mark.parametrize(
        ("strength", "expected"), [(0.0, (8, 8, 8)), (0.25, (8, 8, 8)), (0.5, (12, 8, 4)), (1.0, (16, 4, 4))]
    )
    def test_between(self, strength, expected):
        """A quarter is 2.5, 1.75 and 1.75 blocks: the two largest remainders get what is left over."""
        assert between((8, 8, 8), (16, 4, 4), strength, round_to=4) == expected

    @pytest.mark.parametrize("width", [3, 7, 48, 1536, 13824])
    def test_a_density_for_every_number(self, width):
        for k in range(1, width + 1, max(1, width // 97)):
            assert gj.kept_neurons(width, density_that_keeps(k, width)) == k


class TestPrior:
    @pytest.mark.parametrize("density", [0.25, 0.5, 0.75])
    @pytest.mark.parametrize(
        ("round_to", "options"), [(1, {}), (4, {"round_to": 4}), (6, {"round_to": 2, "groups": 3})]
    )
    def test_the_sum_is_the_same(self, tiny, prior, density, round_to, options):
        neurons = tiny.llm.model.neurons
        config = gj.GriffinConfig(density, **options)
        budgeted = prior.budgeted(config)
        kept = budgeted.kept(neurons)
        assert sum(kept) == sum(config.kept(neurons))
        assert kept != config.kept(neurons)
        assert all(k % round_to == 0 for k in kept)
        losses = [
            np.asarray(s, float) * np.asarray(c, float) for s, c in zip(prior.squares, prior.sensitivity, strict=True)
        ]
        best = share_out(losses, config.kept(neurons), round_to=round_to)
        assert kept == best
        half = dataclasses.replace(prior, strength=0.5).budgeted(config).kept(neurons)
        assert half == between(config.kept(neurons), best, 0.5, round_to=round_to)
        assert sum(half) == sum(kept)

    @pytest.mark.parametrize("round_to", [1, 2])
    def test_experts_of_a_layer_keep_equally_many(self, rng, round_to):
        """The best of all shares; a layer without experts keeps that of the config."""
        ranges = ((6, 6, 12), (20,), (6, 6, 12), (6, 6, 12))
        squares, weights = (
            tuple(jnp.asarray(rng.gamma(0.5, 1 + 3 * n, sum(sizes)), jnp.float32) for n, sizes in enumerate(ranges))
            for _ in range(2)
        )
        prior = gj.Prior(squares, (), "m", 9, weights, strength=1.0, uniform="", ranges=ranges)
        shares = prior.budgeted(gj.GriffinConfig(0.5, round_to=round_to)).kept_of_ranges(ranges)

        def lost(kept: tuple[int, ...]) -> float:
            total = 0.0
            for layer, k in zip((0, 2, 3), kept, strict=True):
                parts = np.split(np.float64(squares[layer]) * weights[layer], (6, 12))
                total += sum(np.sort(part)[: len(part) - k * len(part) // 6].sum() for part in parts)
            return total

        # Half of six, rounded up.
        total, allowed = 3 * (3 if round_to == 1 else 4), [range(round_to, 7, round_to)] * 3
        best = min((kept for kept in itertools.product(*allowed) if sum(kept) == total), key=lost)
        assert [layer for layer in shares if len(layer) == 3] == [(k, k, 2 * k) for k in best]
        assert shares[1] == (10,)

    def test_ranges_of_other_sizes_are_divided_evenly_too(self, rng):
        """Shared experts of another width: a share that is whole groups of routed experts may be none of theirs."""
        ranges = ((12, 12, 8),) * 2
        squares, weights = (tuple(jnp.asarray(rng.random(32) + n, jnp.float32) for n in range(2)) for _ in range(2))
        prior = gj.Prior(squares, (), "m", 9, weights, strength=1.0, uniform="", ranges=ranges)
        shares = prior.budgeted(gj.GriffinConfig(0.5, groups=2)).kept_of_ranges(ranges)
        assert any(own[0] * 8 // 12 % 2 for own in shares)
        assert all(k % 2 == 0 for own in shares for k in own)

    def test_they_are_found_once_for_all_answers(self, prior, monkeypatch):
        config = gj.GriffinConfig(0.4375)
        first = prior.budgeted(config)
        monkeypatch.setattr("griffin_jax.extensions.prior.share_out", None)
        assert prior.budgeted(gj.GriffinConfig(0.4375)) is first

    def test_they_do_not_keep_the_prior(self, prior):
        copy = dataclasses.replace(prior)
        copy.budgeted(gj.GriffinConfig(0.5))
        kept = weakref.ref(copy)
        del copy
        gc.collect()
        assert kept() is None

    def test_not_used_where_they_do_not_pay(self, prior):
        config = gj.GriffinConfig(0.5)
        assert dataclasses.replace(prior, strength=0.0).budgeted(config) is config

    def test_refused_beside_densities_of_ones_own(self, prior):
        with pytest.raises(ValueError, match="one for each already"):
            prior.budgeted(gj.GriffinConfig((0.5, 0.25)))

    @pytest.mark.parametrize("best", [0.0, 0.25, 1.0])
    def test_a_trial_decides(self, tiny, monkeypatch, best):
        """The scores of the trial are made up: the further from the best strength, the worse."""
        plain = measure(tiny.llm.model, TEXTS, size=4, rows=20, quiet=True)

        def scored(_model, rows, _prefilled, answers, *rest):
            kl = 0.6 + abs(rest[-1].prior.strength - best)
            return [{row.name: {"kl": [kl]} for row in rows}] * len(answers)

        monkeypatch.setattr("griffin_jax.evaluation.general_text.score_answers", scored)
        found = with_budgets(tiny.llm.model, plain, TEXTS[:2], TEXTS[2:5], size=2, quiet=True)
        assert len(found.sensitivity) == 2
        assert found.strength == best
        # Three texts with answers of six tokens.
        assert found.uniform.startswith("KL was 0.100 nats per token" if not best else "")
        assert bool(found.uniform) == (not best)

    def test_a_lesser_strength_is_enough_if_it_is_not_clearly_worse(self):
        best = [1.0, 1.2, 0.8, 1.0]
        unclear = [1.3, 1.0, 1.1, 0.8]  # by 0.05, with a standard error of 0.14
        clear = [1.4, 1.5, 1.3, 1.35]  # by 0.39, with one of 0.04
        assert least_strength({0.0: clear, 0.25: unclear, 0.5: best, 1.0: unclear}) == 0.25
        assert least_strength({0.0: unclear, 0.25: clear, 0.5: best}) == 0.0
        assert least_strength({0.0: clear, 0.5: clear, 1.0: best}) == 1.0
        assert least_strength({0.0: [1.1], 0.5: [1.0]}) == 0.5

    def test_saved_and_loaded(self, prior, tmp_path):
        lost = dataclasses.replace(prior, strength=0.0, sensitivity=(), uniform="they lost")
        routed = dataclasses.replace(prior, ranges=((12, 36),) * 2)
        for saved in (prior, dataclasses.replace(prior, strength=0.25), lost, routed):
            saved.save(tmp_path / "p")
            again = gj.Prior.load(tmp_path / "p")
            assert (again.strength, again.uniform, again.ranges) == (saved.strength, saved.uniform, saved.ranges)
            assert len(again.sensitivity) == len(saved.sensitivity)
            for a, b in zip(saved.sensitivity, again.sensitivity, strict=True):
                np.testing.assert_array_equal(a, b)


class TestEvaluation:
    def test_rows_keep_their_shares(self, tiny, prior):
        model = tiny.llm.model
        tokens, lengths = map(jnp.asarray, gj.pad(TEXTS[:1], 16))
        prefilled = jitted.prefill(model, tokens, lengths, max_new_tokens=0)
        rows = [Variant("topk", 0.5), Variant("topk+budgets", 0.5), Variant("oracle+budgets", 0.25)]
        seeds, extensions = np.zeros(1, np.int32), dataclasses.replace(DEFAULTS, prior=prior)
        found = [
            pruned.neurons for _, pruned in models(model, rows, prefilled, prefilled.statistics, seeds, extensions)
        ]
        shares = [prior.budgeted(gj.GriffinConfig(density)).kept(model.neurons) for density in (0.5, 0.25)]
        assert found == [(24, 24), *shares]

    def test_summaries_are_not_refreshed(self, capsys, tmp_path):
        arguments = ["eval", "summarize", str(tmp_path / "t"), "--method", "topk+refresh"]
        assert main(arguments) == 2
        assert "evaluate divergence or perplexity" in capsys.readouterr().err


class TestGenerate:
    OPTIONS = {"max_new_tokens": 8, "ignore_eos": True}  # noqa: RUF012

    def test_layers_keep_their_shares(self, tiny, prior):
        kept = prior.budgeted(gj.GriffinConfig(0.5)).kept(tiny.llm.model.neurons)
        out = tiny.llm.generate(TEXTS[:2], prior=prior, budgets=True, **self.OPTIONS)
        assert out.kept == kept
        assert tiny.llm.experts(TEXTS[:2], prior=prior, budgets=True).kept == kept
        assert tiny.llm.generate(TEXTS[:2], prior=prior, **self.OPTIONS).kept != kept

    def test_best_is_all_steps(self, tiny, prior):
        best = tiny.llm.generate(TEXTS[:2], quality="best", prior=prior, **self.OPTIONS)
        steps = tiny.llm.generate(TEXTS[:2], prior=prior, budgets=True, refit=True, **self.OPTIONS)
        assert best.tokens == steps.tokens
        assert best.kept == steps.kept
        assert best.tokens != tiny.llm.generate(TEXTS[:2], **self.OPTIONS).tokens

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"quality": "best"}, "need a prior"),
            ({"budgets": True}, "need a prior"),
            ({"quality": "good"}, "quality must be one of griffin, best, got 'good'"),
        ],
    )
    def test_refused(self, tiny, options, message):
        with pytest.raises(ValueError, match=message):
            tiny.llm.generate(TEXTS[0], **options)
