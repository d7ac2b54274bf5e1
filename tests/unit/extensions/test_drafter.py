"""A copy of fewer bits that drafts: what it holds, what it drafts, and whose answers they are."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PASSAGES, first_and_slow
from flax import nnx
from reference import assert_close

import griffin_jax as gj
from griffin_jax.checkpoints.verification import dense_logits
from griffin_jax.cli.main import main
from griffin_jax.extensions.drafter import drafter_bytes, drafter_of, step_bytes
from griffin_jax.model.assembly import assemble, disassemble, random_model
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.weights import Precision, WeightFormat, quantise, stored_bytes
from griffin_jax.parallel.mesh import make_mesh

TINY = ModelConfig(
    family="llama", vocab_size=101, width=32, ff_width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=256, tied_head=True,
)  # fmt: skip
PROMPTS = [list(range(3, 40)), [9, 5, 70, 11, 2, 44]]
OPTIONS = {"max_new_tokens": 24, "ignore_eos": True}


def stored(leaves, format: WeightFormat) -> int:
    """Bytes of a drafter's arrays as its format says, however a CPU holds them."""
    kinds = [format.dtype if leaf.dtype == jnp.int8 else leaf.dtype for leaf in leaves]
    return sum(stored_bytes(leaf.shape, kind) for leaf, kind in zip(leaves, kinds, strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize("weights", first_and_slow(1, "int8:16", "float32", "int8", "int4:16", "bfloat16"))
@pytest.mark.parametrize("few", ["int4:16", "int8"])
@pytest.mark.parametrize("block", first_and_slow(1, 1000, 1 << 22))
def test_matrices_are_rounded_and_all_else_is_the_models(monkeypatch, weights, few, block):
    monkeypatch.setattr("griffin_jax.extensions.drafter.BLOCK", block)
    model = random_model(TINY, weights=WeightFormat.parse(weights))
    drafter, format = drafter_of(model, few), WeightFormat.parse(few)
    assert (drafter.weights, drafter.dtype) == (format, jnp.float32)
    ff, rounded = model.layers[1].ff, drafter.layers[1].ff
    for one, other, outputs in (
        (ff.gate_up_matrix(), (rounded.gate_up, rounded.gate_up_scale), "first"),
        (ff.down_matrix(), (rounded.down, rounded.down_row_scale or rounded.down_scale), "last"),
    ):
        for mine, expected in zip(other, quantise(one, format, outputs), strict=True):
            np.testing.assert_array_equal(mine[...], expected)
    # It computes what a model of these matrices computes that was loaded in this format.
    tokens = jnp.asarray([PROMPTS[0]], jnp.int32)
    if weights == "float32" and few == "int8":
        loaded = assemble(TINY, disassemble(model), jnp.float32, format)
        loaded.embedding, loaded.embedding_scale = model.embedding, nnx.data(None)
        loaded.head, loaded.head_scale = nnx.data(drafter.head), nnx.data(drafter.head_scale)
        assert_close(np.asarray(dense_logits(drafter, tokens)), np.asarray(dense_logits(loaded, tokens)))
    assert drafter.embedding[...] is model.embedding[...]
    assert drafter.layers[0].ff_norm.scale[...] is model.layers[0].ff_norm.scale[...]
    shared = {id(leaf) for leaf in jax.tree.leaves(model)}
    own = [leaf for leaf in jax.tree.leaves(drafter) if id(leaf) not in shared]
    assert stored(own, format) == drafter_bytes(TINY, Precision.of("float32", format))


def test_bytes_of_a_draft():
    drafter = drafter_of(random_model(TINY), "int4:16")
    pruned = gj.prune(drafter, gj.ExpertNeurons.from_indices([np.arange(24)] * 2, drafter.neurons))
    sizes = Sizes(TINY, 1, 40, Precision.of("float32"), shared=True)
    read = [leaf for leaf in jax.tree.leaves(pruned) if leaf is not pruned.embedding[...] and leaf.dtype != jnp.float32]
    assert step_bytes(TINY, Precision.of("float32"), 40, [24] * 2, WeightFormat.parse("int4:16")) == (
        stored(read, drafter.weights) + sizes.cache,
        sizes.step(None),
    )


@pytest.mark.thorough
@pytest.mark.parametrize("density", first_and_slow(1, 0.5, 1.0))
@pytest.mark.parametrize("weights", first_and_slow(1, "int8", "float32"))
def test_answers_are_the_full_models(weights, density):
    llm = gj.LLM(random_model(TINY, weights=WeightFormat.parse(weights)))
    expected = [llm.generate([prompt], density=1.0, **OPTIONS).tokens[0] for prompt in PROMPTS]
    options = OPTIONS | {"density": density, "speculative": 3, "draft_weights": "int4:16"}
    out = llm.generate(PROMPTS, **options)
    assert out.tokens == expected
    drafter = llm._drafter
    # Drafts of a random model are right now and then.
    assert 0 < out.drafting.accepted.sum() < out.drafting.drafted.sum()
    assert llm.generate(PROMPTS, **options).tokens == expected
    assert llm._drafter is drafter is not None


@pytest.mark.slow
def test_drafts_are_the_drafters(worded):
    """At density 1 in fewer bits, nothing but the format is between what drafts and what answers."""
    options = OPTIONS | {"density": 1.0, "speculative": 3}
    fine = worded.llm.generate(PASSAGES[0], draft_weights="int8:16", **options)
    coarse = worded.llm.generate(PASSAGES[0], draft_weights="int4:32", **options)
    assert fine.tokens == coarse.tokens == worded.llm.generate(PASSAGES[0], density=1.0, **OPTIONS).tokens
    assert fine.drafting.accepted.sum() > coarse.drafting.accepted.sum()
    assert fine.drafting.accepted.sum() > 0.8 * fine.drafting.drafted.sum()


@pytest.mark.slow
def test_refitted_and_shared(worded):
    options = OPTIONS | {"density": 0.5, "speculative": 2, "draft_weights": "int4", "refit": 16, "shared": True}
    dense = [worded.llm.generate(passage, density=1.0, **OPTIONS).tokens[0] for passage in PASSAGES[:2]]
    assert worded.llm.generate(PASSAGES[:2], **options).tokens == dense


@pytest.mark.slow
def test_on_a_mesh():
    mesh = make_mesh(data=1, model=2)
    here, there = (random_model(TINY, mesh=each, weights=WeightFormat("int8")) for each in (None, mesh))
    for one, other in zip(*map(jax.tree.leaves, map(drafter_of, (here, there))), strict=True):
        np.testing.assert_array_equal(one, other)
    options = OPTIONS | {"density": 0.5, "groups": 2, "speculative": 2, "draft_weights": "int4"}
    assert gj.LLM(there).generate(PROMPTS, **options).tokens == gj.LLM(here).generate(PROMPTS, **options).tokens


@pytest.mark.thorough
def test_memory_of_a_drafter_is_asked_for(monkeypatch):
    llm = gj.LLM(random_model(TINY))
    asked = []
    monkeypatch.setattr("griffin_jax.llm.llm.memory.check", lambda parts, *_: asked.append(parts))
    for _ in range(2):
        llm.generate([PROMPTS[0]], density=0.5, speculative=2, draft_weights="int4:16", **OPTIONS)
    first, second = asked
    # On a CPU each number of 4 bits is a byte in memory.
    assert first["drafting model"] == 2 * drafter_bytes(TINY, Precision.of("float32", WeightFormat.parse("int4:16")))
    assert "drafting model" not in second


class TestErrors:
    @pytest.mark.parametrize("weights", ["float32", "bfloat16", "int3", "int4:", 4])
    def test_no_format_of_integers(self, weights):
        with pytest.raises(ValueError, match=r"draft_weights are '.*'; allowed are int8 and int4"):
            gj.Extensions(speculative=True, draft_weights=weights)

    def test_nothing_is_drafted(self):
        with pytest.raises(ValueError, match="nothing is drafted: speculative=True"):
            gj.Extensions(draft_weights="int4")

    def test_groups_that_do_not_divide(self):
        llm = gj.LLM(random_model(TINY))
        with pytest.raises(ValueError, match="groups of 24 do not divide rows of 32 weights"):
            llm.generate([PROMPTS[0]], speculative=True, draft_weights="int4:24")

    def test_in_place(self):
        llm = gj.LLM(random_model(TINY), in_place=True)
        with pytest.raises(ValueError, match="draft_weights=None"):
            llm.generate([PROMPTS[0]], speculative=True, draft_weights="int4", shared=True)


@pytest.mark.thorough
def test_command(worded, capsys):
    dense = worded.llm.generate(PASSAGES[0], density=1.0, **OPTIONS).tokens[0]
    arguments = [
        "generate",
        "--model",
        str(worded.folder),
        "--prompt",
        PASSAGES[0],
        "--max-new-tokens",
        "24",
        "--ignore-eos",
    ]
    main([*arguments, "--speculative", "2", "--draft-weights", "int4", "--density", "1", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tokens"] == dense
    assert found["drafting"]["drafted"] >= found["drafting"]["accepted"] > 0
