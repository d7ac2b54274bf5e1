"""Neurons of each sequence's own: copies of rows, or masks where copies would be no less to read."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import first_and_slow

import griffin_jax as gj
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation import jitted
from griffin_jax.griffin.prune import prune
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import make_mesh

PROMPTS = [[5, 9, 33, 7, 60, 21, 4], [80, 11, 3, 45], [7, 7, 90, 2, 14]]


def prefilled(model: Transformer, batch: int) -> gj.Prefilled:
    tokens, lengths = gj.pad(PROMPTS[:batch], 8)
    return jitted.prefill(model, tokens, lengths, max_new_tokens=8)


def masked(model: Transformer) -> bool:
    return all(layer.ff.mask is not None for layer in model.layers)


@pytest.mark.parametrize(
    ("batch", "density", "shared", "masks"),
    [
        (1, 0.5, False, False),
        (2, 0.5, False, True),
        (2, 0.45, False, False),
        pytest.param(3, 0.5, True, False, marks=pytest.mark.slow),
        (3, 0.35, False, True),
    ],
)
def test_masks_where_copies_would_be_no_less(tiny, batch, density, shared, masks):
    model, pruner = tiny.llm.model, Pruner.of(gj.GriffinConfig(density, shared=shared))
    read = prefilled(model, batch)
    experts, pruned = pruner(model, read.statistics)
    assert masked(pruned) == masks
    copied = prune(model, experts)
    expected = jitted.decode(copied, jitted.init_decode(prefilled(model, batch)), np.int32(8)).tokens
    np.testing.assert_array_equal(jitted.decode(pruned, jitted.init_decode(read), np.int32(8)).tokens, expected)


def test_refitted_rows_are_copies(tiny):
    model = tiny.llm.model
    pruner = Pruner(gj.GriffinConfig(0.5), rows=4)
    tokens, lengths = gj.pad(PROMPTS[:2], 8)
    read = jitted.prefill(model, tokens, lengths, max_new_tokens=8, rows=4)
    _, pruned = pruner(model, read.statistics, read.rows)
    assert not masked(pruned)
    assert pruned.layers[0].ff.per_sequence


def test_each_device_has_its_sequences(tiny):
    """Of four sequences on two devices each has two, which keep as many as there are only at a half."""
    llm = gj.load(tiny.folder, mesh=make_mesh(data=2))
    tokens, lengths = gj.pad([PROMPTS[0]] * 4, 8)
    read = jitted.prefill(llm.model, tokens, lengths, max_new_tokens=8)
    for density, masks in ((0.5, True), (0.4, False)):
        assert masked(Pruner.of(gj.GriffinConfig(density))(llm.model, read.statistics)[1]) == masks


@pytest.mark.thorough
@pytest.mark.parametrize("options", first_and_slow(1, {"refresh_every": 3}, {}, {"speculative": 2}), ids=str)
def test_answers_are_those_of_single_prompts(tiny, options):
    llm = tiny.llm
    together = llm.generate(PROMPTS, density=0.5, max_new_tokens=10, ignore_eos=True, **options)
    alone = [llm.generate([p], density=0.5, max_new_tokens=10, ignore_eos=True, **options).tokens[0] for p in PROMPTS]
    assert together.tokens == alone
    assert together.kept == (24, 24)
    assert together.experts is not None
    assert together.experts[0].shape == (3, 24)
    # Another answer of another shape after it.
    assert (
        llm.generate(PROMPTS[:1], density=0.5, max_new_tokens=4, ignore_eos=True).tokens[0]
        == (llm.generate(PROMPTS[:1], density=0.5, max_new_tokens=4, ignore_eos=True).tokens[0])
    )
