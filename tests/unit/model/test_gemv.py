"""The kernels for integers, interpreted: against NumPy, and in a model against the form that other platforms run."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from griffin_jax.model import gemv, products
from griffin_jax.model.weights import grouped

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def operands(rng) -> Any:
    """A function that makes tokens, integers with all their values, and scales of groups."""

    def make(tokens: int, rows: int, width: int, dtype: Any, groups: int, of: int) -> tuple[Any, ...]:
        limits = jnp.iinfo(dtype)
        numbers = rng.integers(limits.min, limits.max + 1, (rows, width)).astype(np.int8)
        scale = rng.uniform(0.5, 1.5, (rows, groups)).astype(np.float16) / limits.max
        x = rng.standard_normal((tokens, of)).astype(np.float32)
        return jnp.asarray(x, jnp.bfloat16), jnp.asarray(numbers).astype(dtype), jnp.asarray(scale)

    return make


def floating(numbers: Any, scale: Any) -> np.ndarray:
    """What integers and scales stand for, in float64."""
    wide = np.asarray(numbers.astype(jnp.int8), np.float64).reshape(*scale.shape, -1)
    return (wide * np.asarray(scale, np.float64)[..., None]).reshape(numbers.shape)


@pytest.mark.parametrize(
    ("tokens", "rows", "width", "dtype", "groups"),
    # Rows and words that are a block's, some more, fewer, and groups of one word and of more.
    [
        (1, 64, 512, jnp.int4, 16), (2, 35, 264, jnp.int8, 1), (1, 70, 320, jnp.int8, 5), (4, 3, 40, jnp.int4, 5),
        (1, 33, 1048, jnp.int4, 1),
    ],
)  # fmt: skip
class TestAgainstNumPy:
    def test_rows(self, operands, tokens, rows, width, dtype, groups):
        x, numbers, scale = operands(tokens, rows, width, dtype, groups, width)
        expected = np.asarray(x, np.float64) @ floating(numbers, scale).T
        assert gemv.fits(tokens, numbers, groups)
        np.testing.assert_allclose(gemv.rows_times(x, numbers, scale, interpret=True), expected, **CLOSE)

    def test_columns(self, operands, tokens, rows, width, dtype, groups):
        x, numbers, scale = operands(tokens, rows, width, dtype, groups, rows)
        expected = np.asarray(x, np.float64) @ floating(numbers, scale)
        np.testing.assert_allclose(gemv.sums_of_rows(x, numbers, scale, interpret=True), expected, **CLOSE)


def test_columns_without_scales(operands):
    """In several ranges of rows, the last of which is shorter."""
    x, numbers, _ = operands(2, 70, 200, jnp.int8, 1, 70)
    expected = np.asarray(x, np.float64) @ np.asarray(numbers, np.float64)
    np.testing.assert_allclose(gemv.sums_of_rows(x, numbers, interpret=True), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "width", "dtype", "groups", "there"),
    [
        (1, 256, jnp.int8, 1, True), (4, 256, jnp.int4, 8, True), (5, 256, jnp.int8, 1, False),
        (1, 256, jnp.float32, 1, False), (1, 258, jnp.int8, 1, False), (1, 36, jnp.int4, 1, False),
        (1, 192, jnp.int4, 8, False), (1, 2048, jnp.int8, 8, False),
    ],
)  # fmt: skip
def test_what_they_take(tokens, width, dtype, groups, there):
    """Few tokens, whole words, and groups of 1, 2, 4, ... words that are in one block."""
    assert gemv.fits(tokens, jnp.zeros((2, width), dtype), groups) == there


@pytest.fixture
def on_gpu(monkeypatch) -> list[str]:
    """Products take the branch of GPUs, with kernels interpreted; the names of those that ran."""
    ran: list[str] = []

    def platform(*operands: Any, default: Any, **others: Any) -> Any:
        return others.get("cuda", default)(*operands)

    def noted(name: str) -> Any:
        kernel = getattr(gemv, name)

        def run(*operands: Any) -> Any:
            ran.append(name)
            return kernel(*operands, interpret=True)

        return run

    for name in ("rows_times", "sums_of_rows"):
        monkeypatch.setattr(gemv, name, noted(name))
    monkeypatch.setattr(jax.lax, "platform_dependent", platform)
    monkeypatch.setenv(products.GEMV_VARIABLE, "1")
    return ran


@pytest.mark.parametrize("groups", [1, 4])
def test_products_are_those_of_other_platforms(on_gpu, operands, monkeypatch, groups):
    """Of matrices with two leading axes, with their gradients, which are those of XLA's operations."""
    x, numbers, scale = operands(2, 24, 64, jnp.int8, groups, 64)
    x = x[:, None].astype(jnp.float32)
    stacked, scales = numbers.reshape(2, 12, 64), scale.reshape(2, 12, groups)
    outputs = scale[0, :1].repeat(64) if groups == 1 else None
    rows = scale if groups > 1 else None

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = products.linear(x, stacked, scales)
        return y, products.matmul(y.reshape(2, 1, 24), numbers, outputs, rows)

    found, gradient = both(x), jax.grad(lambda x: jnp.sum(both(x)[1] ** 2))(x)
    assert set(on_gpu) == {"rows_times", "sums_of_rows"}
    on_gpu.clear()
    monkeypatch.delenv(products.GEMV_VARIABLE)
    expected, expected_gradient = both(x), jax.grad(lambda x: jnp.sum(both(x)[1] ** 2))(x)
    assert not on_gpu
    for a, b in zip((*found, gradient), (*expected, expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    np.testing.assert_allclose(found[0].reshape(2, 24), x[:, 0] @ grouped(numbers, scale).reshape(24, 64).T, **CLOSE)


def test_a_jax_without_triton_old_gpus_and_other_operands_take_xlas_products(on_gpu, operands, monkeypatch):
    x, numbers, scale = operands(5, 8, 64, jnp.int8, 1, 64)
    products.linear(x[:, None], numbers, scale)
    products.linear(x[:1, None], numbers.astype(jnp.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda **_: [SimpleNamespace(compute_capability="7.5")])
        products.linear(x[:1, None], numbers, scale)
    monkeypatch.setitem(sys.modules, "griffin_jax.model.gemv", None)
    monkeypatch.delattr("griffin_jax.model.gemv")
    products.linear(x[:1, None], numbers, scale)
    assert not on_gpu
