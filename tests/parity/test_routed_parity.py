"""Families with routed experts equal Hugging Face's torch models; GRIFFIN within experts equals plain NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import VOCABULARY, all_cases, build_torch
from reference import assert_close, load_torch, oracle_squares, oracle_topk, stepwise_logits, torch_logits

import griffin_jax as gj
from griffin_jax.generation import jitted
from griffin_jax.griffin.masked import mask
from griffin_jax.model import grouped
from griffin_jax.model.cache import empty_cache
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.weights import Precision

ROUTED = {name: cases for name, cases in all_cases().items() if cases.routed}
MODELS = {
    f"{name}-{variant}": {**cases.config, **attributes}
    for name, cases in ROUTED.items()
    for variant, attributes in cases.variants.items()
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same random weights in torch and in JAX."""

    torch: Any
    llm: gj.LLM


LAST = [f"{name}-{list(cases.variants)[-1]}" for name, cases in ROUTED.items()]
"""The variants of every run, which have what the others have and more."""


def variants(usual: Collection[str]) -> list[Any]:
    """Every variant, of which some are for every run."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in usual)) for name in MODELS]


STRUCTURES = [name for name in LAST if name.startswith(("gpt_oss", "qwen2_moe"))]
"""Of every run: biases and sinks, and shared experts with a gate."""
of_each_structure = pytest.mark.parametrize("pair", variants(STRUCTURES), indirect=True)


@pytest.fixture(scope="module", params=variants(LAST))
def pair(request, tmp_path_factory) -> Pair:
    folder: Path = tmp_path_factory.mktemp("routed")
    model = build_torch(request.param.partition("-")[0], MODELS[request.param], folder)
    return Pair(model, gj.load(folder, "float32"))


@pytest.fixture
def small_blocks(monkeypatch):
    """Experts with several blocks of tokens."""
    monkeypatch.setattr(grouped, "BLOCK_TOKENS", 8)
    monkeypatch.setattr(grouped, "CPU_BLOCKS", (2, 8))


@pytest.mark.usefixtures("small_blocks")
def test_whole_sequences(pair, rng):
    tokens = rng.integers(3, VOCABULARY, (3, 60)).astype(np.int32)
    assert_close(stepwise_logits(pair.llm.model, [tokens], 60), torch_logits(pair.torch, tokens))


@of_each_structure
def test_steps(pair, rng):
    tokens = rng.integers(3, VOCABULARY, (1, 12)).astype(np.int32)
    pieces = [tokens[:, :5], *(tokens[:, t : t + 1] for t in range(5, 12))]
    assert_close(stepwise_logits(pair.llm.model, pieces, 12), torch_logits(pair.torch, tokens))


@pytest.mark.thorough
@pytest.mark.parametrize("pair", [name for name in LAST if name.startswith("gpt_oss")], indirect=True)
def test_ragged_rows_with_sinks(pair, rng):
    """Rows of different lengths with padding between their tokens, as prompts and steps; others are as dense models."""
    columns, lengths = 24, (1, 7, 24)
    padded = np.full((len(lengths), columns), -1, np.int32)
    places = [np.sort(rng.permutation(columns)[:length]) for length in lengths]
    rows = [rng.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]
    for line, place, row in zip(padded, places, rows, strict=True):
        line[place] = row
    logits = stepwise_logits(pair.llm.model, np.split(padded, [10, *range(20, columns)], axis=1), 40)
    for line, place, row in zip(logits, places, rows, strict=True):
        assert_close(line[place], torch_logits(pair.torch, [row])[0])


@jax.jit
def intermediates(model: gj.Transformer, tokens: jax.Array) -> list[jax.Array]:
    """z of every layer of whole sequences; of a routed layer that of all experts, with zeros where one was not read."""
    cache = empty_cache(model.config, *tokens.shape, jnp.float32)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]

    def everywhere(_layer: int, z: Any, _real: jax.Array) -> jax.Array:
        return z.everywhere() if hasattr(z, "everywhere") else z

    return model(tokens, positions, cache, read_slots=0, observe=everywhere)[2]


@pytest.mark.thorough
@of_each_structure
@pytest.mark.usefixtures("small_blocks")
def test_statistics_and_neurons_of_each_expert(pair, rng):
    """Ragged rows read in chunks, against each token's intermediates added up by NumPy."""
    model, lengths = pair.llm.model, np.asarray([30, 11])
    tokens = rng.integers(3, VOCABULARY, (2, 30)).astype(np.int32)
    read = jitted.prefill(model, tokens, lengths, max_new_tokens=1, chunk=8)
    config = gj.GriffinConfig(density=0.5)
    experts = gj.select(read.statistics, config)
    for sequence, length in enumerate(lengths):
        seen = intermediates(model, tokens[sequence : sequence + 1, :length])
        for layer, (z, ranges) in enumerate(zip(seen, model.config.neuron_ranges, strict=True)):
            every, parts, kept, start = np.asarray(z)[0], [], [], 0
            for size in ranges:
                squares = oracle_squares(every[:, start : start + size])
                parts.append(squares)
                found = np.asarray(read.statistics.squares[layer][sequence, start : start + size])
                kept.append(start + oracle_topk(np.sqrt(found), size // 2))
                start += size
            np.testing.assert_allclose(
                read.statistics.squares[layer][sequence], np.concatenate(parts), rtol=1e-5, atol=1e-5
            )
            np.testing.assert_array_equal(experts[layer][sequence], np.concatenate(kept))


@pytest.mark.thorough
@of_each_structure
def test_pruned_is_masked(pair, rng):
    """The gathered rows compute what the full model does in which only they take part."""
    model = pair.llm.model
    tokens = jnp.asarray(rng.integers(3, VOCABULARY, (1, 20)), jnp.int32)
    read = jitted.prefill(model, tokens, jnp.asarray([20]), max_new_tokens=1)
    experts = gj.select(read.statistics, gj.GriffinConfig(density=0.5, shared=True))
    pruned = gj.prune(model, experts)
    assert pruned.neurons == gj.GriffinConfig(density=0.5).kept(model.config.neuron_ranges)
    assert_close(stepwise_logits(pruned, [tokens], 20), stepwise_logits(mask(model, experts), [tokens], 20))


@pytest.mark.thorough
@of_each_structure
def test_tokens_of_pruned_torch(pair, rng):
    """Greedy tokens at a density equal those of the torch model whose other neurons' down projections are zero."""
    torch = load_torch()
    from benchmarks.torchpeers import cache_name

    prompt = rng.integers(3, VOCABULARY, 16).tolist()
    experts = pair.llm.experts([prompt], density=0.5)
    answer = pair.llm.generate([prompt], density=0.5, max_new_tokens=8, seed=0).tokens[0]
    tokens = torch.tensor([prompt])
    read, name = pair.torch(tokens, use_cache=True), cache_name(pair.torch)
    saved = {name: parameter.clone() for name, parameter in pair.torch.named_parameters()}
    try:
        for layer, kept in enumerate(np.asarray(index).reshape(-1) for index in experts):
            _zero_others(torch, pair, layer, kept)
        got, cache, logits = [], getattr(read, name), read.logits
        for _ in answer:
            got.append(int(logits[0, -1].argmax()))
            step = pair.torch(torch.tensor([[got[-1]]]), use_cache=True, **{name: cache})
            cache, logits = getattr(step, name), step.logits
    finally:
        for name, parameter in pair.torch.named_parameters():
            parameter.copy_(saved[name])
    assert answer == got[: len(answer)]


SHARED_DOWN = ("mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj", "shared_mlp.output_linear")
"""The down projections of shared experts in torch models."""


def _zero_others(torch: Any, pair: Pair, layer: int, kept: np.ndarray) -> None:
    """Make all neurons of a layer of the torch model zero that are not kept."""
    module = pair.torch.model.layers[layer]
    module = getattr(module, "mlp", None) or module.block_sparse_moe
    is_kept = np.zeros(pair.llm.model.neurons[layer], bool)
    is_kept[kept] = True
    if hasattr(module, "down_proj"):
        module.down_proj.weight[:, torch.tensor(~is_kept)] = 0
        return
    stacked = module.experts.down_proj
    # In gpt-oss it lies the other way.
    stacked = stacked.swapaxes(1, 2) if pair.llm.config.family == "gpt_oss" else stacked
    own = stacked.shape[0] * stacked.shape[2]
    of_experts = torch.tensor(is_kept[:own].reshape(stacked.shape[0], 1, stacked.shape[2]))
    stacked.mul_(of_experts)
    if own < is_kept.size:
        modules = dict(pair.torch.model.layers[layer].named_modules())
        shared = next(modules[name] for name in SHARED_DOWN if name in modules)
        shared.weight[:, torch.tensor(~is_kept[own:])] = 0


@pytest.mark.slow
@of_each_structure
def test_own_neurons_of_a_batch(pair, rng):
    """Each answer of a batch is that of its prompt alone."""
    prompts = [rng.integers(3, VOCABULARY, length).tolist() for length in (12, 5)]
    together = pair.llm.generate(prompts, density=0.5, max_new_tokens=6).tokens
    assert together == [pair.llm.generate([prompt], density=0.5, max_new_tokens=6).tokens[0] for prompt in prompts]


def test_bytes_of_a_step(pair):
    """A step reads the chosen experts, and half of their neurons at a density of a half."""
    config = pair.llm.model.config
    sizes = Sizes(config, 1, 8, Precision.of(jnp.float32), shared=True)
    routing = config.routing
    assert routing is not None
    row = (3 * config.width + 2 * config.ff_bias) * 4
    read = [
        routing.active * routing.width + routing.shared_width if config.routed(layer) else config.ff_width
        for layer in range(config.num_layers)
    ]
    assert sizes.read(None) == sum(read) * row
    kept = gj.GriffinConfig(density=0.5).kept(config.neuron_ranges)
    assert sizes.read(kept) == sum(read) * row // 2
    assert sizes.step(None) - sizes.step(kept) == sum(read) * row // 2
    assert sizes.weights(None) == sum(leaf.nbytes for leaf in jax.tree.leaves(pair.llm.model))


@pytest.mark.slow
@of_each_structure
def test_native_checkpoint(pair, tmp_path, rng):
    """Converted, stored as int8, and read again."""
    prompt = [rng.integers(3, VOCABULARY, 9).tolist()]
    folder = tmp_path / "native"
    gj.save(pair.llm.model, folder)
    again = gj.load(folder, "float32")
    assert again.generate(prompt, max_new_tokens=6).tokens == pair.llm.generate(prompt, max_new_tokens=6).tokens
    few = gj.load(folder, "float32", weights="int8")
    assert few.generate(prompt, density=0.5, max_new_tokens=6).tokens
