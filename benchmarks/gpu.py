"""Measures what pruning gains on this accelerator, in parts whose results are kept.

The parts are, with the most valuable ones first: whether the device computes what the CPU computes (tiny models of five
families); decoding and prefill of Llama-2-13B and Gemma-7B in their true shapes with random weights, in bfloat16, int8
and int4, for one sequence and for eight, and for one sequence in int8 with a density of bytes; the integer formats with
the kernels of `griffin_jax.model.gemv`, which are not the default until they have been measured; transformers and the
published GRIFFIN in PyTorch, on the same device with the same shapes; the kernels of a decode step; one copy of the
weights instead of two; and the loop over tokens as one CUDA graph.

Each part runs in a separate process and leaves a file in --output. If the command is run again, it goes on with the
parts that are missing, so a few minutes at a time on a device are enough. No part begins for which --minutes leaves no
time. At the end of each run, all results so far are collected in results.json and results.txt.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_checks import FAMILIES
from benchmarks.gpu_profile import table as profile_table
from griffin_jax.bench.report import size
from griffin_jax.bench.report import table as bench_table
from griffin_jax.cli.options import numbers
from griffin_jax.model.named import named
from griffin_jax.model.products import GEMV_VARIABLE
from griffin_jax.model.sharding import INTEGER_TILE
from griffin_jax.utils.wholefile import write_text

FORMAT = "griffin_jax gpu 1"
"""Version of the JSON object in `results.json`."""

PAPER = {"Llama-2-13B": 1.25, "Gemma-7B": 1.29}
"""The speed-up of decoding at a density of 0.5 that the paper measured on an L40 (arXiv 2404.01365)."""

CHECKS = ("correctness", "correctness-gemv")
"""Names of the parts that check what the device computes."""

FIRST_GUESS = 60.0
"""Seconds that a part is assumed to take before any part has been run."""


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of all that is measured.

    Attributes:
        models: names of models in `griffin_jax.model.named`.
        layers: number of layers of each model, from the first; all if None.
        lengths: numbers of tokens of prompt and answer, such as `2048+128`.
        densities: the densities to measure, separated by commas.
        batches: numbers of sequences.
        repeats: number of repeats of each measurement.
        formats: formats of the weights; the first two are measured earlier, and also with several sequences.
        families: the models of `benchmarks.gpu_checks` whose tiny versions are checked.
        gemv: whether the kernels of `griffin_jax.model.gemv`, which only GPUs have, are checked and measured, too.
    """

    models: tuple[str, ...]
    layers: int | None
    lengths: str
    densities: str
    batches: tuple[int, ...]
    repeats: int
    formats: tuple[str, ...]
    families: tuple[str, ...]
    gemv: bool


FULL = Size(
    ("Llama-2-13B", "Gemma-7B"), None, "2048+128", "1,0.5", (1, 8), 3, ("bfloat16", "int8", "int4"), FAMILIES, gemv=True
)
SMALL = Size(("SmolLM2-135M",), 1, "32+8", "1,0.5", (1,), 1, ("bfloat16", "int8"), FAMILIES[:1], gemv=False)
"""Sizes for a test of this command on any machine; the figures mean nothing."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One part, which runs in a separate process.

    Attributes:
        name: name of the part's file, without suffix.
        command: arguments after `python -m`; the process writes a JSON object to the file given by `--json-file`.
        in_torch: whether JAX leaves the device to PyTorch.
        xla_flags: further `XLA_FLAGS` for this process only.
        gemv: whether products of a few tokens with integers use `griffin_jax.model.gemv`.
    """

    name: str
    command: tuple[str, ...]
    in_torch: bool = False
    xla_flags: str = ""
    gemv: bool = False


def parts(scale: Size) -> Iterator[Part]:
    """All parts, the most valuable ones first."""

    def run(model: str, *more: str) -> tuple[str, ...]:
        layers = () if scale.layers is None else ("--layers", str(scale.layers))
        return ("--model", model, *layers, "--lengths", scale.lengths, "--repeats", str(scale.repeats), *more)

    def checks(name: str, families: Sequence[str], gemv: bool = False) -> Part:
        return Part(name, ("benchmarks.gpu_checks", "--families", ",".join(families)), gemv=gemv)

    def decoding(model: str, weights: str, batch: int, gemv: bool = False) -> Part:
        options = run(
            model, "--dtype", "bfloat16", "--weights", weights, "--batch", str(batch), "--density", scale.densities,
            "--experts", "shared",
        )  # fmt: skip
        if weights == "int8" and batch == first:
            # Whole tiles in both formats, as a single format has at these densities anyway.
            options += ("--mixed-weights", "int4", "--round-to", str(INTEGER_TILE))
        name = f"{model}-{weights}-batch-{batch}" + "-gemv" * gemv
        return Part(name, ("benchmarks", "run", *options), gemv=gemv)

    def peers(model: str, batch: int) -> Part:
        options = run(model, "--density", scale.densities, "--batch", str(batch))
        return Part(f"{model}-torch-batch-{batch}", ("benchmarks.gpu_torch", *options), in_torch=True)

    first, *others = scale.batches
    yield checks("correctness", scale.families)
    for weights in scale.formats[:2]:
        yield from (decoding(model, weights, first) for model in scale.models)
    if scale.gemv:
        yield checks("correctness-gemv", scale.families[:2], gemv=True)
        yield from (decoding(model, "int8", first, gemv=True) for model in scale.models)
    for weights in scale.formats[2:]:
        for gemv in (False, True) if scale.gemv else (False,):
            yield from (decoding(model, weights, first, gemv) for model in scale.models)
    yield from (peers(model, first) for model in scale.models)
    for weights in scale.formats:
        options = ("--model", scale.models[0], "--weights", weights, "--lengths", scale.lengths)
        yield Part(f"{scale.models[0]}-{weights}-profile", ("benchmarks.gpu_profile", *options))
    for batch in others:
        for weights in scale.formats[:2]:
            yield from (decoding(model, weights, batch) for model in scale.models)
        yield from (peers(model, batch) for model in scale.models)
    short = ("--dtype", "bfloat16", "--weights", "bfloat16", "--density", "0.5")
    for model in scale.models:
        yield Part(f"{model}-in-place", ("benchmarks", "run", *run(model, *short, "--in-place")))
    for model in scale.models:
        # By default XLA records the steps of a loop in CUDA graphs, and the CPU launches each of them. With this flag
        # it records the loop, too.
        command = ("benchmarks", "run", *run(model, *short))
        yield Part(f"{model}-loop-in-a-graph", command, xla_flags="--xla_gpu_enable_command_buffer=+WHILE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-results"), metavar="FOLDER", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, metavar="M",
        help="start no part that would probably end later than this (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--part", metavar="TEXT", help="run only the parts that have this text in their names")
    parser.add_argument("--density", metavar="LIST", help=f"densities to decode with (default: {FULL.densities})")
    parser.add_argument("--list", action="store_true", help="list the parts, and which of them are done")
    parser.add_argument(
        "--small", action="store_true", help="use one layer of a small model, to test this command on any machine"
    )


def run(options: argparse.Namespace) -> int:
    """Run the missing parts, and collect all results so far.

    Returns:
        1 if a part failed or the device computed something wrong; otherwise 0.

    Raises:
        ValueError: no part has the given text in its name, the densities are not numbers, or --minutes is not above 0.
        FileExistsError: the folder has results of another device, version or size.
    """
    scale = SMALL if options.small else FULL
    if options.density is not None:
        numbers("--density", options.density, float)
        scale = dataclasses.replace(scale, densities=options.density)
    wanted = [part for part in parts(scale) if (options.part or "") in part.name]
    if not wanted:
        raise ValueError(f"no part has {options.part!r} in its name; --list names them")
    if not options.minutes > 0:
        raise ValueError(f"--minutes must be more than 0, got {options.minutes:g}")
    folder: Path = options.output
    if options.list:
        for part in wanted:
            print(f"{part.name:32} {'done' if _file(folder, part).exists() else '-'}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    machine = _machine(scale)
    _check_same(folder / "machine.json", machine)
    failed = _run_missing(wanted, folder, options.minutes * 60)
    result = collected(machine, list(parts(scale)), folder)
    text = table(result)
    write_text(folder / "results.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / "results.txt", text + "\n")
    print(text)
    for name, reason in failed.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    wrong = [row for part in CHECKS for row in result["parts"].get(part, {}).get("rows", ()) if not row["passed"]]
    return 1 if failed or wrong else 0


def _run_missing(wanted: Sequence[Part], folder: Path, seconds: float) -> dict[str, str]:
    """Run the parts that have no file yet, as long as there is time; returns why parts failed, by name."""
    start, longest = time.monotonic(), 0.0
    failed: dict[str, str] = {}
    for part in wanted:
        if _file(folder, part).exists():
            continue
        left = seconds - (time.monotonic() - start)
        if left < (longest or min(FIRST_GUESS, seconds)):
            print("no time is left for another part; run this again to go on", file=sys.stderr)
            break
        print(f"{part.name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        if reason := _run(part, folder, left):
            failed[part.name] = reason
        longest = max(longest, time.monotonic() - began)
    return failed


def _run(part: Part, folder: Path, seconds: float) -> str | None:
    """Run a part, and keep its output next to its file; returns why it failed, or None."""
    target = _file(folder, part)
    environment = dict(os.environ)
    if part.in_torch:
        environment["JAX_PLATFORMS"] = "cpu"
    else:
        # Nothing else uses the device.
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {part.xla_flags}".strip()
        environment[GEMV_VARIABLE] = "1" if part.gemv else ""
    command = [sys.executable, "-m", *part.command, "--json-file", str(target)]
    with target.with_suffix(".log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return "it took longer than there was time"
    if done.returncode == 0 and target.exists():
        return None
    lines = target.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def _file(folder: Path, part: Part) -> Path:
    return folder / f"{part.name}.json"


def _machine(scale: Size) -> dict[str, Any]:
    """The device and versions, asked for in a separate process, so that this one does not occupy the device."""
    code = (
        "import json, jax, griffin_jax; print(json.dumps({'griffin_jax': griffin_jax.__version__,"
        "'jax': jax.__version__, 'backend': jax.default_backend(), 'device': jax.devices()[0].device_kind}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"JAX does not start: {done.stderr.strip().splitlines()[-1]}")
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    shapes = [{"model": name, "layers": named(name, scale.layers).num_layers} for name in scale.models]
    return json.loads(done.stdout.splitlines()[-1]) | {
        "driver": driver,
        "shapes": shapes,
        "lengths": scale.lengths,
        "densities": scale.densities,
        "families": list(scale.families),
    }


def _check_same(file: Path, machine: Mapping[str, Any]) -> None:
    if not file.exists():
        write_text(file, json.dumps(machine) + "\n")
    elif json.loads(file.read_text(encoding="utf-8")) != machine:
        raise FileExistsError(
            f"{file.parent} has results of another device, version or size ({file.name}); give another --output"
        )


def collected(machine: Mapping[str, Any], every: Sequence[Part], folder: Path) -> dict[str, Any]:
    """All results so far, as one JSON object."""
    found = {part.name: json.loads(_file(folder, part).read_text()) for part in every if _file(folder, part).exists()}
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **machine,
        "missing": [part.name for part in every if part.name not in found],
        "parts": found,
    }


def table(result: Mapping[str, Any]) -> str:
    """All results for people: the checks, a summary of decoding, and the tables of every part."""
    found = result["parts"]
    driver = "" if result["driver"] is None else f", driver {result['driver']}"
    lines = [
        f"griffin_jax {result['griffin_jax']} on {result['device']}{driver}, jax {result['jax']}, {result['date']}",
        *([f"not there yet: {', '.join(result['missing'])}"] if result["missing"] else []),
        "",
        *_checks([row for part in CHECKS for row in found.get(part, {}).get("rows", ())]),
        *_summary(found),
    ]
    for name, part in found.items():
        if "profiled" in part:
            lines += ["", f"---- {name}", profile_table(part)]
        elif "stored_as" in part:
            lines += ["", f"---- {name}", bench_table(part)]
    return "\n".join(lines)


def _checks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    wrong = [row for row in rows if not row["passed"]]
    lines = [f"the device computes what the processor computes: {len(rows) - len(wrong)} of {len(rows)} checks"]
    lines += [f"  WRONG {r['family']}, {r['check']}: {r['value']:.3g}, allowed {r['allowed']:.3g}" for r in wrong]
    return [*lines, ""]


def _summary(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each system, format, batch and density."""
    lines = [
        f"{'decoding':14}{'system':38}{'batch':>6}{'density':>9}{'prefill ms':>12}{'ms/token':>10}{'of bandwidth':>14}"
        f"{'speed-up':>10}{'allowed':>9}{'paper':>7}{'memory':>11}"
    ]
    for name, part in found.items():
        model = part.get("model", "")
        for row in part["rows"] if model else ():
            ours = "ceiling_ms" in row
            kind = (row["format"] or part["stored_as"]) if ours else ""
            kind += next((f", {mark}" for mark in ("in-place", "loop-in-a-graph", "gemv") if name.endswith(mark)), "")
            paper = PAPER.get(model) if row["density"] == 0.5 else None
            memory = part["device_memory"] if ours else row["device_memory"]
            cells = (
                f"{model:14}{f'griffin_jax {kind}' if ours else row['system']:38}{row['batch']:>6}{row['density']:>9g}",
                f"{row['prefill_ms']:>12,.1f}{row['decode_ms']:>10,.2f}",
                f"{row['fraction_of_ceiling']:>14.0%}" if ours else f"{'-':>14}",
                _times(row["speedup"], 10),
                _times(row.get("speedup_ceiling"), 9),
                _times(paper, 7),
                f"{'-' if memory is None else size(memory):>11}",
            )
            lines.append("".join(cells))
    note = "memory: the most that the part's process held on the device. paper: on an L40, prompt 2048, 128 new tokens."
    return [*lines, note] if len(lines) > 1 else []


def _times(value: float | None, width: int) -> str:
    return f"{'-' if value is None else f'{value:.2f}x':>{width}}"
