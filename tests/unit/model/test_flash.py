"""The kernels of attention, interpreted: against NumPy, and in a model against the form that other platforms run."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_and_slow
from reference import assert_close

import griffin_jax as gj
from griffin_jax.extensions.speculative import decode_speculative
from griffin_jax.model import attention, flash
from griffin_jax.model.assembly import random_model
from griffin_jax.model.cache import EMPTY
from griffin_jax.model.config import ModelConfig, Rotary
from griffin_jax.model.norm import Norm
from griffin_jax.model.positions import Positions
from griffin_jax.parallel.mesh import make_mesh

SCALE = 0.3


def oracle(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, queries: np.ndarray, positions: np.ndarray,
    cap: float | None, window: int,
) -> np.ndarray:  # fmt: skip
    """Attention of queries (B, G, R, T, H) at positions (B, T) to slots, in float64."""
    scores = np.einsum("bgrth,bghs->bgrts", query, keys, dtype=np.float64) * SCALE
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    own, others = queries[:, :, None], positions[:, None]
    readable = (others != EMPTY) & (others <= own) & ((window == 0) | (others > own - window))
    weights = np.exp(scores - scores.max()) * readable[:, None, None]
    return np.einsum("bgrts,bgsh->bgrth", weights / weights.sum(-1, keepdims=True), values)


@pytest.fixture
def cache(rng) -> Any:
    """A function that makes keys, values and positions of a cache whose rows have gaps."""

    def make(batch: int, groups: int, size: int, slots: int, filled: int) -> tuple[np.ndarray, ...]:
        keys = rng.standard_normal((batch, groups, size, slots)).astype(np.float32)
        values = rng.standard_normal((batch, groups, slots, size)).astype(np.float32)
        positions = np.full((batch, slots), EMPTY, np.int32)
        for row in positions:
            gap = rng.integers(1, filled // 2)
            row[: filled - 2 * gap] = np.arange(filled - 2 * gap)
            row[filled - gap : filled] = filled - 2 * gap + np.arange(gap)
        return keys, values, positions

    return make


@pytest.mark.parametrize(
    ("batch", "groups", "heads", "size", "slots", "cap", "window"),
    [
        (1, 2, 1, 16, 300, None, 0),
        (2, 2, 3, 24, 200, None, 50),
        (1, 1, 20, 64, 1000, 5.0, 0),
        (3, 8, 1, 8, 70, None, 7),
        (2, 1, 8, 130, 100, None, 40),
    ],
    ids=["one_head", "grouped_window", "many_heads_cap", "batch_window", "wide_heads"],
)
class TestKernels:
    def test_a_token(self, cache, rng, batch, groups, heads, size, slots, cap, window):
        filled = 2 * slots // 3
        keys, values, positions = cache(batch, groups, size, slots, filled)
        query = rng.standard_normal((batch, groups, heads, size)).astype(np.float32)
        key, value = rng.standard_normal((2, batch, groups, size)).astype(np.float32)
        position = positions.max(axis=1) + 1
        position[-1] += 3
        options: dict[str, Any] = {"scale": SCALE, "cap": cap, "window": window, "interpret": True}
        arrays = query, key, value, keys, values, position, positions, np.int32(filled)
        mixed, new_keys, new_values = flash.decode_step(*map(jnp.asarray, arrays), **options)

        keys[..., filled], values[:, :, filled], positions[:, filled] = key, value, position
        np.testing.assert_array_equal(new_keys, keys)
        np.testing.assert_array_equal(new_values, values)
        expected = oracle(query[:, :, :, None], keys, values, position[:, None], positions, cap, window)
        assert_close(np.asarray(mixed), expected[:, :, :, 0])

    @pytest.mark.parametrize(("read", "tokens"), [(flash.read_few, 2), (flash.read_few, 9), (flash.read_prompt, 45)])
    def test_several_tokens(self, cache, rng, batch, groups, heads, size, slots, cap, window, read, tokens):
        filled = 2 * slots // 3
        keys, values, positions = cache(batch, groups, size, slots, filled)
        query = rng.standard_normal((batch, groups, heads, tokens, size)).astype(np.float32)
        start = filled - tokens
        queries = np.ascontiguousarray(positions[:, start:filled])
        arrays = query.reshape(batch, -1, tokens, size), keys, values, queries, positions, np.int32(start)
        options: dict[str, Any] = {"scale": SCALE, "cap": cap, "window": window, "interpret": True}
        mixed = np.asarray(read(*map(jnp.asarray, arrays), **options)).reshape(query.shape)

        real = queries != EMPTY
        assert np.isfinite(mixed).all()
        with np.errstate(invalid="ignore"):
            expected = oracle(query, keys, values, queries, positions, cap, window)
        shown = np.broadcast_to(real[:, None, None, :, None], mixed.shape)
        assert_close(mixed[shown], expected[shown])

    def test_gradients_of_a_prompt(self, cache, rng, batch, groups, heads, size, slots, cap, window):
        """Those of a product with a random array, next to finite differences."""
        keys, values, positions = cache(batch, groups, size, 40, 20)
        query = rng.standard_normal((batch, groups * heads, 20, size)).astype(np.float32)
        factor, directions = (
            rng.standard_normal(query.shape),
            [rng.standard_normal(a.shape) for a in (query, keys, values)],
        )
        factor = factor * (positions[:, None, :20, None] != EMPTY)
        options: dict[str, Any] = {"scale": SCALE, "cap": cap, "window": window, "interpret": True}

        def exact(*arrays: np.ndarray) -> float:
            query, keys, values = arrays
            grouped = query.reshape(batch, groups, heads, 20, size)
            with np.errstate(invalid="ignore"):
                mixed = oracle(grouped, keys, values, positions[:, :20], positions, cap, window).reshape(query.shape)
            return float(np.sum(np.where(factor != 0, mixed, 0) * factor))

        def loss(query: Any, keys: Any, values: Any) -> Any:
            positional = jnp.asarray(positions[:, :20]), jnp.asarray(positions), jnp.int32(0)
            return jnp.sum(flash.read_prompt(query, keys, values, *positional, **options) * factor)

        gradients = jax.grad(loss, argnums=(0, 1, 2))(*map(jnp.asarray, (query, keys, values)))
        for number, (gradient, direction) in enumerate(zip(gradients, directions, strict=True)):
            moved = []
            for step in (1e-4, -1e-4):
                arrays = [a.astype(np.float64) for a in (query, keys, values)]
                arrays[number] = arrays[number] + step * direction
                moved.append(exact(*arrays))
            expected = (moved[0] - moved[1]) / 2e-4
            assert np.sum(np.asarray(gradient, np.float64) * direction) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("tokens", [1, 32])
def test_blocks_outside_of_the_window_are_not_read(rng, tokens):
    """What lies there is not even multiplied by zero."""
    slots, filled, window = 512, 400, 40
    keys, values = rng.standard_normal((2, 1, 1, 8, slots)).astype(np.float32)
    values = np.ascontiguousarray(values.swapaxes(2, 3))
    positions = np.where(np.arange(slots) < filled, np.arange(slots), EMPTY).astype(np.int32)[None]
    unread = np.arange(slots) < filled - tokens - window - flash.BLOCK_SLOTS
    keys[..., unread], values[:, :, unread] = np.nan, np.nan
    query = rng.standard_normal((1, 1, tokens, 8)).astype(np.float32)
    options: dict[str, Any] = {"scale": SCALE, "window": window, "interpret": True}
    start = np.int32(filled - tokens)
    if tokens == 1:
        own = query, keys[:, :, :, start], values[:, :, start]
        arrays = (*own, keys, values, positions[:, start], positions, start)
        found = flash.decode_step(*map(jnp.asarray, arrays), **options)[0]
    else:
        arrays = query, keys, values, positions[:, start:filled], positions, start
        found = flash.read_prompt(*map(jnp.asarray, arrays), **options)
    cut = filled - tokens - window
    seen = keys[..., cut:], values[:, :, cut:], positions[:, start:filled], positions[:, cut:]
    expected = oracle(query[:, :, None], *seen, None, window)[:, :, 0]
    assert_close(np.asarray(found).reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("heads", "tokens", "size", "block"),
    [(1, 2, 128, 16), (16, 8, 128, 128), (48, 9, 128, 128), (48, 9, 64, 128), (8, 5, 256, 64), (8, 9, 400, 32)],
)
def test_programs_of_few_tokens_have_few_rows(monkeypatch, heads, tokens, size, block):
    """As many as registers can hold the sums of."""
    found, plain = [], flash._block_slots

    def noted(*shape: int) -> int:
        found.append(shape)
        return plain(*shape)

    monkeypatch.setattr(flash, "_block_slots", noted)
    query, keys, values = (
        jnp.zeros(shape, jnp.bfloat16) for shape in ((1, heads, tokens, size), (1, 1, size, 80), (1, 1, 80, size))
    )
    positional = jnp.zeros((1, tokens), jnp.int32), jnp.zeros((1, 80), jnp.int32), jnp.int32(0)
    jax.eval_shape(lambda *arrays: flash.read_few(*arrays, scale=SCALE), query, keys, values, *positional)
    assert set(found) == {(block, 1 << (size - 1).bit_length())}


@pytest.mark.parametrize(
    ("rows", "dims", "slots"), [(16, 128, 64), (128, 128, 64), (32, 256, 64), (64, 256, 32), (64, 512, 16)]
)
def test_wide_heads_read_fewer_slots_at_a_time(rows, dims, slots):
    """Of those that a kernel was measured with, up to 128 dimensions, none do."""
    assert flash._block_slots(rows, dims) == slots


LLAMA = ModelConfig(
    family="llama", vocab_size=61, width=32, ff_width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=256, rotary=Rotary(theta=1e4),
)  # fmt: skip
GEMMA = ModelConfig(
    family="gemma2", vocab_size=61, width=32, ff_width=48, num_layers=2, num_heads=4, num_kv_heads=1, head_dim=12,
    max_positions=256, rotary=Rotary(theta=1e4), attention_softcap=5.0, windows=(9, 0), norm_placement="sandwich",
    norm_plus_one=True,
)  # fmt: skip


@pytest.fixture
def kernels(monkeypatch) -> Any:
    """Runs a function as a GPU would run it, with interpreted kernels; counts them."""
    plain = jax.lax.platform_dependent
    ran: list[str] = []

    def run(function: Any, *args: Any) -> Any:
        def counted(name: str) -> Any:
            def call(*operands: Any, **options: Any) -> Any:
                ran.append(name)
                return original[name](*operands, **options, interpret=True)

            return call

        def as_on_cuda(*operands: Any, cuda: Any = None, **others: Any) -> Any:
            # Still a branch of several, since only some functions can be one.
            return plain(*operands, **(others if cuda is None else others | {"cpu": cuda}))

        original = {name: getattr(flash, name) for name in ("decode_step", "read_few", "read_prompt")}
        with monkeypatch.context() as patch:
            for name in original:
                patch.setattr(flash, name, counted(name))
            patch.setattr(jax.lax, "platform_dependent", as_on_cuda)
            patch.setattr(attention, "KERNEL_ITEMSIZE", 4)
            return function(*args), ran

    return run


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        pytest.param(LLAMA, None, id="llama"),
        pytest.param(GEMMA, None, id="gemma2", marks=pytest.mark.slow),
        pytest.param(LLAMA, (2, 2), id="four devices", marks=pytest.mark.slow),
    ],
)
def test_a_model_computes_the_same_with_kernels(config, mesh, kernels, rng):
    """Prompts of several lengths in chunks, tokens of the full model and of a pruned one."""
    model = random_model(config, seed=0, mesh=None if mesh is None else make_mesh(*mesh))
    tokens, lengths = gj.pad([rng.integers(0, 61, n).astype(np.int32) for n in (3, 17, 40, 64)], 64)

    def answers() -> tuple[Any, ...]:
        prefilled = gj.prefill(model, jnp.asarray(tokens), jnp.asarray(lengths), max_new_tokens=12, chunk=32)
        state = gj.decode(model, gj.init_decode(prefilled), 6)
        experts = gj.select(prefilled.statistics, gj.GriffinConfig(0.5, shared=True))
        pruned = gj.prune(model, experts)
        state = gj.decode(pruned, state, 12)
        return prefilled.logits, prefilled.statistics.squares, state.tokens, state.cache.keys, state.cache.values

    expected = jax.jit(answers)()
    found, ran = kernels(lambda: jax.jit(lambda: answers())())
    assert set(ran) == {"decode_step", "read_prompt"}
    np.testing.assert_array_equal(found[2], expected[2])
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(np.asarray(got), np.asarray(want))


@pytest.mark.thorough
def test_one_token_of_one_sequence(kernels, rng):
    """The row that GPUs compute twice is used for all that follows."""
    model = random_model(GEMMA, seed=1)
    tokens = jnp.asarray(rng.integers(0, 61, (1, 20)).astype(np.int32))

    def answer() -> Any:
        prefilled = gj.prefill(model, tokens, jnp.asarray([20]), max_new_tokens=8)
        return gj.decode(model, gj.init_decode(prefilled), 8)

    expected = jax.jit(answer)()
    found, ran = kernels(lambda: jax.jit(lambda: answer())())
    assert ran.count("decode_step") == GEMMA.num_layers
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    for got, want in zip(
        (*found.cache.keys, *found.cache.values), (*expected.cache.keys, *expected.cache.values), strict=True
    ):
        assert_close(np.asarray(got), np.asarray(want))


def test_a_norm_of_a_single_row(monkeypatch, rng):
    """GPUs compute two rows that are alike, and go on with the first of them."""
    norm = Norm((64,), dataclasses.replace(LLAMA, width=64), jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((1, 1, 64)), jnp.bfloat16)
    expected = norm(x)
    shapes: list[tuple[int, ...]] = []

    def as_on_cuda(x: Any, *, cuda: Any, default: Any) -> Any:
        found = cuda(x)
        shapes.extend(part.shape for part in found)
        return found

    monkeypatch.setattr(jax.lax, "platform_dependent", as_on_cuda)
    stream, normed = norm.of_stream(x)
    np.testing.assert_array_equal(stream, x)
    np.testing.assert_array_equal(normed, expected)
    np.testing.assert_array_equal(norm(x), expected)
    assert shapes == [(1, 1, 64)] * 4
    # Several rows, and numbers of 32 bits, are left as they are.
    norm.of_stream(jnp.ones((1, 2, 64), jnp.bfloat16))
    norm.of_stream(x.astype(jnp.float32))
    assert len(shapes) == 4


@pytest.mark.parametrize(
    ("tokens", "dtype", "biases", "there"),
    [
        (1, jnp.bfloat16, False, True),
        (1, jnp.float16, False, True),
        (1, jnp.float32, False, False),
        (1, jnp.bfloat16, True, False),
        (2, jnp.bfloat16, False, True),
        (16, jnp.bfloat16, True, False),
        (16, jnp.bfloat16, False, True),
    ],
)
def test_what_kernels_are_for(tokens, dtype, biases, there):
    """Numbers of 16 bits, and no ALiBi."""
    layer = random_model(LLAMA, dtype, seed=0).layers[0].attention
    mask, numbers = jnp.ones((1, 1, 1, tokens, tokens), bool), jnp.arange(tokens, dtype=jnp.int32)[None]
    added = jnp.zeros((1, 4, tokens, tokens))
    at = Positions(None, (mask, mask), (added, added) if biases else None, numbers, numbers, 0)
    query, key = (jnp.zeros((1, heads, tokens, 8), dtype) for heads in (4, 2))
    assert (layer._kernel(at, query, key) is not None) == there


@pytest.mark.parametrize(("capabilities", "there"), [(["8.0", "12.0"], True), (["8.6", "7.5"], False)])
def test_old_gpus_attend_without_kernels(monkeypatch, capabilities, there):
    """Triton compiles for none before Ampere. Where there is no GPU, programs may be compiled for another machine."""
    gpus = [SimpleNamespace(compute_capability=capability) for capability in capabilities]
    at = Positions(None, (jnp.ones((1, 1, 1, 1, 1), bool),) * 2, None, *[jnp.zeros((1, 1), jnp.int32)] * 2, 0)
    layer = random_model(LLAMA, jnp.bfloat16, seed=0).layers[0].attention
    operands = [jnp.zeros((1, heads, 1, 8), jnp.bfloat16) for heads in (4, 2)]
    assert layer._kernel(at, *operands) is not None
    monkeypatch.setattr(jax, "local_devices", lambda **_: gpus)
    assert (layer._kernel(at, *operands) is not None) == there


@pytest.mark.slow
def test_a_jax_without_triton_attends_without_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "griffin_jax.model.flash", None)
    model = random_model(LLAMA, jnp.bfloat16, seed=0)
    prefilled = gj.prefill(model, jnp.zeros((1, 16), jnp.int32), jnp.asarray([16]), max_new_tokens=4)
    assert np.isfinite(np.asarray(prefilled.logits)).all()


@pytest.mark.slow
def test_drafts_are_read_by_a_kernel(kernels, rng):
    """Speculative answers are the full model's greedy ones, whichever way attention is computed."""
    model = random_model(GEMMA, seed=3)
    tokens = jnp.asarray(rng.integers(0, 61, (1, 20)).astype(np.int32))

    def answer() -> Any:
        prefilled = gj.prefill(model, tokens, jnp.asarray([20]), max_new_tokens=16)
        pruned = gj.prune(model, gj.select(prefilled.statistics, gj.GriffinConfig(0.5)))
        state = gj.init_decode(prefilled)
        return decode_speculative(model, pruned, state, 9, drafts=3)[0].tokens

    def dense() -> Any:
        prefilled = gj.prefill(model, tokens, jnp.asarray([20]), max_new_tokens=16)
        return gj.decode(model, gj.init_decode(prefilled), 9).tokens

    found, ran = kernels(lambda: jax.jit(lambda: answer())())
    assert {"decode_step", "read_few", "read_prompt"} == set(ran)
    np.testing.assert_array_equal(found[:, :9], jax.jit(dense)()[:, :9])


@pytest.mark.parametrize(("slots", "size"), [(200, 24), (70, 8)])
def test_what_slots_hold_that_are_not_filled_changes_nothing(cache, rng, slots, size):
    """Keys are loaded together with their neighbours, some of which may be beyond the last one."""
    filled = 133 if slots == 200 else 47
    keys, values, positions = cache(1, 2, size, slots, filled)
    query, position = rng.standard_normal((1, 2, 3, size)).astype(np.float32), positions.max(axis=1) + 1
    own = rng.standard_normal((2, 1, 2, size)).astype(np.float32)

    def mixed(beyond: float) -> np.ndarray:
        keys[..., filled:], values[:, :, filled:] = beyond, beyond
        arrays = query, *own, keys, values, position, positions, np.int32(filled)
        return np.asarray(flash.decode_step(*map(jnp.asarray, arrays), scale=SCALE, interpret=True)[0])

    np.testing.assert_array_equal(mixed(np.nan), mixed(0.0))


@pytest.mark.parametrize(("stop", "there", "below"), [(13, 24, 16), (16, 24, 16), (13, 30, 14), (13, 7, 13)])
def test_conditions_hold_for_numbers_that_are_loaded_together(stop, there, below):
    """Up to the next multiple of 8 that an array has room for, or of what its length and 8 have in common."""
    found = np.asarray(flash._below(jnp.int32(8), 32, stop, there))
    np.testing.assert_array_equal(found, np.arange(8, 40) < below)


@pytest.mark.parametrize("tokens", first_and_slow(1, 8, 1, 16))
def test_models_of_16_bits_have_gradients(tokens):
    """However few tokens there are: a program is traced for all platforms."""
    model = random_model(LLAMA, jnp.bfloat16, seed=0)

    def loss(model: gj.Transformer) -> Any:
        positions = jnp.arange(tokens, dtype=jnp.int32)[None]
        x, _, _ = model(jnp.ones((1, tokens), jnp.int32), positions, gj.empty_cache(LLAMA, 1, 32, jnp.bfloat16))
        return jnp.sum(model.logits(x) ** 2)

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(model))
    assert all(np.isfinite(np.asarray(gradient, np.float32)).all() for gradient in gradients)


@pytest.mark.thorough
@pytest.mark.parametrize("tokens", first_and_slow(1, 8, 1, 32))
def test_gradients_of_a_model_are_the_same_with_kernels(kernels, tokens, rng):
    """They are those of XLA's operations, wherever a kernel computed what they begin with."""
    model = random_model(GEMMA, seed=4)
    read = jnp.asarray(rng.integers(0, 61, (2, tokens)).astype(np.int32))

    def loss(model: gj.Transformer) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), read.shape)
        x, _, _ = model(read, positions, gj.empty_cache(GEMMA, 2, 40, jnp.float32))
        return jnp.sum(model.logits(x) ** 2)

    expected = jax.jit(jax.grad(loss))(model)
    found, ran = kernels(lambda: jax.jit(jax.grad(lambda model: loss(model)))(model))
    assert set(ran) == {"decode_step" if tokens == 1 else "read_few" if tokens < 16 else "read_prompt"}
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(np.asarray(got), np.asarray(want))
