"""A process keeps a bounded number of compiled programs, and what holds the others is really given up."""

from __future__ import annotations

import gc
import random
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import griffin_jax as gj
from griffin_jax.model.assembly import random_model
from griffin_jax.utils import programs

CONFIG = gj.ModelConfig(
    family="llama", vocab_size=64, width=16, ff_width=400, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    max_positions=4096,
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> Iterator[None]:
    """Each test begins without programs, and with its own limit."""
    programs.clear()
    monkeypatch.setattr(programs, "_warned", True)
    monkeypatch.setattr(programs, "_dropped", 0)
    yield
    programs.clear()


def maps() -> int:
    return programs.MAPS.read_bytes().count(b"\n")


@programs.jit(static_argnames="k", donate_argnames="x")
def power(x: jax.Array, y: jax.Array | None = None, *, k: int = 1) -> jax.Array:
    return jax.lax.fori_loop(0, k, lambda _, z: jnp.sort(z @ x) + (0 if y is None else y), x)


def ones() -> jax.Array:
    return jnp.ones((8, 8))


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="counts memory maps")


@on_linux
def test_dropped_programs_give_their_memory_maps_back(monkeypatch):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 5)
    found = []
    for k in range(1, 31):
        power(ones(), k=k)
        found.append(maps())
    assert programs.count() == 5
    # Each has about ten.
    assert max(found[10:]) <= max(found[:10]) + 15


@pytest.mark.thorough
def test_what_jax_has_traced_goes_with_dropped_programs(monkeypatch):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(programs, "DROPS_UNTIL_CLEARED", 10)
    found = {}
    for k in range(1, 43):
        power(ones(), k=k)
        if k in (12, 21, 42):
            gc.collect()
            found[k] = len(gc.get_objects())
    # Cleared when 12, 22, 32 and 42 programs were made.
    assert found[21] > found[12] + 150
    assert found[42] < found[12] + 100


def test_the_least_recently_used_goes(monkeypatch, compiled):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    for k in (1, 2, 1, 3, 1):
        power(ones(), k=k)
    before = len(compiled)
    power(ones(), k=1)
    power(ones(), k=3)
    assert len(compiled) == before
    power(ones(), k=2)
    assert len(compiled) == before + 1


@on_linux
def test_programs_go_before_the_memory_maps_are_used_up(monkeypatch):
    most = 2 * (maps() + 60)
    monkeypatch.setattr(programs, "_most_maps", lambda: most)
    for k in range(1, 31):
        power(ones(), k=k)
    assert 1 <= programs.count() < 15


def test_one_warning_says_what_compiles_again(monkeypatch):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(programs, "_warned", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(1, 7):
            power(ones(), k=k)
    (warning,) = caught
    assert "density" in str(warning.message)
    assert "MAX_PROGRAMS (2)" in str(warning.message)
    assert warning.filename == __file__


def test_it_is_a_jit(compiled):
    x = ones()
    whole = power(x, 2, k=2)
    assert x.is_deleted()
    before = len(compiled)
    np.testing.assert_array_equal(power(x=ones(), k=2, y=2), whole)
    assert len(compiled) == before
    with pytest.raises(TypeError, match="unexpected keyword"):
        power(ones(), n=3)
    lowered = power.lower(ones(), 2, k=2)
    np.testing.assert_array_equal(lowered.compile()(ones(), 2), whole)
    assert power.eval_shape(ones(), k=2).shape == (8, 8)


def test_inside_of_a_jit_nothing_is_kept():
    expected = power(ones(), k=3)
    before = programs.count()
    inside = jax.jit(lambda x: power(x, k=3))
    np.testing.assert_array_equal(inside(ones()), expected)
    np.testing.assert_array_equal(jax.vmap(lambda x: power(x, k=3))(ones()[None])[0], expected)
    assert programs.count() == before


@pytest.mark.parametrize("drops", [512, 3])
def test_threads_drop_what_others_are_using(monkeypatch, drops):
    monkeypatch.setattr(programs, "DROPS_UNTIL_CLEARED", drops)
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    wanted = [random.Random(0).randrange(1, 6) for _ in range(60)]
    expected = {k: np.asarray(power(ones(), k=k)) for k in range(1, 6)}
    with ThreadPoolExecutor(4) as pool:
        for k, found in zip(wanted, pool.map(lambda k: np.asarray(power(ones(), k=k)), wanted), strict=True):
            np.testing.assert_array_equal(found, expected[k])
    assert programs.count() <= 2


def answer(llm: gj.LLM, rng: random.Random) -> None:
    """One of very many requests that differ in all that can differ."""
    options = {"density": rng.uniform(0.1, 0.9), "shared": rng.random() < 0.5, "max_new_tokens": rng.randrange(1, 6)}
    if rng.random() < 0.5:
        options |= {"temperature": rng.uniform(0.1, 2), "top_k": rng.randrange(1, 70)}
    if rng.random() < 0.3:
        options["refit"] = rng.randrange(1, 40)
    if rng.random() < 0.3:
        options["speculative"] = rng.randrange(1, 5)
    llm.generate([[rng.randrange(64) for _ in range(rng.randrange(1, 40))]] * rng.randrange(1, 3), **options)


def test_every_step_of_an_answer_is_among_them():
    llm = gj.LLM(random_model(CONFIG))
    for density in (0.3, 0.4):
        llm.generate([[5]], density=density, max_new_tokens=3)
    names = [key[0].__name__ for key in programs._programs]
    assert sorted(names) == sorted(["prefill", "_init_decode", *2 * ["select", "_gathered", "decode"]])


@programs.jit
def draw(sampler: gj.Sample, logits: jax.Array, keys: jax.Array) -> jax.Array:
    return sampler(logits, keys)


def test_another_top_k_compiles_nothing(compiled):
    logits, keys = jnp.zeros((2, 500)), jax.random.split(jax.random.key(0), 2)
    found = [draw(gj.Sample(1.0, top_k=k), logits, keys) for k in (3, 50, np.int64(64))]
    assert len(found) == 3
    assert [key[0].__name__ for key in programs._programs] == ["draw"]


@on_linux
@pytest.mark.slow
def test_random_requests_take_no_more_memory_maps(monkeypatch):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 10)
    llm, rng, found = gj.LLM(random_model(CONFIG)), random.Random(0), []
    for _ in range(400):
        answer(llm, rng)
        found.append(maps())
        assert programs.count() <= 10
    half = len(found) // 2
    assert max(found[half:]) <= max(found[:half]) * 1.05
