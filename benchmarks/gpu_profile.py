"""Shows where the time of a decode step goes: its kernels, read off a profile and the compiled program.

While a profiler runs, XLA launches kernel by kernel, so the time between kernels, `idle`, is longer than without it.
What counts here is the time of each kernel alone. The bytes of a kernel, and its bytes per second, are those of all
arrays that it reads and writes, each counted whole. Weights are random, and a few layers are enough.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.profiler import ProfileData

import griffin_jax as gj
from griffin_jax.aot.hlo import CONTROL, HloArray, Instruction, Module
from griffin_jax.cli.options import numbers
from griffin_jax.generation import jitted
from griffin_jax.model.assembly import random_model
from griffin_jax.model.named import named
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import WeightFormat
from griffin_jax.utils.wholefile import write_text

FORMAT = "griffin_jax profile 1"

LEAST_SHARE = 0.004
"""Least share of a step's time at which a kernel is shown in a separate row."""


@dataclasses.dataclass(frozen=True)
class Event:
    """One run of a kernel: the HLO instruction that it belongs to, its name, its start and its duration, in ns."""

    instruction: str
    kernel: str
    start: float
    duration: float


def events(folder: Path, module: str) -> list[Event]:
    """All runs of an HLO module's kernels (on a CPU, of its instructions) in the newest profile of a folder.

    Raises:
        RuntimeError: the profile has no kernel of the module.
    """
    newest = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime_ns)
    found = list(_events(ProfileData.from_file(str(newest)), module))
    if not found:
        raise RuntimeError(f"the profile has no kernel of {module}")
    return found


def _events(profile: Any, module: str) -> Iterator[Event]:
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or planes:
        for line in plane.lines:
            # The other lines of a device show the same time again, by steps and by modules.
            if devices and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if stats.get("hlo_module") == module and "hlo_op" in stats:
                    yield Event(str(stats["hlo_op"]), event.name, event.start_ns, event.duration_ns)


def kernels(found: Sequence[Event], module: Module, tokens: int) -> list[dict[str, Any]]:
    """The kernels, with similar ones as one row, those that take longest first; times in microseconds."""
    instructions = {i.name: i for computation in module.computations.values() for i in computation}
    alike: dict[tuple[str, str, int], list[Event]] = collections.defaultdict(list)
    for event in found:
        # In a CUDA graph, the event names the graph as its instruction, and the kernel has the instruction's name.
        own = re.sub(r"_(\d+)$", r".\1", event.kernel)
        instruction = instructions.get(event.instruction, instructions.get(own, instructions.get(event.kernel)))
        if instruction is None or instruction.opcode not in CONTROL:
            alike[_kind(event, instruction, instructions)].append(event)
    rows = [
        {
            "kernel": kernel,
            "makes": makes,
            "per_token": len(runs) / tokens,
            "us": float(np.median([run.duration for run in runs])) / 1e3,
            "us_per_token": math.fsum(run.duration for run in runs) / 1e3 / tokens,
            "bytes": size,
            "of": sorted({run.instruction for run in runs})[0],
        }
        for (kernel, makes, size), runs in alike.items()
    ]
    return sorted(rows, key=lambda row: -row["us_per_token"])


def _kind(event: Event, instruction: Instruction | None, all_of: Mapping[str, Instruction]) -> tuple[str, str, int]:
    """A kernel's name without numbers, the shapes that its instruction makes, and the bytes of all its arrays."""
    name = re.sub(r"[._]?\d+$", "", event.kernel)
    if instruction is None:
        return name, "", 0
    read = [array for operand in set(instruction.operands) if operand in all_of for array in all_of[operand].results]
    shapes = ", ".join(str(list(array.dims)) for array in instruction.results)
    return name, shapes, math.ceil(sum(map(_size, (*read, *instruction.results))))


def _size(array: HloArray) -> float:
    return array.elements * array.itemsize


def profile(model: Transformer, density: float, prompt: int, new: int, folder: Path) -> dict[str, Any]:
    """The kernels of a decode step of the model at a density, after a random prompt.

    The profile and the program's HLO text stay in the folder.
    """
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, prompt)).astype(np.int32)
    lengths = np.array([prompt], np.int32)

    def read() -> gj.Prefilled:
        return jitted.prefill(model, tokens, lengths, max_new_tokens=new)

    prefilled = read()
    pruned = model
    if density < 1:
        pruned = gj.prune(model, jitted.select(prefilled.statistics, config=gj.GriffinConfig(density)))
    program = jitted.decode.lower(pruned, jitted.init_decode(prefilled), np.int32(new)).compile()
    text = program.as_text()
    write_text(folder / f"decode-{density:g}.hlo.txt", text)
    for run in range(2):
        state = jax.block_until_ready(jitted.init_decode(read()))
        with jax.profiler.trace(str(folder / f"{density:g}-{run}")):
            jax.block_until_ready(program(pruned, state, np.int32(new)))
    found = events(folder / f"{density:g}-1", text.split(maxsplit=2)[1].rstrip(","))
    rows = kernels(found, Module.parse(text), new - 1)
    span = (max(e.start + e.duration for e in found) - min(e.start for e in found)) / 1e3 / (new - 1)
    busy = math.fsum(row["us_per_token"] for row in rows)
    return {"density": density, "busy_us": busy, "span_us": span, "kernels": rows}


def table(result: Mapping[str, Any]) -> str:
    """The profile as a table for people."""
    lines = [
        f"{result['profiled']}: {result['layers']} layers, {result['stored_as']}, cache of {result['slots']} slots"
    ]
    for each in result["densities"]:
        idle = 1 - each["busy_us"] / each["span_us"]
        launches = sum(row["per_token"] for row in each["kernels"])
        lines += [
            f"density {each['density']:g}: {each['busy_us']:,.0f} us a token in {launches:.1f} kernels, "
            f"idle between them {idle:.0%} of the time",
            f"{'us/token':>10}{'a token':>9}{'us each':>9}{'MB':>9}{'GB/s':>8}  kernel",
        ]
        shown = [row for row in each["kernels"] if row["us_per_token"] >= LEAST_SHARE * each["busy_us"]]
        for row in shown:
            size, speed = (
                (f"{row['bytes'] / 1e6:.1f}", f"{row['bytes'] / row['us'] / 1e3:,.0f}") if row["bytes"] else "--"
            )
            makes = f" -> {row['makes']}" if row["makes"] else ""
            lines.append(
                f"{row['us_per_token']:>10,.1f}{row['per_token']:>9.1f}{row['us']:>9,.1f}{size:>9}{speed:>8}"
                f"  {row['kernel']}{makes}"
            )
        others = each["busy_us"] - math.fsum(row["us_per_token"] for row in shown)
        lines.append(f"{others:>10,.1f}{launches - sum(row['per_token'] for row in shown):>9.1f}{'':26}  all others")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_profile", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)d)")
    parser.add_argument("--lengths", default="2048+32", help="(default: %(default)s)")
    parser.add_argument("--weights", default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--density", default="1,0.5", help="(default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep profiles and HLO in this folder")
    parser.add_argument("--json-file", type=Path, required=True)
    options = parser.parse_args()
    prompt, new = map(int, options.lengths.split("+"))
    config = named(options.model, options.layers)
    model = random_model(config, options.dtype, weights=WeightFormat.parse(options.weights))
    densities = numbers("--density", options.density, float)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = [profile(model, density, prompt, new, folder) for density in densities]
    result = {
        "format": FORMAT,
        "profiled": options.model,
        "layers": options.layers,
        "dtype": options.dtype,
        "stored_as": options.weights,
        "slots": prompt + new,
        "device": jax.devices()[0].device_kind,
        "densities": found,
    }
    write_text(options.json_file, json.dumps(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
