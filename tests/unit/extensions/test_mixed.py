"""Rows in two formats: what is pruned, what is masked, and what the rows stand for in float32 compute the same."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PASSAGES, first_and_slow
from flax import nnx
from reference import assert_close, oracle_topk

import griffin_jax as gj
from griffin_jax.cli.main import main
from griffin_jax.evaluation import front
from griffin_jax.evaluation.grid import DENSE, Variant
from griffin_jax.extensions.mixed import MixedFormat, MixedSizes, coarse, mask_mixed, prune_mixed, select_mixed
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation import jitted
from griffin_jax.llm.memory import Needs
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig, Routing
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.weights import Precision, WeightFormat, dequantise, quantise
from griffin_jax.parallel.mesh import make_mesh

GATED = ModelConfig(
    family="llama", vocab_size=101, width=32, ff_width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=256,
)  # fmt: skip
PLAIN = dataclasses.replace(GATED, gated=False, ff_bias=True, activation="xielu")
FINE = WeightFormat("int8")
MIXED = MixedFormat(FINE, WeightFormat.parse("int4:16"), 0.25)
FEW_ROW = 2 * 3 * (32 // 2 + 2 * 2)
"""Bytes of a neuron in int4:16, with float16 scales, twice: on a CPU each number of 4 bits is a byte in memory."""


@pytest.fixture(scope="module", params=first_and_slow(1, GATED, PLAIN), ids=["gated", "biases"])
def model(request) -> gj.Transformer:
    found = random_model(request.param, weights=MIXED.fine)
    for layer in found.layers:
        if layer.ff.down_bias is not None:
            layer.ff.down_bias[...] = jnp.linspace(-1, 1, 32)
    return found


@pytest.fixture(scope="module")
def prefilled(model) -> gj.Prefilled:
    prompts = jnp.asarray(np.random.default_rng(0).integers(3, 101, (2, 16)), jnp.int32)
    return jitted.prefill(model, prompts, jnp.asarray([16, 9]), max_new_tokens=8)


def test_a_layer_whose_neurons_are_all_precise_where_others_are_not_is_refused_before_anything_is_read(monkeypatch):
    """Rounded up, the precise ones are all that the first layer keeps."""
    llm = gj.LLM(random_model(GATED, weights=MIXED.fine))
    monkeypatch.setattr(jitted, "prefill", None)
    options = {"density": [8 / 48, 24 / 48], "round_to": 8, "max_new_tokens": 4, "ignore_eos": True}
    with pytest.raises(ValueError, match="rounded up to multiples of 8, all neurons that layer 0 keeps"):
        llm.generate([[5, 6, 7, 8]], mixed_weights="int4:16@0.7", **options)


@pytest.mark.parametrize("shared", [True, False])
def test_the_best_are_precise_and_the_next_are_not(prefilled, shared):
    config = gj.GriffinConfig(0.5, shared=shared)
    precise, others = select_mixed(prefilled.statistics, config, MIXED)
    assert precise is not None
    assert others is not None
    assert (precise.kept, others.kept) == ((6,) * 2, (18,) * 2)
    assert precise.shared == others.shared == shared
    kept = gj.select(prefilled.statistics, config)
    best = gj.select(prefilled.statistics, gj.GriffinConfig(0.125, shared=shared))
    for layer in range(2):
        both = np.concatenate([precise[layer], others[layer]], axis=-1)
        np.testing.assert_array_equal(np.sort(both, axis=-1), kept[layer])
        np.testing.assert_array_equal(precise[layer], best[layer])
    squares = np.asarray(prefilled.statistics.squares[0])
    if not shared:
        np.testing.assert_array_equal(precise[0][1], oracle_topk(squares[1], 6))


def wide(model: gj.Transformer, few: gj.Transformer, precise, others, row: int | None) -> gj.Transformer:
    """The model in float32, with the rows of each neuron as they stand in its format, and zeros for the rest."""
    found: gj.Transformer = jax.tree.map(lambda leaf: leaf, model)
    for number, (layer, rough) in enumerate(zip(found.layers, few.layers, strict=True)):
        ff, chosen = layer.ff, np.zeros(48, int)
        for experts, mark in ((precise, 1), (others, 2)):
            if experts is not None:
                indices = np.asarray(experts[number])
                chosen[indices if indices.ndim == 1 else indices[row]] = mark

        def pick(mine: jax.Array, other: jax.Array) -> jax.Array:
            of = chosen[:, None]  # noqa: B023
            return jnp.where(of == 1, mine, jnp.where(of == 2, other, 0))

        gate_up, down = (
            pick(ff.gate_up_matrix(), rough.ff.gate_up_matrix()),
            pick(ff.down_matrix(), rough.ff.down_matrix()),
        )
        ff.gate_up, ff.gate_up_scale, ff.down = nnx.Param(gate_up), None, nnx.Param(down)
        ff.down_scale = ff.down_row_scale = None
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("share", first_and_slow(1, 0.25, 0))
@pytest.mark.parametrize("density", first_and_slow(1, 0.5, 1.0))
@pytest.mark.parametrize("shared", first_and_slow(1, False, True))
def test_pruned_and_masked_are_what_the_rows_stand_for(model, prefilled, shared, density, share):
    few, mixed = coarse(model, MIXED.coarse), dataclasses.replace(MIXED, share=share)
    chosen = select_mixed(prefilled.statistics, gj.GriffinConfig(density, shared=shared), mixed)
    assert (chosen[0] is None) == (share == 0)
    answers = jnp.asarray(np.random.default_rng(1).integers(3, 101, (2, 5)), jnp.int32)
    lengths = jnp.asarray([5, 5])

    def hidden(of: gj.Transformer) -> np.ndarray:
        return np.asarray(jitted.teacher_force(of, prefilled, answers, lengths)[0])

    pruned = hidden(prune_mixed(model, few, *chosen))
    assert_close(hidden(mask_mixed(model, few, *chosen)), pruned)
    for row in range(2):
        assert_close(pruned[row], hidden(wide(model, few, *chosen, row))[row])


def test_it_decodes_and_its_memory_is_used_again(model, prefilled):
    few = coarse(model, MIXED.coarse)
    precise, others = select_mixed(prefilled.statistics, gj.GriffinConfig(0.5, shared=True), MIXED)

    def answer(pruned: gj.Transformer) -> list:
        read = jax.tree.map(jnp.copy, prefilled)
        return np.asarray(jitted.decode(pruned, jitted.init_decode(read), np.int32(8)).tokens).tolist()

    first = prune_mixed(model, few, precise, others)
    assert first.neurons == (24,) * 2
    tokens, old = answer(first), first.layers[0].ff.rest.down[...]
    second = prune_mixed(model, few, precise, others, reuse=first)
    assert old.is_deleted()
    assert answer(second) == tokens


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_on_a_mesh(shared):
    mesh = make_mesh(data=2, model=2)
    here, there = (random_model(GATED, weights=MIXED.fine, mesh=each) for each in (None, mesh))
    prompts = jnp.asarray(np.random.default_rng(0).integers(3, 101, (2, 16)), jnp.int32)
    config, found = gj.GriffinConfig(0.5, shared=shared, groups=2), []
    for model in (here, there):
        read = jitted.prefill(model, prompts, jnp.asarray([16, 9]), max_new_tokens=8)
        chosen, few = select_mixed(read.statistics, config, MIXED), coarse(model, MIXED.coarse)
        answers = prompts[:, :5], jnp.asarray([5, 5])
        for make in (prune_mixed, mask_mixed):
            found.append(np.asarray(jitted.teacher_force(make(model, few, *chosen), read, *answers)[0]))
    for other in found[1:]:
        assert_close(other, found[0])


def test_all_but_the_feed_forward_rows_are_the_models_own(model):
    few = coarse(model, WeightFormat.parse("int4"))
    assert np.abs(few.layers[0].ff.gate_up[...]).max() == 8
    assert few.layers[1].attention.out[...] is model.layers[1].attention.out[...]
    assert few.embedding[...] is model.embedding[...]
    assert model.layers[0].ff.gate_up[...].dtype == jnp.int8


def test_what_cannot_be_mixed(model, prefilled):
    few = coarse(model, MIXED.coarse)
    with pytest.raises(ValueError, match='by their rank, which method "topk" gives; method is'):
        select_mixed(prefilled.statistics, gj.GriffinConfig(0.5, "random"), MIXED)
    with pytest.raises(ValueError, match="at least one neuron"):
        prune_mixed(model, few, None, None)
    with pytest.raises(ValueError, match="groups of 24 do not divide"):
        coarse(model, WeightFormat.parse("int4:24"))
    chosen = select_mixed(prefilled.statistics, gj.GriffinConfig(0.5, shared=True), MIXED)
    pruned = prune_mixed(model, few, *chosen)
    with pytest.raises(ValueError, match="holds its neurons in two groups"):
        coarse(pruned)


def test_names():
    assert str(MIXED) == "int8+int4:16@0.25"
    assert MixedFormat.parse("int8+int4:16@0.25") == MIXED
    assert MixedFormat.parse("int8") == WeightFormat.parse("int8")
    assert MIXED.precise(gj.GriffinConfig((0.5, 0.25))).density == (0.125, 0.0625)
    # 35 of 1,000 neurons, although a tenth of 0.35 is less in float64.
    tenth = dataclasses.replace(MIXED, share=0.1).precise(gj.GriffinConfig(0.35))
    assert 0.1 * 0.35 < 0.035
    assert tenth.kept([1000]) == (35,)


class TestBytes:
    """Formats without a part: a density is one of bytes."""

    WIDE = dataclasses.replace(GATED, ff_width=4800)
    BY_BYTES = MixedFormat(FINE, WeightFormat.parse("int4:16"), None)

    @pytest.mark.parametrize(("density", "share", "kept"), [
        # int4:16 takes 5 bits: (density - 5/8) / (3/8) are precise, or density / (5/8) are kept.
        (0.9, 0.73, 1.0), (0.75, 0.33, 1.0), (0.63, 0.01, 1.0), (0.625, 0.0, 1.0), (0.5, 0.0, 0.8), (0.25, 0.0, 0.4),
    ])  # fmt: skip
    def test_by_hand(self, density, share, kept):
        assert self.BY_BYTES.at(density) == (dataclasses.replace(MIXED, share=share), kept)

    def test_a_part_that_is_given_and_all_bytes(self):
        assert MIXED.at(0.5) == (MIXED, 0.5)
        assert MIXED.at((0.5, 0.25)) == (MIXED, (0.5, 0.25))
        assert self.BY_BYTES.at(1) == (FINE, 1.0)

    @pytest.mark.parametrize("text", ["int8+int4", "int8+int4:64", "int8:32+int4", "bfloat16+int8", "bfloat16+int4"])
    @pytest.mark.parametrize("density", [0.95, 0.75, 0.5, 0.35, 0.25, 0.1])
    def test_no_more_is_read_and_hardly_less(self, text, density):
        """But for the scales of whole rows, which are no part of `bits`: 4 bytes for 512 numbers here."""
        by_bytes, width = MixedFormat.parse(text), dataclasses.replace(self.WIDE, width=512)

        def read(weights: MixedFormat | WeightFormat) -> int:
            dense = front.bytes_per_token(width, np.dtype("bfloat16"), by_bytes.fine, 1, Variant(DENSE, 1.0))
            return dense - front.bytes_per_token(width, np.dtype("bfloat16"), weights, 1, Variant("topk", density))

        every = read(by_bytes.fine) / (1 - density)
        assert -0.005 * every < read(by_bytes) - read(by_bytes.fine) < 0.012 * every

    def test_a_part_that_is_whole_stays_so(self):
        """Half of the bytes pay for eight ninths of the neurons, which are 12,288 of 13,824."""
        _, density = MixedFormat.parse("int8+int4").at(0.5)
        assert gj.GriffinConfig(density).kept([13_824, 9]) == (12_288, 8)

    def test_what_has_no_bytes_to_spare(self):
        with pytest.raises(ValueError, match="int8:2 takes 16 bits and int4:16 5: the second format needs fewer"):
            MixedFormat.parse("int4:16+int8:2")
        with pytest.raises(ValueError, match="a density of bytes is one for all layers, and there are 2"):
            self.BY_BYTES.at((0.5, 0.25))
        with pytest.raises(ValueError, match="how many neurons of int8\\+int4:16 are precise depends on the density"):
            self.BY_BYTES.precise(gj.GriffinConfig(0.5))

    def test_all_neurons_in_few_bits_are_not_copied(self, model, prefilled):
        few, (mixed, kept) = coarse(model, self.BY_BYTES.coarse), self.BY_BYTES.at(0.625)
        chosen = select_mixed(prefilled.statistics, gj.GriffinConfig(kept), mixed)
        assert prune_mixed(model, few, *chosen) is few
        assert mask_mixed(model, few, *chosen) is few

    @pytest.mark.thorough
    def test_rows_of_one_format_are_refitted(self, model):
        """As those of a model that has no others."""
        prompts = jnp.asarray(np.random.default_rng(0).integers(3, 101, (1, 16)), jnp.int32)
        read = jitted.prefill(model, prompts, jnp.asarray([16]), max_new_tokens=8, rows=8)
        few, (mixed, kept) = coarse(model, self.BY_BYTES.coarse), self.BY_BYTES.at(0.5)
        pruner = Pruner(gj.GriffinConfig(kept), rows=8)
        answers = prompts[:, :5], jnp.asarray([5])
        experts = gj.select(read.statistics, pruner.config)
        expected = gj.prune(few, experts, refit=pruner.refit(read.rows))
        found = pruner.mix(model, few, mixed, read.statistics, read.rows)
        hidden = [np.asarray(jitted.teacher_force(each, read, *answers)[0]) for each in (found, expected)]
        assert_close(*hidden)
        masked = pruner.mix(model, few, mixed, read.statistics, read.rows, masked=True)
        for ff, layer in zip((layer.ff for layer in found.layers), masked.layers, strict=True):
            added = sum(
                np.einsum("...sf,...sd->...fd", change.left, change.right).reshape(48, 32)
                for change in layer.ff.mask.changes
            )
            kept_rows = (layer.ff.down_matrix() + added)[np.asarray(layer.ff.mask.kept).reshape(48)]
            rounded = dequantise(*quantise(jnp.asarray(kept_rows), self.BY_BYTES.coarse))
            np.testing.assert_allclose(np.squeeze(ff.down_matrix()), rounded, atol=1e-5)
        with pytest.raises(ValueError, match="rows in two formats are not refitted"):
            prune_mixed(model, few, experts, experts, refit=pruner.refit(read.rows))


@pytest.mark.parametrize(("batch", "density", "share", "copied"), [
    (1, 0.5, 0.25, (6, 18)), (4, 0.5, 0.25, (24, 72)), (5, 0.5, 0.25, None), (1, 1.0, 0, (0, 0)), (2, 1.0, 0, None),
])  # fmt: skip
def test_bytes_of_the_kept_rows(batch, density, share, copied):
    """Of 48 neurons in each of two layers: 104 bytes of one in int8, 60 in int4:16. Masked, a step reads all."""

    def sizes(weights: WeightFormat) -> Sizes:
        return Sizes(GATED, batch, 8, Precision.of("float32", weights), shared=False, refitted=True)

    formats = dataclasses.replace(MIXED, share=share)
    found = MixedSizes(formats, gj.GriffinConfig(density), GATED.neuron_ranges, sizes)
    assert found.masked == (copied is None)
    fine, few = copied or (0, 0)
    assert found.copied == (2 * fine * 104, 2 * few * 60)
    read = 2 * 48 * (60 if share == 0 else 164) if found.masked or density == 1 else sum(found.copied)
    assert found.step == sizes(FINE).step([0, 0]) + read


def test_routed_sequences_read_all_experts_of_the_one_format():
    routing = Routing(4, 2, 24)
    config = dataclasses.replace(GATED, family="mixtral", ff_width=96, routing=routing)

    def sizes(weights: WeightFormat) -> Sizes:
        return Sizes(config, 2, 8, Precision.of("float32", weights), shared=False, refitted=True)

    few = dataclasses.replace(MIXED, share=0)
    found = MixedSizes(few, gj.GriffinConfig(0.5), config.neuron_ranges, sizes)
    assert found.masked
    fine, rough = sizes(MIXED.fine), sizes(MIXED.coarse)
    assert found.step == fine.step(None) - fine.read(None) + rough.read(None)


class TestAnswers:
    """`mixed_weights` of `LLM.generate`."""

    OPTIONS = {"max_new_tokens": 8, "ignore_eos": True, "mixed_weights": "int4:16@0.25"}  # noqa: RUF012
    PROMPTS = [list(range(3, 19)), [9, 5, 70, 11]]  # noqa: RUF012

    @pytest.mark.parametrize("shared", [True, False])
    @pytest.mark.parametrize("density", first_and_slow(1, 0.5, 1.0))
    def test_they_are_those_of_the_four_steps(self, model, density, shared):
        config = gj.GriffinConfig(density, shared=shared)
        prefilled = jitted.prefill(model, *gj.pad(self.PROMPTS, 16), max_new_tokens=8)
        chosen = select_mixed(prefilled.statistics, config, MIXED)
        pruned = prune_mixed(model, coarse(model, MIXED.coarse), *chosen)
        expected = np.asarray(jitted.decode(pruned, jitted.init_decode(prefilled), np.int32(8)).tokens).tolist()
        llm = gj.LLM(model)
        out = llm.generate(self.PROMPTS, griffin=config, **self.OPTIONS)
        assert out.tokens == expected
        assert out.kept == ((24 if density < 1 else 48),) * 2
        few = llm._few
        assert llm.generate(self.PROMPTS, griffin=config, **self.OPTIONS).tokens == expected
        assert llm._few is few is not None

    @pytest.mark.parametrize(("density", "same", "kept"), [(0.75, "int4:16@0.33", 48), (0.5, "int4:16@0", 38)])
    def test_a_density_of_bytes(self, model, density, same, kept):
        llm, options = gj.LLM(model), self.OPTIONS | {"mixed_weights": "int4:16"}
        out = llm.generate(self.PROMPTS, density=density, **options)
        of_neurons = {0.75: 1.0, 0.5: 0.8}[density]
        expected = llm.generate(self.PROMPTS, density=of_neurons, **self.OPTIONS | {"mixed_weights": same})
        assert out.tokens == expected.tokens
        assert out.kept == (kept,) * 2
        assert llm.generate(self.PROMPTS, density=1, **options).tokens == llm.generate(
            self.PROMPTS, density=1, max_new_tokens=8, ignore_eos=True
        ).tokens  # fmt: skip

    def test_experts_are_those_that_are_kept(self, model):
        llm, options = gj.LLM(model), {"density": 0.5, "mixed_weights": "int4:16"}
        kept = llm.generate(self.PROMPTS, max_new_tokens=8, **options).experts
        assert kept is not None
        for found, expected in zip(llm.experts(self.PROMPTS, **options), kept, strict=True):
            np.testing.assert_array_equal(found, expected)

    def test_another_thread_may_want_another_format(self, model, monkeypatch):
        """What it has made meanwhile is not taken for the rows of this answer."""
        expected = gj.LLM(model).generate(self.PROMPTS, density=0.5, **self.OPTIONS).tokens
        llm = gj.LLM(model)
        select, other = llm._select, WeightFormat("int4", 8)

        def meanwhile(*arguments):
            llm._few = other, coarse(model, other)
            return select(*arguments)

        monkeypatch.setattr(llm, "_select", meanwhile)
        assert llm.generate(self.PROMPTS, density=0.5, **self.OPTIONS).tokens == expected
        assert llm._few is not None
        assert llm._few[0] == MIXED.coarse

    def test_rows_in_few_bits_are_no_memory_for_another_answer(self, model):
        """With all neurons in few bits the answer's model is what the next such answer needs, too."""
        llm, options = gj.LLM(model), self.OPTIONS | {"mixed_weights": "int4:16"}
        first = llm.generate(self.PROMPTS[:1], density=0.625, **options)
        assert llm._spare is None
        assert llm.generate(self.PROMPTS[:1], density=0.625, **options).tokens == first.tokens

    @pytest.mark.parametrize(("density", "rows"), [(0.75, 0), (0.5, 8)])
    def test_rows_are_kept_for_a_refit_where_there_is_one(self, model, monkeypatch, density, rows):
        asked, prefill = [], jitted.prefill
        monkeypatch.setattr(
            "griffin_jax.llm.llm.jitted.prefill", lambda *a, **k: (asked.append(k["rows"]), prefill(*a, **k))[1]
        )
        options = self.OPTIONS | {"mixed_weights": "int4:16", "refit": 8}
        assert len(gj.LLM(model).generate(self.PROMPTS, density=density, **options).tokens[0]) == 8
        assert asked == [rows]

    def test_another_format_is_made_anew_and_none_is_the_models(self, model):
        llm = gj.LLM(model)
        plain = llm.generate(self.PROMPTS, density=0.5, max_new_tokens=8, ignore_eos=True).tokens
        assert llm._few is None
        llm.generate(self.PROMPTS, density=0.5, **self.OPTIONS)
        fine = llm.generate(self.PROMPTS, density=0.5, **self.OPTIONS | {"mixed_weights": "int8:16@0.25"})
        assert llm._few is not None
        assert llm._few[0] == WeightFormat.parse("int8:16")
        assert len(fine.tokens) == 2
        assert llm.generate(self.PROMPTS, density=0.5, max_new_tokens=8, ignore_eos=True).tokens == plain

    def test_their_memory_is_asked_for(self, monkeypatch):
        llm = gj.LLM(random_model(GATED, weights=MIXED.fine))
        asked = []
        monkeypatch.setattr("griffin_jax.llm.llm.memory.check", lambda parts, *_: asked.append(parts))
        for _ in range(2):
            llm.generate([self.PROMPTS[0]], density=0.5, **self.OPTIONS)
        first, second = asked
        assert first["neurons in fewer bits"] == 2 * 48 * FEW_ROW
        assert "neurons in fewer bits" not in second

    @pytest.mark.parametrize(("batch", "shared", "sets"), [(1, False, 1), (2, False, 2), (5, False, 0), (5, True, 1)])
    def test_memory_of_kept_rows_in_two_formats(self, batch, shared, sets):
        """Half of the neurons, a quarter of them precise: a byte for each number, and float32 scales of gate and up.
        Five sequences would need more copies than there are rows."""
        deep = dataclasses.replace(GATED, num_layers=24, ff_width=480)
        needs = Needs(deep, Precision.of("float32", FINE), loaded=True)
        kept, few = [240] * 24, (MIXED, gj.GriffinConfig(0.5))
        asked = needs.generation(batch, 16, 8, kept, shared=shared, mixed=few, mixed_is_there=True)
        assert asked.get("kept neurons", 0) == sets * 24 * (60 * (3 * 32 + 2 * 4) + 180 * FEW_ROW)

    @pytest.mark.thorough
    @pytest.mark.parametrize(
        ("batch", "masked"), [(4, False), (5, True), pytest.param(1, False, marks=pytest.mark.slow)]
    )
    def test_several_sequences_are_masked_where_copies_are_as_large(self, model, batch, masked):
        """Half of the neurons, a quarter of them in 8 bits and others in 5: of 13 bits 4 sequences read 11.5, 5 14."""
        prompts = jnp.asarray(np.random.default_rng(2).integers(3, 101, (batch, 16)), jnp.int32)
        prompt = jitted.prefill(model, prompts, jnp.full(batch, 16), max_new_tokens=8)
        few, answers = coarse(model, MIXED.coarse), prompts[:, :5]

        def hidden(of: gj.Transformer) -> np.ndarray:
            return np.asarray(jitted.teacher_force(of, prompt, answers, jnp.full(batch, 5))[0])

        mixed = Pruner(gj.GriffinConfig(0.5)).mix(model, few, MIXED, prompt.statistics)
        assert (mixed.layers[0].ff.mask is not None) == masked
        chosen = select_mixed(prompt.statistics, gj.GriffinConfig(0.5), MIXED)
        assert_close(hidden(mixed), hidden(prune_mixed(model, few, *chosen)))

    def test_a_prior_has_a_say(self, model):
        draw = np.random.default_rng(3)
        squares = tuple(jnp.asarray(draw.random(48), jnp.float32) for _ in range(2))
        prior = gj.Prior(squares, (), fingerprint(model), 8)
        llm = gj.LLM(model)
        out = llm.generate([self.PROMPTS[0]], density=0.5, prior=prior, prior_weight=1.0, **self.OPTIONS)
        assert out.experts is not None
        for layer, square in zip(out.experts, squares, strict=True):
            np.testing.assert_array_equal(np.asarray(layer).ravel(), oracle_topk(np.asarray(square), 24))

    @pytest.mark.parametrize(("options", "message"), [
        ({"mixed_weights": "int4@all"}, "mixed_weights are 'int4@all'; the first format is the model's"),
        ({"mixed_weights": "int4@"}, "mixed_weights are 'int4@'; the first format is the model's"),
        ({"mixed_weights": "int8"}, "int8 takes 8 bits and int8 8: the second format needs fewer bits"),
        ({"mixed_weights": "int4:16", "density": (0.5, 0.25)}, "a density of bytes is one for all layers"),
        ({"mixed_weights": "bfloat16@0.5"}, "the second format is one of integers"),
        ({"mixed_weights": 4}, "mixed_weights are 4; the first format is the model's"),
        ({"refit": True}, "rows in two formats are not refitted"),
        ({"speculative": True}, "mixed_weights do not go with speculative"),
        ({"refresh_every": 4}, "mixed_weights do not go with refresh_every"),
        ({"method": "random"}, 'by their rank, which method "topk" gives; method is'),
        ({"mixed_weights": "int4:24@0.5"}, "groups of 24 do not divide"),
    ])  # fmt: skip
    def test_what_they_do_not_go_with(self, model, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            gj.LLM(model).generate([self.PROMPTS[0]], **{"density": 0.5} | self.OPTIONS | options)

    def test_given_neurons_and_one_copy(self):
        llm = gj.LLM(random_model(GATED, weights=MIXED.fine))
        experts = llm.experts([self.PROMPTS[0]], density=0.5)
        with pytest.raises(ValueError, match="experts do not say which neurons have more bits"):
            llm.generate([self.PROMPTS[0]], experts=experts, **self.OPTIONS)
        with pytest.raises(ValueError, match="mixed_weights=None"):
            gj.LLM(random_model(GATED), in_place=True).generate([self.PROMPTS[0]], density=0.5, **self.OPTIONS)

    def test_of_the_command_line(self, worded, capsys):
        options = ("--density", "0.5", "--max-new-tokens", "6", "--ignore-eos", "--prompt", PASSAGES[0], "--json")
        assert main(["generate", "--model", str(worded.folder), "--mixed-weights", "int4@0.25", *options]) == 0
        tokens = json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]
        expected = worded.llm.generate(
            PASSAGES[0], density=0.5, max_new_tokens=6, ignore_eos=True, mixed_weights="int4@0.25"
        )
        assert tokens == expected.tokens[0]

    @pytest.mark.slow
    def test_on_a_mesh(self):
        mesh = make_mesh(data=2, model=2)
        here, there = (gj.LLM(random_model(GATED, weights=FINE, mesh=each)) for each in (None, mesh))
        options = self.OPTIONS | {"density": 0.5, "groups": 2}
        assert there.generate(self.PROMPTS, **options).tokens == here.generate(self.PROMPTS, **options).tokens
