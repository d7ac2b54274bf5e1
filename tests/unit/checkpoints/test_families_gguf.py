"""What GGUF files of single families say in ways of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from cases import all_cases, build_torch
from checkpoints_gguf import write_gguf, write_twin
from safetensors.numpy import load_file

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


def curves(file: Path) -> list[float]:
    source = open_source(file)
    paths = [f"layers.{layer}.ff.positive_curve" for layer in range(source.config.num_layers)]
    return [source.read(path, np.dtype("float32")).item() for path in paths]


def test_numbers_in_the_metadata_are_those_of_each_layer(apertus, tmp_path):
    assert curves(with_numbers(apertus, tmp_path / "twin.gguf", "alpha_p", [0.25, 0.75])) == [0.25, 0.75]


def test_one_number_in_the_metadata_is_that_of_all_layers(apertus, tmp_path):
    assert curves(with_numbers(apertus, tmp_path / "twin.gguf", "alpha_p", 0.25)) == [0.25, 0.25]


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


CHATGLM = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
    "model.layers": "transformer.encoder.layers",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def test_glm_is_the_same_when_published_as_chatglm(tmp_path):
    """With other names, and with queries, keys and values in one tensor."""
    attributes = {"head_dim": 8, "rms_norm_eps": 1e-3, "max_position_embeddings": 64, "num_key_value_heads": 2}
    build_torch("glm", {**all_cases()["glm"].config, **attributes}, tmp_path)
    weights: dict[str, np.ndarray] = {}
    fused: dict[str, list[np.ndarray]] = {}
    for name, array in load_file(tmp_path / "model.safetensors").items():
        for ours, theirs in CHATGLM.items():
            name = name.replace(ours, theirs)
        if ".self_attn." in name:
            fused.setdefault(name, []).append(array)
        else:
            weights[name] = array
    for name in [name for name in fused if ".q_proj." in name]:
        parts = [array for part in "qkv" for array in fused[name.replace(".q_proj.", f".{part}_proj.")]]
        weights[name.replace("self_attn.q_proj", "self_attention.query_key_value")] = np.concatenate(parts)
    config = {
        "model_type": "glm", "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 48,
        "multi_query_group_num": 2, "layernorm_epsilon": 1e-3, "seq_length": 64, "rope_ratio": 1,
    }  # fmt: skip
    twin = gj.load(write_gguf(tmp_path / "chatglm.gguf", weights, config), "float32").model
    model = gj.load(tmp_path, "float32").model
    assert twin.config == dataclasses.replace(model.config, bos_token_id=None, eos_token_ids=())
    for array, counterpart in zip(jax.tree.leaves(twin), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(array, counterpart)
