"""Checkpoints of models with routed experts: one tensor for each expert or for all, in safetensors and GGUF files."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import LLAMA_LIKE, all_cases, build_torch, rewrite_config
from checkpoints_gguf import RECIPES, write_twin
from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter
from reference import load_torch
from safetensors.numpy import load_file, save_file

from griffin_jax.checkpoints import sources
from griffin_jax.checkpoints.loading import convert, load_model, open_source
from griffin_jax.checkpoints.quantised import mxfp4
from griffin_jax.model.assembly import assemble, in_format_by_pieces
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.weights import Precision, WeightFormat

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


@pytest.mark.filterwarnings("ignore::griffin_jax.checkpoints.planning.NarrowingWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_corrects_the_choice_of_experts_stays_float32(tmp_path, dtype):
    """As in transformers (`_keep_in_fp32_modules_strict`): experts may be closer than 16 bits tell apart."""
    cases = ROUTED["glm4_moe"]
    build_torch("glm4_moe", cases.config, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("layers.1.mlp.gate.e_score_correction_bias")]
    weights[name] = (1 + np.arange(8) / 1e5).astype(np.float32)
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "native", dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "int8", dtype=dtype, weights="int8")
    for source, stored in (("hf", None), ("native", None), ("hf", "int8"), ("int8", None)):
        layer = load_model(tmp_path / source, dtype, weights=stored)[0].layers[1].ff
        assert layer.choice_bias is not None
        np.testing.assert_array_equal(layer.choice_bias[...], weights[name])
        assert layer.router[...].dtype == dtype


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


def test_a_layers_experts_are_never_whole_as_floating_numbers(tmp_path, monkeypatch):
    """Where they become integers; as NumPy counts what it allocates."""
    config = {**LLAMA_LIKE, "hidden_size": 128, "intermediate_size": 128, "num_local_experts": 32}
    torch = build_torch("mixtral", config, tmp_path)
    torch.save_pretrained(tmp_path / "stacked", save_original_format=False)
    twin = write_twin(tmp_path, tmp_path / "twin.gguf", GGMLQuantizationType.Q8_0)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1 << 16)
    experts, precision = 32 * 128 * 128, Precision.of("float32", WeightFormat("int8"))
    for source in (tmp_path, tmp_path / "stacked", twin):
        opened, peak = open_source(source), 0
        for layer in range(2):  # Programs are there when it is measured.
            path = f"layers.{layer}.ff.experts.up"
            tracemalloc.start()
            found = in_format_by_pieces(path, opened.pieces(path, np.dtype(np.float32)), opened.config, precision)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert found[path].nbytes == experts
        assert peak < 2 * experts < 4 * experts, source


# ---- four bits ----

PACKED = {**LLAMA_LIKE, "head_dim": 16, "intermediate_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2}


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tiny gpt-oss, whose experts are of four bits in one folder, and what transformers reads of them in another."""

    folder: Path
    weights: dict[str, np.ndarray]
    dequantised: Path

    def write(self, folder: Path, **changes: np.ndarray | None) -> Path:
        """The same, in two files, with changed tensors of the first layer's experts."""
        shutil.copytree(self.folder, folder)
        named = {f"model.layers.0.mlp.experts.{name}": array for name, array in changes.items()}
        weights = {name: array for name, array in {**self.weights, **named}.items() if array is not None}
        # Numbers in one file, scales in the other.
        files = {"model-1.safetensors": {}, "model-2.safetensors": {}}
        for name, array in weights.items():
            files[f"model-{1 + name.endswith('_scales')}.safetensors"][name] = array
        for file, tensors in files.items():
            save_file(tensors, folder / file)
        listed = {name: file for file, tensors in files.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Packed:
    torch = load_torch()
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, dequantised = tmp_path_factory.mktemp("packed"), tmp_path_factory.mktemp("dequantised")
    build_torch("gpt_oss", PACKED, dequantised)
    rng = np.random.default_rng(0)
    floating = load_file(dequantised / "model.safetensors")
    weights = dict(floating)
    for name in [name for name in floating if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, summed, outputs = weights.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outputs, summed // 32, 16), np.uint8)
        scales = rng.integers(110, 130, (experts, outputs, summed // 32), np.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        parts = torch.tensor(blocks), torch.tensor(scales)
        floating[name] = convert_moe_packed_tensors(*parts, dtype=torch.float32).contiguous().numpy()
    save_file(floating, dequantised / "model.safetensors")
    config = json.loads((dequantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return Packed(folder, weights, dequantised)


@pytest.mark.usefixtures("small_pieces")
def test_experts_of_four_bits_are_what_transformers_reads(packed, tmp_path):
    folder = packed.write(tmp_path / "packed")
    assert_same(parameters(folder), parameters(packed.dequantised))
    assert open_source(folder).dtype == np.float32
    assert open_source(folder).origin("layers.0.ff.experts.up").dtype == "MXFP4"


def test_every_byte_and_scale_of_four_bits():
    """As the specification says it: sign, exponent with a bias of 1, mantissa; a power of two with a bias of 127."""
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
    numbers = mxfp4.dequantise(blocks, np.full((16, 1), 127, np.uint8)).reshape(256, 2)
    for byte, pair in enumerate(numbers):
        for number, bits in zip(pair, (byte & 15, byte >> 4), strict=True):
            sign, exponent, mantissa = bits >> 3, (bits >> 1) & 3, bits & 1
            magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            assert number == (-1) ** sign * magnitude
    twos = np.full((255, 1, 16), 0x22, np.uint8)
    scaled = mxfp4.dequantise(twos, np.arange(255, dtype=np.uint8)[:, None])
    np.testing.assert_array_equal(scaled[:, 0], np.ldexp(np.float32(1), np.arange(-127, 128)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_proj_scales": None}, r"1 missing: model\.layers\.0\.mlp\.experts\.down_proj_scales"),
        ({"down_proj_blocks": None}, r"1 missing: .*down_proj_blocks; 1 unexpected: .*down_proj_scales"),
        ({"down_proj_scales": np.ones((3, 32, 1), np.uint8)}, r"down_proj_scales is \(3, 32, 1\) of U8, not"),
        ({"down_proj_blocks": np.ones((3, 32, 2, 8), np.uint8)}, r"down_proj_blocks is \(3, 32, 2, 8\) of U8, not"),
        ({"down_proj_scales": np.ones((3, 32, 2), np.int8)}, r"down_proj_scales is \(3, 32, 2\) of I8, not"),
    ],
)  # fmt: skip
def test_parts_of_four_bits_that_do_not_fit_are_named(packed, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_source(packed.write(tmp_path / "packed", **changes))


def test_a_scale_that_is_no_number(packed, tmp_path):
    scales = packed.weights["model.layers.0.mlp.experts.down_proj_scales"].copy()
    scales[1, 2, 0] = 255
    source = open_source(packed.write(tmp_path / "packed", down_proj_scales=scales))
    with pytest.raises(ValueError, match="down_proj_blocks: holds NaN or infinite values"):
        source.read("layers.0.ff.experts.down", np.dtype(np.float32))


def test_other_quantisations_of_gpt_oss_are_refused(packed, tmp_path):
    folder = packed.write(tmp_path / "packed")
    rewrite_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="of gpt_oss only mxfp4 can be read;"):
        open_source(folder)


# ---- GGUF files ----


def as_stored(value: Any) -> Any:
    """A configuration's fields with numbers of 32 bits, as GGUF files have them."""
    if isinstance(value, ModelConfig):
        return as_stored(value.to_json())
    if isinstance(value, dict):
        return {name: as_stored(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(as_stored, value))
    return np.float32(value) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("family", "variant"),
    [(family, variant) for family, cases in ROUTED.items() if family in RECIPES for variant in cases.variants],
)
def test_gguf_twins_are_the_same_model(family, variant, tmp_path):
    cases = ROUTED[family]
    build_torch(family, {**cases.config, **cases.variants[variant]}, tmp_path)
    if variant not in cases.not_in_gguf:
        twin = write_twin(tmp_path, tmp_path / "twin.gguf")
        assert as_stored(open_source(twin).config) == as_stored(open_source(tmp_path).config)
        assert_same(parameters(twin), parameters(tmp_path))
        return
    try:
        config = open_source(write_twin(tmp_path, tmp_path / "twin.gguf")).config
    except (AssertionError, KeyError, ValueError):
        return
    assert as_stored(config) != as_stored(open_source(tmp_path).config), (
        f"a GGUF file can say it: {cases.not_in_gguf[variant]}"
    )


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """Four experts whose rows divide into blocks of 32 numbers."""
    folder = tmp_path_factory.mktemp("mixtral")
    build_torch("mixtral", {**LLAMA_LIKE, "intermediate_size": 64, "num_local_experts": 4}, folder)
    return folder


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("weights", ["int8", "int8:32", "int4"])
def test_quantised_experts_become_integers(mixtral, tmp_path, weights):
    """One expert after the other, to what all of them as floating numbers become."""
    twin = write_twin(mixtral, tmp_path / "twin.gguf", GGMLQuantizationType.Q8_0)
    convert(twin, tmp_path / "native", weights=weights, progress=False)
    config, format = open_source(twin).config, WeightFormat.parse(weights)
    dequantised = parameters(twin)
    for path, array in parameters(mixtral).items():
        np.testing.assert_allclose(dequantised[path], array, rtol=0, atol=np.abs(array).max() / 200, err_msg=path)
    expected = assemble(config, dequantised.items(), np.float32, format)
    for leaf, ours in zip(*map(jax.tree.leaves, (load_model(tmp_path / "native")[0], expected)), strict=True):
        np.testing.assert_array_equal(leaf, ours)
    # As floating numbers again, which are near those that they were rounded from.
    for path, array in parameters(tmp_path / "native").items():
        error = np.abs(array - dequantised[path]).max()
        assert error <= np.abs(dequantised[path]).max() / (4 if weights == "int4" else 100), path


def test_the_first_files_of_mixtral_have_a_tensor_for_each_expert(mixtral, tmp_path):
    def add(writer: GGUFWriter) -> None:
        for name, array in load_file(mixtral / "model.safetensors").items():
            if ".experts." in name:
                _, _, block, _, _, expert, matrix, _ = name.split(".")
                part = {"w1": "gate", "w2": "down", "w3": "up"}[matrix]
                writer.add_tensor(f"blk.{block}.ffn_{part}.{expert}.weight", array)

    whole = write_twin(mixtral, tmp_path / "whole.gguf")
    each = write_twin(mixtral, tmp_path / "each.gguf", extra=[add], without=".experts.")
    assert_same(parameters(each), parameters(whole))


def test_an_axis_of_one_may_be_left_out(tmp_path):
    """llama.cpp counts no axes: a matrix of one row is a vector to it, and is stored as one when it is quantised."""
    cases = ROUTED["qwen2_moe"]
    build_torch("qwen2_moe", {**cases.config, "num_hidden_layers": 1}, tmp_path)
    gate = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.shared_expert_gate.weight"]
    assert gate.shape == (1, 32)

    def add(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_gate_inp_shexp.weight", gate[0])

    vector = write_twin(tmp_path, tmp_path / "vector.gguf", extra=[add], without="shared_expert_gate")
    assert_same(parameters(vector), parameters(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("expert_gating_func", ExpertGatingFuncType.SIGMOID, "expert_gating_func is 2; only 1 is supported"),
        ("expert_weights_scale", 2.5, "expert_weights_scale is 2.5; only 1.0 is supported"),
        ("expert_group_count", 2, "does not know what to do with llama.expert_group_count=2"),
    ],
)
def test_what_a_family_does_not_do_is_refused(mixtral, tmp_path, field, value, message):
    file = write_twin(mixtral, tmp_path / "x.gguf", extra=[lambda writer: getattr(writer, f"add_{field}")(value)])
    with pytest.raises(ValueError, match=message):
        open_source(file)


def test_layers_that_draft_are_left_out(tmp_path):
    """As transformers leaves them out, too: they come after the last one, and the file counts them among the others."""
    cases = ROUTED["glm4_moe"]
    build_torch("glm4_moe", cases.config, tmp_path)

    def add(writer: GGUFWriter) -> None:
        for name, shape in {"nextn.eh_proj": (32, 64), "attn_norm": (32,), "ffn_gate_exps": (8, 24, 32)}.items():
            writer.add_tensor(f"blk.3.{name}.weight", np.zeros(shape, np.float32))

    rewrite_config(tmp_path, num_nextn_predict_layers=1)
    twin = open_source(write_twin(tmp_path, tmp_path / "twin.gguf", extra=[add]))
    assert twin.config.num_layers == 3
    assert twin.ignored == ["blk.3.attn_norm.weight", "blk.3.ffn_gate_exps.weight", "blk.3.nextn.eh_proj.weight"]
    assert_same(parameters(tmp_path / "twin.gguf"), parameters(tmp_path))
    rewrite_config(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"unexpected: blk\.3\.attn_norm"):
        open_source(write_twin(tmp_path, tmp_path / "other.gguf", extra=[add]))


def test_experts_of_a_family_without_them_are_refused(tmp_path):
    cases = all_cases()["qwen2"]
    build_torch("qwen2", cases.config, tmp_path)
    file = write_twin(tmp_path, tmp_path / "x.gguf", extra=[lambda writer: writer.add_expert_count(8)])
    with pytest.raises(ValueError, match=r"does not know what to do with qwen2\.expert_count=8"):
        open_source(file)
    none = write_twin(tmp_path, tmp_path / "y.gguf", extra=[lambda writer: writer.add_expert_count(0)])
    assert open_source(none).config.routing is None
