"""What GGUF files of single families say in ways of their own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from cases import LLAMA_LIKE, VOCABULARY, all_cases, build_torch, rewrite_config
from checkpoints_gguf import add_field, write_gguf, write_twin
from reference import assert_close, stepwise_logits, torch_logits
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


# ---- Nemotron ----


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nemotron")
    build_torch("nemotron", {**all_cases()["nemotron"].config, "norm_eps": 1e-3}, folder)
    return folder


def test_epsilon_of_nemotron_is_in_the_file_twice(nemotron, tmp_path):
    """Newer converters take it for that of RMSNorms, too."""
    both = write_twin(nemotron, tmp_path / "both.gguf")
    one = write_twin(nemotron, tmp_path / "one.gguf", leave_out=("rms",))
    assert open_source(both).config == open_source(one).config == open_source(nemotron).config
    add = [lambda writer: writer.add_layer_norm_rms_eps(0.5)]
    with pytest.raises(ValueError, match=r"layer_norm_rms_epsilon is 0\.5, but attention\.layer_norm_epsilon is 0\.00"):
        open_source(write_twin(nemotron, tmp_path / "other.gguf", leave_out=("rms",), extra=add))


def scaled(kind: gguf.RopeScalingType | None, factor: float = 4.0, **more: float) -> Callable[[gguf.GGUFWriter], None]:
    """What makes the rotary embedding of a file one of another kind; further numbers by the end of their name."""

    def add(writer: gguf.GGUFWriter) -> None:
        if kind is not None:
            writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        for name, value in more.items():
            getattr(writer, f"add_rope_scaling_{name}")(value)

    return add


@pytest.mark.parametrize(
    ("add", "rope"),
    [
        (scaled(None), {"rope_type": "linear", "factor": 4.0}),
        (scaled(gguf.RopeScalingType.LINEAR), {"rope_type": "linear", "factor": 4.0}),
        (scaled(gguf.RopeScalingType.NONE), {"rope_type": "default"}),
        (
            scaled(gguf.RopeScalingType.YARN, orig_ctx_len=32),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_scaling_of_nemotron(nemotron, tmp_path, add, rope):
    file = write_twin(nemotron, tmp_path / "twin.gguf", leave_out=("rope_scaling",), extra=[add])
    folder = Path(shutil.copytree(nemotron, tmp_path / "hf"))
    rewrite_config(folder, rope_parameters={"rope_theta": 10_000.0, "partial_rotary_factor": 0.5, **rope})
    assert open_source(file).config == open_source(folder).config


def test_scaling_of_nemotron_that_is_not_in_the_metadata(nemotron, tmp_path):
    add = scaled(gguf.RopeScalingType.LONGROPE)
    with pytest.raises(ValueError, match="missing short_factor"):
        open_source(write_twin(nemotron, tmp_path / "twin.gguf", leave_out=("rope_scaling",), extra=[add]))


# ---- YaRN ----


@pytest.mark.parametrize("more", [{}, {"attn_factor": 1.0}, {"attention_factor": 1.3}])
def test_magnitude_of_yarn_is_that_of_transformers(tmp_path, more):
    """The file has `attn_factor` in the place of `attention_factor`, and transformers reads only the latter."""
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16, **more}
    model = build_torch("llama", {**LLAMA_LIKE, "num_hidden_layers": 1, "rope_parameters": rope}, tmp_path)
    rotary = open_source(write_twin(tmp_path, tmp_path / "twin.gguf")).config.rotary
    assert rotary.attention_factor == pytest.approx(model.model.rotary_emb.attention_scaling, rel=1e-6)


# ---- Granite ----


GRANITE4 = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "shared_intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 0,
    "num_experts_per_tok": 0, "layer_types": ["full_attention"] * 2, "position_embedding_type": "rope",
    "max_position_embeddings": 256, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
    "attention_multiplier": 0.09, "logits_scaling": 8.0, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
}  # fmt: skip


def test_granite_4_without_experts_or_other_layers_than_attention(tmp_path, rng):
    """Its file is one of Granite, with what it does not have, and a number of key/value heads for each layer."""
    model = build_torch("granitemoehybrid", GRANITE4, tmp_path)
    twin = gj.load(write_twin(tmp_path, tmp_path / "twin.gguf"), "float32").model
    assert (twin.config.family, twin.config.ff_width, twin.config.num_kv_heads) == ("granite", 48, 2)
    tokens = rng.integers(0, VOCABULARY, (2, 20)).astype(np.int32)
    assert_close(stepwise_logits(twin, [tokens], 20), torch_logits(model, tokens))


@pytest.fixture(scope="module")
def granite(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("granite")
    build_torch("granite", all_cases()["granite"].config, folder)
    return folder


@pytest.mark.parametrize(
    ("field", "value", "left_out", "message"),
    [
        ("rope.scaling.finetuned", False, (), r"rope\.scaling\.finetuned is False, .* has no rotary embedding"),
        ("attention.head_count_kv", [2, 0], ("head_count_kv",), r"kv is \[2, 0\]; only one value, the same"),
        (
            "attention.head_count_kv",
            [2],
            ("head_count_kv",),
            r"kv is \[2\]; only one value, .* in all 2 layers",
        ),
        ("ssm.novelty", 3, (), r"ssm\.novelty=3"),
    ],
)
def test_granites_that_are_refused(granite, tmp_path, field, value, left_out, message):
    def add(writer: gguf.GGUFWriter) -> None:
        add_field(writer, f"granite.{field}", value)

    with pytest.raises(ValueError, match=message):
        open_source(write_twin(granite, tmp_path / "twin.gguf", leave_out=left_out, extra=[add]))


def test_numbers_of_layers_may_be_listed(granite, tmp_path):
    config = open_source(granite).config

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_head_count([config.num_heads] * config.num_layers)
        writer.add_head_count_kv([config.num_kv_heads] * config.num_layers)
        writer.add_feed_forward_length([config.ff_width] * config.num_layers)

    left_out = ("head_count", "feed_forward_length")
    listed = open_source(write_twin(granite, tmp_path / "listed.gguf", leave_out=left_out, extra=[add])).config
    assert listed == open_source(write_twin(granite, tmp_path / "plain.gguf")).config
