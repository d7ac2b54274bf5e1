"""Layers with routed experts: the router, products of tokens with the matrices of their experts, and whole layers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hlo_reads import looked_up
from reference import unchecked

import griffin_jax as gj
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation import jitted
from griffin_jax.griffin.select import magnitude
from griffin_jax.model import grouped
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig, Routing
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.grouped import linear_of_experts, matmul_of_experts
from griffin_jax.model.parameters import array_of
from griffin_jax.model.products import DOTS_NEED_FLOATS
from griffin_jax.model.routed import RoutedFeedForward, choose
from griffin_jax.model.sharding import check_mesh, neuron_groups
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.weights import Precision, WeightFormat, dequantise, floating_rows, quantise
from griffin_jax.parallel.mesh import make_mesh
from griffin_jax.training.data import Batch
from griffin_jax.training.loss import next_token_loss

EXPERTS, ROWS, NEURONS, WIDTH = 6, 2, 40, 32
FORMATS = ("float32", "bfloat16", "int8", "int8:16", "int4:16")


@pytest.fixture
def few_tokens_a_block(monkeypatch):
    """Several blocks for some experts, and some that are not full."""
    monkeypatch.setattr(grouped, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(grouped, "CPU_BLOCKS", (1, 4))


def stored(rng, shape, text, outputs):
    """A random matrix in a format, its scales, and the numbers that both stand for."""
    matrix = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    weights = WeightFormat.parse(text)
    if not weights.quantised:
        numbers = matrix.astype(weights.dtype)
        return numbers, None, np.asarray(numbers, np.float64)
    numbers, scale = quantise(matrix, weights, outputs)
    if outputs == "first" or weights.group is not None:
        exact = dequantise(numbers, scale)
    else:
        exact = numbers.astype(jnp.float32) * scale[:, None]
    return numbers, scale, np.asarray(exact, np.float64)


def cases():
    """Tokens and choices: one token, some, many; an expert that nobody chose, and one that all did."""
    rng = np.random.default_rng(1)
    yield (1, 1), np.asarray([[[4, 0]]])
    yield (1, 3), rng.permuted(np.tile(np.arange(EXPERTS), (1, 3, 1)), axis=-1)[..., :2]
    many = rng.permuted(np.tile(np.arange(EXPERTS - 1), (2, 9, 1)), axis=-1)[..., :3]
    many[..., 0] = 2
    many[..., 1] = np.where(many[..., 1] == 2, EXPERTS - 2, many[..., 1])
    many[..., 2] = np.where(many[..., 2] == 2, 0, many[..., 2])
    yield (2, 9), many


@pytest.mark.usefixtures("few_tokens_a_block")
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("case", range(3))
class TestProducts:
    def test_linear(self, text, case, rng):
        shape, chosen = list(cases())[case]
        numbers, scale, exact = stored(rng, (EXPERTS, ROWS, NEURONS, WIDTH), text, "first")
        x = rng.standard_normal((*shape, WIDTH)).astype(np.float32)
        got = jax.jit(linear_of_experts)(x, jnp.asarray(chosen, jnp.int32), numbers, scale)
        want = np.einsum("btd,btkafd->btkaf", x.astype(np.float64), exact[chosen])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())

    def test_matmul(self, text, case, rng):
        shape, chosen = list(cases())[case]
        numbers, scale, exact = stored(rng, (EXPERTS, NEURONS, WIDTH), text, "last_of_each")
        of_rows = WeightFormat.parse(text).group is not None
        z = rng.standard_normal((*shape, chosen.shape[-1], NEURONS)).astype(np.float32)
        scales = (None, scale) if of_rows else (scale, None)
        got = jax.jit(matmul_of_experts)(z, jnp.asarray(chosen, jnp.int32), numbers, *scales)
        want = np.einsum("btkf,btkfd->btd", z.astype(np.float64), exact[chosen])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("branches", [EXPERTS, EXPERTS - 1])
@pytest.mark.parametrize("block", [10, 1 << 20], ids=["many blocks", "few"])
def test_long_vectors_of_few_pairs(text, branches, block, rng, monkeypatch):
    """Too long for one product on CPUs: in two parts, each with blocks of rows of which the last ones overlap."""
    monkeypatch.setattr("griffin_jax.model.products.FUSED_BYTES", 4 * WIDTH // 2 + 1)
    monkeypatch.setattr("griffin_jax.model.products.PASS_BYTES", block * WIDTH)
    monkeypatch.setattr(grouped, "MOST_BRANCHES", branches)
    TestProducts().test_linear(text, 1, rng)
    TestProducts().test_matmul(text, 1, rng)
    if block == 10:
        numbers, scale, exact = stored(rng, (EXPERTS, ROWS, NEURONS - 3, WIDTH), text, "first")
        x = rng.standard_normal((1, 1, WIDTH)).astype(np.float32)
        got = jax.jit(linear_of_experts)(x, jnp.asarray([[[3]]]), numbers, scale)
        want = np.einsum("btd,afd->btaf", x.astype(np.float64), exact[3])[:, :, None]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.skipif(DOTS_NEED_FLOATS, reason="this jax needs blocks of rows in memory")
@pytest.mark.parametrize("text", ["float32", "bfloat16", "int8"])
def test_matrices_that_a_long_vector_chooses_are_not_copied(text, rng):
    """Nor converted in memory, on CPUs: neither those of all experts nor one of them."""
    numbers, scale, _ = stored(rng, (4, ROWS, NEURONS, 8192), text, "first")
    x, chosen = jnp.zeros((1, 1, 8192)), jnp.asarray([[[3, 1]]])
    program = jax.jit(linear_of_experts).lower(x, chosen, numbers, scale).compile()
    assert program.memory_analysis().temp_size_in_bytes < ROWS * NEURONS * 8192 // 4


def floating_experts(numbers, scale, text, outputs):
    """What numbers and scales stand for, as one formula that can be differentiated."""
    if scale is None:
        return numbers.astype(jnp.float32)
    wide = numbers.astype(jnp.float32)
    if outputs == "last_of_each" and WeightFormat.parse(text).group is None:
        return wide * scale[:, None]
    each = wide.reshape(*scale.shape, -1) * scale[..., None].astype(jnp.float32)
    return each.reshape(numbers.shape)


@pytest.mark.usefixtures("few_tokens_a_block")
@pytest.mark.parametrize("text", ["float32", "int8", "int8:16"])
@pytest.mark.parametrize("case", [1, 2], ids=["few", "many"])
class TestGradients:
    """Against products with the matrices of all experts, of which the chosen ones are looked up."""

    def compared(self, product, reference, given, numbers):
        def of_inputs(function):
            return lambda given, scale, *weight: function(given, *(weight or (numbers,)), scale)

        arguments = (*given, numbers) if jnp.issubdtype(numbers.dtype, jnp.floating) else given
        wanted = tuple(number for number, array in enumerate(arguments) if array is not None)
        got = jax.jit(jax.grad(of_inputs(product), wanted))(*arguments)
        want = jax.grad(of_inputs(reference), wanted)(*arguments)
        assert len(got) == 2
        for one, other in zip(got, want, strict=True):
            assert one.dtype == other.dtype
            largest = float(jnp.abs(other.astype(jnp.float32)).max())
            # Scales of groups are float16, and their gradients too.
            close = 1e-5 if one.dtype == jnp.float32 else 1e-3
            np.testing.assert_allclose(one, other, rtol=close, atol=close * largest)

    def test_linear(self, text, case, rng):
        shape, chosen = list(cases())[case]
        numbers, scale, _ = stored(rng, (EXPERTS, ROWS, NEURONS, WIDTH), text, "first")
        x = jnp.asarray(rng.standard_normal((*shape, WIDTH)), jnp.float32)
        weigh = jnp.asarray(rng.standard_normal((*chosen.shape, ROWS, NEURONS)), jnp.float32)
        experts = jnp.asarray(chosen, jnp.int32)

        def reference(x, numbers, scale):
            exact = floating_experts(numbers, scale, text, "first")
            return jnp.sum(weigh * jnp.einsum("btd,btkafd->btkaf", x, exact[chosen]))

        def product(x, numbers, scale):
            return jnp.sum(weigh * linear_of_experts(x, experts, numbers, scale))

        self.compared(product, reference, (x, scale), numbers)

    def test_matmul(self, text, case, rng):
        shape, chosen = list(cases())[case]
        numbers, scale, _ = stored(rng, (EXPERTS, NEURONS, WIDTH), text, "last_of_each")
        z = jnp.asarray(rng.standard_normal((*chosen.shape, NEURONS)), jnp.float32)
        weigh = jnp.asarray(rng.standard_normal((*shape, WIDTH)), jnp.float32)
        experts, of_rows = jnp.asarray(chosen, jnp.int32), WeightFormat.parse(text).group is not None

        def reference(z, numbers, scale):
            exact = floating_experts(numbers, scale, text, "last_of_each")
            return jnp.sum(weigh * jnp.einsum("btkf,btkfd->btd", z, exact[chosen]))

        def product(z, numbers, scale):
            scales = (None, scale) if of_rows else (scale, None)
            return jnp.sum(weigh * matmul_of_experts(z, experts, numbers, *scales))

        self.compared(product, reference, (z, scale), numbers)


@pytest.mark.parametrize("length", [1, 9], ids=["few", "many"])
def test_gradients_keep_nothing_but_the_operands(length, rng):
    chosen = jnp.asarray(rng.permuted(np.tile(np.arange(EXPERTS), (2, length, 1)), axis=-1)[..., :2], jnp.int32)
    x = jnp.ones((2, length, WIDTH), jnp.float32)
    weight = jnp.ones((EXPERTS, ROWS, NEURONS, WIDTH), jnp.float32)
    kept = jax.tree.leaves(jax.vjp(lambda x, weight: linear_of_experts(x, chosen, weight), x, weight)[1])
    assert sum(array.nbytes for array in kept) == x.nbytes + weight.nbytes + chosen.nbytes


@pytest.mark.parametrize("length", [1, 9], ids=["few", "many"])
def test_a_token_that_overflows_is_alone(length, rng):
    """What is not finite in one sequence reaches no other."""
    chosen = jnp.asarray(rng.permuted(np.tile(np.arange(EXPERTS), (2, length, 1)), axis=-1)[..., :2], jnp.int32)
    z = jnp.asarray(rng.standard_normal((2, length, 2, NEURONS)), jnp.float32).at[0, 0].set(jnp.inf)
    weight = jnp.asarray(rng.standard_normal((EXPERTS, NEURONS, WIDTH)), jnp.float32)
    assert jnp.isfinite(jax.jit(matmul_of_experts)(z, chosen, weight)[1]).all()
    x = jnp.asarray(rng.standard_normal((2, length, WIDTH)), jnp.float32).at[0, 0].set(jnp.inf)
    both = jnp.asarray(rng.standard_normal((EXPERTS, ROWS, NEURONS, WIDTH)), jnp.float32)
    assert jnp.isfinite(jax.jit(linear_of_experts)(x, chosen, both)[1]).all()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["linear", "matmul"])
@pytest.mark.parametrize("text", FORMATS)
def test_few_pairs_are_the_same_on_other_platforms(name, text, platform, rng, monkeypatch):
    """The forms for GPUs and TPUs, computed on a CPU."""
    chosen = jnp.asarray([[[4, 0]], [[1, 4]]], jnp.int32)
    if name == "linear":
        numbers, scale, _ = stored(rng, (EXPERTS, ROWS, NEURONS, WIDTH), text, "first")
        product = functools.partial(linear_of_experts, weight=numbers, scale=scale)
    else:
        numbers, scale, _ = stored(rng, (EXPERTS, NEURONS, WIDTH), text, "last_of_each")
        of_rows = WeightFormat.parse(text).group is not None
        kind = "row_scale" if of_rows else "scale"
        product = functools.partial(matmul_of_experts, weight=numbers, **{kind: scale})
    shape = (2, 1, WIDTH) if name == "linear" else (2, 1, 2, NEURONS)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    here = product(x, chosen)

    def chosen_form(*given, default, **others):
        return others.get(platform, default)(*given)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen_form)
    there = product(x, chosen)
    np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5 * float(jnp.abs(here).max()))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


class TestChoice:
    @pytest.mark.parametrize("normalised", [False, True])
    @pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
    def test_best_scores(self, scores, normalised, rng):
        logits = rng.standard_normal((2, 3, 8)).astype(np.float32)
        routing = Routing(8, 3, 4, scores=scores, normalised=normalised, scale=2.5)
        experts, weights = choose(jnp.asarray(logits), routing)
        for b, t in np.ndindex(2, 3):
            score = softmax(logits[b, t]) if scores == "softmax" else 1 / (1 + np.exp(-logits[b, t]))
            best = np.argsort(-score, kind="stable")[:3]
            want = score[best] / (score[best].sum() if normalised else 1) * 2.5
            np.testing.assert_array_equal(experts[b, t], best)
            np.testing.assert_allclose(weights[b, t], want, rtol=1e-5)

    def test_of_equal_scores_the_first(self):
        experts, weights = choose(jnp.zeros((1, 1, 6)), Routing(6, 2, 4, normalised=True))
        np.testing.assert_array_equal(experts[0, 0], [0, 1])
        np.testing.assert_allclose(weights[0, 0], [0.5, 0.5])

    def test_all_experts_and_a_single_one(self):
        experts, weights = choose(jnp.asarray([[[0.0, 2.0, 1.0]]]), Routing(3, 3, 4))
        np.testing.assert_array_equal(experts[0, 0], [1, 2, 0])
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
        assert choose(jnp.asarray([[[-3.0]]]), Routing(1, 1, 4))[1].item() == 1

    def test_a_bias_chooses_and_does_not_weigh(self):
        routing = Routing(4, 1, 4, scores="sigmoid", choice_bias=True)
        experts, weights = choose(jnp.asarray([[[1.0, 0.0, 0.0, 0.0]]]), routing, jnp.asarray([0.0, 0.0, 0.0, 0.9]))
        assert experts.item() == 3
        assert weights.item() == pytest.approx(0.5)

    def test_only_the_best_groups(self):
        # The second best expert is in a group whose two best are worse than those of the others.
        logits = jnp.asarray([[[3.0, -9.0, 2.9, -9.0, 1.0, 1.0, 2.0, 2.0]]])
        routing = Routing(8, 2, 4, scores="sigmoid", groups=4, active_groups=2, group_best=2)
        assert sorted(np.asarray(choose(logits, routing)[0][0, 0]).tolist()) == [6, 7]
        one_best = dataclasses.replace(routing, group_best=1)
        assert sorted(np.asarray(choose(logits, one_best)[0][0, 0]).tolist()) == [0, 2]

    @pytest.mark.parametrize(
        "fields",
        [
            {"active": 9}, {"groups": 3}, {"groups": 4, "active_groups": 1, "active": 3}, {"shared_width": -1},
            {"shared_gate": True}, {"scores": "sparsemixer", "normalised": True}, {"width": 0},
        ],
    )  # fmt: skip
    def test_what_cannot_be(self, fields):
        with pytest.raises(ValueError, match=r"experts|at least|shared_width|sparsemixer"):
            Routing(**{"experts": 8, "active": 2, "width": 4, **fields})


def config(**fields) -> ModelConfig:
    routing = Routing(EXPERTS, 2, NEURONS, normalised=True, **fields)
    return ModelConfig("mixtral", 64, WIDTH, 48, 2, 4, 2, 8, 128, routing=routing)


@pytest.mark.usefixtures("few_tokens_a_block")
@pytest.mark.parametrize("fields", [{}, {"shared_width": 24, "shared_gate": True}], ids=["experts", "shared"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_layer_is_the_weighted_sum_of_its_experts(fields, tokens, rng):
    layer = RoutedFeedForward(config(**fields), jnp.float32, WeightFormat("float32"), nnx.Rngs(0))
    x = rng.standard_normal((2, tokens, WIDTH)).astype(np.float32)
    z = layer.intermediate(jnp.asarray(x))
    got = layer.project(z)
    gate_up, down = (np.asarray(w[...], np.float64) for w in (layer.experts.gate_up, layer.experts.down))
    want = np.zeros((2, tokens, WIDTH))
    for b, t in np.ndindex(2, tokens):
        scores = softmax(np.asarray(layer.router[...], np.float64) @ x[b, t])
        best = np.argsort(-scores)[:2]
        np.testing.assert_array_equal(z.experts[b, t], best)
        for expert, weight in zip(best, scores[best] / scores[best].sum(), strict=True):
            gate, up = gate_up[expert] @ x[b, t]
            want[b, t] += weight * (gate / (1 + np.exp(-gate)) * up) @ down[expert]
        if layer.shared is not None:
            gate, up = np.asarray(layer.shared.gate_up[...], np.float64) @ x[b, t]
            opened = 1 / (1 + np.exp(-np.asarray(layer.shared_gate[...], np.float64) @ x[b, t]))
            want[b, t] += opened * (gate / (1 + np.exp(-gate)) * up) @ np.asarray(layer.shared.down[...], np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    # The layer is the dense one with these intermediates.
    dense = np.asarray(z.everywhere(), np.float64) @ np.asarray(layer.down_matrix(), np.float64)
    np.testing.assert_allclose(dense, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def of_all_experts(layer, x):
    """The layer with every expert computed for every token, and those that it did not choose left out."""
    gate, up = jnp.einsum("eafd,btd->abtef", layer.experts.gate_up[...], x)
    outputs = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, layer.experts.down[...])
    scores = jax.nn.softmax(jnp.einsum("ed,btd->bte", layer.router[...], x), axis=-1)
    chosen = scores >= jnp.sort(scores, axis=-1)[..., -2:-1]
    weights = jnp.where(chosen, scores, 0) / jnp.sum(jnp.where(chosen, scores, 0), axis=-1, keepdims=True)
    y = jnp.einsum("bte,bted->btd", weights, outputs)
    if layer.shared is None:
        return y
    gate, up = jnp.einsum("afd,btd->abtf", layer.shared.gate_up[...], x)
    opened = jax.nn.sigmoid(jnp.einsum("d,btd->bt", layer.shared_gate[...], x))
    return y + opened[..., None] * ((jax.nn.silu(gate) * up) @ layer.shared.down[...])


@pytest.mark.usefixtures("few_tokens_a_block")
@pytest.mark.parametrize("fields", [{}, {"shared_width": 24, "shared_gate": True}], ids=["experts", "shared"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_gradients_of_a_layer(fields, tokens, rng):
    """Of x, the router, experts and shared experts."""
    layer = RoutedFeedForward(config(**fields), jnp.float32, WeightFormat("float32"), nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((2, tokens, WIDTH)), jnp.float32)
    weigh = jnp.asarray(rng.standard_normal((2, tokens, WIDTH)), jnp.float32)
    got, want = (
        jax.jit(jax.grad(lambda layer, x, form=form: jnp.sum(weigh * form(layer, x)), (0, 1)))(layer, x)
        for form in (lambda layer, x: layer(x), of_all_experts)
    )
    for (path, one), other in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        largest = float(jnp.abs(other).max())
        assert largest > 0, path
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * largest, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize(("text", "division"), [("float32", "experts"), ("float32", "neurons"), ("int8", "neurons")])
def test_gradients_on_a_mesh(text, division, rng):
    """Of a whole model: each device has a part of each expert's neurons, or whole ones, and half of the sequences."""
    batch = Batch(rng.integers(0, 64, (4, 12)).astype(np.int32), np.asarray([12, 7, 12, 9], np.int32))
    found = []
    for mesh in (None, make_mesh(2, 2)):
        whole_experts = mesh is not None and division == "experts"
        divided = dataclasses.replace(config(shared_width=24), expert_parallel=whole_experts, num_layers=1)
        model = random_model(divided, mesh=mesh, weights=WeightFormat.parse(text))
        # Of integers, gradients reach what lies below the experts.
        graph, trained, rest = nnx.split(model, lambda _, leaf: jnp.issubdtype(leaf.dtype, jnp.floating), ...)

        def loss(trained, rest, graph=graph):
            return next_token_loss(nnx.merge(graph, trained, rest), batch)

        found.append(jax.jit(jax.grad(loss))(trained, rest))
    for (path, one), many in zip(jax.tree.leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True):
        largest = float(np.abs(np.asarray(one, float)).max())
        assert largest > 0, path
        np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-5 * largest, err_msg=str(path))


@pytest.mark.thorough
@pytest.mark.parametrize("text", ["float32", "int8"])
def test_a_step_on_cpus_reads_the_chosen_experts(text):
    """And no other one, dense or pruned: of their matrices the loop reads nothing else, and copies nothing."""
    model = random_model(dataclasses.replace(config(shared_width=24), num_layers=1), weights=WeightFormat.parse(text))
    read = jitted.prefill(model, jnp.zeros((1, 4), jnp.int32), jnp.asarray([4]), max_new_tokens=8)
    pruned = gj.prune(model, gj.select(read.statistics, gj.GriffinConfig(0.5)))
    state = jitted.init_decode(read)
    for each, neurons in ((model, NEURONS), (pruned, NEURONS // 2)):
        with unchecked():
            program = jax.jit(gj.decode).lower(each, state, 8).compile().as_text()
        matrices = {EXPERTS * ROWS * neurons * WIDTH, EXPERTS * neurons * WIDTH}
        assert looked_up(program, matrices) == (2 * (ROWS + 1) * neurons * WIDTH, [])


def with_biases(model, rng):
    """The model with biases that are not zero, of experts and elsewhere."""
    for layer in model.layers:
        for part in layer.ff.parts():
            for bias in (part.gate_up_bias, part.down_bias):
                values = jnp.asarray(rng.standard_normal(bias.shape), jnp.float32)
                bias.set_value(jax.device_put(values, bias.get_value().sharding))
    return model


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("text", "division"),
    [("float32", "neurons"), *(pytest.param("int8", each, marks=pytest.mark.slow) for each in ("experts", "neurons"))],
)
def test_on_a_mesh(text, division, rng):
    """Each device has a part of each expert's neurons, or whole experts, and half of the sequences; nothing else
    changes: prompts, statistics, neurons, and the tokens of the pruned model."""
    weights = WeightFormat.parse(text)
    whole = dataclasses.replace(config(shared_width=24), ff_bias=True, num_layers=1)
    tokens, lengths = jnp.asarray(rng.integers(0, 64, (2, 12)), jnp.int32), jnp.asarray([12, 7])
    griffin, found = gj.GriffinConfig(density=0.5, shared=True, groups=2), []
    for mesh in (None, make_mesh(2, 2)):
        divided = dataclasses.replace(whole, expert_parallel=mesh is not None and division == "experts")
        model = with_biases(random_model(divided, mesh=mesh, weights=weights), np.random.default_rng(5))
        read = jitted.prefill(model, tokens, lengths, max_new_tokens=4)
        experts = gj.select(read.statistics, griffin)
        pruned = gj.prune(model, experts)
        again = jitted.prefill(pruned, tokens, lengths, max_new_tokens=4)
        found.append((read.logits, read.statistics.squares, again.logits, experts.indices))
        found[-1] += (
            pruned.layers[0].ff.experts.gate_up[...],
            jitted.decode(pruned, jitted.init_decode(read), 4).tokens,
        )
        if mesh is not None:
            shape = (6, 10, 32) if division == "neurons" else (3, 20, 32)
            assert pruned.layers[0].ff.experts.down[...].sharding.shard_shape((6, 20, 32)) == shape
    for one, many in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-5 * float(np.abs(np.asarray(one, float)).max()))


@pytest.mark.parametrize(
    ("whole", "shared", "message"), [(False, 0, "3 kept"), (False, 8, "3 kept"), (True, 8, None), (True, 10, "5 kept")]
)
def test_devices_share_what_each_expert_keeps(whole, shared, message):
    """Half of the neurons of each of four experts and of the shared one; whether the sum can be shared says nothing."""
    routing = Routing(4, 2, 6, shared_width=shared)
    divided = dataclasses.replace(config(), num_layers=1, routing=routing, expert_parallel=whole)
    model, ranges = random_model(divided, mesh=make_mesh(1, 2)), divided.neuron_ranges
    starts = np.cumsum((0, *ranges[0]))[:-1]
    kept = np.concatenate([start + np.arange(size // 2) for start, size in zip(starts, ranges[0], strict=True)])
    experts = gj.ExpertNeurons.from_indices([kept], divided.neurons, ranges=ranges)
    if message is None:
        assert gj.prune(model, experts).layers[0].ff.experts.down.shape == (4, 3, WIDTH)
        return
    for refused in (lambda: gj.prune(model, experts), lambda: check_mesh(divided, 2, experts.shares)):
        with pytest.raises(ValueError, match=f"2 devices cannot share {message} neurons evenly: .*--round-to 2;"):
            refused()


class TestWholeExperts:
    def test_a_checkpoint_is_read_and_written(self, tmp_path, rng):
        model = random_model(config())
        gj.save(model, tmp_path / "one")
        loaded = gj.load(tmp_path / "one", mesh=make_mesh(1, 2), expert_parallel=True).model
        assert loaded.layers[0].ff.experts.gate_up[...].sharding.shard_shape((6, 2, 40, 32)) == (3, 2, 40, 32)
        assert fingerprint(loaded) == fingerprint(model)
        gj.save(loaded, tmp_path / "again")
        assert gj.load(tmp_path / "again").config == model.config

    def test_what_each_device_reads_and_holds(self):
        """All choices of a token may be experts of one device."""
        sizes = [
            Sizes(each, 1, 8, Precision.of(jnp.float32), shared=True, devices=2)
            for each in (config(shared_width=24), dataclasses.replace(config(shared_width=24), expert_parallel=True))
        ]
        row, kept = 3 * WIDTH * 4, [EXPERTS * NEURONS // 2 + 12] * 2
        assert [size.ff(None) for size in sizes] == [2 * (EXPERTS * NEURONS + 24) * row // 2] * 2
        assert [size.read(None) for size in sizes] == [2 * (NEURONS + 12) * row, 2 * (2 * NEURONS + 12) * row]
        assert sizes[1].read(kept) == sizes[1].read(None) // 2

    def test_groups_are_for_what_is_divided(self):
        whole = dataclasses.replace(config(), expert_parallel=True)
        assert neuron_groups(config(), 2) == 2
        assert neuron_groups(whole, 2) == 1
        assert neuron_groups(dataclasses.replace(config(shared_width=24), expert_parallel=True), 2) == 2

    def test_what_cannot_be(self, tmp_path, tiny):
        whole = dataclasses.replace(config(), expert_parallel=True)
        with pytest.raises(ValueError, match="4 devices cannot share 6 experts evenly; these can: 1, 2, 3, 6"):
            random_model(whole, mesh=make_mesh(1, 4))
        gj.save(random_model(config()), tmp_path / "one")
        with pytest.raises(ValueError, match="give a mesh"):
            gj.load(tmp_path / "one", expert_parallel=True)
        with pytest.raises(ValueError, match="expert_parallel is for models with routed experts"):
            dataclasses.replace(tiny.llm.config, expert_parallel=True)


def test_sequences_with_neurons_of_their_own_are_refused_copies(rng):
    model = random_model(config())
    read = jitted.prefill(model, jnp.asarray(rng.integers(0, 64, (2, 9))), jnp.asarray([9, 9]), max_new_tokens=2)
    experts = gj.select(read.statistics, gj.GriffinConfig(density=0.5))
    with pytest.raises(ValueError, match="2 sequences would each need a copy of all routed experts: mask the model"):
        gj.prune(model, experts)


class TestUnreadExperts:
    """A prompt of one token reads two of six experts; the others keep their largest neurons."""

    def read(self, text="float32", mesh=None):
        model = random_model(config(shared_width=24), weights=WeightFormat.parse(text), mesh=mesh)
        tokens, lengths = jnp.asarray([[5, 0], [9, 0]], jnp.int32), jnp.asarray([1, 1])
        return model, jitted.prefill(model, tokens, lengths, max_new_tokens=1).statistics

    def expected(self, model, statistics, keeps=20, groups=1):
        """The neurons of the first layer's experts, for each sequence."""
        gate, up = np.moveaxis(np.asarray(floating_rows_of(model), np.float64), 1, 0)
        largest = np.linalg.norm(gate, axis=-1) * np.linalg.norm(up, axis=-1)
        for squares in np.asarray(statistics.squares[0]):
            scores = squares[: EXPERTS * NEURONS].reshape(EXPERTS, NEURONS)
            read = scores.any(axis=-1)
            assert 0 < read.sum() < EXPERTS
            scores = np.where(read[:, None], scores, largest).reshape(EXPERTS * groups, -1)
            kept = np.sort(np.argsort(-scores, axis=-1, kind="stable")[:, : keeps // groups], axis=-1)
            yield (kept + np.arange(EXPERTS * groups)[:, None] * NEURONS // groups).reshape(-1)

    @pytest.mark.parametrize("text", ["float32", "int8"])
    def test_they_keep_their_largest_neurons(self, text):
        model, statistics = self.read(text)
        griffin = gj.GriffinConfig(0.5)
        want = np.stack(list(self.expected(model, statistics)))
        for experts in (
            gj.select(statistics, griffin, model=model),
            Pruner(griffin).select(model, statistics),
            jitted.select(statistics, griffin, magnitudes=magnitude(model)),
        ):
            np.testing.assert_array_equal(experts[0][:, : want.shape[1]], want)
            assert experts.shares[0] == (20,) * EXPERTS + (12,)

    def test_on_a_mesh_in_groups(self):
        model, statistics = self.read(mesh=make_mesh(1, 2))
        experts = Pruner(gj.GriffinConfig(0.5, groups=2)).select(model, statistics)
        alone, _ = self.read()
        for sequence, want in enumerate(self.expected(alone, statistics, groups=2)):
            np.testing.assert_array_equal(experts[0][sequence, : want.size], want)

    def test_with_a_prior_those_of_general_text(self, rng):
        model, statistics = self.read()
        general = [rng.random(neurons).astype(np.float32) for neurons in model.neurons]
        # General text reads all experts but one that the first prompt does not read, either.
        read = np.asarray(statistics.squares[0][0])[: EXPERTS * NEURONS].reshape(EXPERTS, -1).any(axis=-1)
        never, other = np.flatnonzero(~read)[:2]
        general[0][never * NEURONS : (never + 1) * NEURONS] = 0
        prior = gj.Prior(tuple(map(jnp.asarray, general)), (), "0" * 16, 1)
        pruner = dataclasses.replace(Pruner(gj.GriffinConfig(0.5)), fuse=prior.fusion())
        kept = np.asarray(pruner.select(model, statistics)[0][0])
        for expert, by in ((other, general[0]), (never, np.asarray(magnitude(model)[0]))):
            own = by[expert * NEURONS : (expert + 1) * NEURONS]
            want = expert * NEURONS + np.sort(np.argsort(-own)[:20])
            np.testing.assert_array_equal(kept[(kept >= expert * NEURONS) & (kept < (expert + 1) * NEURONS)], want)

    def test_magnitudes_are_computed_once_for_the_same_weights(self):
        model = random_model(config())
        first = jitted.magnitudes_of(model)
        assert jitted.magnitudes_of(model) is first
        experts = model.layers[0].ff.experts
        experts.gate_up = nnx.Param(2 * experts.gate_up[...])
        np.testing.assert_allclose(jitted.magnitudes_of(model)[0], 4 * first[0], rtol=1e-6)


def floating_rows_of(model):
    experts = model.layers[0].ff.experts
    return floating_rows(experts.gate_up[...], None, array_of(experts.gate_up_scale))


class TestRanges:
    def test_indices_of_each_range(self, tmp_path):
        kept = np.concatenate([np.arange(3) + 10 * number for number in range(4)])
        experts = gj.ExpertNeurons.from_indices([kept], [40], ranges=((10,) * 4,))
        assert experts.shares == ((3,) * 4,)
        experts.save(tmp_path / "experts")
        assert gj.ExpertNeurons.load(tmp_path / "experts").shares == experts.shares

    def test_ranges_keep_equally_many(self):
        with pytest.raises(ValueError, match="of experts of layer 0, some ranges of 10 neurons keep more than others"):
            gj.ExpertNeurons.from_indices([[0, 1, 10]], [20], ranges=((10, 10),))

    def test_another_model(self):
        experts = gj.ExpertNeurons.from_indices([[0, 100]] * 2, [240] * 2)
        with pytest.raises(ValueError, match="a model with other routed experts"):
            gj.prune(random_model(config()), experts)
