"""Reading checkpoints of others: complete ones, incomplete ones and broken ones."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import struct
from pathlib import Path

import checkpoints
import gguf
import ml_dtypes
import numpy as np
import pytest
from checkpoints_gguf import write_gguf
from safetensors.numpy import save_file

from griffin_jax.checkpoints.gguf import read_gguf_header
from griffin_jax.checkpoints.loading import describe, load_model, open_source, parse_dtype
from griffin_jax.checkpoints.native import NativeCheckpoint
from griffin_jax.checkpoints.planning import NarrowingWarning
from griffin_jax.model.config import Rotary
from griffin_jax.model.positions import rotary_frequencies
from griffin_jax.model.weights import Precision

QUERY = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    return checkpoints.tensors()


def refusal(folder: Path) -> str:
    """The message with which a checkpoint is refused, without its weights being read."""
    with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
        open_source(folder)
    return str(error.value)


# ---- where tensors go ----


def test_every_tensor_arrives_in_its_place(tmp_path, weights):
    source = open_source(checkpoints.write(tmp_path, weights))

    def read(path):
        return source.read(path, np.dtype(np.float32))

    np.testing.assert_array_equal(read("embedding"), weights[EMBEDDING])
    np.testing.assert_array_equal(read("head"), weights["lm_head.weight"])
    np.testing.assert_array_equal(read("norm.scale"), weights["model.norm.weight"])
    prefix = "model.layers.1."
    np.testing.assert_array_equal(read("layers.1.attention_norm.scale"), weights[prefix + "input_layernorm.weight"])
    np.testing.assert_array_equal(read("layers.1.ff_norm.scale"), weights[prefix + "post_attention_layernorm.weight"])
    np.testing.assert_array_equal(read("layers.1.attention.query"), weights[QUERY].reshape(4, 6, 16))
    key, value = weights[prefix + "self_attn.k_proj.weight"], weights[prefix + "self_attn.v_proj.weight"]
    np.testing.assert_array_equal(read("layers.1.attention.key"), key.reshape(2, 6, 16))
    np.testing.assert_array_equal(read("layers.1.attention.value"), value.reshape(2, 6, 16))
    out = weights[prefix + "self_attn.o_proj.weight"]
    np.testing.assert_array_equal(read("layers.1.attention.out"), out.T.reshape(4, 6, 16))
    np.testing.assert_array_equal(read("layers.1.ff.gate"), weights[prefix + "mlp.gate_proj.weight"])
    np.testing.assert_array_equal(read("layers.1.ff.up"), weights[prefix + "mlp.up_proj.weight"])
    np.testing.assert_array_equal(read("layers.1.ff.down"), weights[prefix + "mlp.down_proj.weight"].T)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_narrow_and_wide_dtypes(tmp_path, weights, dtype):
    cast = {name: array.astype(dtype) for name, array in weights.items()}
    source = open_source(checkpoints.write(tmp_path, cast))
    assert source.dtype == (np.float32 if dtype is np.float64 else dtype)
    down = source.read("layers.0.ff.down", np.dtype(np.float32))
    np.testing.assert_array_equal(down, cast[DOWN].T.astype(np.float32))


@pytest.mark.thorough
def test_shards_are_one_checkpoint(tmp_path, weights):
    one, _ = load_model(checkpoints.write(tmp_path / "one", weights), "float32")
    three, _ = load_model(checkpoints.write(tmp_path / "three", weights, shards=3), "float32")
    np.testing.assert_array_equal(checkpoints.logits(one, [3, 4]), checkpoints.logits(three, [3, 4]))


def test_generation_config_says_where_answers_end(tmp_path, weights):
    checkpoints.write(tmp_path, weights)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert open_source(tmp_path).config.eos_token_ids == (5, 6)


# ---- completeness ----


def test_missing_extra_and_misshapen_tensors_are_one_message(tmp_path, weights):
    del weights[QUERY]
    weights["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
    weights[DOWN] = weights[DOWN].T.copy()
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(np.int64)
    message = refusal(checkpoints.write(tmp_path, weights))
    assert f"1 missing: {QUERY}" in message
    assert "1 unexpected: model.layers.2.mlp.up_proj.weight" in message
    assert f"1 misshapen: {DOWN} is (24, 16), not (16, 24)" in message
    assert "1 not of a supported dtype: lm_head.weight is I64" in message


@pytest.mark.parametrize("name", sorted(checkpoints.tensors()))
def test_no_tensor_can_be_left_out(tmp_path, weights, name):
    del weights[name]
    assert f"1 missing: {name}" in refusal(checkpoints.write(tmp_path, weights))


def test_a_reshaped_tensor_of_the_right_size_is_refused(tmp_path, weights):
    weights[QUERY] = weights[QUERY].reshape(4, 6, 16)
    assert f"{QUERY} is (4, 6, 16), not (24, 16)" in refusal(checkpoints.write(tmp_path, weights))


def test_long_lists_are_cut(tmp_path, weights):
    message = refusal(checkpoints.write(tmp_path, {EMBEDDING: weights[EMBEDDING]}))
    assert "20 missing: " in message
    assert "and 12 more" in message


def test_duplicate_tensors_across_shards(tmp_path, weights):
    checkpoints.write(tmp_path, weights, shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    from safetensors.numpy import load_file

    save_file({**load_file(second), EMBEDDING: weights[EMBEDDING]}, second)
    assert f"1 duplicate: {EMBEDDING} in {first.name} and {second.name}" in refusal(tmp_path)


def test_duplicate_names_within_a_header(tmp_path, weights):
    file = checkpoints.write(tmp_path, weights) / "model.safetensors"
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    entry = json.dumps({"model.norm.weight": json.loads(raw[8 : 8 + size])["model.norm.weight"]})[1:-1]
    header = raw[8 : 8 + size].rstrip()[:-1] + b"," + entry.encode() + b"}"
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size :])
    assert "1 duplicate: model.norm.weight twice in model.safetensors" in refusal(tmp_path)


def test_tensors_that_carry_nothing_are_ignored(tmp_path, weights):
    weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    open_source(checkpoints.write(tmp_path, weights))


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path, weights):
    weights["lm_head.weight"] = weights[EMBEDDING].copy()
    tied = checkpoints.config(tie_word_embeddings=True)
    assert "head" not in open_source(checkpoints.write(tmp_path / "same", weights, config=tied)).shapes
    weights["lm_head.weight"][3, 4] += 1
    message = refusal(checkpoints.write(tmp_path / "other", weights, config=tied))
    assert "lm_head.weight should be the same as model.embed_tokens.weight" in message
    weights["lm_head.weight"] = weights[EMBEDDING].astype(np.int64)
    message = refusal(checkpoints.write(tmp_path / "whole-numbers", weights, config=tied))
    assert "lm_head.weight should be the same as model.embed_tokens.weight" in message


def test_a_tied_embedding_may_be_stored_as_the_head_alone(tmp_path, weights):
    """As safetensors' save_model may have it, which writes one of several names of a tensor."""
    expected = weights.pop(EMBEDDING)
    weights["lm_head.weight"] = expected
    tied = checkpoints.config(tie_word_embeddings=True)
    source = open_source(checkpoints.write(tmp_path / "tied", weights, config=tied))
    np.testing.assert_array_equal(source.read("embedding", np.dtype("float32")), expected)
    assert f"1 missing: {EMBEDDING}" in refusal(checkpoints.write(tmp_path / "untied", weights))


# ---- weights that are not numbers ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite(tmp_path, weights, value, dtype):
    cast = {name: array.astype(dtype) for name, array in weights.items()}
    cast[DOWN][3, 5] = value
    with pytest.raises(ValueError, match=rf"{DOWN}: holds NaN or infinite values"):
        load_model(checkpoints.write(tmp_path, cast))


def test_weights_that_overflow_a_narrow_dtype(tmp_path, weights):
    weights[DOWN][0, 0] = 1e5
    folder = checkpoints.write(tmp_path, weights)
    load_model(folder, "float32")
    with (
        pytest.warns(NarrowingWarning, match="values beyond 65504 are refused"),
        pytest.raises(ValueError, match=rf"{DOWN}: values up to 1e\+05 do not fit into float16"),
    ):
        load_model(folder, "float16")


# ---- folders and files that are not what they should be ----


def test_an_index_that_does_not_fit_its_shards(tmp_path, weights):
    index = checkpoints.write(tmp_path, weights, shards=2) / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.extra"] = values["weight_map"].pop(EMBEDDING)
    index.write_text(json.dumps(values))
    message = refusal(tmp_path)
    assert f"1 in a file but not in the index: {EMBEDDING}" in message


def test_an_index_that_lists_too_much(tmp_path):
    """Of a tied model it may list the head, which no file holds; a tensor that is needed is missing."""
    weights = checkpoints.tensors(tied=True)
    config = checkpoints.config(tie_word_embeddings=True)
    index = checkpoints.write(tmp_path, weights, shards=2, config=config) / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = values["weight_map"][EMBEDDING]
    index.write_text(json.dumps(values))
    load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.config()))
    assert "1 missing: lm_head.weight" in refusal(tmp_path)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod._checkpoint_wrapped_module."),
        lambda name: f"_orig_mod.{name.removeprefix('model.')}",
    ],
)
def test_names_of_torch_wrappers(tmp_path, weights, rename):
    checkpoints.write(tmp_path / "plain", weights)
    checkpoints.write(tmp_path / "wrapped", {rename(name): array for name, array in weights.items()})
    plain, wrapped = (load_model(tmp_path / name)[0] for name in ("plain", "wrapped"))
    np.testing.assert_array_equal(checkpoints.logits(wrapped, [3, 4, 5]), checkpoints.logits(plain, [3, 4, 5]))


def test_unexpected_names_are_those_in_the_file(tmp_path, weights):
    checkpoints.write(tmp_path, {f"base_model.model.{name}": array for name, array in weights.items()})
    message = refusal(tmp_path)
    assert "unexpected: base_model.model.lm_head.weight" in message
    assert "merge it into its model with merge_and_unload(), and save that" in message
    assert "model.base_model" not in message
    checkpoints.write(tmp_path, {**weights, "extra.weight": weights[DOWN]})
    assert "1 unexpected: extra.weight;" in refusal(tmp_path) + ";"


def test_a_gguf_file_next_to_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.config()))
    (tmp_path / "model.Q4_K_M.gguf").touch()
    with pytest.raises(
        FileNotFoundError, match=r"has neither model\.safetensors nor .*; did you mean .*Q4_K_M\.gguf\?"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../secret{}", "/etc/passwd", "/etc/x{}", "a/b{}", "..\\x{}", "C:x{}", "model\0{}", "\n{}", "..", ".", "", 7,
        None, ["x{}"], "model", "x" * 5000,
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("index", "suffix"), [("model.safetensors.index.json", ".safetensors"), ("pytorch_model.bin.index.json", ".bin")]
)
def test_an_index_that_points_elsewhere(tmp_path, weights, index, suffix, name):
    checkpoints.write(tmp_path, weights)
    (tmp_path / "model.safetensors").unlink()
    name = name.format(suffix) if isinstance(name, str) else name
    (tmp_path / index).write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    with pytest.raises(ValueError, match=rf"{index}: .* is not the name of a {suffix} file in the folder"):
        open_source(tmp_path, allow_pickle=True)


def test_a_shard_that_is_missing(tmp_path, weights):
    checkpoints.write(tmp_path, weights, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"do not exist: model-00002-of-00003\.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_malformed_json(tmp_path, weights, name, content):
    (checkpoints.write(tmp_path, weights, shards=2) / name).write_bytes(content)
    assert name in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 1500, -1])
def test_truncated_safetensors(tmp_path, weights, keep):
    file = checkpoints.write(tmp_path, weights) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors: not a readable safetensors file" in refusal(tmp_path)


def test_corrupt_safetensors_headers(tmp_path, weights):
    file = checkpoints.write(tmp_path, weights) / "model.safetensors"
    raw = bytearray(file.read_bytes())
    for changed in (b"\xff" * 8 + raw[8:], raw[:8] + b"x" * 50 + raw[58:], b"\x00" * 8 + raw[8:]):
        file.write_bytes(changed)
        assert "not a readable safetensors file" in refusal(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path, weights):
    source = open_source(checkpoints.write(tmp_path, weights))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor .* cannot be read"):
        dict(source.parameters(Precision.of(np.float32)))


def test_folders_without_weights_say_what_they_need(tmp_path, weights):
    checkpoints.write(tmp_path, weights)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"has no safetensors.*allow_pickle=True.*--allow-pickle"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        open_source(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        open_source(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ValueError, match=r"did you mean .*x\.gguf"):
        open_source(tmp_path)


def test_names_that_are_no_models(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no model .*nowhere.*GGUF file"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no model"):
        open_source("no-such-model")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="give the folder"):
        open_source(tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("These are only my notes, no model.")
    with pytest.raises(ValueError, match="not a GGUF file"):
        open_source(tmp_path / "notes.txt")


def test_hub_ids_are_fetched_configuration_first(tmp_path, weights, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, "model.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoints.write(tmp_path, weights)
    assert open_source("someone/tiny-llama").config.width == 16
    assert asked == [("someone/tiny-llama", False), ("someone/tiny-llama", True)]
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    asked.clear()
    with pytest.raises(ValueError, match="mamba"):
        open_source("someone/mamba")
    assert asked == [("someone/mamba", False)]


def write_sharded(folder: Path, weights: dict[str, np.ndarray]) -> list[str]:
    """A checkpoint of two files whose names are not those that transformers gives them today."""
    checkpoints.write(folder, weights)
    (folder / "model.safetensors").unlink()
    names = ["model_00001-of-00002.safetensors", "model_00002-of-00002.safetensors"]
    index = {tensor: names[number % 2] for number, tensor in enumerate(weights)}
    for name in names:
        save_file({tensor: weights[tensor] for tensor, file in index.items() if file == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return names


def test_of_the_hub_the_files_are_fetched_that_an_index_names(tmp_path, weights, monkeypatch):
    """And for what is only described none of them, not even if some are there already."""
    import huggingface_hub

    names = write_sharded(tmp_path / "remote", weights)
    local = tmp_path / "local"
    asked = []

    def snapshot_download(name, allow_patterns):
        local.mkdir(exist_ok=True)
        for file in (tmp_path / "remote").iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                asked.append(file.name)
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config, opened = describe("someone/sharded")
    assert (config.width, opened) == (16, None)
    shutil.copy(tmp_path / "remote" / names[0], local)
    assert describe("someone/sharded")[1] is None
    assert not set(names) & set(asked)
    source = open_source("someone/sharded")
    assert set(names) <= set(asked)
    np.testing.assert_array_equal(source.read("layers.0.ff.down", np.dtype(np.float32)), weights[DOWN].T)
    assert describe("someone/sharded")[1] is not None


def test_a_folder_without_its_shards_is_described(tmp_path, weights):
    names = write_sharded(tmp_path, weights)
    (tmp_path / names[0]).unlink()
    with pytest.raises(FileNotFoundError, match=f"names files that do not exist: {names[0]}"):
        describe(tmp_path)
    (tmp_path / names[1]).unlink()
    assert describe(tmp_path)[1] is None


def test_hub_ids_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"someone/tiny-llama.*cannot be reached"):
        open_source("someone/tiny-llama")


def test_dtypes():
    assert parse_dtype(None) is None
    assert parse_dtype("bfloat16") == ml_dtypes.bfloat16
    assert parse_dtype(np.float16) == np.float16
    for wrong in ("int8", "float64", "fp16", 3):
        with pytest.raises(ValueError, match="allowed are float32, bfloat16, float16"):
            parse_dtype(wrong)


# ---- GGUF ----


BLOCKY = checkpoints.config(hidden_size=32, intermediate_size=64, num_attention_heads=4, head_dim=8)


def blocky_tensors() -> dict[str, np.ndarray]:
    """Tensors whose rows divide into blocks of 32, as quantised types need it."""
    random = np.random.default_rng(1)
    shapes = {"embed": (32, 32), "lm_head": (32, 32), "q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32),
              "o_proj": (32, 32), "gate": (64, 32), "up_proj": (64, 32), "down": (32, 64), "norm": (32,)}  # fmt: skip
    return {
        name: random.normal(0, 0.3, next(shape for part, shape in shapes.items() if part in name)).astype(np.float32)
        for name in checkpoints.tensors()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_twin_in_float32(tmp_path, tied):
    weights = checkpoints.tensors(tied=tied)
    config = checkpoints.config(tie_word_embeddings=tied)
    folder = open_source(checkpoints.write(tmp_path / "hf", weights, config=config))
    file = open_source(write_gguf(tmp_path / "twin.gguf", weights, config))
    assert file.config == folder.config
    for path in folder.shapes:
        np.testing.assert_array_equal(file.read(path, np.dtype(np.float32)), folder.read(path, np.dtype(np.float32)))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_gguf_twin_quantised(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    weights = blocky_tensors()
    source = open_source(write_gguf(tmp_path / "twin.gguf", weights, BLOCKY, quantise=kind))
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind).reshape(array.shape)
        if array.ndim == 2
        else array
        for name, array in weights.items()
    }
    folder = open_source(checkpoints.write(tmp_path / "hf", rounded, config=BLOCKY))
    for path in folder.shapes:
        np.testing.assert_array_equal(source.read(path, np.dtype(np.float32)), folder.read(path, np.dtype(np.float32)))


def test_gguf_biases(tmp_path, weights):
    random = np.random.default_rng(2)
    shapes = {"q_proj": 24, "k_proj": 12, "v_proj": 12, "o_proj": 16, "gate_proj": 24, "up_proj": 24, "down_proj": 16}
    for layer in range(2):
        for name, size in shapes.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            weights[f"model.layers.{layer}.{block}.{name}.bias"] = random.normal(size=size).astype(np.float32)
    config = checkpoints.config(attention_bias=True, mlp_bias=True)
    folder, _ = load_model(checkpoints.write(tmp_path / "hf", weights, config=config), "float32")
    file, _ = load_model(write_gguf(tmp_path / "twin.gguf", weights, config), "float32")
    np.testing.assert_array_equal(checkpoints.logits(file, [4, 5, 6]), checkpoints.logits(folder, [4, 5, 6]))


def test_gguf_without_optional_metadata(tmp_path, weights):
    weights = blocky_tensors()
    file = write_gguf(
        tmp_path / "twin.gguf", weights, BLOCKY,
        leave_out=("key_length", "value_length", "dimension_count", "freq_base", "vocab_size", "bos"),
    )  # fmt: skip
    config = open_source(file).config
    assert (config.head_dim, config.vocab_size, config.rotary.theta, config.bos_token_id) == (8, 32, 10_000.0, None)


@pytest.mark.parametrize(
    ("kind", "extra", "expected"),
    [
        (gguf.RopeScalingType.LINEAR, (), {"rope_type": "linear", "factor": 4.0}),
        (None, (), {"rope_type": "linear", "factor": 4.0}),
        (gguf.RopeScalingType.NONE, (), None),
        (
            gguf.RopeScalingType.YARN,
            (lambda writer: writer.add_rope_scaling_orig_ctx_len(16),),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_gguf_rope_scaling(tmp_path, weights, kind, extra, expected):
    scaled = [lambda writer: writer.add_rope_scaling_factor(4.0)]
    if kind is not None:
        scaled.append(lambda writer: writer.add_rope_scaling_type(kind))
    file = open_source(write_gguf(tmp_path / "twin.gguf", weights, extra=(*scaled, *extra)))
    folder = open_source(checkpoints.write(tmp_path / "hf", weights, config=checkpoints.config(rope_scaling=expected)))
    assert file.config == folder.config


@pytest.mark.parametrize("kind", [None, gguf.RopeScalingType.LINEAR, gguf.RopeScalingType.YARN])
def test_gguf_rope_scaling_without_a_factor_is_none(tmp_path, weights, kind):
    extra = [] if kind is None else [lambda writer: writer.add_rope_scaling_type(kind)]
    plain = open_source(write_gguf(tmp_path / "plain.gguf", weights)).config
    assert open_source(write_gguf(tmp_path / "twin.gguf", weights, extra=extra)).config == plain
    extra.append(lambda writer: writer.add_rope_scaling_yarn_attn_factor(1.5))
    message = refusal(write_gguf(tmp_path / "other.gguf", weights, extra=extra))
    assert "rope.scaling.yarn_attn_factor is 1.5; only 1.0 is supported" in message


def add_rope_factors(factors):
    return lambda writer: writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))


def test_gguf_rope_factors_divide_the_frequencies(tmp_path, weights):
    rotary = open_source(write_gguf(tmp_path / "x.gguf", weights, extra=(add_rope_factors([1, 2, 8]),))).config.rotary
    plain = rotary_frequencies(Rotary(), checkpoints.HEAD_DIM)
    for long in (False, True):
        found = rotary_frequencies(rotary, checkpoints.HEAD_DIM, long=long)
        np.testing.assert_allclose(found, plain / [1, 2, 8], rtol=1e-6)
    assert rotary.attention_factor == 1


def test_gguf_rope_factors_must_be_one_for_each_pair(tmp_path, weights):
    message = refusal(write_gguf(tmp_path / "x.gguf", weights, extra=(add_rope_factors([1, 2]),)))
    assert "must be 3, one for each pair, got 2" in message


def test_gguf_rope_factors_of_one_change_nothing(tmp_path, weights):
    plain = open_source(write_gguf(tmp_path / "plain.gguf", weights))
    ones = open_source(write_gguf(tmp_path / "ones.gguf", weights, extra=(add_rope_factors([1, 1, 1]),)))
    assert ones.config == plain.config


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda writer: writer.add_expert_count(8), "missing expert_used_count"),
        (lambda writer: writer.add_sliding_window(512), "llama.attention.sliding_window=512"),
        (lambda writer: writer.add_uint32("split.count", 2), "one part of several"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "missing short_factor"),
        (lambda writer: writer.add_tensor("blk.0.attn_gate.weight", np.ones(4, np.float32)), "1 unexpected: blk.0.att"),
        (lambda writer: writer.add_tensor("blk.2.ffn_up.weight", np.ones(4, np.float32)), "1 unexpected: blk.2.ffn_up"),
    ],
)
def test_gguf_files_that_say_more_than_we_understand(tmp_path, weights, extra, message):
    assert message in refusal(write_gguf(tmp_path / "x.gguf", weights, extra=(extra,)))


def test_gguf_partial_rotary_is_refused(tmp_path, weights):
    file = write_gguf(
        tmp_path / "x.gguf", weights, leave_out=("dimension_count",),
        extra=(lambda writer: writer.add_rope_dimension_count(4),),
    )  # fmt: skip
    assert "this family turns whole heads only" in refusal(file)


def test_gguf_missing_pieces(tmp_path, weights):
    file = write_gguf(tmp_path / "a.gguf", weights, leave_out=("block_count", "eps"))
    assert "missing block_count, attention.layer_norm_rms_epsilon" in refusal(file)
    del weights[DOWN]
    assert "1 missing: blk.0.ffn_down.weight" in refusal(write_gguf(tmp_path / "b.gguf", weights))
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "novelty")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "GGUF architecture 'novelty' is not supported; supported are apertus, arcee, bloom" in refusal(
        tmp_path / "c.gguf"
    )


def test_gguf_tensors_of_whole_numbers(tmp_path, weights):
    weights["model.norm.weight"] = np.ones(16, np.int32)
    assert "output_norm.weight is I32" in refusal(write_gguf(tmp_path / "x.gguf", weights))


def test_gguf_nan(tmp_path, weights):
    weights[DOWN][0, 0] = np.nan
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_down\.weight: holds NaN"):
        load_model(write_gguf(tmp_path / "x.gguf", weights))


@pytest.mark.parametrize("keep", [0, 3, 23, 24, 40, 200, 1000, -1])
def test_truncated_gguf(tmp_path, weights, keep):
    file = write_gguf(tmp_path / "x.gguf", weights)
    file.write_bytes(file.read_bytes()[:keep])
    assert "GGUF file" in refusal(file)


@pytest.mark.filterwarnings("ignore::griffin_jax.CheckpointWarning")
def test_gguf_headers_with_any_byte_changed(tmp_path, weights):
    """Either it can still be read, or there is a ValueError that names the file; never anything else, and soon."""
    file = write_gguf(tmp_path / "x.gguf", weights, extra=(lambda w: w.add_token_types([1] * 50),))
    raw = file.read_bytes()
    messages = []
    for position in range(0, 1200, 3):
        changed = bytearray(raw)
        changed[position] ^= 0xFF
        file.write_bytes(changed)
        try:
            open_source(file)
        except ValueError as error:
            messages.append(str(error))
    assert all(str(file) in message for message in messages)
    assert len(messages) > 200


def test_gguf_header_agrees_with_the_gguf_package(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", blocky_tensors(), BLOCKY, quantise=gguf.GGMLQuantizationType.Q8_0)
    metadata, tensors = read_gguf_header(file)
    reference = gguf.GGUFReader(file)
    for name, field in reference.fields.items():
        if not name.startswith("GGUF."):
            assert metadata[name] == pytest.approx(field.contents())
    assert {tensor.name: (tensor.data_offset, tensor.n_bytes) for tensor in reference.tensors} == {
        name: (tensor.start, tensor.size) for name, tensor in tensors.items()
    }


def test_the_demo_model_can_be_opened(demo_gguf):
    source = open_source(demo_gguf)
    assert (source.config.num_layers, source.config.tied_head, source.config.norm_eps) == (30, True, 1e-5)
    # <|im_end|> as the file says, and <|endoftext|> and <reponame> by their text.
    assert source.config.eos_token_ids == (2, 0, 4)
    assert len(source.shapes) == 272
    assert not isinstance(source, NativeCheckpoint)
