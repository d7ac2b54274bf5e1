"""The README and the docs say what is so: code runs, flags exist, files and names are there."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import griffin_jax as gj
from benchmarks import gpu
from griffin_jax.cli import main as cli
from griffin_jax.evaluation import general_text

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DEMO = "smollm2-135m-instruct"
PRIOR = "smollm2.prior.safetensors"

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language.strip() in languages]


def without_blocks(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def pages_with_code() -> list[Any]:
    """A page that loads the demo model takes long."""
    found = [(page, "\n".join(blocks(page, "python"))) for page in PAGES]
    return [
        pytest.param(page, code, id=name_of(page), marks=[pytest.mark.slow] if "load(" in code else [])
        for page, code in found
        if code
    ]


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """The folder `smollm2` of the docs, and a small prior of this model next to it."""
    folder = tmp_path_factory.mktemp("docs") / "smollm2"
    gj.convert(DEMO, folder)
    llm = gj.load(folder)
    assert llm.tokenizer is not None
    texts = [llm.tokenizer.encode(text) for text in ("Bees dance on the comb.", "The river has three bridges.")]
    general_text.measure(llm.model, texts, size=2, rows=4, quiet=True).save(folder.with_name(PRIOR))
    return folder


# ---- code ----


def run(script: Path, folder: Path, flags: str | None = None) -> str:
    """Runs a script as its readers do, in a process of its own; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), **({"XLA_FLAGS": flags} if flags else {})}
    done = subprocess.run(
        [sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.thorough
@pytest.mark.parametrize(("page", "code"), pages_with_code())
def test_the_python_blocks_of_a_page_run(page: Path, code: str, tmp_path: Path, request):
    if '"smollm2"' in code and "convert(" not in code:
        folder = request.getfixturevalue("converted")
        for source in (folder, folder.with_name(PRIOR)):
            (tmp_path / source.name).symlink_to(source)
    script = tmp_path / "blocks.py"
    script.write_text(code)
    # With as many devices as the pages about meshes say.
    run(script, tmp_path, os.environ["XLA_FLAGS"])


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_an_example_runs(example: Path, tmp_path: Path):
    assert run(example, tmp_path)


# ---- the command line ----


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def nested(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a command's own commands, such as those of `eval`."""
    return {
        name: each
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, each in action.choices.items()
    }


def all_flags() -> set[str]:
    parsers = [cli.parser_of(name) for name in cli.COMMANDS if name not in cli.UNPARSED]
    parsers += [each for parser in parsers for each in nested(parser).values()]
    of_benchmark = argparse.ArgumentParser()
    gpu.add_arguments(of_benchmark)
    return set().union(*map(flags_of, [*parsers, of_benchmark])) | {"--version"}


def commands(page: Path) -> Iterator[list[str]]:
    """What follows `griffin-jax` in the shell blocks and in the text of a page."""
    shell = "\n".join(blocks(page, "", "sh", "bash", "shell")).replace("\\\n", " ")
    lines = [line for line in shell.splitlines() if "->" not in line]
    lines += re.findall(r"`(griffin-jax [^`]+)`", without_blocks(page).replace("\n", " "))
    for line in lines:
        for part in re.split(r"&&|\|(?=\s)", line):
            words = shlex.split(part.replace("[", " ").replace("]", " "), comments=True)
            if words[:1] == ["griffin-jax"]:
                yield words[1:]


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name_of)
def test_commands_and_their_flags_exist(page: Path):
    for name, *words in commands(page):
        if name.startswith("-"):
            continue
        assert name in cli.COMMANDS, f"griffin-jax {name}"
        if name in cli.UNPARSED:
            continue
        parser = cli.parser_of(name)
        known, inner = flags_of(parser), nested(parser)
        if inner and words and not words[0].startswith("-"):
            assert words[0] in inner, f"griffin-jax {name} {words[0]}"
            known = known | flags_of(inner[words[0]])
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= known, f"griffin-jax {name}: {sorted(flags - known)}"


def test_commands_are_found_in_the_readme():
    found = [words[0] for words in commands(ROOT / "README.md")]
    assert {"generate", "eval", "convert"} <= set(found)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_in_the_text_exist(page: Path):
    """Flags that stand alone; those with an underscore are lm-evaluation-harness's."""
    text = re.sub(r"`(pip|python|sphinx-build|griffin-jax lm-eval)[^`]*`", "", without_blocks(page))
    inline = " ".join(re.findall(r"`([^`]+)`", text))
    flags = {flag for flag in re.findall(r"(?<!\S)(--[a-z][\w-]*)", inline) if "_" not in flag}
    assert flags <= all_flags() | {"--model", "--peers"}


# ---- names ----


def resolve(dotted: str) -> Any:
    """What a dotted name means; raises if there is nothing of that name."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:count]).startswith(str(error.name)):
                raise
            continue
        for attribute in parts[count:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_names_that_a_page_mentions_exist(page: Path):
    text = without_blocks(page)
    for path in re.findall(r"`((?:griffin_jax|tests|docs|examples|benchmarks|convert)/[\w./-]*)`", text):
        # What the build makes is there after the first one.
        assert path.startswith("docs/_build") or (ROOT / path).exists(), path
    for dotted in set(re.findall(r"\bgriffin_jax(?:\.[A-Za-z_]\w*)+", text)):
        if not dotted.endswith(".py"):
            resolve(dotted)


def test_the_way_through_the_code_names_what_is_there():
    lines = re.findall(
        r"^- \[`([\w/]+\.py)`\]\(\.\./([\w/]+\.py)\): (.*)$", (ROOT / "docs" / "code.md").read_text(), re.M
    )
    assert len(lines) > 30
    for path, target, names in lines:
        assert path == target
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        found = re.findall(r"`(\w+)`", names)
        assert found, path
        for name in found:
            assert hasattr(module, name), f"{path} has no {name}"


def test_the_way_through_the_code_is_that_of_the_data():
    seen = list(dict.fromkeys(re.findall(r"griffin_jax/(\w+)/", (ROOT / "docs" / "code.md").read_text())))
    way = ["checkpoints", "model", "griffin", "generation", "llm", "cli"]
    assert [package for package in seen if package in way] == way


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^\.\. auto\w+:: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.M)
    for name in listed:
        resolve(name if name.startswith("griffin_jax.") else f"griffin_jax.{name}")
    assert set(gj.__all__) <= {name.rpartition(".")[2] for name in listed}
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name_of)
def test_links_lead_to_files(page: Path):
    """Sphinx checks anchors, but not what lies outside of its folder."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", without_blocks(page)):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_table_of_contents():
    tree = (ROOT / "docs" / "index.md").read_text()
    listed = {line for _, code in FENCE.findall(tree) for line in code.splitlines()}
    pages = [*(ROOT / "docs").glob("*.md"), *NOTEBOOKS]
    names = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in pages} - {"index"}
    assert names <= listed
