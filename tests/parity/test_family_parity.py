"""Every family equals Hugging Face's torch model: prompts, cached steps, ragged batches, experts, pruned tokens.

And nothing that could make it another model goes unnoticed: attributes of the configuration, tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from cases import (
    TOKENWISE,
    VOCABULARY,
    Cases,
    all_cases,
    attention_structure,
    build_torch,
    feed_forward_structure,
    first_of_each,
    rewrite_config,
)
from checkpoints_gguf import RECIPES, write_twin
from conftest import every_and_slow
from reference import (
    assert_close,
    oracle_squares,
    oracle_topk,
    stepwise_logits,
    torch_greedy,
    torch_intermediates,
    torch_logits,
)
from safetensors.numpy import load_file, save_file

import griffin_jax as gj
from griffin_jax.checkpoints.families import NOT_IN_GGUF, families
from griffin_jax.checkpoints.huggingface import read_hf_config
from griffin_jax.checkpoints.loading import open_source
from griffin_jax.checkpoints.schema.family import is_ignored
from griffin_jax.model.config import Alibi, Routing

CASES = all_cases()

pytestmark = pytest.mark.filterwarnings("ignore:.*only the text model is read:UserWarning")


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same random weights in torch and in JAX."""

    torch: Any
    llm: gj.LLM
    folder: Path
    down: str
    not_in_gguf: str | None


def parameter(family: str, variant: str, **options: Any) -> Any:
    return pytest.param((family, variant), id=f"{family}-{variant.replace(', ', '-').replace(' ', '_')}", **options)


def variants(usual: set[tuple[str, str]]) -> list[Any]:
    """Every variant, of which some are for every run."""
    return [
        parameter(family, variant, marks=[pytest.mark.slow] * ((family, variant) not in usual))
        for family, cases in CASES.items()
        for variant in cases.variants
        if not cases.routed
    ]


ATTENTION, FEED_FORWARD = (first_of_each(structure) for structure in (attention_structure, feed_forward_structure))
VARIANTS = variants(ATTENTION | FEED_FORWARD | {(family, next(iter(CASES[family].variants))) for family in CASES})


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory) -> Iterator[Pair]:
    family, variant = request.param
    cases = CASES[family]
    folder = tmp_path_factory.mktemp(family)
    model = build_torch(family, {**cases.config, **cases.variants[variant]}, folder)
    yield Pair(model, gj.load(folder, "float32"), folder, cases.down, cases.not_in_gguf.get(variant))
    if variant == list(cases.variants)[-1]:
        # Some gigabytes of small programs after a few families. All families share the smallest, so not after each.
        pair_families.append(family)
        if len(pair_families) % 5 == 0:
            jax.clear_caches()


pair_families: list[str] = []


@pytest.fixture
def query_blocks(monkeypatch) -> None:
    """Long sequences in several blocks. For every test that compiles their length: a program is compiled once."""
    monkeypatch.setattr("griffin_jax.model.attention.QUERY_BLOCK", 32)


@pytest.mark.usefixtures("query_blocks")
def test_whole_sequences(pair, rng):
    tokens = rng.integers(0, VOCABULARY, (3, 70)).astype(np.int32)
    assert_close(stepwise_logits(pair.llm.model, [tokens], 70), torch_logits(pair.torch, tokens))


@pytest.mark.parametrize("pair", variants(ATTENTION), indirect=True)
def test_ragged_rows_step_by_step_through_the_cache(pair, rng):
    """Rows of different lengths with padding anywhere between their tokens, as prompts and single tokens."""
    columns, lengths = 24, (1, 7, 24)
    padded = np.full((len(lengths), columns), -1, np.int32)
    places = [np.sort(rng.permutation(columns)[:length]) for length in lengths]
    rows = [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]
    for line, place, row in zip(padded, places, rows, strict=True):
        line[place] = row
    steps = np.split(padded, [10, *range(20, columns)], axis=1)
    logits = stepwise_logits(pair.llm.model, steps, 40)
    for line, place, row in zip(logits, places, rows, strict=True):
        assert_close(line[place], torch_logits(pair.torch, [row])[0])


@pytest.mark.parametrize("pair", variants(FEED_FORWARD), indirect=True)
def test_experts_and_pruned_tokens_of_a_batch(pair, rng):
    prompts = [rng.integers(3, VOCABULARY, length).tolist() for length in (37, 20)]
    out = pair.llm.generate(prompts, max_new_tokens=12, density=0.5, ignore_eos=True)
    for row, prompt in enumerate(prompts):
        z = torch_intermediates(pair.torch, prompt, pair.down)
        assert len(out.experts) == len(z)
        for kept, layer in zip(out.experts, z, strict=True):
            np.testing.assert_array_equal(kept[row], oracle_topk(oracle_squares(layer), layer.shape[1] // 2))
        masks = [mask[row] for mask in out.experts.masks()]
        assert out.tokens[row] == torch_greedy(pair.torch, prompt, 12, masks, pair.down)


def same(one: gj.Transformer, other: gj.Transformer) -> bool:
    """Whether two models have the same configuration, but for its name, and the same arrays: they compute the same."""
    ours, theirs = (jax.tree.leaves_with_path(model) for model in (one, other))
    config = dataclasses.replace(one.config, family=other.config.family)
    return config == other.config and all(
        path == place and np.array_equal(array, counterpart)
        for (path, array), (place, counterpart) in zip(ours, theirs, strict=True)
    )


@pytest.mark.usefixtures("query_blocks")
def test_gguf_twin(pair, rng, tmp_path):
    """Where it is not the very same model (GGUF rounds numbers of the configuration to float32), its logits count."""
    family = pair.llm.config.family
    if reason := why_not_in_gguf().get(family):
        pytest.skip(reason)
    if pair.not_in_gguf:
        check_reason(pair, tmp_path / "twin.gguf")
        pytest.skip(pair.not_in_gguf)
    twin = gj.load(write_twin(pair.folder, tmp_path / "twin.gguf"), "float32")
    if not same(twin.model, pair.llm.model):
        tokens = rng.integers(0, VOCABULARY, (3, 70)).astype(np.int32)
        assert_close(stepwise_logits(twin.model, [tokens], 70), torch_logits(pair.torch, tokens))


def test_every_field_of_a_configuration_is_in_the_structure_or_of_one_token():
    """A new field is to be placed; and whatever is in the structure can make it another one."""
    base = gj.ModelConfig("llama", 101, 32, 48, 2, 4, 2, 8, 256)
    longrope = gj.Rotary(kind="longrope", original_positions=8, short_factors=(1.0,) * 4, long_factors=(2.0,) * 4)
    changes = {
        "rotary": longrope, "local_rotary": gj.Rotary(theta=500.0), "unrotated_layers": (1,), "windows": (0, 8),
        "learned_positions": True, "alibi": Alibi(), "attention_softcap": 5.0, "head_norm": "own", "parallel": True,
        "norm_placement": "sandwich", "gated": False, "ff_bias": True, "attention_sinks": True,
        "routing": Routing(4, 2, 24),
    }  # fmt: skip
    assert changes.keys() | TOKENWISE == {field.name for field in dataclasses.fields(gj.ModelConfig)}
    assert not changes.keys() & TOKENWISE
    changed = [base, *(dataclasses.replace(base, **{name: value}) for name, value in changes.items())]
    assert len({(attention_structure(config), feed_forward_structure(config)) for config in changed}) == len(changed)


def why_not_in_gguf() -> dict[str, str]:
    """The reason of each family that is not read from GGUF files."""
    return {name: reason for reason, names in NOT_IN_GGUF.items() for name in names}


def check_reason(pair: Pair, file: Path) -> None:
    """A file cannot say what the variant is, if it cannot be written or read, or what is read is another model."""
    try:
        twin = gj.load(write_twin(pair.folder, file), "float32").model
    except (AssertionError, KeyError, TypeError, ValueError):
        return
    assert not same(twin, pair.llm.model), f"a GGUF file can say it: {pair.not_in_gguf}"


def test_every_family_that_llama_cpp_has_is_read_from_gguf_files():
    """Or is said not to be in llama.cpp, as far as the gguf package tells: it lists architectures."""
    reasons, known = why_not_in_gguf(), set(gguf.MODEL_ARCH_NAMES.values())
    assert sum(map(len, NOT_IN_GGUF.values())) == len(reasons)
    for name, family in families().items():
        architectures = family.gguf.architectures if family.gguf else family.also_gguf
        assert not (family.gguf and family.also_gguf), name
        assert bool(architectures) == (name in RECIPES) == (name not in reasons), name
        assert set(architectures) <= known, name
        assert name not in RECIPES or gguf.MODEL_ARCH_NAMES[RECIPES[name].architecture] in architectures, name
    alike = {re.sub(r"[-_.]", "", name): name for name in known}
    found = {alike[plain] for name in reasons if (plain := re.sub(r"[-_.]", "", name)) in alike}
    # A name without a converter and a model.
    assert found == {"gptj"}


def test_variants_that_a_gguf_file_cannot_say_exist():
    for name, cases in CASES.items():
        assert cases.not_in_gguf.keys() <= cases.variants.keys(), name
        assert name in RECIPES or not cases.not_in_gguf, name


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


# Names and files are looked up alike for all families: every fourth is for every run.
some_families = pytest.mark.parametrize("family_folder", every_and_slow(4, *CASES), indirect=True)


def cases_of(folder: Path) -> Cases:
    return CASES[folder.name]


@some_families
def test_unknown_attributes_are_named(family_folder):
    """They change nothing, because transformers does not read them either."""
    rewrite_config(family_folder, hidden_novelty=3)
    with pytest.warns(UserWarning, match="hidden_novelty=3"):
        open_source(family_folder)


@pytest.mark.filterwarnings("ignore:.*is outside the vocabulary:UserWarning")
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


def tensors_to_spoil(folder: Path, weights: dict[str, np.ndarray]) -> dict[str, str]:
    """Those of the first layer and of none, each with its name in the family."""
    family = families()[folder.name]
    return {
        name: family.name_of(name)
        for name in weights
        if (".0." in name or not any(f".{layer}." in name for layer in range(9)))
        and not is_ignored(name, family.ignored)
    }


@some_families
def test_missing_tensors_are_named(family_folder):
    weights = load_file(family_folder / "model.safetensors")
    for name, ours in tensors_to_spoil(family_folder, weights).items():
        save_file({key: value for key, value in weights.items() if key != name}, family_folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"1 missing: {ours}"):
            open_source(family_folder)


@some_families
def test_misshapen_tensors_are_named(family_folder):
    weights = load_file(family_folder / "model.safetensors")
    for name, ours in tensors_to_spoil(family_folder, weights).items():
        wrong = np.concatenate([weights[name], weights[name][:1]])
        save_file({**weights, name: wrong}, family_folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"1 misshapen: {ours} is"):
            open_source(family_folder)


@some_families
def test_surplus_tensors_are_named(family_folder):
    weights = load_file(family_folder / "model.safetensors")
    save_file({**weights, "novelty.weight": np.zeros(3, np.float32)}, family_folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: novelty\.weight"):
        open_source(family_folder)


def test_every_family_is_tested():
    assert CASES.keys() == families().keys()
