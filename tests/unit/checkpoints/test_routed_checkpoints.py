"""Checkpoints of models with routed experts: one tensor for each expert or for all, in safetensors and GGUF files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import all_cases, build_torch
from safetensors.numpy import load_file, save_file

from griffin_jax.checkpoints import sources
from griffin_jax.checkpoints.loading import open_source

ROUTED = {name: cases for name, cases in all_cases().items() if cases.routed}


@dataclasses.dataclass(frozen=True)
class Saved:
    """A tiny model, saved by transformers with the published names of its tensors."""

    family: str
    torch: Any
    folder: Path


@pytest.fixture(scope="module", params=ROUTED)
def saved(request, tmp_path_factory) -> Saved:
    folder, cases = tmp_path_factory.mktemp(request.param), ROUTED[request.param]
    variant = list(cases.variants.values())[-1]
    return Saved(request.param, build_torch(request.param, {**cases.config, **variant}, folder), folder)


def parameters(source: Path) -> dict[str, np.ndarray]:
    opened = open_source(source)
    return {path: opened.read(path, np.dtype(np.float32)) for path in opened.shapes}


def assert_same(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)


@pytest.fixture
def small_pieces(monkeypatch):
    """Every tensor is a large one."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)


@pytest.mark.usefixtures("small_pieces")
def test_tensors_of_all_experts_are_those_of_each(saved, tmp_path):
    """As transformers holds them, in several files, against the names that models are published with."""
    saved.torch.save_pretrained(tmp_path, save_original_format=False, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(parameters(tmp_path), parameters(saved.folder))


def test_missing_and_misshapen_tensors_of_all_experts_are_named(saved, tmp_path):
    saved.torch.save_pretrained(tmp_path, save_original_format=False)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if ".experts." in name]:
        others = {other: array for other, array in weights.items() if other != name}
        save_file(others, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"1 missing: {name}$"):
            open_source(tmp_path)
        save_file({**others, name: weights[name][1:]}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"1 misshapen: {name} is"):
            open_source(tmp_path)
