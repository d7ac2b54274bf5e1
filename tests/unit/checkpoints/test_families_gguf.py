"""What GGUF files of single families say in ways of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from cases import all_cases, build_torch
from checkpoints_gguf import write_twin

import griffin_jax as gj
from griffin_jax.checkpoints.loading import open_source


@pytest.fixture(scope="module")
def apertus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("apertus")
    cases = all_cases()["apertus"]
    build_torch("apertus", {**cases.config, **cases.variants["xielu"]}, folder)
    return folder


def with_numbers(folder: Path, file: Path, name: str, value: Any) -> Path:
    """A twin whose xIELUs have other numbers of this name, or none."""

    def add(writer: gguf.GGUFWriter) -> None:
        if isinstance(value, float):
            writer.add_float32(f"xielu.{name}", value)
        elif value is not None:
            writer.add_array(f"xielu.{name}", value)

    return write_twin(folder, file, leave_out=(f"xielu_{name}",), extra=[add])


def test_numbers_in_the_metadata_are_those_of_each_layer(apertus, tmp_path):
    twin = gj.load(with_numbers(apertus, tmp_path / "twin.gguf", "alpha_p", [0.25, 0.75]), "float32")
    curves = [float(layer.ff.positive_curve[0]) for layer in twin.model.layers]
    assert curves == [0.25, 0.75]


def test_one_number_in_the_metadata_is_that_of_all_layers(apertus, tmp_path):
    twin = gj.load(with_numbers(apertus, tmp_path / "twin.gguf", "alpha_p", 0.25), "float32")
    assert [float(layer.ff.positive_curve[0]) for layer in twin.model.layers] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("alpha_p", None, r"missing: blk\.0\.xielu\.alpha_p"),
        ("alpha_p", [0.25], r"xielu\.alpha_p must be a number for each of 2 layers, got \[0\.25\]"),
        ("alpha_n", ["x", "y"], r"xielu\.alpha_n must be a number for each of 2 layers, got \['x', 'y'\]"),
        ("beta", [0.5, 0.25], r"blk\.1\.xielu\.beta is \[0\.25\], and only 0\.5 is supported"),
        ("eps", 1.0, r"blk\.0\.xielu\.eps is \[1\.\], and only -1e-06 is supported"),
    ],
)  # fmt: skip
def test_numbers_in_the_metadata_are_checked(apertus, tmp_path, name, value, message):
    with pytest.raises(ValueError, match=message):
        open_source(with_numbers(apertus, tmp_path / "twin.gguf", name, value))


def test_numbers_in_the_metadata_are_finite(apertus, tmp_path):
    file = with_numbers(apertus, tmp_path / "twin.gguf", "alpha_n", [0.5, float(np.inf)])
    with pytest.raises(ValueError, match=r"blk\.1\.xielu\.alpha_n"):
        gj.load(file, "float32")


def test_epsilon_of_exaone_has_two_names(tmp_path):
    cases = all_cases()["exaone"]
    build_torch("exaone", {**cases.config, "rms_norm_eps": 1e-3}, tmp_path)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_layer_norm_eps(1e-3)

    files = [
        write_twin(tmp_path, tmp_path / "one.gguf"),
        write_twin(tmp_path, tmp_path / "two.gguf", leave_out=("rms_eps",), extra=[add]),
    ]
    assert [open_source(file).config.norm_eps for file in files] == [1e-3, 1e-3]
