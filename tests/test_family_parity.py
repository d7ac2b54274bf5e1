"""Every family equals Hugging Face's torch model: prompts, cached steps, ragged batches, experts, pruned tokens.

And nothing that could make it another model goes unnoticed: attributes of the configuration, tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import VOCABULARY, Cases, all_cases, build_torch, rewrite_config
from reference import oracle_squares, oracle_topk, torch_greedy, torch_intermediates, torch_logits
from safetensors.numpy import load_file, save_file

import griffin_jax as gj
from griffin_jax.families import families
from griffin_jax.loading import open_source
from griffin_jax.sources import read_hf_config

CASES = all_cases()
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same random weights in torch and in JAX."""

    torch: Any
    llm: gj.LLM
    folder: Path
    down: str


VARIANTS = [(family, variant) for family, cases in CASES.items() for variant in cases.variants]


@pytest.fixture(
    scope="module", params=VARIANTS, ids=lambda case: f"{case[0]}-{case[1].replace(', ', '-').replace(' ', '_')}"
)
def pair(request, tmp_path_factory) -> Pair:
    family, variant = request.param
    cases = CASES[family]
    folder = tmp_path_factory.mktemp(family)
    model = build_torch(family, {**cases.config, **cases.variants[variant]}, folder)
    return Pair(model, gj.load(folder, "float32"), folder, cases.down)


def run(model: gj.Transformer, steps: list[np.ndarray], slots: int) -> np.ndarray:
    """Logits of token columns read step by step through one cache; -1 is padding."""
    batch = steps[0].shape[0]
    context = np.sum([(step >= 0).sum(axis=1) for step in steps], axis=0)
    cache = gj.empty_cache(model.config, batch, slots, context=jnp.asarray(context, jnp.int32))
    logits, lengths = [], np.zeros((batch, 1), np.int32)
    for step in steps:
        real = step >= 0
        positions = np.where(real, lengths + np.cumsum(real, axis=1) - 1, gj.EMPTY).astype(np.int32)
        x, cache, _ = model(jnp.asarray(np.maximum(step, 0)), jnp.asarray(positions), cache)
        lengths += real.sum(axis=1, keepdims=True, dtype=np.int32)
        logits.append(np.asarray(model.logits(x)))
    return np.concatenate(logits, axis=1)


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


def test_whole_sequence(pair, rng):
    tokens = rng.integers(0, VOCABULARY, (2, 70)).astype(np.int32)
    close(run(pair.llm.model, [tokens], 70), torch_logits(pair.torch, tokens))


def test_token_by_token_through_the_cache(pair, rng):
    tokens = rng.integers(0, VOCABULARY, (2, 24)).astype(np.int32)
    steps = [tokens[:, :16], tokens[:, 16:19], *(tokens[:, t : t + 1] for t in range(19, 24))]
    close(run(pair.llm.model, steps, 40), torch_logits(pair.torch, tokens))


def test_ragged_batch_and_padding_anywhere(pair, rng):
    rows = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in (1, 7, 30)]
    expected = [torch_logits(pair.torch, [row])[0] for row in rows]
    tokens, lengths = gj.pad(rows, 32)
    prefilled = gj.prefill(pair.llm.model, jnp.asarray(tokens), jnp.asarray(lengths), room=4, collect=False)
    for index in range(len(rows)):
        close(np.asarray(prefilled.logits[index]), expected[index][-1])
    scattered = np.full((3, 40), -1, np.int32)
    places = [np.sort(rng.permutation(40)[: len(row)]) for row in rows]
    for index, row in enumerate(rows):
        scattered[index, places[index]] = row
    logits = run(pair.llm.model, [scattered[:, :24], scattered[:, 24:]], 50)
    for index in range(len(rows)):
        close(logits[index, places[index]], expected[index])


def test_experts_and_pruned_tokens(pair, rng):
    tokens = rng.integers(3, VOCABULARY, 37).tolist()
    experts = pair.llm.experts([tokens], density=0.5)
    z = torch_intermediates(pair.torch, tokens, pair.down)
    assert len(experts) == len(z)
    for kept, layer in zip(experts, z, strict=True):
        width = layer.shape[1]
        np.testing.assert_array_equal(kept[0], oracle_topk(oracle_squares(layer), width // 2))
    masks = [mask[0] for mask in experts.masks()]
    got = pair.llm.generate([tokens], max_new_tokens=12, density=0.5, ignore_eos=True).tokens[0]
    assert got == torch_greedy(pair.torch, tokens, 12, masks, pair.down)
    dense = pair.llm.generate([tokens], max_new_tokens=12, density=1.0, ignore_eos=True).tokens[0]
    assert dense == torch_greedy(pair.torch, tokens, 12, None, pair.down)


# ---- what must be noticed ----


@functools.cache
def saved(family: str, where: Path) -> Path:
    cases = CASES[family]
    folder = where / f"saved-{family}"
    build_torch(family, {**cases.config, **next(iter(cases.variants.values()))}, folder)
    return folder


@pytest.fixture(params=CASES)
def family_folder(request, tmp_path, tmp_path_factory) -> Path:
    """A copy of a family's checkpoint, to be spoiled."""
    source = saved(request.param, tmp_path_factory.getbasetemp())
    return Path(shutil.copytree(source, tmp_path / request.param))


def cases_of(folder: Path) -> Cases:
    return CASES[folder.name]


def test_unknown_attributes_are_refused(family_folder):
    rewrite_config(family_folder, hidden_novelty=3)
    with pytest.raises(ValueError, match="hidden_novelty=3"):
        open_source(family_folder)


def test_attributes_left_out_have_the_defaults_of_transformers(family_folder):
    """Or are asked for. A default of ours that differs would be another model."""
    from transformers import AutoConfig

    complete = json.loads((family_folder / "config.json").read_text())
    for name in complete.keys() - {"model_type", "architectures"}:
        without = {key: value for key, value in complete.items() if key != name}
        (family_folder / "config.json").write_text(json.dumps(without))
        try:
            _, ours = read_hf_config(family_folder)
        except ValueError:
            continue
        filled = AutoConfig.for_model(**without).to_dict()
        (family_folder / "config.json").write_text(json.dumps(filled))
        _, theirs = read_hf_config(family_folder)
        assert ours == theirs, f"without {name}"


def tensors_to_spoil(weights: dict[str, np.ndarray]) -> list[str]:
    return [name for name in weights if ".0." in name or not any(f".{layer}." in name for layer in range(9))]


def test_missing_tensors_are_named(family_folder):
    weights = load_file(family_folder / "model.safetensors")
    for name in tensors_to_spoil(weights):
        save_file({key: value for key, value in weights.items() if key != name}, family_folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"1 missing: {name}"):
            open_source(family_folder)


def test_misshapen_tensors_are_named(family_folder):
    weights = load_file(family_folder / "model.safetensors")
    for name in tensors_to_spoil(weights):
        wrong = np.concatenate([weights[name], weights[name][:1]])
        save_file({**weights, name: wrong}, family_folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"1 misshapen: {name} is"):
            open_source(family_folder)


def test_surplus_tensors_are_named(family_folder):
    weights = load_file(family_folder / "model.safetensors")
    save_file({**weights, "novelty.weight": np.zeros(3, np.float32)}, family_folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: novelty\.weight"):
        open_source(family_folder)


def test_every_family_is_tested():
    assert CASES.keys() == families().keys()
