"""PyTorch's files: read when allowed, and only as weights."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from reference import load_torch

from griffin_jax.checkpoints import loading, pytorch, sources
from griffin_jax.checkpoints.loading import convert, load_model, open_source
from griffin_jax.checkpoints.pytorch import PickleFile
from griffin_jax.llm import llm

torch = load_torch()

EMBEDDING = "model.embed_tokens.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def torch_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: torch.from_numpy(array).to(dtype) for name, array in checkpoints.tensors().items()}


def write(folder: Path, payload: Any = None, shards: int = 1, config=None, **options: Any) -> Path:
    """A Hugging Face folder with pytorch_model.bin, or several and an index."""
    payload = torch_tensors() if payload is None else payload
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(checkpoints.CONFIG if config is None else config))
    if shards == 1:
        torch.save(payload, folder / "pytorch_model.bin", **options)
        return folder
    files = [f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin" for shard in range(shards)]
    parts = {file: dict(list(payload.items())[shard::shards]) for shard, file in enumerate(files)}
    for file, part in parts.items():
        torch.save(part, folder / file, **options)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def check_same(folder: Path, dtype: str = "float32") -> None:
    """The model in a folder is that of `checkpoints.tensors`."""
    source = open_source(folder, allow_pickle=True)
    expected = open_source(checkpoints.write(folder.parent / "expected"))
    for path in expected.shapes:
        np.testing.assert_array_equal(
            source.read(path, np.dtype(np.float32)),
            expected.read(path, np.dtype(np.float32)).astype(dtype).astype(np.float32),
        )


def refusal(payload: Any, folder: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r"pytorch_model\.bin|tensors are not those") as error:
        open_source(write(folder / "bad", payload, **options), allow_pickle=True)
    return str(error.value)


# ---- what is read ----


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_hold_the_same_model(tmp_path, shards, zipped):
    check_same(write(tmp_path / "bin", shards=shards, _use_new_zipfile_serialization=zipped))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_pickles(tmp_path, dtype):
    folder = write(tmp_path / "bin", torch_tensors(getattr(torch, dtype)))
    assert open_source(folder, allow_pickle=True).dtype == dtype
    check_same(folder, dtype)


def test_views_parameters_and_expanded_tensors(tmp_path):
    tensors = torch_tensors()
    tensors[DOWN] = tensors[DOWN].t().contiguous().t()
    tensors[EMBEDDING] = torch.nn.Parameter(tensors[EMBEDDING])
    both = torch.stack([tensors["model.norm.weight"], tensors["model.layers.0.input_layernorm.weight"]])
    tensors["model.norm.weight"], tensors["model.layers.0.input_layernorm.weight"] = both
    check_same(write(tmp_path / "bin", tensors))
    file = tmp_path / "expanded.bin"
    torch.save({"a": torch.tensor([[1.5], [2.5]], dtype=torch.bfloat16).expand(2, 3)}, file)
    read = PickleFile(file).read("a", 1, 2)
    assert (read.dtype.name, read.tolist()) == ("bfloat16", [[2.5, 2.5, 2.5]])


def test_a_tied_head_shares_its_storage(tmp_path):
    tensors = torch_tensors()
    tensors["lm_head.weight"] = tensors[EMBEDDING]
    source = open_source(
        write(tmp_path / "bin", tensors, config=checkpoints.config(tie_word_embeddings=True)), allow_pickle=True
    )
    assert "head" not in source.shapes
    assert source.ignored == ["lm_head.weight"]


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 200)
    check_same(write(tmp_path / "bin", shards=2))
    check_same(write(tmp_path / "legacy", _use_new_zipfile_serialization=False))


@pytest.mark.thorough
def test_conversion_and_loading(tmp_path):
    folder = write(tmp_path / "bin", shards=2)
    native = convert(folder, tmp_path / "native", progress=False, allow_pickle=True).path
    loaded = llm.load(folder, allow_pickle=True)
    expected = checkpoints.logits(load_model(native)[0], [3, 4, 5])
    np.testing.assert_array_equal(checkpoints.logits(loaded.model, [3, 4, 5]), expected)


def test_nothing_stays_mapped(tmp_path):
    """Mapped pages would count as resident memory, and a file that shrinks would end the process."""
    source = open_source(write(tmp_path / "bin"), allow_pickle=True)
    array = source.read("embedding", np.dtype(np.float32))
    if os.path.exists("/proc/self/maps"):
        assert "pytorch_model.bin" not in Path("/proc/self/maps").read_text()
    file = tmp_path / "bin" / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:1000])
    assert np.isfinite(array).all()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: "):
        source.read("embedding", np.dtype(np.float32))


# ---- only where it is allowed ----


def test_pickles_are_refused_without_the_option(tmp_path, monkeypatch):
    monkeypatch.setattr(pytorch, "import_torch", lambda purpose: pytest.fail("torch was imported"))
    for folder in (write(tmp_path / "one"), write(tmp_path / "two", shards=2)):
        for opening in (open_source, load_model, llm.load, loading.plan):
            with pytest.raises(FileNotFoundError, match=r"has no safetensors.*allow_pickle=True.*--allow-pickle"):
                opening(folder)


def test_safetensors_win(tmp_path, monkeypatch):
    folder = write(tmp_path / "both", {"nothing": torch.ones(1)})
    checkpoints.write(folder)
    monkeypatch.setattr(pytorch, "import_torch", lambda purpose: pytest.fail("torch was imported"))
    assert len(open_source(folder, allow_pickle=True).shapes) == 21


def test_without_torch_the_message_says_what_to_install(tmp_path, monkeypatch):
    folder = write(tmp_path / "bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pytorch_model\.bin.* needs PyTorch.*pip install 'torch>=2\.10'"):
        open_source(folder, allow_pickle=True)


def test_old_releases_of_torch_are_refused(tmp_path, monkeypatch):
    folder = write(tmp_path / "bin")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ImportError, match=r"needs PyTorch 2\.10 or later, and 2\.5\.1\+cpu is installed"):
        open_source(folder, allow_pickle=True)


def test_hub_repositories_give_pickles_only_if_there_is_nothing_else(tmp_path, monkeypatch):
    import huggingface_hub

    remote, local = write(tmp_path / "remote"), tmp_path / "local"
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append("pytorch_model.bin" in allow_patterns)
        local.mkdir(exist_ok=True)
        for file in remote.iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"someone/old: the repository has no safetensors.*allow_pickle=True"):
        open_source("someone/old")
    assert asked == [False, False]
    assert open_source("someone/old", allow_pickle=True).config.width == 16
    assert asked == [False, False, False, False, True]
    asked.clear()
    checkpoints.write(remote)
    open_source("someone/old", allow_pickle=True)
    assert asked == [False, False]


# ---- what is refused ----


class Harmful:
    """Runs a command when it is unpickled by anything that does as it is told."""

    def __init__(self, file: Path):
        self._file = file

    def __reduce__(self):
        return os.system, (f"touch {self._file}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path, zipped):
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(Harmful(ran)))
    assert ran.exists(), "the test's own pickle does nothing"
    ran.unlink()
    message = refusal({**torch_tensors(), "x": Harmful(ran)}, tmp_path, _use_new_zipfile_serialization=zipped)
    assert "asks for posix.system, which may run code" in message or "asks for nt.system" in message
    assert not ran.exists()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(checkpoints.CONFIG))
    (tmp_path / "plain" / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful(ran)))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        open_source(tmp_path / "plain", allow_pickle=True)
    assert not ran.exists()


def test_entries_that_are_no_tensors(tmp_path):
    message = refusal({**torch_tensors(), "step": 7, "names": ["a"]}, tmp_path)
    assert "2 entries that are no tensors: step is not a tensor but int, names is not a tensor but list" in message


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([torch.ones(2)], "holds list, not a dictionary of tensors"),
        (torch.ones(2), "holds Tensor, not a dictionary"),
        ({"model": {"a": torch.ones(2)}, "step": 3}, "has no tensors at its top level, only 'model', 'step'"),
        ({3: torch.ones(2)}, "names of tensors are texts, 3 is not"),
        ({}, "has no tensors at its top level, only nothing"),
    ],
)
def test_payloads_that_are_no_state_dicts(tmp_path, payload, message):
    assert message in refusal(payload, tmp_path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tensor: tensor.int(), "I32"),
        (lambda tensor: tensor.to_sparse(), "float32 (torch.sparse_coo, cpu)"),
        (lambda tensor: tensor.to("meta"), "float32 (torch.strided, meta)"),
    ],
)
def test_tensors_that_are_no_weights(tmp_path, change, found):
    tensors = torch_tensors()
    tensors[DOWN] = change(tensors[DOWN])
    assert f"1 not of a supported dtype: {DOWN} is {found}" in refusal(tensors, tmp_path)


def repack(file: Path, change) -> None:
    """The archive once more, entry by entry, as `change(archive, name, content)` writes them."""
    with zipfile.ZipFile(file) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries:
            change(archive, name, content)


def compressed(archive, name, content):
    archive.writestr(name, content, zipfile.ZIP_DEFLATED)


def twice(archive, name, content):
    archive.writestr(name, content)
    if name.endswith("data.pkl"):
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, content)


def script(archive, name, content):
    archive.writestr(name, content)
    if name.endswith("data.pkl"):
        archive.writestr(name.replace("data.pkl", "constants.pkl"), content)


@pytest.mark.parametrize(
    ("change", "message"),
    [(compressed, "is compressed"), (twice, "is there 2 times"), (script, "a TorchScript archive")],
)
def test_archives_that_torch_would_not_write(tmp_path, change, message):
    file = write(tmp_path / "bin") / "pytorch_model.bin"
    repack(file, change)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "bin", allow_pickle=True)


def test_archives_that_claim_more_than_they_have(tmp_path):
    file = write(tmp_path / "bin") / "pytorch_model.bin"
    raw = file.read_bytes()
    at = raw.index(b"PK\x01\x02")
    claimed = (1 << 30).to_bytes(4, "little")
    file.write_bytes(raw[: at + 20] + claimed * 2 + raw[at + 28 :])
    with pytest.raises(ValueError, match=r"entries claim 1,07\d,\d+,\d+ bytes, the file has"):
        open_source(tmp_path / "bin", allow_pickle=True)
    encrypted = bytearray(raw)
    encrypted[at + 8] |= 1
    file.write_bytes(encrypted)
    with pytest.raises(ValueError, match="is encrypted"):
        open_source(tmp_path / "bin", allow_pickle=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(tmp_path, zipped):
    """Any byte changed, or an end missing: the model as it is, or an error that names the file."""
    file = write(tmp_path / "bin", _use_new_zipfile_serialization=zipped) / "pytorch_model.bin"
    raw = file.read_bytes()
    random = np.random.default_rng(0)
    cases = [raw[:keep] for keep in (0, 1, 3, 4, 30, 100, len(raw) // 2, len(raw) - 1)]
    for position in [*range(0, 400, 7), *random.integers(0, len(raw), 150)]:
        changed = bytearray(raw)
        changed[position] ^= 1 << int(random.integers(8))
        cases.append(bytes(changed))
    refused = 0
    for content in cases:
        file.write_bytes(content)
        try:
            source = open_source(tmp_path / "bin", allow_pickle=True)
            for path in source.shapes:
                source.read(path, np.dtype(np.float32))
        except ValueError as error:
            assert str(tmp_path / "bin") in str(error)  # noqa: PT017
            refused += 1
    assert refused > 20


def test_an_index_of_pickles_names_pickles(tmp_path):
    folder = write(tmp_path / "bin", shards=2)
    index = folder / "pytorch_model.bin.index.json"
    values = json.loads(index.read_text())
    first = values["weight_map"][EMBEDDING]
    (folder / first).rename(folder / "renamed.safetensors")
    index.write_text(index.read_text().replace(first, "renamed.safetensors"))
    with pytest.raises(ValueError, match=r"'renamed\.safetensors' is not the name of a \.bin file in the folder"):
        open_source(folder, allow_pickle=True)


# ---- what torch would not notice ----


def test_a_changed_member_is_noticed(tmp_path):
    file = write(tmp_path / "bin") / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    values = checkpoints.tensors()[DOWN].tobytes()
    content[content.index(values) + 9] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: damaged, the CRC-32 of .*data/\d+ is not that of"):
        open_source(file.parent, allow_pickle=True)


def test_a_member_that_claims_more_than_it_has(tmp_path):
    file = write(tmp_path / "bin") / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        entry = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = file.read_bytes()
    at = content.rindex(entry.filename.encode()) - 46  # its entry in the central directory
    assert content[at : at + 4] == b"PK\1\2"
    size = (entry.file_size + 64).to_bytes(4, "little")
    file.write_bytes(content[: at + 24] + size + content[at + 28 :])
    with pytest.raises(ValueError, match=r"not an archive that torch\.save writes: .* claims"):
        open_source(file.parent, allow_pickle=True)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_small_files_that_make_large_ones(tmp_path, monkeypatch, protocol, zipped):
    class Bomb:
        def __reduce__(self):
            return bytearray, (1 << 40,)

    folder = write(tmp_path / "bin")
    bomb = pickle.dumps({"x": Bomb()}, protocol)
    if zipped:
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", bomb)
            archive.writestr("archive/version", "3")
    else:
        (folder / "pytorch_model.bin").write_bytes(bomb)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="asks for bytearray") as error:
        open_source(folder, allow_pickle=True)
    assert len(str(error.value).splitlines()) == 1
