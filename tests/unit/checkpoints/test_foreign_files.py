"""Folders and files of somebody else: nothing in them runs, and nobody is told to delete them."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import checkpoints
import pytest

from griffin_jax.aot import compilation
from griffin_jax.checkpoints.loading import load_model, open_source
from griffin_jax.checkpoints.native import load
from griffin_jax.utils.download import run_pip

# ---- code that lies around ----


@pytest.mark.parametrize("configured", ["tokenizer_config.json", "config.json"])
def test_code_in_a_model_folder_never_runs_and_nobody_asks(tmp_path, monkeypatch, configured):
    folder = checkpoints.write(tmp_path / "hf")
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Tokenizer: pass\n")
    (folder / "vocab.json").write_text("{}")
    values = json.loads((folder / configured).read_text()) if (folder / configured).exists() else {}
    values["auto_map"] = {"AutoTokenizer": ["code.Tokenizer", None], "AutoConfig": "code.Tokenizer"}
    (folder / configured).write_text(json.dumps(values))
    questions = []
    monkeypatch.setattr(builtins, "input", lambda *text: questions.append(text) or "y")
    with pytest.raises(ValueError, match="the tokenizer cannot be read") as error:
        load_model(folder)
    assert len(str(error.value).splitlines()) == 1
    assert str(folder) in str(error.value)
    assert questions == []
    assert not ran.exists()


def plant(folder: Path, *modules: str) -> Path:
    """Modules that leave a file when they are imported."""
    for module in modules:
        (folder / f"{module}.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nraise SystemExit(0)\n")
    return folder / "ran"


def test_pip_is_not_what_the_current_folder_says(tmp_path, monkeypatch):
    ran = plant(tmp_path, "pip", "json", "typing")
    monkeypatch.chdir(tmp_path)
    assert run_pip("download") is not None  # no requirement was given
    assert not ran.exists()


@pytest.mark.thorough
def test_the_compiling_process_imports_nothing_from_the_current_folder(tmp_path, monkeypatch):
    ran = plant(tmp_path, "griffin_jax", "numpy")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="the compiler failed"):
        compilation._in_child({}, None)
    assert not ran.exists()


# ---- what is not ours ----


@pytest.mark.parametrize("name", ["params.json", "params", "params.pth"])
def test_names_that_other_formats_have_too(tmp_path, name):
    """Mistral's folders have a params.json."""
    folder = checkpoints.write(tmp_path / "hf")
    if name == "params":
        (folder / name).mkdir()
    else:
        (folder / name).write_text('{"dim": 16}')
    assert open_source(folder).config.width == checkpoints.WIDTH


def test_other_folders_are_not_called_broken(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "notes.txt").write_text("mine")
    for opening in (open_source, load):
        with pytest.raises(
            (ValueError, FileNotFoundError), match=r"griffin_jax\.json, which a conversion writes"
        ) as error:
            opening(tmp_path)
        assert "delete it" not in str(error.value)
        assert len(str(error.value).splitlines()) == 1
