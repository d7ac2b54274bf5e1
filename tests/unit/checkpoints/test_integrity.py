"""What is damaged in a native folder is noticed: any bit of any file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from griffin_jax.checkpoints import native as checkpoint
from griffin_jax.checkpoints.loading import convert, load_model, open_source
from griffin_jax.checkpoints.native import MANIFEST, load, save, sealed
from griffin_jax.checkpoints.planning import UncheckedWarning
from griffin_jax.checkpoints.sources import is_finite_on_devices
from griffin_jax.model.assembly import disassemble


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder whose parameters are in files that have no sha256, as those of large models."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "HASHED_BYTES", 0)
        return convert(checkpoints.write(folder / "hf"), folder / "native", progress=False).path


@pytest.fixture
def native(written, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(checkpoint, "HASHED_BYTES", 0)
    return Path(shutil.copytree(written, tmp_path / "native"))


def flip(file: Path, position: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def test_flipped_bits_of_weights_are_noticed(native, capfd):
    """A few are of what Orbax wrote on the way and never reads, which changes nothing."""
    expected = {path: np.asarray(array).copy() for path, array in disassemble(load(native))}
    random = np.random.default_rng(0)
    refused = 0
    for file in sorted((native / "params").rglob("ocdbt.process_0/d/*")):
        content = file.read_bytes()
        for position in random.integers(len(content), size=min(8, len(content) // 256)):
            flip(file, int(position), int(random.integers(8)))
            try:
                found = dict(disassemble(load(native)))
            except ValueError as error:
                refused += 1
                assert re.fullmatch(rf"{native}: damaged, the parameters cannot be read \(.*", str(error))  # noqa: PT017
            else:
                assert all((found[path] == array).all() for path, array in expected.items())
            file.write_bytes(content)
    assert refused > 5
    assert capfd.readouterr().err == ""


def test_a_flipped_bit_of_every_large_parameter_is_noticed(native):
    """Small ones are in nodes of Orbax's tree, which have checksums of their own."""
    arrays = {path: np.asarray(array) for path, array in disassemble(load(native))}
    for path, array in arrays.items():
        part = array.tobytes()[-64:]
        found = [file for file in (native / "params").rglob("ocdbt.process_0/d/*") if part in file.read_bytes()]
        assert found or array.nbytes <= 1024, path
        if not found:
            continue
        before = [file.read_bytes() for file in found]
        for file in found:
            flip(file, file.read_bytes().index(part) + 5, 0)
        with pytest.raises(ValueError, match="damaged, the parameters cannot be read"):
            load(native)
        for file, content in zip(found, before, strict=True):
            file.write_bytes(content)


def test_parts_are_checked_on_every_device(native):
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    load_model(native, "float32", mesh=mesh)
    part = np.asarray(dict(disassemble(load(native)))["head"]).tobytes()[-64:]
    for file in (native / "params").rglob("ocdbt.process_0/d/*"):
        if part in file.read_bytes():
            flip(file, file.read_bytes().index(part), 3)
    with pytest.raises(ValueError, match="damaged, the parameters cannot be read"):
        load_model(native, "float32", mesh=mesh)


@pytest.mark.parametrize(("old", "new"), [('"norm_eps": 1e-05', '"norm_eps": 1e-04'), ('"width": 16', '"width": 17')])
def test_a_changed_manifest_is_noticed(native, old, new):
    manifest = native / MANIFEST
    assert old in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"griffin_jax\.json: damaged or edited"):
        load(native)


def test_tokenizers_are_compared_whole(native, monkeypatch):
    (native / "tokenizer").mkdir()
    (native / "tokenizer" / "big.json").write_bytes(b"x" * 1000)
    manifest = json.loads((native / MANIFEST).read_text())
    manifest["files"] |= checkpoint._fingerprints(native, ["tokenizer/big.json"])
    (native / MANIFEST).write_text(json.dumps(sealed(manifest)))
    flip(native / "tokenizer" / "big.json", 500, 0)
    with pytest.raises(ValueError, match=r"damaged files: tokenizer/big\.json"):
        open_source(native)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_are_refused(native, tmp_path, monkeypatch, value, dtype):
    model = load(native)
    model.norm.scale[...] = model.norm.scale[...].at[3].set(value)
    monkeypatch.setattr(checkpoint, "check_finite", lambda *_: None)
    save(model, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"norm\.scale: holds NaN or infinite values"):
        load(tmp_path / "saved", jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_finite_is_what_numpy_says(dtype):
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**16, (50, 7), np.uint16)
    values = bits.view(dtype) if dtype != "float32" else bits.astype(np.uint32).view(np.float32)
    special = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, float(jnp.finfo(dtype).max)]
    for array in (*values, *np.array(special, dtype)[:, None]):
        assert is_finite_on_devices(jnp.asarray(array)) == bool(np.isfinite(array.astype(np.float32)).all())


def test_folders_of_the_former_version(native, tmp_path):
    """Written here as version 0.2.0 did: Zarr 2, sizes of large files, no checksum of anything larger."""
    arrays = {path: np.asarray(array) for path, array in disassemble(load(native))}
    expected = {path: array.copy() for path, array in arrays.items()}
    arrays["norm.scale"] = arrays["norm.scale"] * 2
    shutil.rmtree(native / "params")
    with checkpoint._quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(native / "params", args=ocp.args.PyTreeSave(checkpoint._nested(arrays)))
    manifest = json.loads((native / MANIFEST).read_text()) | {"version": 1}
    del manifest[checkpoint.SEAL]
    manifest["files"] = checkpoint._fingerprints(native, checkpoint._files_in(native / "params"))
    manifest["files"] = {f"params/{name}": known for name, known in manifest["files"].items()}
    manifest["files"] = checkpoint._fingerprints(native, manifest["files"])
    (native / MANIFEST).write_text(json.dumps(manifest))
    with pytest.warns(UncheckedWarning, match="of files over 1 MiB only the sizes are compared"):
        found = dict(disassemble(load(native)))
    np.testing.assert_array_equal(found["norm.scale"], expected["norm.scale"] * 2)
    np.testing.assert_array_equal(found["head"], expected["head"])


# ---- names in a manifest ----


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "params/../../secret", "a\\..\\b", "linked", "x\0"])
def test_a_manifest_names_files_of_its_folder_only(native, name):
    (native.parent / "secret").write_text("secret")
    (native / "linked").symlink_to(native.parent / "secret")
    manifest = json.loads((native / MANIFEST).read_text())
    manifest["files"][name] = "7 bytes"
    (native / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ValueError, match="is not the name of a file in the folder") as error:
        open_source(native)
    assert "sha256" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"params/_METADATA": []}},
        {"source": {"name": "x", "sha256": [1]}},
        {"source": {"name": "x", "sha256": {"a": []}}},
        {"dtype": []},
        {"dtype": {}},
        {"version": True},
        {"version": []},
        {"files": ["params"]},
    ],
)
def test_fields_of_other_kinds(native, change):
    manifest = json.loads((native / MANIFEST).read_text()) | change
    (native / MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ValueError, match=str(native)) as error:
        open_source(native)
    assert len(str(error.value).splitlines()) == 1
