"""Quantised safetensors: what their makers' packages read in them, whole models of them, and what is refused."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import LLAMA_LIKE, VISION, all_cases, build_torch, rewrite_config
from reference import load_torch
from safetensors.numpy import load_file, save_file

from griffin_jax.checkpoints import sources
from griffin_jax.checkpoints.huggingface import HuggingFaceFolder
from griffin_jax.checkpoints.loading import convert, open_source
from griffin_jax.checkpoints.quantised.methods import BESIDE, METHODS, join, kinds_of
from griffin_jax.checkpoints.quantised.parts import Packed, Read
from griffin_jax.checkpoints.schema.family import QUANTISATIONS, is_ignored, quantisation_of
from griffin_jax.checkpoints.sources import PACKED, TensorInfo
from griffin_jax.checkpoints.verification import EXACT, ROUNDED

DTYPES = {
    np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint8): "U8", np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32", np.dtype(np.int64): "I64", np.dtype(bool): "BOOL",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}  # fmt: skip

EXAMPLES = json.loads(Path(__file__).with_name("quantised_examples.json").read_text())


def example(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    """A quantization_config, the parts that a package made of a matrix, and what it reads in them."""
    dtypes = {name: dtype for dtype, name in DTYPES.items()}

    def array(stored: Mapping[str, Any]) -> np.ndarray:
        data = np.frombuffer(base64.b64decode(stored["base64"]), dtypes[stored["dtype"]])
        return data.reshape(stored["shape"])

    found = copy.deepcopy(EXAMPLES[name])
    return found["config"], {end: array(part) for end, part in found["parts"].items()}, array(found["expected"])


def joined(
    config: Mapping[str, Any], parts: Mapping[str, np.ndarray]
) -> tuple[dict[str, TensorInfo], dict[str, Packed], Read]:
    """The tensors that a checkpoint with one layer has."""
    stored = {f"layer.{end}": part for end, part in parts.items()}

    def read(name: str, start: int, stop: int | None) -> np.ndarray:
        return stored[name][start:stop] if stored[name].ndim else stored[name]

    tensors = {name: TensorInfo(part.shape, DTYPES[part.dtype]) for name, part in stored.items()}
    return *join(tensors, kinds_of(config, "here"), read, needless=lambda name: False), read


def weight(config: Mapping[str, Any], parts: Mapping[str, np.ndarray]) -> np.ndarray:
    _, packed, read = joined(config, parts)
    return packed["layer.weight"].rows(read, 0, None)


@pytest.mark.parametrize("name", EXAMPLES)
def test_numbers_are_those_that_their_makers_read(name):
    """`quantised_examples.py` says with which packages."""
    config, parts, expected = example(name)
    tensors, packed, read = joined(config, parts)
    tensor = packed["layer.weight"]
    assert tensors["layer.weight"] == tensor.info
    assert tensor.info.shape == expected.shape
    assert tensor.info.dtype in PACKED
    assert all(is_ignored(left, BESIDE) for left in tensors.keys() - {"layer.weight"})
    ours = tensor.rows(read, 0, None)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    for start, stop in ((0, 1), (5, 11), (8, 16), (15, 16)):
        np.testing.assert_array_equal(tensor.rows(read, start, stop), ours[start:stop])


def gptq(
    numbers: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, group_of: np.ndarray | None, less: int
) -> dict[str, np.ndarray]:
    """The parts of a matrix (O, I) in GPTQ's format, number by number.

    Args:
        numbers: unsigned integers (O, I).
        zeros: unsigned integers (O, groups).
        scales: (O, groups).
        bits: of a number.
        group_of: the group of each input; None where they are neighbours.
        less: what zeros are stored less, as GPTQModel subtracts it: from words.
    """
    outputs, inputs = numbers.shape
    each = 32 // bits
    qweight = np.zeros((inputs // each, outputs), np.uint32)
    qzeros = np.zeros((zeros.shape[1], outputs // each), np.uint32)
    for o in range(outputs):
        for i in range(inputs):
            qweight[i // each, o] |= np.uint32(int(numbers[o, i]) << (bits * (i % each)))
        for g in range(zeros.shape[1]):
            qzeros[g, o // each] |= np.uint32(int(zeros[o, g]) << (bits * (o % each)))
    qzeros -= np.uint32(sum(less << (bits * place) for place in range(each)))
    # Safetensors are written as they lie in memory.
    stored = np.ascontiguousarray(scales.T, np.float16)
    parts = {"qweight": qweight.view(np.int32), "qzeros": qzeros.view(np.int32), "scales": stored}
    return parts if group_of is None else {**parts, "g_idx": group_of.astype(np.int32)}


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_with_every_number_of_bits(bits, ordered, version):
    rng = np.random.default_rng(bits)
    outputs, inputs, groups = 16, 64, 4
    numbers, zeros = rng.integers(0, 2**bits, (outputs, inputs)), rng.integers(0, 2**bits, (outputs, groups))
    scales = rng.uniform(0.5, 1, (outputs, groups)).astype(np.float16).astype(np.float32)
    group_of = rng.integers(0, groups, inputs) if ordered else None
    parts = gptq(numbers, zeros, scales, bits, group_of, less=version == "gptq")
    config = {"quant_method": "gptq", "bits": bits, "group_size": inputs // groups, "checkpoint_format": version}
    at = np.arange(inputs) // (inputs // groups) if group_of is None else group_of
    np.testing.assert_array_equal(weight(config, parts), (numbers - zeros[:, at]) * scales[:, at])


def test_one_scale_for_all_inputs():
    numbers, zeros, scales = np.arange(64).reshape(8, 8) % 16, np.full((8, 1), 8), np.ones((8, 1))
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    np.testing.assert_array_equal(weight(config, gptq(numbers, zeros, scales, 4, None, 1)), numbers - 8)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_layer_with_bits_and_groups_of_its_own(ordered):
    """GPTQModel's `dynamic`: they follow from the parts."""
    numbers, zeros, scales = np.arange(128).reshape(8, 16), np.full((8, 2), 128), np.arange(1, 17).reshape(8, 2)
    group_of = np.arange(16) // 8
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "dynamic": {"layer": {"bits": 8, "group_size": 8}}}
    parts = gptq(numbers, zeros, scales, 8, group_of if ordered else None, 1)
    np.testing.assert_array_equal(weight(config, parts), (numbers - 128) * scales[:, group_of])
    with pytest.raises(ValueError, match=r"1 misshapen: layer\."):
        weight({**config, "dynamic": None}, parts)


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("awq", {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": None, "format": "gemm"}),
        ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "", "meta": {}}),
        ("packed", {"quant_method": "compressed-tensors", "quantization_config": {"config_groups": {}}}),
        ("floats", {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
        ("floats-one-scale", {"quant_method": "fp8"}),
        ("floats-blocks", {"quant_method": "fp8", "weight_block_size": [8, 32]}),
        ("floats-blocks", {"quant_method": "compressed-tensors", "config_groups": {
            "a": {"weights": {"block_structure": "8x32"}, "format": "float-quantized"}, "b": {"weights": None}}}),
    ],
)  # fmt: skip
def test_other_spellings_of_the_same(name, spelling):
    config, parts, expected = example(name)
    assert config != spelling
    np.testing.assert_allclose(weight(spelling, parts), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["format", "checkpoint_format"])
def test_the_second_format_is_known_by_either_name(name):
    parts = gptq(np.zeros((8, 8), int), np.full((8, 1), 3), np.ones((8, 1)), 4, None, less=0)
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1, name: "gptq_v2"}
    np.testing.assert_array_equal(weight(config, parts), -3)


@pytest.mark.parametrize("dynamic", [None, {"-:other": {}}])
def test_a_last_group_that_is_not_full(dynamic):
    numbers, zeros, scales = np.ones((8, 96), int), np.zeros((8, 2)), np.tile([1, 9], (8, 1))
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": dynamic}
    ours = weight(config, gptq(numbers, zeros, scales, 4, None, 1))
    np.testing.assert_array_equal(ours, np.tile(np.repeat([1, 9], [64, 32]), (8, 1)))


def test_a_last_group_of_compressed_tensors_that_is_not_full():
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": weights}}}
    parts = {
        "weight_packed": np.full((8, 12), 0x11111111, np.int32),
        "weight_shape": np.array([8, 96]),
        "weight_scale": np.tile(np.float32([1, 9]), (8, 1)),
    }
    np.testing.assert_array_equal(weight(config, parts), -7 * np.tile(np.repeat([1, 9], [64, 32]), (8, 1)))


def test_four_bits_that_are_stored_as_signed_bytes():
    config, parts, expected = example("nf4")
    np.testing.assert_allclose(
        weight(config, parts | {"weight": parts["weight"].view(np.int8)}), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", ["gptq", "awq", "floats", "packed-zeros", "nf4"])
def test_no_rows(name):
    config, parts, expected = example(name)
    _, packed, read = joined(config, parts)
    assert packed["layer.weight"].rows(read, 3, 3).shape == (0, expected.shape[1])


def test_thousands_of_biases_are_looked_up_at_once(floating, tmp_path):
    """Python keeps some hundred compiled patterns, and compiles the others for every name."""
    folder = HuggingFaceFolder(quantised(floating, tmp_path / "quantised", 0.0))
    assert len(folder.ignored) == len(folder.family.ignored) + len(BESIDE) + 1
    assert is_ignored("model.layers.1.mlp.down_proj.bias", folder.ignored)


@pytest.mark.parametrize("place", ["compression_config", "text_config"])
def test_where_else_a_configuration_may_be(place):
    found = {"quant_method": "fp8"}
    assert quantisation_of({place: {"quantization_config": found} if place == "text_config" else found}) == found
    assert quantisation_of({"quantization_config": {"a": 1}, place: found}) == {"a": 1}
    assert quantisation_of({"text_config": None, "quantization_config": None}) == {}


def test_numbers_that_do_not_fill_their_last_word():
    """Of compressed-tensors: `weight_shape` says how many there are."""
    config, parts, expected = example("packed")
    cut = parts | {"weight_shape": np.array([16, 60]), "weight_scale": parts["weight_scale"][:, :1]}
    ours = weight(config, cut)
    assert ours.shape == (16, 60)
    np.testing.assert_allclose(ours[:, :32], expected[:, :32], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["packed", "packed-zeros"])
def test_groups_of_compressed_tensors_in_another_order(name):
    config, parts, expected = example(name)
    order = np.random.default_rng(0).permutation(64)
    octets = parts["weight_packed"].view(np.uint8)
    numbers = np.stack([octets & 15, octets >> 4], axis=-1).reshape(16, 64)[:, order]
    octets = np.ascontiguousarray(numbers[:, ::2] | numbers[:, 1::2] << 4)
    turned = parts | {"weight_packed": octets.view(np.int32), "weight_g_idx": (order // 32).astype(np.int32)}
    np.testing.assert_allclose(weight(config, turned), expected[:, order], rtol=0, atol=1e-6)
    # What was never set.
    plain = parts | {"weight_g_idx": np.full(64, -1, np.int32)}
    np.testing.assert_allclose(weight(config, plain), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("end", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize(
    ("blocks", "config"),
    [
        ((), {}),
        ((1,), {}),
        ((16,), {}),
        ((16, 1), {}),
        ((2, 2), {"weight_block_size": [8, 32]}),
        ((2, 3), {"weight_block_size": [12, 24]}),
    ],
)
def test_fp8_with_scales_of_many_shapes(blocks, config, end):
    """One for a tensor, for rows, for blocks; the last blocks may be smaller ones."""
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(16, 64)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 1, blocks).astype(np.float32)
    rows, columns = config.get("weight_block_size", (16 // (blocks or (1,))[0], 64 // (*blocks, 1, 1)[1]))
    expected = np.empty((16, 64), np.float32)
    for o in range(16):
        for i in range(64):
            at = (o // rows, i // columns)[: len(blocks)] if blocks != (1,) else 0
            expected[o, i] = np.float32(numbers[o, i]) * scale[at]
    ours = weight({"quant_method": "fp8"} | config, {"weight": numbers, end: scale})
    np.testing.assert_array_equal(ours, expected)


def test_fp8_is_what_transformers_reads():
    torch = load_torch()
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(64, 96)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 1, (2, 3)).astype(np.float32)
    stored = torch.tensor(numbers.view(np.uint8)).view(torch.float8_e4m3fn)
    theirs = Fp8Dequantize(None)._dequantize_one(stored, torch.tensor(scale))
    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    ours = weight(config, {"weight": numbers, "weight_scale_inv": scale})
    np.testing.assert_array_equal(ours, theirs.numpy())


# ---- Whole models ----


def test_what_transformers_computes_in_another_way_is_not_verified(floating, tmp_path):
    """That is said before anything is converted."""
    folder = quantised(floating, tmp_path / "gptq")
    with pytest.raises(ValueError, match="transformers multiplies weights of gptq with other packages"):
        convert(folder, tmp_path / "native", progress=False, verify=True)
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_that_becomes_16_bits_is_verified_as_rounded(floating, tmp_path, dtype):
    """Beside 16-bit tensors, of which nothing is lost."""
    stored = {}
    for name, array in load_file(floating / "model.safetensors").items():
        stored[name] = array.astype(ml_dtypes.bfloat16)
        if name.endswith("proj.weight"):
            scale = np.random.default_rng(0).uniform(0.02, 0.04, [-(-size // 32) for size in array.shape])
            blocks = np.repeat(np.repeat(scale, 32, 0), 32, 1)[: array.shape[0], : array.shape[1]]
            stored[name] = (array / blocks).astype(ml_dtypes.float8_e4m3fn)
            stored[name.removesuffix("weight") + "weight_scale_inv"] = scale.astype(np.float32)
    save_file(stored, floating / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(floating, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    found = convert(floating, tmp_path / "native", dtype, progress=False, verify=True).verification
    assert found.ok
    assert found.tolerance == (ROUNDED["bfloat16"] if dtype == "bfloat16" else EXACT)


def quantised(folder: Path, out: Path, biases: float | None = None) -> Path:
    """A model whose linear layers are stored as GPTQ has them.

    Args:
        folder: the model, of which the floating weights are replaced by what the quantised ones mean.
        out: where the quantised one goes.
        biases: what the biases are that it has in addition; None where it has none.
    """
    rng = np.random.default_rng(0)
    floating = load_file(folder / "model.safetensors")
    stored = {}
    for name, array in floating.items():
        if not name.endswith("proj.weight"):
            stored[name] = array
            continue
        layer, (outputs, inputs) = name.removesuffix("weight"), array.shape
        numbers, zeros = rng.integers(0, 16, array.shape), rng.integers(0, 16, (outputs, inputs // 16))
        scales = rng.uniform(0.01, 0.02, zeros.shape).astype(np.float16).astype(np.float32)
        group_of = rng.permutation(inputs) // 16
        parts = gptq(numbers, zeros, scales, 4, group_of, less=1)
        if biases is not None and layer + "bias" not in floating:
            parts["bias"] = np.full(outputs, biases, np.float16)
        stored |= {layer + end: part for end, part in parts.items()}
        floating[name] = ((numbers - zeros[:, group_of]) * scales[:, group_of]).astype(np.float32)
    out.mkdir()
    save_file(floating, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    rewrite_config(out, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True})
    return out


SIZES = {
    "llama": {"intermediate_size": 96},
    "qwen2": {"intermediate_size": 96},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}


@pytest.fixture
def floating(tmp_path, request) -> Path:
    family = getattr(request, "param", "llama")
    build_torch(family, {**LLAMA_LIKE, "hidden_size": 64, **SIZES[family]}, tmp_path / "floating")
    return tmp_path / "floating"


@pytest.mark.parametrize("floating", SIZES, indirect=True)
@pytest.mark.parametrize("biases", [None, 0.0])
@pytest.mark.parametrize("piece", [1, sources.PIECE_BYTES])
def test_a_quantised_model_is_the_model_that_its_numbers_are(floating, tmp_path, monkeypatch, biases, piece):
    """Also where every layer has a bias of zeros, as AutoGPTQ wrote them; in pieces and whole."""
    folder = quantised(floating, tmp_path / "quantised", biases)
    monkeypatch.setattr(sources, "PIECE_BYTES", piece)
    ours, theirs = open_source(folder), open_source(floating)
    assert ours.dtype == np.float32
    assert ours.config == theirs.config
    assert ours.origin("layers.0.attention.out").dtype == "INT4"
    assert ours.shapes == theirs.shapes
    for path in theirs.shapes:
        np.testing.assert_array_equal(
            ours.read(path, np.dtype(np.float32)), theirs.read(path, np.dtype(np.float32)), err_msg=path
        )


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {"fp4"}))
def test_examples_in_files(tmp_path, name):
    """Of every dtype that parts have, in a second file, of a text model within a larger one."""
    torch = load_torch()
    from safetensors.torch import load_file, save_file

    config, parts, expected = example(name)
    text = {**LLAMA_LIKE, "model_type": "mistral", "hidden_size": 64, "head_dim": 8, "num_attention_heads": 2}
    vision = {"model_type": "pixtral", **VISION}
    build_torch("mistral3", {"text_config": text, "vision_config": vision, "image_token_index": 5}, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    (layer,) = [key.removesuffix("weight") for key in stored if key.endswith("layers.0.self_attn.q_proj.weight")]
    assert stored.pop(f"{layer}weight").shape == expected.shape
    second = {}
    for end, part in parts.items():
        tensor = torch.tensor(part.view(np.uint8) if DTYPES[part.dtype] == "F8_E4M3" else part)
        second[layer + end] = tensor.view(torch.float8_e4m3fn) if DTYPES[part.dtype] == "F8_E4M3" else tensor
    (tmp_path / "model.safetensors").unlink()
    files = {"a.safetensors": stored, "b.safetensors": second}
    for file, tensors in files.items():
        save_file(tensors, tmp_path / file)
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    rewrite_config(tmp_path, quantization_config=config)
    with pytest.warns(UserWarning, match="only the text model is read"):
        source = open_source(tmp_path)
    ours = source.read("layers.0.attention.query", np.dtype(np.float32)).reshape(expected.shape)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_biases_that_the_model_has_not_are_named(floating, tmp_path):
    with pytest.raises(ValueError, match=r"14 unexpected: model\.layers\.0\.mlp\.down_proj\.bias"):
        open_source(quantised(floating, tmp_path / "quantised", biases=0.5))


def test_what_is_read_whole_is_read_once(floating, tmp_path, monkeypatch):
    folder = quantised(floating, tmp_path / "quantised")
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    source, read, names = open_source(folder), HuggingFaceFolder._read_stored, []
    monkeypatch.setattr(
        HuggingFaceFolder, "_read_stored", lambda self, name, *rows: (names.append(name), read(self, name, *rows))[1]
    )
    for path in ("layers.0.ff.down", "layers.0.attention.query"):
        names.clear()
        source.read(path, np.dtype(np.float32))
        assert sorted(name.rpartition(".")[2] for name in names) == ["g_idx", "qweight", "qzeros", "scales"]


def test_tensors_that_the_model_has_not_need_not_fit(floating, tmp_path):
    """Such as those of a tower for images, and biases that are no numbers."""
    folder = quantised(floating, tmp_path / "quantised")
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    stored["model.layers.0.mlp.down_proj.bias"] = np.zeros(64, bool)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.0\.mlp\.down_proj\.bias"):
        open_source(folder)
    parts = {"qweight": np.zeros((3, 3), np.int32), "scales": np.zeros(3, np.float32)}
    stored = {f"layer.{end}": TensorInfo(part.shape, DTYPES[part.dtype]) for end, part in parts.items()}
    kinds = kinds_of({"quant_method": "gptq", "bits": 4, "group_size": -1}, "here")
    joined, packed = join(stored, kinds, lambda *_: np.zeros(0), needless=lambda name: name == "layer.weight")
    assert joined == stored
    assert not packed


def test_matrices_of_gpt2_are_not_read_the_other_way_round(tmp_path):
    build_torch("gpt2", all_cases()["gpt2"].config, tmp_path)
    rewrite_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16})
    with pytest.raises(ValueError, match="of gpt2 only unquantised checkpoints can be read; use the"):
        open_source(tmp_path)


def test_what_is_said_about_activations_is_ignored(floating, tmp_path):
    folder = quantised(floating, tmp_path / "quantised")
    stored = load_file(folder / "model.safetensors")
    ends = ("mlp.up_proj.input_scale", "self_attn.k_scale", "self_attn.q_proj.activation_scale")
    stored |= {f"model.layers.0.{end}": np.ones(1, np.float32) for end in ends}
    save_file(stored, folder / "model.safetensors")
    assert set(open_source(folder).ignored) == {f"model.layers.0.{end}" for end in ends}
    stored = load_file(floating / "model.safetensors") | {"model.layers.0.self_attn.k_scale": np.ones(1, np.float32)}
    save_file(stored, floating / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: .*k_scale"):
        open_source(floating)


# ---- What is refused ----


def test_families_and_readers_name_the_same_methods():
    assert tuple(METHODS) == QUANTISATIONS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "of gptq: needs 'group_size'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0, allowed are -1 and positive"),
        ({"quant_method": "gptq", "bits": "four", "group_size": 8}, "of gptq: .*four"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": "marlin"}, "'marlin', allowed are"),
        ({"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemv"}, "'gemv' with 4 bits"),
        ({"quant_method": "awq", "bits": 3, "group_size": 8}, "'gemm' with 3 bits"),
        ({"quant_method": "gptq", "bits": float("inf"), "group_size": 8}, "of gptq: .*infinity"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 8, "pack_dtype": "int8"}, "pack_dtype is 'int8', allowed"),
        ({"quant_method": "awq", "group_size": 8}, "needs 'w_bit'"),
        ({"quant_method": "fp8", "weight_scale_semantics": "inverse"}, "'inverse', which is not read"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {}}, "'marlin-24', allowed"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"format": "mxfp4-pack-quantized"}}},
            "'mxfp4-pack-quantized', allowed are dense, naive",
        ),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"blocks are \[0, 128\], allowed are two positive"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "of fp8: malformed"),
        ({"quant_method": "gptq", "bits": 4, "group_size": None}, "of gptq: malformed"),
        ({"quant_method": "compressed-tensors"}, "needs 'config_groups'"),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, "weights are rotated"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "stored sparsely as 'sparse-24-bitmask'",
        ),
    ],
)  # fmt: skip
def test_configurations_that_are_not_read(config, message):
    with pytest.raises(ValueError, match=f"here: quantization_config.*{message}"):
        kinds_of(config, "here")


NF4 = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gptq", {"scales": None}, r"1 missing: layer\.scales"),
        ("gptq", {"qzeros": np.zeros((2, 3), np.int32)}, r"qzeros is \(2, 3\) of I32, not \(2, 2\) of I32"),
        ("gptq", {"scales": np.zeros((2, 16), np.int8)}, r"scales is \(2, 16\) of I8, not \(2, 16\) of F32 or"),
        ("gptq", {"g_idx": np.zeros(80, np.int32)}, r"g_idx is \(80,\) of I32, not \(64,\)"),
        ("gptq", {"qweight": np.zeros((0, 16), np.int32)}, r"1 not read: layer\.qweight is \(0, 16\)"),
        ("gptq", {"qweight": np.zeros((8, 12), np.int32)}, r"qweight is \(8, 12\), with words that are not full"),
        ("gptq", {"weight": np.zeros((16, 64), np.float32)}, r"1 duplicate: layer\.weight, quantised and not"),
        ("awq", {"qweight": np.zeros((0, 2), np.int32)}, r"1 not read: layer\.qweight is empty"),
        ("awq", {"scales": np.zeros((3, 16), np.float16)}, r"scales is \(3, 16\) of F16, not \(2, 16\)"),
        ("floats", {"weight_scale": None}, r"1 missing: layer\.weight_scale"),
        ("floats", {"weight_scale": np.zeros((3, 1), np.float32)}, r"\(3, 1\), which does not divide \(16, 64\)"),
        ("integers-zeros", {"weight_zero_point": np.zeros((1, 1), np.int8)}, r"zero_point is \(1, 1\) of I8, not"),
        ("floats", {"weight_scale": np.zeros((1, 64), np.float32)}, r"\(1, 64\), which does not divide \(16, 64\)"),
        ("floats-blocks", {"weight_scale": np.zeros((4, 4), np.float32)}, r"does not divide .* in blocks of \(8, 32\)"),
        ("packed", {"weight_shape": np.array([16, 80])}, r"\(16, 8\), which is no matrix of \(16, 80\) with 4 or 8"),
        ("packed-zeros", {"weight_scale": np.ones((), np.float32)}, r"zero_point is \(2, 2\) of I32, not \(2, 1\)"),
        ("packed", {"weight_g_idx": np.zeros(3, np.int32)}, r"weight_g_idx is \(3,\) of I32, not \(64,\)"),
        ("nvfp4", {"weight_global_scale": None}, "1 missing: .*global_scale"),
        ("nf4", {"weight.absmax": np.zeros(3, np.float32)}, r"absmax is \(3,\) of F32, not \(16,\)"),
        ("nf4", {"weight": np.zeros((3, 1), np.uint8)}, r"weight is \(3, 1\) of U8, not \(512, 1\)"),
        ("nf4", {NF4: np.frombuffer(b'{"shape": [1e999, 2], "blocksize": 64}', np.uint8)}, "1 malformed: .*infinity"),
        ("nf4", {NF4: np.frombuffer(b"[" * 100_000, np.uint8)}, "1 malformed: .*recursion"),
        ("nf4", {NF4: np.frombuffer(b"{}", np.uint8)}, "1 malformed: .*nf4 .*shape"),
        ("nf4", {NF4: np.frombuffer(b'{"shape": [2, 3], "blocksize": 64}', np.uint8)}, "1 malformed: .*2 rows of 3"),
        ("nf4", {NF4: None}, "1 missing: .*bitsandbytes__nf4"),
        ("int8", {"SCB": None}, "1 missing: .*SCB"),
        ("int8", {"weight_format": np.array(2, np.uint8)}, r"1 not read: layer\.weight_format is 2, and only 0"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(name, changes, message):
    config, parts, _ = example(name)
    with pytest.raises(ValueError, match=f"parts of quantised tensors do not fit: .*{message}"):
        joined(config, {end: part for end, part in (parts | changes).items() if part is not None})


def test_groups_that_are_not_there():
    config, parts, _ = example("gptq")
    with pytest.raises(ValueError, match=r"layer\.g_idx: names groups from 2 to 2, and there are 2"):
        weight(config, parts | {"g_idx": np.full(64, 2, np.int32)})


def test_numbers_that_are_none(floating):
    """An FP8 number can be no number, which is found where any other is."""
    torch = load_torch()
    from safetensors.torch import load_file, save_file

    stored = load_file(floating / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    stored[name] = torch.full(stored[name].shape, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    stored[name + "_scale_inv"] = torch.ones(())
    save_file(stored, floating / "model.safetensors")
    rewrite_config(floating, quantization_config={"quant_method": "fp8"})
    source = open_source(floating)
    with pytest.raises(ValueError, match=r"down_proj\.weight: holds NaN or infinite values"):
        source.read("layers.1.ff.down", np.dtype(np.float32))
