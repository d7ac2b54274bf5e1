"""The command line as a user meets it: what it prints, and what bad input gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
from reference import load_torch

import griffin_jax as gj
from convert.__main__ import main as module_main
from griffin_jax.cli.main import main

PROJECT = Path(__file__).parents[3]


def run(capfd, *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def model(worded) -> str:
    return str(worded.folder)


class TestGenerate:
    def test_json_is_the_last_line(self, capfd, model, worded):
        code, out, _ = run(
            capfd, "generate", "--model", model, "--prompt", "The tallest mountain on Earth", "--max-new-tokens", "8",
            "--json",
        )  # fmt: skip
        result = json.loads(out.splitlines()[-1])
        assert code == 0
        assert result["prompt_tokens"] == len(worded.llm.tokenizer.encode("The tallest mountain on Earth"))
        assert len(result["tokens"]) == 8
        assert result["density"] == 0.5
        assert result["kept"] == [24] * 2
        assert set(result["seconds"]) == {"load", "compile", "prefill", "select", "prune", "decode"}
        assert result["decode_tokens_per_second"] > 0
        assert isinstance(result["text"], str)

    def test_prompt_file_density_and_method(self, capfd, model, worded, tmp_path):
        (tmp_path / "prompt.txt").write_text("Once upon a time", encoding="utf-8")
        code, out, err = run(
            capfd, "generate", "--model", model, "--prompt-file", str(tmp_path / "prompt.txt"), "--density", "1",
            "--max-new-tokens", "4",
        )  # fmt: skip
        assert code == 0
        assert out == worded.llm.generate("Once upon a time", max_new_tokens=4, density=1.0).texts[0] + "\n"
        assert "96 of 96 neurons kept" in err

    def test_stream_and_batch_print_the_same_text(self, capfd, model):
        arguments = ["generate", "--model", model, "--max-new-tokens", "6", "--prompt", "A river"]
        _, plain, _ = run(capfd, *arguments)
        _, streamed, _ = run(capfd, *arguments, "--stream")
        assert streamed == plain
        _, batch, _ = run(capfd, *arguments, "--prompt", "A river")
        assert batch == f"--- prompt 1\n{plain}--- prompt 2\n{plain}"

    def test_experts_saved_and_given_back(self, capfd, model, tmp_path):
        file = str(tmp_path / "experts.safetensors")
        arguments = ["generate", "--model", model, "--prompt", "A river", "--max-new-tokens", "6"]
        _, first, _ = run(capfd, *arguments, "--density", "0.6", "--save-experts", file)
        _, again, err = run(capfd, *arguments, "--experts", file)
        assert first == again
        assert f"{2 * 28} of 96 neurons kept" in err

    def test_in_place(self, capfd, model):
        arguments = ["generate", "--model", model, "--prompt", "A river", "--max-new-tokens", "6"]
        _, usual, _ = run(capfd, *arguments)
        code, out, _ = run(capfd, *arguments, "--in-place")
        assert (code, out) == (0, usual)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "no prompt"),
            (["--prompt", ""], "prompt 0 is empty"),
            (["--prompt", "a", "--density", "0"], r"density must be in (0, 1], got 0.0"),
            (["--prompt", "a", "--density", "1.5"], r"density must be in (0, 1], got 1.5"),
            (["--prompt", "a", "--density", "half"], "could not convert"),
            (["--prompt", "a", "--density", "0.5,0.5,0.5"], "3 densities for 2 layers"),
            (["--prompt", "a", "--density", "0.0001"], "keeps 0 of 48 neurons"),
            (["--prompt", "a", "--method", "best"], "invalid choice: 'best'"),
            (["--prompt", "a", "--max-new-tokens", "9000"], "context of 256"),
            (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be"),
            (["--prompt", "a", "--top-p", "0.9"], "top_p need a temperature"),
            (["--prompt-file", "no such file"], "no such file"),
            (["--prompt", "a", "--experts", "no such file"], "there is no file no such file"),
            (["--prompt", "a", "--prompt", "b", "--stream"], "--stream shows one answer"),
            (["--prompt", "a", "--seed", "5000000000"], "seed must be a whole number"),
            (["--prompt", "\udcff"], "the text is not Unicode"),
            (["--prompt", "a", "--save-experts", "no such folder/e"], "--save-experts: there is no folder"),
            (["--prompt", "a", "--save-experts", "e", "--density", "1"], "at density 1 nothing is pruned"),
            (["--prompt", "a", "--model", "~nosuch/x"], "nosuch"),
            (["--prompt", "a", "--in-place", "--refit"], "the kept ones are the model's own and cannot be refitted"),
            (["--prompt", "a", "--in-place", "--mesh", "model=2"], "leave out in_place or mesh"),
            (["--prompt", "a", "--prompt", "b", "--in-place"], "with in_place a batch shares its experts"),
            (["--prompt", "a", "--wrong"], "unrecognized arguments: --wrong"),
            (["--prompt", "a", "--model", "/nowhere/model"], "/nowhere/model"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, capfd, model, arguments, message):
        arguments = arguments if "--model" in arguments else ["--model", model, *arguments]
        code, out, err = run(capfd, "generate", *arguments)
        assert code == 2
        assert out == ""
        assert message in err
        assert len(err.splitlines()) == 1


class TestInfo:
    def test_counts(self, capfd, model, worded):
        code, out, _ = run(capfd, "info", "--model", model, "--json", "--density", "0.25")
        facts = json.loads(out)
        import jax

        assert code == 0
        assert facts["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(worded.llm.model))
        experts = gj.ExpertNeurons.from_indices([range(12)] * 2, worded.llm.model.neurons)
        pruned = gj.prune(worded.llm.model, experts)
        assert facts["active_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(pruned))

    def test_a_config_is_enough(self, capfd, model, tmp_path):
        _, expected, _ = run(capfd, "info", "--model", model, "--json")
        (tmp_path / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
        for name in (tmp_path, tmp_path / "config.json"):
            code, out, _ = run(capfd, "info", "--model", str(name), "--json")
            assert code == 0
            assert {**json.loads(out), "model": model} == json.loads(expected)
        code, _, err = run(capfd, "generate", "--model", str(tmp_path), "--prompt", "x")
        assert code == 2
        assert "has neither model.safetensors" in err

    def test_a_config_beside_its_weights(self, capfd, tmp_path):
        folder = checkpoints.write(tmp_path / "hf")
        _, expected, _ = run(capfd, "info", "--model", str(folder), "--json")
        code, out, _ = run(capfd, "info", "--model", str(folder / "config.json"), "--json")
        assert code == 0
        assert {**json.loads(out), "model": str(folder)} == json.loads(expected)

    def test_warnings_are_one_line(self, capfd, model, tmp_path):
        values = json.loads((Path(model) / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**values, "never_heard_of": 1}))
        _, _, err = run(capfd, "info", "--model", str(tmp_path))
        assert err.startswith("griffin-jax info: warning: ")
        assert "never_heard_of=1 changes nothing here" in err
        assert err.count("\n") == 1

    def test_for_people(self, capfd, demo_gguf):
        _, out, _ = run(capfd, "info", "--model", str(demo_gguf))
        assert "30 layers, width 576, context 8,192 tokens" in out
        assert "at density 0.5: 768 neurons a layer, 94.7 M parameters active" in out


class TestConvert:
    def test_the_converted_model_writes_the_same(self, capfd, tiny, tmp_path):
        output = str(tmp_path / "native")
        code, out, _ = run(capfd, "convert", str(tiny.folder), output)
        assert code == 0
        assert "peak memory" in out
        converted = gj.load(output)
        assert (
            converted.generate([[5, 6, 7]], max_new_tokens=9).tokens
            == tiny.llm.generate([[5, 6, 7]], max_new_tokens=9).tokens
        )
        code, _, err = run(capfd, "convert", str(tiny.folder), output)
        assert code == 2
        assert "exists" in err

    def test_pickles_only_with_the_option(self, capfd, tiny, tmp_path):
        torch = load_torch()
        folder = tmp_path / "hf"
        folder.mkdir()
        (folder / "config.json").write_bytes((tiny.folder / "config.json").read_bytes())
        torch.save(tiny.torch.state_dict(), folder / "pytorch_model.bin")
        for command in (["convert", str(folder), str(tmp_path / "native")], ["info", "--model", str(folder)]):
            code, _, err = run(capfd, *command)
            assert code == 2
            assert "--allow-pickle on the command line" in err
            assert len(err.splitlines()) == 1
            assert run(capfd, *command, "--allow-pickle")[0] == 0
        assert gj.load(tmp_path / "native").config == tiny.llm.config

    def test_python_m_convert(self, tiny, tmp_path, monkeypatch, capfd):
        """Its function; as a process it is run by the tests of checkpoints."""
        monkeypatch.setattr(sys, "argv", ["convert", str(tiny.folder), str(tmp_path / "native")])
        assert module_main() == 0, capfd.readouterr().err
        assert gj.load(tmp_path / "native").config == tiny.llm.config
        capfd.readouterr()
        assert module_main() == 2
        assert len(capfd.readouterr().err.splitlines()) == 1


def test_help_names_every_command(capfd):
    code, out, _ = run(capfd, "--help")
    assert code == 0
    for command in ("generate", "convert", "info"):
        assert command in out


@pytest.mark.thorough
def test_torch_is_never_imported():
    code = (
        "import sys; sys.modules['torch'] = None; import griffin_jax, griffin_jax.cli.main, convert.__main__;"
        "assert not any(name.startswith('transformers.models') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
