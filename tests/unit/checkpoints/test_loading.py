"""Plans, warnings, hashes, verification and shardings of what is loaded or converted."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import checkpoints
import gguf
import ml_dtypes
import numpy as np
import pytest
from checkpoints_gguf import write_gguf
from conftest import first_and_slow
from reference import needs_torch
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

import griffin_jax as gj
from griffin_jax.checkpoints import loading, sources, verification
from griffin_jax.checkpoints.loading import convert, load_model, open_source, plan, verify
from griffin_jax.checkpoints.native import MANIFEST, NativeCheckpoint, sealed
from griffin_jax.checkpoints.planning import NarrowingWarning, _ranges
from griffin_jax.cli.main import main

ROOT = Path(__file__).parents[3]
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    return checkpoints.write(tmp_path / "hf")


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capfd.readouterr()
    return code, out, err


def stored_as(dtype) -> dict[str, np.ndarray]:
    return {name: array.astype(dtype) for name, array in checkpoints.tensors().items()}


# ---- large tensors ----


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_pieces_give_what_the_whole_gives(tmp_path, monkeypatch, dtype):
    """Every layout, cut into rows of every size: one row at a time, several, and a last piece that is smaller."""
    weights = checkpoints.tensors()
    source = open_source(checkpoints.write(tmp_path / "hf", weights))
    twin = open_source(write_gguf(tmp_path / "twin.gguf", weights))
    whole = {path: source.read(path, np.dtype(dtype)) for path in source.shapes}
    for size in (1, 100, 500, 1000):
        monkeypatch.setattr(sources, "PIECE_BYTES", size)
        for path, expected in whole.items():
            for one in (source, twin):
                found = one.read(path, np.dtype(dtype))
                assert found.flags.c_contiguous
                np.testing.assert_array_equal(found, expected)


def test_pieces_are_checked_for_values_that_are_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    weights = checkpoints.tensors()
    weights[DOWN][-1, -1] = 1e5
    source = open_source(checkpoints.write(tmp_path, weights))
    with pytest.raises(ValueError, match=rf"{DOWN}: values up to 1e\+05 do not fit into float16"):
        source.read("layers.0.ff.down", np.dtype(np.float16))


def test_quantised_tensors_in_pieces(tmp_path, monkeypatch):
    config = checkpoints.config(hidden_size=32, intermediate_size=64, head_dim=8)
    weights = {
        name: np.random.default_rng(1).normal(size=shape).astype(np.float32)
        for name, shape in {
            "model.embed_tokens.weight": (32, 32), "lm_head.weight": (32, 32), "model.norm.weight": (32,),
            **{
                f"model.layers.{layer}.{name}": shape
                for layer in range(2)
                for name, shape in {
                    "input_layernorm.weight": (32,), "post_attention_layernorm.weight": (32,),
                    "self_attn.q_proj.weight": (32, 32), "self_attn.k_proj.weight": (16, 32),
                    "self_attn.v_proj.weight": (16, 32), "self_attn.o_proj.weight": (32, 32),
                    "mlp.gate_proj.weight": (64, 32), "mlp.up_proj.weight": (64, 32), "mlp.down_proj.weight": (32, 64),
                }.items()
            },
        }.items()
    }  # fmt: skip
    source = open_source(write_gguf(tmp_path / "x.gguf", weights, config, quantise=gguf.GGMLQuantizationType.Q8_0))
    whole = {path: source.read(path, np.dtype(np.float32)) for path in source.shapes}
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    for path, expected in whole.items():
        np.testing.assert_array_equal(source.read(path, np.dtype(np.float32)), expected)


# ---- plans ----


def test_a_plan_says_where_everything_comes_from(hf_folder):
    planned = plan(hf_folder, "bfloat16")
    steps = {step.path: step for step in planned.steps}
    assert len(steps) == 21
    out = steps["layers.1.attention.out"]
    assert (out.shape, out.bytes) == ((4, 6, 16), 4 * 6 * 16 * 2)
    assert (out.origin.tensor, out.origin.shape, out.origin.dtype, out.origin.layout) == (
        "model.layers.1.self_attn.o_proj.weight", (16, 24), "F32", "D (N H) -> N H D",
    )  # fmt: skip
    assert planned.bytes == sum(array.size * 2 for array in checkpoints.tensors().values())
    assert (planned.dtype, planned.ignored, planned.has_tokenizer) == ("bfloat16", (), False)
    assert planned.narrowing is not None


def test_a_plan_is_a_table(hf_folder):
    lines = str(plan(hf_folder)).splitlines()
    assert len(lines) == 1 + 3 + 9 + 2
    (key,) = [line for line in lines if "attention.key" in line]
    assert key.split("  ")[0] == "layers.{0..1}.attention.key"
    for part in ("2 x 6 x 16", "model.layers.{0..1}.self_attn.k_proj.weight", "12 x 16", "(G H) D -> G H D"):
        assert part in key
    assert "F32 -> float32" in key
    table = lines[:-2]
    assert {line.index("model.") for line in table[1:] if "model." in line} == {table[0].index("from")}
    assert len({len(line) for line in table}) == 1
    assert lines[-2].endswith("21 parameters, 0.0 MB in float32")
    assert lines[-1] == "tensors knowingly ignored: none; tokenizer: none"


def test_layers_that_differ_have_lines_of_their_own(tmp_path):
    weights = checkpoints.tensors()
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].astype(np.float16)
    weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    text = str(plan(checkpoints.write(tmp_path, weights)))
    assert "layers.0.ff.up " in text
    assert "layers.1.ff.up " in text
    assert "ignored: 1 (model.layers.1.self_attn.rotary_emb.inv_freq)" in text


def test_ranges():
    assert _ranges([3]) == "3"
    assert _ranges([0, 1, 2, 3]) == "{0..3}"
    assert _ranges([5, 0, 2, 1, 9, 8]) == "{0..2,5,8..9}"


def test_plans_of_other_sources(tmp_path, hf_folder):
    native = convert(hf_folder, tmp_path / "native", progress=False).path
    assert plan(native).steps[0].origin == sources.Origin("embedding", "", (32, 16), "F32")
    ones = (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(3, np.float32)),)
    planned = plan(write_gguf(tmp_path / "x.gguf", checkpoints.tensors(), extra=ones))
    assert planned.ignored == ("rope_freqs.weight",)


def test_the_dry_run_writes_nothing(capfd, hf_folder, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for arguments in ((), (hf_folder,), (tmp_path / "new",)):
        code, out, _ = run(capfd, "convert", hf_folder, *arguments, "--dry-run")
        assert code == 0
        assert "layers.{0..1}.ff.down" in out
    assert sorted(tmp_path.rglob("*")) == before
    code, _, err = run(capfd, "convert", hf_folder)
    assert code == 2
    assert "give OUTPUT, the folder to write, or --dry-run" in err
    code, _, err = run(capfd, "convert", hf_folder, "--dry-run", "--verify")
    assert code == 2
    assert "--dry-run makes none" in err


# ---- what narrowing loses ----


@pytest.mark.parametrize(
    ("stored", "dtype", "message"),
    [
        (np.float32, "bfloat16", "21 stored as F32 become bfloat16: 24 bits of precision become 8; float32 keeps"),
        (np.float32, "float16", "bits of precision become 11 and values beyond 65504 are refused, those below 6e-08"),
        (np.float16, "bfloat16", "21 stored as F16 become bfloat16: 11 bits of precision become 8;"),
        (ml_dtypes.bfloat16, "float16", "21 stored as BF16 become float16: values beyond 65504 are refused"),
        (np.float64, "float32", "53 bits of precision become 24"),
    ],
)
def test_narrowing_warns_once(tmp_path, stored, dtype, message):
    folder = checkpoints.write(tmp_path / "hf", stored_as(stored))
    with pytest.warns(NarrowingWarning) as found:
        convert(folder, tmp_path / "native", dtype, progress=False)
    assert len(found) == 1
    assert message in str(found[0].message)
    with pytest.warns(NarrowingWarning):
        load_model(folder, dtype)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (np.float32, None), (np.float32, "float32"), (ml_dtypes.bfloat16, None), (ml_dtypes.bfloat16, "float32"),
        (np.float16, "float32"), (np.float16, "float16"),
    ],
)  # fmt: skip
def test_what_loses_nothing_does_not_warn(tmp_path, stored, dtype):
    folder = checkpoints.write(tmp_path / "hf", stored_as(stored))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(folder, tmp_path / "native", dtype, progress=False)
        load_model(folder, dtype)


def test_the_default_dtype_of_loading_does_not_warn(tmp_path, monkeypatch):
    folder = checkpoints.write(tmp_path / "hf")
    monkeypatch.setattr(loading.jax, "default_backend", lambda: "gpu")
    assert load_model(folder)[0].dtype == ml_dtypes.bfloat16


def test_the_command_warns_in_one_line(capfd, hf_folder, tmp_path):
    code, _, err = run(capfd, "convert", hf_folder, tmp_path / "native", "--dtype", "bfloat16")
    (line,) = [line for line in err.splitlines() if "warning" in line]
    assert code == 0
    assert line.startswith("griffin-jax convert: warning: ")
    assert line.endswith("24 bits of precision become 8; float32 keeps everything")


# ---- hashes ----


def test_the_manifest_has_hashes_of_the_source(capfd, tmp_path):
    folder = checkpoints.write(tmp_path / "hf", shards=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    backend = Backend(models.BPE(vocab={f"t{token}": token for token in range(checkpoints.VOCABULARY)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="{{ messages }}").save_pretrained(folder)
    # What no model is read from.
    for name in ("README.md", "vocab.json", "tokenizer.model"):
        (folder / name).write_text("x")
    native = convert(folder, tmp_path / "native", progress=False).path
    expected = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in (
            "config.json", "generation_config.json", "model.safetensors.index.json",
            "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
            "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        )
    }  # fmt: skip
    opened = NativeCheckpoint(native)
    assert (opened.converted_from, opened.hashes) == (str(folder), expected)
    again = convert(native, tmp_path / "again", progress=False).path
    hashes = NativeCheckpoint(again).hashes
    assert hashes[MANIFEST] == hashlib.sha256((native / MANIFEST).read_bytes()).hexdigest()
    assert any(name.startswith("params/") for name in hashes)
    _, out, _ = run(capfd, "info", "--model", native)
    assert f"stored in float32, from {folder}" in out
    for name, digest in expected.items():
        assert f"sha256 {digest}  {name}" in out
    _, out, _ = run(capfd, "info", "--model", native, "--json")
    assert json.loads(out)["source"] == {"name": str(folder), "sha256": expected}


def test_manifests_without_hashes_can_be_loaded(hf_folder, tmp_path, capfd):
    native = convert(hf_folder, tmp_path / "native", progress=False).path
    manifest = json.loads((native / MANIFEST).read_text())
    (native / MANIFEST).write_text(json.dumps(sealed({**manifest, "source": "somewhere"})))
    assert (NativeCheckpoint(native).converted_from, NativeCheckpoint(native).hashes) == ("somewhere", {})
    gj.load(native)
    code, out, _ = run(capfd, "info", "--model", native)
    assert (code, "sha256" in out) == (0, False)


def test_a_failed_conversion_does_not_wait_for_hashes(tmp_path, hf_folder, monkeypatch):
    import threading

    stop = threading.Event()
    stop.set()
    # Nothing is read any more once the conversion has ended.
    assert loading._sha256(hf_folder / "model.safetensors", stop) == hashlib.sha256(b"").hexdigest()
    monkeypatch.setattr(sources.FamilySource, "read", lambda *_: (_ for _ in ()).throw(ValueError("bad")))
    with pytest.raises(ValueError, match="bad"):
        convert(hf_folder, tmp_path / "native", progress=False)
    assert [thread.name for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name] == []


# ---- verification ----


@needs_torch
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_conversions_that_keep_the_values_agree_with_torch(tmp_path, stored):
    folder = checkpoints.write(tmp_path / "hf", stored_as(stored))
    report = convert(folder, tmp_path / "native", progress=False, verify=True)
    found = report.verification
    assert found is not None
    assert found.ok
    assert (found.tolerance, found.agreement, found.positions) == (1e-4, 1.0, 2 * (1 + 9 + 40))
    assert 0 < found.relative < 1e-5
    assert "verified against PyTorch" in str(report)


@needs_torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_have_a_wider_tolerance(hf_folder, tmp_path, dtype):
    with pytest.warns(NarrowingWarning):
        native = convert(hf_folder, tmp_path / "native", dtype, progress=False).path
    found = verify(hf_folder, native)
    assert found.ok
    assert 1e-4 < found.relative < found.tolerance < 0.05


@needs_torch
def test_a_gguf_file_is_verified(tmp_path):
    from test_sources import BLOCKY, blocky_tensors

    file = write_gguf(tmp_path / "x.gguf", blocky_tensors(), BLOCKY, quantise=gguf.GGMLQuantizationType.Q8_0)
    found = verify(file, convert(file, tmp_path / "native", progress=False).path)
    assert found.ok
    assert found.tolerance == 1e-4


@needs_torch
def test_a_wrong_conversion_is_told(capfd, hf_folder, tmp_path):
    weights = checkpoints.tensors()
    up, gate = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"
    weights[up], weights[gate] = weights[gate], weights[up]
    other = convert(checkpoints.write(tmp_path / "other", weights), tmp_path / "native", progress=False).path
    found = verify(hf_folder, other)
    assert not found.ok
    assert found.relative > 0.01
    assert "does NOT compute what" in str(found)
    assert "The largest difference is" in str(found)


@needs_torch
def test_the_command_fails_where_the_conversion_is_wrong(capfd, hf_folder, tmp_path, monkeypatch):
    ours = verification.our_logits
    monkeypatch.setattr(verification, "our_logits", lambda *arguments: [1.01 * array for array in ours(*arguments)])
    code, out, err = run(capfd, "convert", hf_folder, tmp_path / "native", "--verify")
    assert (code, out) == (1, "")
    assert "verification failed" in err
    assert "stays, to be looked at" in err
    assert NativeCheckpoint(tmp_path / "native").dtype == np.float32
    with pytest.raises(gj.VerificationError) as error:
        convert(hf_folder, tmp_path / "again", progress=False, verify=True)
    assert 0.005 < error.value.verification.relative < 0.015


@needs_torch
def test_the_command_prints_the_verification(capfd, hf_folder, tmp_path):
    code, out, _ = run(capfd, "convert", hf_folder, tmp_path / "native", "--verify")
    assert code == 0
    assert "verified against PyTorch" in out.splitlines()[-1]
    assert "equal at 100.0% of 100 positions" in out


@needs_torch
def test_what_cannot_be_verified_is_refused_first(hf_folder, tmp_path, monkeypatch):
    native = convert(hf_folder, tmp_path / "native", progress=False).path
    with pytest.raises(ValueError, match="is a native folder, which PyTorch cannot read"):
        convert(native, tmp_path / "again", progress=False, verify=True)
    other = checkpoints.write(tmp_path / "other", config=checkpoints.config(rope_theta=500.0))
    with pytest.raises(ValueError, match="is not a conversion of"):
        verify(other, native)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="verifying a conversion needs PyTorch, which is not installed"):
        convert(hf_folder, tmp_path / "again", progress=False, verify=True)
    assert not (tmp_path / "again").exists()


# ---- devices ----

SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import griffin_jax as gj
from griffin_jax.checkpoints.native import NativeCheckpoint

folder, dtype = sys.argv[1:]
assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))

def sharding(path, shape):
    if path.endswith((".gate", ".up", ".down")):
        return NamedSharding(mesh, P("a", "b"))
    return NamedSharding(mesh, P(None, "b") if path in ("embedding", "head") else P())

NativeCheckpoint.read = None  # the way of whole arrays
whole = gj.load(folder, dtype)
split = gj.load(folder, dtype, sharding=sharding)
for (path, one), (_, other) in zip(*(jax.tree_util.tree_leaves_with_path(llm.model) for llm in (whole, split))):
    assert one.dtype == other.dtype == dtype
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
gate_up = split.model.layers[1].ff.gate_up[...]
assert gate_up.sharding == NamedSharding(mesh, P(None, "a", "b")), gate_up.sharding
assert {shard.data.shape for shard in gate_up.addressable_shards} == {(2, 12, 8)}
assert {shard.data.shape for shard in split.model.embedding[...].addressable_shards} == {(32, 8)}
tokens = [[3, 4, 5, 6, 7]] * 2
expected, found = (np.asarray(llm.logits(tokens, prompt_length=5, density=1.0)) for llm in (whole, split))
tolerance = 1e-5 if dtype == "float32" else 2e-2
assert np.abs(expected - found).max() < tolerance * np.abs(expected).max(), np.abs(expected - found).max()
if dtype == "float32":
    one, other = (llm.generate(tokens, max_new_tokens=6, density=0.5).tokens for llm in (whole, split))
    assert one == other

replicated = gj.load(folder, dtype, sharding=NamedSharding(mesh, P()))
assert replicated.model.head[...].is_fully_replicated
last = jax.sharding.SingleDeviceSharding(jax.devices()[3])
assert gj.load(folder, dtype, sharding=last).model.head[...].devices() == {jax.devices()[3]}

def message(sharding):
    try:
        gj.load(folder, dtype, sharding=sharding)
    except ValueError as error:
        return str(error)

three = NamedSharding(Mesh(np.array(jax.devices()[:3]), ("x",)), P("x"))
text = message(three)
assert "parameter embedding of the shape (32, 16) cannot be divided" in text and "'x': 3" in text, text
text = message(NamedSharding(mesh, P(None, "a")))
assert "parameter layers.0.attention_norm.scale of the shape (16,)" in text or "norm.scale" in text, text
assert "sharding of parameter embedding is None" in message(lambda path, shape: None)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::griffin_jax.NarrowingWarning")
@pytest.mark.parametrize("kind", first_and_slow(1, "native", "hf", "gguf", "native-float16"))
def test_parameters_go_to_their_devices(tmp_path, kind):
    folder = checkpoints.write(tmp_path / "hf")
    dtype = "float32"
    if kind == "gguf":
        folder = write_gguf(tmp_path / "x.gguf", checkpoints.tensors())
    elif kind.startswith("native"):
        folder = convert(folder, tmp_path / "native", progress=False).path
        dtype = "float16" if kind == "native-float16" else dtype
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHARDED, str(folder), dtype],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_shardings_are_checked_before_weights_are_read(hf_folder, monkeypatch):
    import jax

    monkeypatch.setattr(sources.FamilySource, "read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"the sharding of parameter embedding is 'x', not a jax\.sharding"):
        load_model(hf_folder, sharding=lambda path, shape: "x")  # pyright: ignore
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    too_long = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "x"))
    with pytest.raises(ValueError, match=r"parameter embedding of the shape \(32, 16\) cannot be divided as"):
        load_model(hf_folder, sharding=too_long)
