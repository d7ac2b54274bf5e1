"""JAX_ENABLE_X64=1 changes what JAX makes of Python numbers, and no token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import griffin_jax as gj
from griffin_jax.model.assembly import random_model

CONFIG = gj.ModelConfig(
    family="llama", vocab_size=64, width=16, ff_width=40, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    max_positions=4096,
)  # fmt: skip
PROMPTS = [[5, 6, 7], [8, 9]]


def answers(options: dict) -> list[list[int]]:
    return gj.LLM(random_model(CONFIG)).generate(PROMPTS, max_new_tokens=6, **options).tokens


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": -4, "method": "sample"},
        pytest.param({"refit": 8, "refresh_every": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"speculative": 2, "lookup": True, "temperature": 1.0, "method": "topk_sample", "seed": [3, -4]},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_same_tokens(options):
    expected = answers(options)
    with jax.enable_x64(True):
        assert answers(options) == expected


@pytest.mark.slow
def test_prompts_of_several_chunks():
    model = random_model(CONFIG)
    tokens, lengths = map(jnp.asarray, gj.pad([[5, 6, 7, 8, 9]], 8))
    with jax.enable_x64(True):
        found = gj.prefill(model, tokens, lengths, max_new_tokens=4, chunk=4, rows=2)
        logits = gj.LLM(model).logits([[5, 6, 7]], prompt_length=2)
    assert {leaf.dtype for leaf in jax.tree.leaves((found, logits))} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    expected = gj.prefill(model, tokens, lengths, max_new_tokens=4, chunk=4, rows=2)
    np.testing.assert_array_equal(found.logits, expected.logits)
