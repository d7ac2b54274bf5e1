"""What pruning gains on this machine: every phase of a request timed, beside what the memory bandwidth allows.

For every pair of prompt and answer lengths and every batch, the densities are measured in turn, round after round, so
that a machine that is slower for a while is slower for all of them; each round begins with another one. The first
round warms up and is not counted, and what XLA spends on compiling in it is shown apart. Prompts are random tokens of
equal length, answers greedy, and no token ends them.

A ceiling is what one decode step must read (weights in use, all slots of the cache) over the bandwidth that this run
measured by summing a large array. A step gives one token to every sequence of the batch.

With random weights (--model NAME of a well-known model) shapes, bytes and times are the model's, its answers are not;
its prior is random, too.

On a mesh bytes and the bandwidth are those of each device, what the devices communicate is in no ceiling, and each
keeps the best of its own neurons, as `generate` does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from griffin_jax import __version__
from griffin_jax.bench import report
from griffin_jax.checkpoints import demo, loading
from griffin_jax.checkpoints.native import DTYPES
from griffin_jax.cli.options import add_mesh_argument, check_output, check_plot, chosen_mesh, numbers
from griffin_jax.evaluation import general_text
from griffin_jax.extensions.in_place import InPlace
from griffin_jax.extensions.prior import Prior
from griffin_jax.extensions.reconstruction import DEFAULT_CALIBRATION, DEFAULT_ROWS, Reconstruction, rows_of_each
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import DEFAULT_CHUNK, bucket, pad
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.griffin.config import GriffinConfig, check_density, kept_neurons
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.griffin.prune import prune
from griffin_jax.llm.llm import Quality, check_quality
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.named import NAMED, named
from griffin_jax.model.sharding import check_mesh, with_kv_copies
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import DATA_AXIS, MODEL_AXIS, axis_size, dividing
from griffin_jax.utils.timing import Stopwatch
from griffin_jax.utils.wholefile import write_text

OURS = "griffin_jax"
EXPERTS = ("shared", "per-sequence")
LENGTHS = {"cpu": "512+64"}
"""Measured by default, by backend. Elsewhere it is the setting of arXiv 2404.01365, table 4."""
OTHER_LENGTHS = "2048+128"
BANDWIDTH_BYTES = 1 << 29
"""Size of the array that is summed to measure the bandwidth: larger than every cache."""
PAUSE = 0.3
"""Seconds before a system is measured where there are peers: idle threads of the other library spin for a while."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What a group of rows has in common.

    Attributes:
        prompt: tokens of each prompt.
        new: tokens of each answer.
        batch: sequences.
    """

    prompt: int
    new: int
    batch: int

    @property
    def slots(self) -> int:
        """Of the cache that is allocated for it, tokens of each sequence."""
        return bucket(self.prompt) + bucket(self.new)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What tells our rows of a case apart.

    Attributes:
        density: share of neurons kept.
        shared: whether a batch shares its experts.
        quality: of `LLM.generate`.
    """

    density: float = 1.0
    shared: bool = False
    quality: Quality = "griffin"


@dataclasses.dataclass(frozen=True)
class Peer:
    """A system that griffin_jax is compared with.

    Attributes:
        name: of the system.
        version: of what it runs on.
        prunes: whether it is measured at the densities below 1, or dense.
        baseline: name of the system whose dense decoding its speed-up refers to.
        measure: (prompt, new tokens, density) -> seconds of `prefill` and of one decoded `token`.
        weights: file that it reads, where it does not take those that griffin_jax has.
    """

    name: str
    version: str
    prunes: bool
    baseline: str
    measure: Callable[[Sequence[int], int, float], dict[str, float]]
    weights: str | None = None


FindPeers = Callable[[Transformer, str, contextlib.ExitStack], "tuple[list[Peer], dict[str, str]]"]
"""(model, its source, stack of what must be undone) -> the peers that can run, and why others cannot, by name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the benchmark takes."""
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--model",
        default=demo.NAME,
        help="any model that griffin_jax loads, or the name of a well-known one, which gets random weights in its true"
        f" shape: {', '.join(NAMED)} (default: %(default)s)",
    )
    what.add_argument("--layers", type=int, metavar="L", help="only the first L layers, of random weights")
    what.add_argument("--dtype", choices=DTYPES, help="of the weights (default: float32 on CPU, else bfloat16)")
    what.add_argument(
        "--density",
        nargs="+",
        default=["1,0.75,0.5,0.25"],
        metavar="D",
        help="densities, separated by commas; 1, which the others are compared with, is always among them"
        " (default: 1,0.75,0.5,0.25)",
    )
    what.add_argument(
        "--lengths",
        metavar="P+N",
        help="tokens of prompt and answer, several pairs separated by commas, such as 2048+128,2048+2048"
        f" (default: {LENGTHS['cpu']} on CPU, else {OTHER_LENGTHS})",
    )
    what.add_argument("--prompt", "--prompt-tokens", type=int, metavar="P", help="one pair of lengths, with --new")
    what.add_argument("--new", "--new-tokens", type=int, metavar="N", help="likewise")
    what.add_argument(
        "--batch", default="1", metavar="B", help="sequences; several separated by commas (default: %(default)s)"
    )
    what.add_argument(
        "--experts",
        default=",".join(EXPERTS),
        help="what a batch of several keeps: one set of neurons for all, one for each sequence, or each in turn"
        " (default: %(default)s)",
    )
    what.add_argument(
        "--quality",
        default="griffin",
        help="griffin, best (prior, budgets and reconstruction, as generate has them), or griffin,best for each in turn"
        " (default: %(default)s)",
    )
    what.add_argument(
        "--prior",
        type=Path,
        metavar="FILE",
        help="of --quality best: what griffin-jax prior measured (default: the file beside the model)",
    )
    what.add_argument("--round-to", type=int, default=1, metavar="N", help="round kept neurons up to a multiple of N")
    what.add_argument(
        "--in-place",
        action="store_true",
        help="hold every neuron once, kept rows and others in two groups, as griffin_jax.load(in_place=True) does; with"
        " one density below 1, and shared experts",
    )
    add_mesh_argument(parser)
    what.add_argument("--repeats", type=int, default=5, help="medians of this many (default: %(default)s)")
    what.add_argument(
        "--peers",
        action="store_true",
        help="measure in turn, on the same work, what is installed of: transformers dense, the published GRIFFIN code,"
        " llama.cpp (llama-cpp-python). Float32 on CPU and batch 1; only in a checkout: python -m benchmarks run",
    )
    loading.add_pickle_argument(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    output.add_argument("--json-file", type=Path, metavar="FILE", help="write it to FILE")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw speed-up against density as a PNG (needs griffin-jax[plot])"
    )
    output.add_argument(
        "--compare", type=Path, metavar="FILE", help="show the ratio of every figure to that of an earlier --json-file"
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The options, checked; nothing is loaded yet.

    Attributes:
        source: of the model.
        config: of the model.
        random: whether it gets random weights.
        dtype: of the weights.
        densities: descending; 1 is the first.
        cases: in the order in which they are measured.
        shared: what batches of several sequences are measured with.
        qualities: what pruned models are measured with.
        prior: of quality "best".
        round_to: kept neurons are rounded up to a multiple of this.
        in_place: whether every neuron is held once.
        mesh: devices that batches and the model are divided among; None for one.
        repeats: counted rounds.
        peers: whether others are measured, too.
    """

    source: str
    config: ModelConfig
    random: bool
    dtype: jnp.dtype
    densities: tuple[float, ...]
    cases: tuple[Case, ...]
    shared: tuple[bool, ...]
    qualities: tuple[Quality, ...]
    prior: Prior | None
    round_to: int
    in_place: bool
    mesh: Mesh | None
    repeats: int
    peers: bool

    def griffin(self, variant: Variant) -> GriffinConfig:
        """How a row prunes."""
        shared, groups = variant.shared or self.in_place, axis_size(self.mesh, MODEL_AXIS)
        config = GriffinConfig(variant.density, shared=shared, round_to=self.round_to, groups=groups)
        return self.prior.budgeted(config) if self.prior is not None and variant.quality == "best" else config

    def variants(self, case: Case) -> list[Variant]:
        """Those of a case; the dense one is the first."""
        sharing = self.shared if case.batch > 1 else (False,)
        densities = [density for density in self.densities if density < 1]
        return [
            Variant(),
            *(Variant(d, shared, quality) for quality in self.qualities for shared in sharing for d in densities),
        ]

    def rows(self, case: Case, variant: Variant) -> int:
        """Tokens of each prompt that a row refits its neurons to."""
        return rows_of_each(DEFAULT_ROWS, case.batch, variant.shared) if variant.quality == "best" else 0

    def sizes(self, case: Case, shared: bool) -> Sizes:
        """Bytes of a row's parts on each device."""
        parts = axis_size(self.mesh, DATA_AXIS) if dividing(self.mesh, DATA_AXIS, case.batch) else 1
        devices, one = axis_size(self.mesh, MODEL_AXIS), shared or case.batch == 1
        return Sizes(self.config, case.batch // parts, case.slots, self.dtype.itemsize, shared=one, devices=devices)

    def kept(self, variant: Variant) -> tuple[int, ...] | None:
        """Neurons of every layer; None for the dense model."""
        if variant.density == 1:
            return None
        return self.griffin(variant).kept([self.config.ff_width] * self.config.num_layers)


def check(options: argparse.Namespace) -> Plan:
    """Everything that can be wrong with the options, before anything is loaded or allocated.

    Raises:
        FileNotFoundError: there is no such model or prior, or no folder for an output.
        ValueError: a value is outside its range or not understood, or a mesh does not divide the model.
        ImportError: a plot is wanted, and matplotlib is not installed.
        MemoryError: the largest case needs more memory than is free.
    """
    densities = numbers("--density", ",".join(options.density), float)
    for density in densities:
        check_density(density)
    batches = numbers("--batch", options.batch, int)
    qualities = list(dict.fromkeys(options.quality.split(",")))
    for quality in qualities:
        check_quality(quality)
    if "best" in qualities and options.in_place:
        raise ValueError("--in-place moves the model's own rows, which --quality best would refit: give one of the two")
    if options.prior is not None and "best" not in qualities:
        raise ValueError("--prior is for --quality best, or griffin,best")
    experts = list(dict.fromkeys(options.experts.split(",")))
    if unknown := [name for name in experts if name not in EXPERTS]:
        raise ValueError(f"--experts: {unknown[0]!r} is neither of {', '.join(EXPERTS)}")
    for name, value in (*(("--batch", b) for b in batches), ("--repeats", options.repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    lengths = _lengths(options)
    check_outputs(options)
    mesh = chosen_mesh(options)
    if mesh is not None and (options.peers or options.in_place):
        raise ValueError(f"--mesh does not go with {'--peers' if options.peers else '--in-place'}: give one of the two")
    config, random = _config(options)
    check_mesh(config, axis_size(mesh, MODEL_AXIS))
    config = with_kv_copies(config, axis_size(mesh, MODEL_AXIS))
    for prompt, new in lengths:
        if prompt + new > config.max_positions:
            raise ValueError(
                f"{prompt} + {new} tokens are more than the model's context of {config.max_positions}; see --lengths"
            )
    dtype = loading.parse_dtype(options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    plan = Plan(
        source=options.model,
        config=config,
        random=random,
        dtype=jnp.dtype(dtype),
        densities=(1.0, *sorted({d for d in densities if d < 1}, reverse=True)),
        cases=tuple(Case(prompt, new, batch) for prompt, new in lengths for batch in batches),
        shared=(True,) if options.in_place else tuple(name == "shared" for name in experts),
        qualities=tuple(quality for quality in get_args(Quality) if quality in qualities),
        prior=_prior(options, config, random) if "best" in qualities else None,
        round_to=options.round_to,
        in_place=options.in_place,
        mesh=mesh,
        repeats=options.repeats,
        peers=options.peers,
    )
    if plan.in_place and len(plan.densities) != 2:
        raise ValueError(
            f"--in-place takes one density below 1, got {', '.join(f'{d:g}' for d in plan.densities[1:]) or 'none'};"
            " give for example --density 0.5"
        )
    for density in plan.densities:
        kept_neurons(config.ff_width, density, options.round_to)
        check_mesh(
            config, axis_size(mesh, MODEL_AXIS), dataclasses.replace(plan, mesh=None).kept(Variant(density)) or ()
        )
    _check_memory(plan)
    return plan


def _lengths(options: argparse.Namespace) -> list[tuple[int, int]]:
    if (options.prompt is None) != (options.new is None):
        raise ValueError("--prompt and --new belong together")
    if options.prompt is not None:
        if options.lengths is not None:
            raise ValueError("give either --lengths or --prompt and --new")
        pairs = [(options.prompt, options.new)]
    else:
        text = options.lengths or LENGTHS.get(jax.default_backend(), OTHER_LENGTHS)
        found = [re.fullmatch(r"(\d+)\+(\d+)", part.strip()) for part in text.split(",")]
        pairs = [(int(match[1]), int(match[2])) for match in found if match]
        if len(pairs) < len(found):
            raise ValueError(f"--lengths: {text!r} is no list such as 2048+128,2048+2048")
    for prompt, new in pairs:
        if prompt < 1 or new < 2:
            raise ValueError(f"a prompt needs at least 1 token and an answer 2, got {prompt}+{new}")
        if options.peers and prompt < 2:
            raise ValueError("--peers needs prompts of 2 tokens or more: the published code takes one for decoding")
    return list(dict.fromkeys(pairs))


def check_outputs(options: argparse.Namespace) -> None:
    """Raise unless the files that are asked for can be written, and the one to compare with can be read."""
    if options.json_file is not None:
        check_output("--json-file", options.json_file)
    if options.plot is not None:
        check_plot("--plot", options.plot)
    if options.compare is not None:
        report.read(options.compare)


def _config(options: argparse.Namespace) -> tuple[ModelConfig, bool]:
    """The model's architecture, and whether it is one that gets random weights."""
    source = options.model
    exists = Path(os.path.expanduser(source)).exists()
    if not exists and any(source.lower() == name.lower() for name in NAMED):
        return named(source, options.layers), True
    if options.layers is not None:
        raise ValueError("--layers is for random weights: give --model the name of a well-known model")
    if not exists and source != demo.NAME and not loading.HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"there is no model {source!r}; give {loading.SOURCES}, or for random weights one of {', '.join(NAMED)}"
        )
    return loading.open_source(source, options.allow_pickle).config, False


def _prior(options: argparse.Namespace, config: ModelConfig, random: bool) -> Prior:
    """The one of --prior or beside the model; of random weights a random one, of the size that priors have."""
    if random:
        if options.prior is not None:
            raise ValueError("random weights have a random prior: leave out --prior")
        draw = np.random.default_rng(0)
        width, layers = config.ff_width, range(config.num_layers)
        squares, weights = (tuple(jnp.asarray(draw.random(width), jnp.float32) for _ in layers) for _ in range(2))
        shape = min(DEFAULT_CALIBRATION, width), width
        rows = tuple(jnp.asarray(draw.standard_normal(shape) * width**-0.5, jnp.float16) for _ in layers)
        return Prior(squares, rows, "random", 0, weights, strength=0.5, uniform="")
    return general_text.load_for_best(options.model, options.prior)


def needed_memory(plan: Plan) -> dict[str, int]:
    """Bytes of what the largest case holds on a device at a time, by what it is for. The prompt's part is an estimate.

    Devices that are one processor's count as one.
    """
    config, itemsize = plan.config, plan.dtype.itemsize

    def parts(case: Case, variant: Variant) -> dict[str, int]:
        sizes = plan.sizes(case, variant.shared)
        chunk = min(bucket(case.prompt), DEFAULT_CHUNK)
        # Float32 scores before and behind the softmax; of the neurons both projections, z and its share.
        scores = 2 * 4 * config.num_heads * chunk * case.slots
        neurons = (3 * itemsize + 4) * chunk * config.ff_width
        return {
            "weights": sizes.weights(None),
            "kept neurons": 0 if variant.density == 1 or plan.in_place else sizes.ff(plan.kept(variant)),
            "caches": 2 * sizes.cache,  # one to keep, which every row begins with a copy of
            "reading the prompt": case.batch * (scores + neurons + 4 * config.vocab_size),
            "measuring the bandwidth": BANDWIDTH_BYTES,
            "peers": 2 * sizes.weights(None) if plan.peers else 0,  # PyTorch's and llama.cpp's own copies
        }

    together = plan.mesh.size if plan.mesh is not None and jax.default_backend() == "cpu" else 1
    largest = max(
        (parts(case, variant) for case in plan.cases for variant in plan.variants(case)),
        key=lambda one: sum(one.values()),
    )
    return {name: together * size for name, size in largest.items()}


def _check_memory(plan: Plan) -> None:
    needed, free = needed_memory(plan), free_memory()
    if free is not None and sum(needed.values()) > free:
        listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in needed.items() if size)
        raise MemoryError(
            f"about {sum(needed.values()) / 1e9:.1f} GB are needed ({listed}), {free / 1e9:.1f} GB are free; take a"
            " smaller --batch, shorter --lengths, a narrower --dtype or, of random weights, fewer --layers"
        )


def free_memory() -> int | None:
    """Bytes that can still be allocated on the default device; None where that is not known."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if jax.default_backend() != "cpu":
        return None
    found = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # of a container; "max" is no limit
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(int((group / "memory.max").read_text()) - used + int(stat.get("inactive_file", 0)))
    return min(found, default=None)


def run(options: argparse.Namespace, find_peers: FindPeers | None = None) -> None:
    """Run the benchmark.

    Args:
        options: those of `add_arguments`.
        find_peers: what finds the peers; without it --peers is refused.

    Raises:
        Exception: see `check`; and what `griffin_jax.load` raises.
    """
    if options.peers and find_peers is None:
        raise ValueError("--peers needs a checkout of the project: python -m benchmarks run --peers")
    plan = check(options)
    earlier: Path | None = options.compare
    before = None if earlier is None else report.read(earlier)
    with contextlib.ExitStack() as stack:
        if plan.random:
            model = random_model(plan.config, plan.dtype, mesh=plan.mesh)
        else:
            model, _ = loading.load_model(
                options.model, options.dtype, allow_pickle=options.allow_pickle, mesh=plan.mesh
            )
        if plan.prior is not None and not plan.random:
            plan.prior.check(fingerprint(model))
        peers, skipped = find_peers(model, options.model, stack) if options.peers and find_peers else ([], {})
        result = measure(plan, jax.block_until_ready(model), peers, skipped)
    print(report.table(result))
    if before is not None:
        print(f"\n{report.comparison(result, before, str(earlier))}")
    if options.plot is not None:
        report.plot(result, options.plot)
    if options.json_file is not None:
        write_text(options.json_file, json.dumps(result) + "\n")
    if options.json:
        print(json.dumps(result))


def threads() -> int:
    """CPU threads that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def measure(
    plan: Plan, model: Transformer, peers: Sequence[Peer] = (), skipped: dict[str, str] | None = None
) -> dict[str, Any]:
    """Measures every case, and returns what `--json` prints.

    Args:
        plan: what to measure.
        model: the full one.
        peers: to be measured at batch 1, in turn with the model.
        skipped: peers that cannot run, and why.
    """
    subject = _Subject(model, plan.griffin(Variant(plan.densities[-1])) if plan.in_place else None)
    groups, bandwidths = [], []
    rounds = len(plan.cases) * (plan.repeats + 1)
    with tqdm(total=rounds, unit="round", desc="measuring", disable=None, leave=False) as bar:
        for case in plan.cases:
            bandwidths.append(measure_bandwidth(plan.mesh))
            groups.append(_measure_case(plan, subject, case, peers if case.batch == 1 else (), bar.update))
    # A ceiling must not be lower than what the machine can do when nothing disturbs it.
    bandwidth = max(*bandwidths, measure_bandwidth(plan.mesh))
    rows = [
        row
        for case, measured in zip(plan.cases, groups, strict=True)
        for row in summarise(plan, case, measured, bandwidth)
    ]
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "format": report.FORMAT,
        "griffin_jax": __version__,
        "jax": jax.__version__,
        "model": plan.source,
        "weights": "random" if plan.random else "loaded",
        "layers": plan.config.num_layers,
        "parameters": plan.sizes(plan.cases[0], True).parameters,
        "dtype": plan.dtype.name,
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "threads": threads(),
        "repeats": plan.repeats,
        "round_to": plan.round_to,
        "in_place": plan.in_place,
        "mesh": None if plan.mesh is None else dict(plan.mesh.shape),
        "bandwidth": bandwidth,
        "peak_memory": loading.peak_memory(),
        "device_memory": stats.get("peak_bytes_in_use"),
        "peers": [{"name": p.name, "version": p.version, "weights": p.weights} for p in peers],
        "skipped": skipped or {},
        "rows": rows,
    }


def measure_bandwidth(mesh: Mesh | None = None) -> float:
    """Bytes per second that summing a large array reads, at best; of a mesh each device, when all of them read."""
    devices = 1 if mesh is None else mesh.size
    # Devices that are one processor's share its caches, and its memory.
    size = BANDWIDTH_BYTES // 4 * (1 if jax.default_backend() == "cpu" else devices)
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    array = jnp.ones((size // devices * devices,), jnp.float32, device=sharding)
    total = jax.jit(jnp.sum)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        total(array).block_until_ready()
        times.append(time.perf_counter() - start)
    return array.nbytes / devices / min(times)


@dataclasses.dataclass
class Measured:
    """A row before it is summarised.

    Attributes:
        system: its name.
        baseline: name of the system whose dense row it is compared with.
        variant: what it is measured with.
        samples: seconds of every phase, one dictionary for every counted round.
        compile: seconds that XLA spent on its programs; None of peers.
        peak_memory: of the process while the row was measured, bytes; None where that is not known.
    """

    system: str
    baseline: str
    variant: Variant
    samples: list[dict[str, float]] = dataclasses.field(default_factory=list)
    compile: float | None = None
    peak_memory: int | None = None


class _Subject:
    """The model, selecting and pruning as `LLM` does.

    Args:
        model: the full one.
        in_place: how a request prunes, if every neuron is to be held once; the model is then used up.
    """

    def __init__(self, model: Transformer, in_place: GriffinConfig | None):
        self._model = model
        self._in_place = None if in_place is None else InPlace(model)
        if self._in_place is not None and in_place is not None:
            # Any experts: from now on the programs are those of two groups.
            kept = in_place.kept(model.neurons)
            self._in_place.prune(ExpertNeurons.from_indices([range(k) for k in kept], model.neurons))

    @property
    def model(self) -> Transformer:
        """The full one."""
        return self._model if self._in_place is None else self._in_place.model

    def prune(self, prefilled: Prefilled, config: GriffinConfig, prior: Prior | None, watch: Stopwatch) -> Transformer:
        """The pruned model; with a prior, of the best quality."""
        statistics = prefilled.statistics
        with watch.phase("select"):
            if self._in_place is not None:
                statistics = self._in_place.in_order(statistics)
            fusion = {} if prior is None else {"prior": prior}
            experts = jax.block_until_ready(jitted.select(statistics, config, **fusion))
        if self._in_place is not None:
            with watch.phase("prune"):
                return jax.block_until_ready(self._in_place.prune(experts))
        fitted = None if prior is None else Reconstruction(prefilled.rows, calibration=prior.rows)
        with watch.phase("first_prune"):
            first = jax.block_until_ready(prune(self._model, experts, refit=fitted))
        with watch.phase("prune"):
            return jax.block_until_ready(prune(self._model, experts, reuse=first, refit=fitted))


def _measure_case(
    plan: Plan, subject: _Subject, case: Case, peers: Sequence[Peer], progress: Callable[[], Any]
) -> list[Measured]:
    prompts = np.random.default_rng(0).integers(0, plan.config.vocab_size, (case.batch, case.prompt))
    tokens, lengths = pad(prompts.tolist(), bucket(case.prompt))
    ours = [Measured(OURS, OURS, variant, compile=0.0) for variant in plan.variants(case)]
    theirs = [
        (peer, Measured(peer.name, peer.baseline, Variant(density)))
        for peer in peers
        for density in ([d for d in plan.densities if d < 1] if peer.prunes else [1.0])
    ]
    # What a prefill records: nothing (None), GRIFFIN's statistic, or also so many rows of each prompt.
    records = list(dict.fromkeys(_recorded(plan, case, row.variant) for row in ours))
    for number in range(plan.repeats + 1):
        # What comes first in a round may find threads asleep and caches cold.
        order = records if number % 2 else records[::-1]
        sides = _prefills(subject.model, tokens, lengths, case.new, order)
        turn = number % len(ours)
        for row in [*ours[turn:], *ours[:turn]]:
            prefilled, read = sides[_recorded(plan, case, row.variant)]
            with _peak_memory(row):
                watch = _answer(subject, prefilled, plan, row.variant, case.new)
            sample = {name: seconds for name, seconds in watch.seconds.items() if name != "compile"}
            sample["prefill"] = read.seconds["prefill"]
            if row.variant.density < 1:
                sample["prefill_without"] = sides[None][1].seconds["prefill"]
            if number:
                row.samples.append(sample)
            else:
                row.compile = read.seconds["compile"] + watch.seconds["compile"]
        del sides
        turn = number % max(1, len(theirs))
        for peer, row in [*theirs[turn:], *theirs[:turn]]:
            time.sleep(PAUSE)
            with _peak_memory(row):
                seconds = peer.measure(prompts[0].tolist(), case.new, row.variant.density)
            if number:
                row.samples.append({"prefill": seconds["prefill"], "decode": seconds["token"] * (case.new - 1)})
        if theirs:
            time.sleep(PAUSE)
        progress()
    return [*ours, *(row for _, row in theirs)]


def _recorded(plan: Plan, case: Case, variant: Variant) -> int | None:
    return None if variant.density == 1 else plan.rows(case, variant)


def _prefills(
    model: Transformer, tokens: np.ndarray, lengths: np.ndarray, new: int, order: Sequence[int | None]
) -> dict[int | None, tuple[Prefilled, Stopwatch]]:
    """The prompts read with each of the things recorded, as neighbours in time; once for all densities."""
    sides: dict[int | None, tuple[Prefilled, Stopwatch]] = {}
    for rows in order:
        watch = Stopwatch()
        with watch.phase("prefill"):
            max_new_tokens, longest = bucket(new), np.int32(new)
            prefilled = jax.block_until_ready(
                jitted.prefill(
                    model,
                    tokens,
                    lengths,
                    max_new_tokens=max_new_tokens,
                    longest=longest,
                    collect=rows is not None,
                    rows=rows or 0,
                )
            )
        for other, _ in sides.values():
            # All caches are the same, and only one has to stay.
            prefilled = dataclasses.replace(prefilled, cache=other.cache)
        sides[rows] = prefilled, watch
    return sides


def _answer(subject: _Subject, prefilled: Prefilled, plan: Plan, variant: Variant, new: int) -> Stopwatch:
    """An answer, phase by phase as `LLM.generate` writes it."""
    watch = Stopwatch()
    model = subject.model
    if variant.density < 1:
        prior = plan.prior if variant.quality == "best" else None
        model = subject.prune(prefilled, plan.griffin(variant), prior, watch)
    # `init_decode` takes the cache, and the next row needs it.
    mine = jax.block_until_ready(dataclasses.replace(prefilled, cache=jax.tree.map(jnp.copy, prefilled.cache)))
    with watch.phase("init_decode"):
        answer = jax.block_until_ready(jitted.init_decode(mine))
    with watch.phase("decode"):
        jax.block_until_ready(jitted.decode(model, answer, np.int32(new)))
    return watch


@contextlib.contextmanager
def _peak_memory(row: Measured) -> Iterator[None]:
    """Notes the largest resident memory during the block; of the process so far where it cannot be reset."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield
    peak = loading.peak_memory()
    if peak is not None:
        row.peak_memory = max(peak, row.peak_memory or 0)


def summarise(plan: Plan, case: Case, measured: Sequence[Measured], bandwidth: float) -> list[dict[str, Any]]:
    """The rows of one case: medians over the rounds, and what follows from them.

    Args:
        plan: what was measured.
        case: likewise.
        measured: its rows.
        bandwidth: bytes per second.

    Returns:
        One dictionary for each row, of plain numbers: times in milliseconds unless their name says seconds, sizes
        in bytes, speeds in bytes per second, and shares as fractions. What a row does not have is None.
    """
    dense = {row.system: row for row in measured if row.variant.density == 1}
    rows = []
    for row in measured:
        ours, variant = row.system == OURS, row.variant
        sizes, kept = plan.sizes(case, variant.shared), plan.kept(variant)
        # Peers' caches grow with the text; ours has all its slots from the start.
        cache = sizes.cache if ours else sizes.cache * (case.prompt + case.new // 2) // case.slots
        weights = sizes.step(kept) - sizes.cache
        times = {
            name: _median(row.samples, name) for name in ("prefill", "select", "prune", "first_prune", "init_decode")
        }
        step = _step(row, case)
        base = dense.get(row.baseline)
        is_pruned = variant.density < 1
        moved = sizes.ff(None if plan.in_place else kept)
        # Read and written; where rows are refitted, that is not what takes the time.
        copied = 2 * moved if ours and is_pruned and variant.quality == "griffin" else None
        ceiling = (weights + cache) / bandwidth
        result: dict[str, Any] = {
            "system": row.system,
            "baseline": row.baseline,
            "prompt": case.prompt,
            "new": case.new,
            "batch": case.batch,
            "experts": EXPERTS[not variant.shared] if ours and is_pruned and case.batch > 1 else None,
            "quality": "best" if variant.quality == "best" else None,
            "density": variant.density,
            "kept": None if kept is None else list(kept),
            "slots": case.slots if ours else None,
            "compile_seconds": row.compile,
            "prefill_ms": times["prefill"],
            "statistic_share": _statistic_share(row.samples),
            "select_ms": times["select"],
            "prune_ms": times["prune"],
            "first_prune_ms": times["first_prune"],
            "overhead_share": _overhead_share(row.samples),
            "prune_bytes": copied,
            "prune_speed": copied / (times["prune"] or math.nan) * 1e3 if copied else None,
            "first_token_ms": _total(row.samples, ("prefill", "select", "prune", "init_decode")),
            "decode_ms": step,
            "decode_ms_range": [_step_of(edge(row.samples, key=_decode), case) for edge in (min, max)],
            "tokens_per_second": case.batch / step * 1e3,
            "total_ms": _total(row.samples, ("prefill", "select", "prune", "init_decode", "decode")),
            "weights_bytes": weights,
            "cache_bytes": cache,
            "step_bytes": weights + cache,
            "read_speed": (weights + cache) / step * 1e3,
            "ceiling_ms": ceiling * 1e3,
            "fraction_of_ceiling": ceiling * 1e3 / step,
            "peak_memory": row.peak_memory,
        }
        result["prune_fraction"] = None if result["prune_speed"] is None else result["prune_speed"] / bandwidth
        speedup = None if base is None else _step(base, case) / step
        # Dense rows come first.
        first = next((r for r in rows if r["system"] == row.baseline and r["density"] == 1), result)
        allowed = first["step_bytes"] / result["step_bytes"]
        result["speedup"] = speedup
        result["speedup_ceiling"] = None if speedup is None else allowed
        result["fraction_of_speedup"] = None if speedup is None else speedup / allowed
        rows.append(result)
    return rows


def _median(samples: Sequence[dict[str, float]], name: str) -> float | None:
    """In milliseconds; None of a phase that the row does not have."""
    return float(np.median([sample[name] for sample in samples])) * 1e3 if name in samples[0] else None


def _total(samples: Sequence[dict[str, float]], names: Sequence[str]) -> float:
    return float(np.median([math.fsum(sample.get(name, 0.0) for name in names) for sample in samples])) * 1e3


def _decode(sample: dict[str, float]) -> float:
    return sample["decode"]


def _step_of(sample: dict[str, float], case: Case) -> float:
    """Milliseconds of one decode step. The first token of an answer comes from the prompt's logits."""
    return sample["decode"] / (case.new - 1) * 1e3


def _step(row: Measured, case: Case) -> float:
    return float(np.median([_step_of(sample, case) for sample in row.samples]))


def _overhead_share(samples: Sequence[dict[str, float]]) -> float | None:
    """What pruning takes before the first step of decoding, as a fraction of prefill: all but the statistic's part."""
    if "select" not in samples[0]:
        return None
    return float(np.median([(sample["select"] + sample["prune"]) / sample["prefill"] for sample in samples]))


def _statistic_share(samples: Sequence[dict[str, float]]) -> float | None:
    """What collecting the statistic adds to prefill, as a fraction of prefill without it."""
    if "prefill_without" not in samples[0]:
        return None
    # Neighbours in time: the median of their ratios is steadier than the ratio of two medians. Which one came first
    # alternates, so the two orders get equal weight.
    ratios = [sample["prefill"] / sample["prefill_without"] for sample in samples]
    orders = [np.median(half) for half in (ratios[::2], ratios[1::2]) if half]
    return math.prod(map(float, orders)) ** (1 / len(orders)) - 1
