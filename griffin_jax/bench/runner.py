"""Measures what pruning gains on this machine: the time of each phase of a request, next to what the bandwidth allows.

For every pair of prompt and answer lengths and every batch size, the densities are measured in turn, round after round,
so that a machine that is slower for a while is slower for all of them. Each round begins with another density. The
first round is a warm-up and is not counted; the time that XLA spends compiling in it is shown separately. Prompts are
random tokens of equal length, decoding is greedy, and no token ends an answer.

A ceiling is the bytes that one decode step must read (the weights in use and all slots of the cache), divided by the
bandwidth that this run measured by summing a large array. A step gives one token to every sequence of the batch.

With random weights (--model NAME of a well-known model), the shapes, bytes and times are those of the model, but its
answers are not. Its prior is random, too.

With --mixed-weights there are also rows whose kept neurons are in two formats. Either the density says how many bytes
of their neurons these rows read, or the given share of the kept neurons is in the model's own format, as in
`griffin-jax generate`.

Speculative rows, at batch 1, write the answer of the full model, for which the pruned one drafts. Their bytes are
counted per token of the answer, drafts and passes of the full model together. How many drafts are accepted depends on
the text, and these prompts are not text: `griffin-jax eval drafts` counts accepted drafts on texts.

On a mesh, bytes and bandwidth are those of each device, and no ceiling includes what the devices communicate. Each
device keeps the best of its own neurons, as in `griffin-jax generate`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from griffin_jax import __version__
from griffin_jax.bench import report
from griffin_jax.extensions import jitted as jitted_extensions
from griffin_jax.extensions.config import Extensions, Quality
from griffin_jax.extensions.drafter import drafter_of, step_bytes
from griffin_jax.extensions.in_place import InPlace
from griffin_jax.extensions.mixed import MixedFormat, MixedSizes, coarse, others_format
from griffin_jax.extensions.prior import Prior
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.extensions.speculative import Drafting
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import bucket, pad
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.llm.memory import Needs
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.sharding import neuron_groups
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size, local_sequences
from griffin_jax.utils import memory
from griffin_jax.utils.timing import Stopwatch

OURS = "griffin_jax"
EXPERTS = ("shared", "per-sequence")
BANDWIDTH_BYTES = 1 << 29
"""Size of the array that is summed to measure the bandwidth; larger than any processor's cache."""
PEERS = {
    "transformers": 4, "published GRIFFIN": 0, "llama.cpp F32": 4, "llama.cpp F16": 2, "llama.cpp Q8_0": 1.1,
    "llama.cpp": 1,
}  # fmt: skip
"""Systems that griffin_jax can be compared with, and the bytes that each holds for a parameter, at most. Those in
PyTorch share their weights; `llama.cpp` without a format reads a GGUF file as it is stored."""
PAUSE = 0.3
"""Seconds to wait before a system is measured if there are peers: idle threads of another library spin for a while."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What the rows of a group have in common.

    Attributes:
        prompt: number of tokens in each prompt.
        new: number of tokens in each answer.
        batch: number of sequences.
        drafts: greatest number of tokens that are drafted at a time; 0 if nothing is drafted.
    """

    prompt: int
    new: int
    batch: int
    drafts: int = 0

    @property
    def room(self) -> int:
        """Number of tokens that an answer has room for. The last round of drafts may write more than was asked for."""
        return bucket(self.new + self.drafts)

    @property
    def slots(self) -> int:
        """Number of cache slots that are allocated for each sequence."""
        return bucket(self.prompt) + self.room


@dataclasses.dataclass(frozen=True)
class Variant:
    """What distinguishes the rows of griffin_jax within a case.

    Attributes:
        density: share of neurons kept.
        shared: whether the sequences of a batch share their experts.
        quality: the argument of this name of `LLM.generate`.
        weights: format in which the matrices are stored; None for the first format that is measured.
        speculative: whether the pruned model only drafts.
        mixed: whether the kept neurons are in two formats.
    """

    density: float = 1.0
    shared: bool = False
    quality: Quality = "griffin"
    weights: WeightFormat | None = None
    speculative: bool = False
    mixed: bool = False


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a decode step reads on each device.

    Attributes:
        bytes: bytes of the weights that are used and of all slots of the cache.
        masked: whether all neurons are read, with a mask for each sequence.
        kept: bytes of the kept rows, which pruning copies or moves.
    """

    bytes: int
    masked: bool
    kept: int


@dataclasses.dataclass(frozen=True)
class Peer:
    """A system that griffin_jax is compared with.

    Attributes:
        name: name of the system.
        version: version of the software that it runs on.
        prunes: whether it is measured at the densities below 1, and not dense.
        baseline: name of the system whose dense decoding its speed-up refers to.
        measure: function of the prompt, the number of new tokens and the density that returns the seconds of `prefill`
            and of one decoded `token`.
        weights: file that it reads; None if it takes the weights that griffin_jax has.
        weights_bytes: bytes of its weights that a step reads; None for those of griffin_jax's model in float32.
        cache_itemsize: bytes of a number in its cache.
    """

    name: str
    version: str
    prunes: bool
    baseline: str
    measure: Callable[[Sequence[int], int, float], dict[str, float]]
    weights: str | None = None
    weights_bytes: int | None = None
    cache_itemsize: int = 4

    @property
    def format(self) -> WeightFormat | None:
        """The format of griffin_jax whose bytes it reads, if there is one."""
        return WeightFormat("float32") if self.weights_bytes is None else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked options, before anything is loaded.

    Attributes:
        source: the model, as it was given on the command line.
        config: configuration of the model.
        random: whether the model gets random weights.
        formats: how the model computes, and how its matrices are stored; measured one after the other in each round.
            All compute in the same dtype.
        densities: densities in descending order; the first is 1.
        cases: cases in the order in which they are measured.
        shared: values of `Variant.shared` with which batches of several sequences are measured.
        qualities: values of `Variant.quality` with which pruned models are measured.
        prior: prior for the quality "best".
        drafting: options that say how many tokens are drafted at a time, and in which format.
        mixing: options that say in which format those kept neurons are read that a prompt needs less; measured in
            separate rows.
        round_to: the number of kept neurons is rounded up to a multiple of this.
        in_place: whether every neuron is held only once.
        mesh: devices that batches and the model are divided among; None for one device.
        repeats: number of rounds that are counted.
        peers: names of other systems that are measured, too, from `PEERS`.
    """

    source: str
    config: ModelConfig
    random: bool
    formats: tuple[Precision, ...]
    densities: tuple[float, ...]
    cases: tuple[Case, ...]
    shared: tuple[bool, ...]
    qualities: tuple[Quality, ...]
    prior: Prior | None
    drafting: Extensions
    mixing: Extensions
    round_to: int
    in_place: bool
    mesh: Mesh | None
    repeats: int
    peers: tuple[str, ...]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the computation and of the cache."""
        return self.formats[0].dtype

    def precision(self, variant: Variant) -> Precision:
        """How the model of a row computes, and how its matrices are stored."""
        return Precision(self.dtype, variant.weights or self.formats[0].weights)

    def mixed(self, variant: Variant) -> MixedFormat | None:
        """The two formats of a row's kept neurons, as given in the options; None if there is only one."""
        return self.mixing.mixed(self.precision(variant).weights) if variant.mixed else None

    def resolved(self, variant: Variant) -> tuple[MixedFormat | None, float]:
        """The two formats, with the share of the precise neurons, and the share of all neurons that is kept."""
        mixed = self.mixed(variant)
        if mixed is None:
            return None, variant.density
        formats, density = mixed.at(variant.density)
        assert isinstance(formats, MixedFormat)
        assert isinstance(density, float)
        return formats, density

    def pruner(self, variant: Variant) -> Pruner:
        """How a row prunes."""
        shared = variant.shared or self.in_place
        groups = neuron_groups(self.config, axis_size(self.mesh, MODEL_AXIS))
        _, density = self.resolved(variant)
        config = GriffinConfig(density, shared=shared, round_to=self.round_to, groups=groups)
        if self.prior is None or variant.quality != "best":
            return Pruner.of(config)
        return Pruner.of(config, Extensions.best(self.prior))

    def variants(self, case: Case) -> list[Variant]:
        """The variants of a case, format by format; each format begins with the dense variant."""
        sharing = self.shared if case.batch > 1 else (False,)
        densities = [density for density in self.densities if density < 1]
        pruned = [Variant(d, shared, quality) for quality in self.qualities for shared in sharing for d in densities]
        mixed = [dataclasses.replace(variant, mixed=True) for variant in pruned]
        drafting = [*([Variant()] if self.drafting.drafter else []), *pruned] if case.drafts else []
        drafting = [dataclasses.replace(variant, speculative=True) for variant in drafting]
        return [
            dataclasses.replace(variant, weights=precision.weights)
            for precision in self.formats
            for variant in (Variant(), *pruned, *(mixed if self.mixes(precision.weights) else ()), *drafting)
        ]

    def mixes(self, weights: WeightFormat) -> bool:
        """Whether pruned models of this format are also measured with neurons in two formats."""
        if self.mixing.mixed_weights is None:
            return False
        others, share = others_format(self.mixing.mixed_weights)
        return share is not None or others.bits < weights.bits

    def rows(self, case: Case, variant: Variant) -> int:
        """Number of tokens of each prompt to which a row refits its neurons.

        It is 0 if the neurons are in two formats, and either none is left out or some are precise.
        """
        formats, _ = self.resolved(variant)
        if formats is not None and (formats.share or self.kept(variant) == self.config.neurons):
            return 0
        return self.pruner(variant).rows_of_each(case.batch)

    def sizes(self, case: Case, variant: Variant = Variant(), *, copied: bool = False) -> Sizes:
        """Bytes of a row's parts on each device.

        With `copied`, each sequence has copies of its kept rows, however many these are.
        """
        devices, one = axis_size(self.mesh, MODEL_AXIS), variant.shared or case.batch == 1
        precision = self.precision(variant)
        if variant.speculative and self.drafting.drafter is not None:
            precision = Precision(self.dtype, self.drafting.drafter)
        refitted = copied or (variant.quality == "best" and variant.density < 1)
        return Sizes(
            self.config,
            local_sequences(self.mesh, case.batch),
            case.slots,
            precision,
            shared=one,
            devices=devices,
            refitted=refitted,
        )

    def reading(self, case: Case, variant: Variant) -> Reading:
        """What a decode step of a row reads on each device."""
        sizes, kept, (formats, _) = self.sizes(case, variant), self.kept(variant), self.resolved(variant)
        if formats is None:
            return Reading(sizes.step(kept), sizes.masked(kept), sizes.ff(None if self.in_place else kept))

        def parts(weights: WeightFormat) -> Sizes:
            return self.sizes(case, dataclasses.replace(variant, weights=weights), copied=True)

        config, refitted = self.pruner(variant).config, self.rows(case, variant) > 0
        both = MixedSizes(formats, config, self.config.neuron_ranges, parts, refitted=refitted)
        return Reading(both.step, both.masked, sum(both.copied))

    def draft_bytes(self, case: Case, variant: Variant) -> tuple[int, int]:
        """Bytes that one draft of a row reads, and bytes that one pass of its full model reads; both with the cache."""
        precision, kept = self.precision(variant), self.kept(variant)
        return step_bytes(self.config, precision, case.slots, kept, self.drafting.drafter)

    def kept(self, variant: Variant) -> tuple[int, ...] | None:
        """Number of kept neurons in every layer; None for the dense model."""
        if variant.density == 1:
            return None
        return self.pruner(variant).config.kept(self.config.neuron_ranges)


def needed_memory(plan: Plan) -> dict[str, int]:
    """Bytes that the largest case holds on a device at a time, by their purpose; see `griffin_jax.llm.memory`.

    Devices of the same processor count as one.
    """
    parameters = plan.sizes(plan.cases[0]).parameters

    def needs_of(variant: Variant) -> Needs:
        return Needs(plan.config, plan.precision(variant), plan.mesh, jax.default_backend())

    def weights_of(variant: Variant) -> int:
        needs, drafter = needs_of(variant), plan.drafting.drafter
        full = needs.in_memory(plan.sizes(plan.cases[0], variant).weights(None), needs.precision.weights)
        full += few_of(variant)
        return full if drafter is None else full + needs.drafter(drafter)

    def few_of(variant: Variant) -> int:
        """Bytes of all neurons in the second of two formats, which are kept for all rows of the first one."""
        if not plan.mixes(plan.precision(variant).weights):
            return 0
        others, _ = others_format(plan.mixing.mixed_weights or "")
        rows = plan.sizes(plan.cases[0], Variant(weights=others)).ff(None)
        return needs_of(variant).in_memory(rows, others)

    held = {each.weights: weights_of(Variant(weights=each.weights)) for each in plan.formats}
    beside = {
        "measuring the bandwidth": BANDWIDTH_BYTES,
        "peers": int(sum(PEERS[name] for name in plan.peers) * parameters),
    }

    def parts(case: Case, variant: Variant) -> dict[str, int]:
        needs = needs_of(variant)
        general = plan.prior.rows if plan.prior is not None and variant.quality == "best" else ()
        formats, _ = plan.resolved(variant)
        found = needs.generation(
            case.batch,
            case.prompt,
            case.new + case.drafts,
            plan.kept(variant),
            shared=variant.shared,
            rows=plan.rows(case, variant),
            calibration=general[0].shape[0] if general else 0,
            drafts=case.drafts if variant.speculative else 0,
            drafter=plan.drafting.drafter if variant.speculative else None,
            mixed=None if formats is None else (formats, plan.pruner(variant).config),
            in_place=plan.in_place,
            repeated=True,
        )
        cache = plan.sizes(case, variant).cache
        others = sum(size + cache for weights, size in held.items() if weights != variant.weights)
        few = {} if variant.mixed else {"neurons in fewer bits": few_of(variant)}
        return found | beside | few | {"weights and caches in the other formats": others}

    every = [parts(case, variant) for case in plan.cases for variant in plan.variants(case)]
    return max(every, key=lambda one: sum(one.values()))


def check_memory(plan: Plan) -> None:
    """Raise `MemoryError` unless the largest case fits into the free memory."""
    advice = "take a smaller --batch, shorter --lengths, --weights of fewer bits or, of random weights, fewer --layers"
    memory.check(needed_memory(plan), free_memory(), advice)


def free_memory() -> int | None:
    """Bytes that can still be allocated on the default device; None if that is unknown."""
    return memory.free(jax.devices()[:1])


def threads() -> int:
    """Number of CPU threads that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def measure(
    plan: Plan,
    models: Mapping[WeightFormat, Transformer],
    peers: Sequence[Peer] = (),
    skipped: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measures every case, and returns what `--json` prints.

    Args:
        plan: what to measure.
        models: the full model in each of the plan's formats.
        peers: systems that are measured at batch 1, in turn with the model.
        skipped: names of peers that cannot run, each with the reason.
    """
    in_place = plan.pruner(Variant(plan.densities[-1])).config if plan.in_place else None
    subjects = {weights: _Subject(model, in_place) for weights, model in models.items()}
    groups, bandwidths = [], []
    rounds = len(plan.cases) * (plan.repeats + 1)
    with tqdm(total=rounds, unit="round", desc="measuring", disable=None, leave=False) as bar:
        for case in plan.cases:
            bandwidths.append(measure_bandwidth(plan.mesh))
            groups.append(_measure_case(plan, subjects, case, peers if case.batch == 1 else (), bar.update))
    # What counts is the bandwidth of the machine when nothing disturbs it.
    bandwidth = max(*bandwidths, measure_bandwidth(plan.mesh))
    rows = [
        row
        for case, measured in zip(plan.cases, groups, strict=True)
        for row in summarise(plan, case, measured, bandwidth, {peer.name: peer for peer in peers})
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
        "parameters": plan.sizes(plan.cases[0]).parameters,
        "dtype": plan.dtype.name,
        "stored_as": ",".join(str(each.weights) for each in plan.formats),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "threads": threads(),
        "repeats": plan.repeats,
        "round_to": plan.round_to,
        "in_place": plan.in_place,
        "mesh": None if plan.mesh is None else dict(plan.mesh.shape),
        "bandwidth": bandwidth,
        "peak_memory": memory.peak(),
        "device_memory": stats.get("peak_bytes_in_use"),
        "peers": [{"name": p.name, "version": p.version, "weights": p.weights} for p in peers],
        "skipped": skipped or {},
        "rows": rows,
    }


def measure_bandwidth(mesh: Mesh | None = None) -> float:
    """Bytes per second read by summing a large array, at best; on a mesh by each device while all of them read."""
    devices = 1 if mesh is None else mesh.size
    # Devices of the same processor share its caches and its memory.
    size = BANDWIDTH_BYTES // 4 * (1 if jax.default_backend() == "cpu" else devices)
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    array = jnp.ones((size // devices * devices,), jnp.float32, device=sharding)
    total = jax.jit(jnp.sum)
    # An accelerator reads the array in less time than ten launches take, and keeps reading while the next is launched.
    runs = 1 if jax.default_backend() == "cpu" else 16
    times = []
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready([total(array) for _ in range(runs)])
        times.append((time.perf_counter() - start) / runs)
    return array.nbytes / devices / min(times)


@dataclasses.dataclass
class Measured:
    """A row before it is summarised.

    Attributes:
        system: name of the system.
        baseline: name of the system whose dense row it is compared with.
        variant: variant that was measured.
        samples: seconds of every phase, one dictionary for every counted round.
        compile: seconds that XLA spent compiling its programs; None for peers.
        peak_memory: peak memory of the process while the row was measured, in bytes; None if that is unknown.
        drafting: how many drafts of an answer were accepted; None if there were none.
    """

    system: str
    baseline: str
    variant: Variant
    samples: list[dict[str, float]] = dataclasses.field(default_factory=list)
    compile: float | None = None
    peak_memory: int | None = None
    drafting: Drafting | None = None


class _Subject:
    """The model, with selection and pruning as in `LLM`.

    Args:
        model: the full model.
        in_place: how a request prunes, if every neuron is to be held only once; `model` is then used up.
    """

    def __init__(self, model: Transformer, in_place: GriffinConfig | None):
        self._model = model
        self._drafter: Transformer | None = None
        self._few: Transformer | None = None
        self._in_place = None if in_place is None else InPlace(model)
        if self._in_place is not None and in_place is not None:
            # Any experts will do: from now on the programs are those for two groups of rows.
            kept = in_place.kept(model.config.neuron_ranges)
            self._in_place.prune(ExpertNeurons.from_indices([range(k) for k in kept], model.neurons))

    @property
    def model(self) -> Transformer:
        """The full model."""
        return self._model if self._in_place is None else self._in_place.model

    def drafter(self, weights: WeightFormat | None) -> Transformer:
        """The model that drafts, before it is pruned: the full model, or a copy in another format that is made once."""
        if weights is None:
            return self.model
        drafter = self._drafter or jax.block_until_ready(drafter_of(self._model, weights))
        self._drafter = drafter
        return drafter

    def in_order(self, prefilled: Prefilled) -> Prefilled:
        """Prompts that `model` has read, with statistics that stay valid when its rows move."""
        if self._in_place is None or not prefilled.statistics.squares:
            return prefilled
        return dataclasses.replace(prefilled, statistics=self._in_place.in_order(prefilled.statistics))

    def prune(self, model: Transformer, prefilled: Prefilled, pruner: Pruner, watch: Stopwatch) -> Transformer:
        """The pruned model: the full model or its drafter, with only the kept rows."""
        statistics, rows = prefilled.statistics, prefilled.rows
        with watch.phase("select"):
            experts = jax.block_until_ready(pruner.select(self.model, statistics))
        if self._in_place is not None:
            with watch.phase("prune"):
                return jax.block_until_ready(self._in_place.prune(experts))
        with watch.phase("first_prune"):
            first = jax.block_until_ready(pruner.prune(model, experts, rows))
        with watch.phase("prune"):
            return jax.block_until_ready(pruner.prune(model, experts, rows, reuse=first))

    def mix(self, prefilled: Prefilled, pruner: Pruner, formats: MixedFormat, watch: Stopwatch) -> Transformer:
        """The pruned model whose neurons are in two formats."""
        few = self._few or jax.block_until_ready(coarse(self.model, formats.coarse))
        self._few = few
        with watch.phase("select"):
            chosen = jax.block_until_ready(pruner.select_mixed(self.model, prefilled.statistics, formats))
        given = self.model, few, formats, chosen, prefilled.rows
        with watch.phase("first_prune"):
            first = jax.block_until_ready(pruner.prune_mixed(*given))
        if first is few or any(layer.ff.mask is not None for layer in first.layers):
            first = None
        with watch.phase("prune"):
            return jax.block_until_ready(pruner.prune_mixed(*given, reuse=first))


def _measure_case(
    plan: Plan,
    subjects: Mapping[WeightFormat, _Subject],
    case: Case,
    peers: Sequence[Peer],
    progress: Callable[[], Any],
) -> list[Measured]:
    prompts = np.random.default_rng(0).integers(0, plan.config.vocab_size, (case.batch, case.prompt))
    tokens, lengths = pad(prompts.tolist(), bucket(case.prompt))
    ours = [Measured(OURS, OURS, variant, compile=0.0) for variant in plan.variants(case)]
    theirs = [
        (peer, Measured(peer.name, peer.baseline, Variant(density, weights=peer.format)))
        for peer in peers
        for density in ([d for d in plan.densities if d < 1] if peer.prunes else [1.0])
    ]
    # What a prefill records: nothing (None), GRIFFIN's statistic (0), or also this many rows of each prompt.
    records = list(dict.fromkeys(_recorded(plan, case, row.variant) for row in ours))
    for number in range(plan.repeats + 1):
        # What comes first in a round may find threads asleep and caches cold.
        order = records if number % 2 else records[::-1]
        read_by = {weights: _prefills(subject, tokens, lengths, case, order) for weights, subject in subjects.items()}
        turn = number % len(ours)
        for row in [*ours[turn:], *ours[:turn]]:
            weights = plan.precision(row.variant).weights
            prefilled, read = read_by[weights][_recorded(plan, case, row.variant)]
            with _peak_memory(row):
                watch, row.drafting = _answer(subjects[weights], prefilled, plan, row.variant, case)
            sample = {name: seconds for name, seconds in watch.seconds.items() if name != "compile"}
            sample["prefill"] = read.seconds["prefill"]
            if row.variant.density < 1:
                sample["prefill_without"] = read_by[weights][None][1].seconds["prefill"]
            if number:
                row.samples.append(sample)
            else:
                row.compile = read.seconds["compile"] + watch.seconds["compile"]
        del read_by
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
    subject: _Subject, tokens: np.ndarray, lengths: np.ndarray, case: Case, order: Sequence[int | None]
) -> dict[int | None, tuple[Prefilled, Stopwatch]]:
    """Prefills of the prompts, one for each value of what is recorded, close together in time; for all densities."""
    sides: dict[int | None, tuple[Prefilled, Stopwatch]] = {}
    for rows in order:
        watch = Stopwatch()
        with watch.phase("prefill"):
            prefilled = jax.block_until_ready(
                jitted.prefill(
                    subject.model,
                    tokens,
                    lengths,
                    max_new_tokens=case.room,
                    longest=np.int32(case.new),
                    collect=rows is not None,
                    rows=rows or 0,
                )
            )
        prefilled = subject.in_order(prefilled)
        for other, _ in sides.values():
            # All caches are equal, and only one has to be kept.
            prefilled = dataclasses.replace(prefilled, cache=other.cache)
        sides[rows] = prefilled, watch
    return sides


def _answer(
    subject: _Subject, prefilled: Prefilled, plan: Plan, variant: Variant, case: Case
) -> tuple[Stopwatch, Drafting | None]:
    """Times of an answer, phase by phase as `LLM.generate` writes it, and how many of its drafts were accepted."""
    watch = Stopwatch()
    model = subject.drafter(plan.drafting.drafter) if variant.speculative else subject.model
    formats, _ = plan.resolved(variant)
    if formats is not None:
        model = subject.mix(prefilled, plan.pruner(variant), formats, watch)
    elif variant.density < 1:
        model = subject.prune(model, prefilled, plan.pruner(variant), watch)
    # `init_decode` uses up the cache, and the next row needs it.
    mine = jax.block_until_ready(dataclasses.replace(prefilled, cache=jax.tree.map(jnp.copy, prefilled.cache)))
    with watch.phase("init_decode"):
        answer = jax.block_until_ready(jitted.init_decode(mine))
    until = np.int32(case.new)
    if not variant.speculative:
        with watch.phase("decode"):
            jax.block_until_ready(jitted.decode(model, answer, until))
        return watch, None
    worth: dict[str, Any] = {}
    if plan.drafting.speculative is True:
        draft, step = plan.draft_bytes(case, variant)
        worth = {"cost": np.float32(draft / step), "earlier": Drafting.none(case.batch)}
    with watch.phase("decode"):
        _, drafting = jax.block_until_ready(
            jitted_extensions.decode_speculative(subject.model, model, answer, until, drafts=case.drafts, **worth)
        )
    return watch, drafting


@contextlib.contextmanager
def _peak_memory(row: Measured) -> Iterator[None]:
    """Notes the largest resident memory during the block, or that of the process so far if it cannot be reset."""
    memory.reset_peak()
    yield
    peak = memory.peak()
    if peak is not None:
        row.peak_memory = max(peak, row.peak_memory or 0)


def summarise(
    plan: Plan,
    case: Case,
    measured: Sequence[Measured],
    bandwidth: float,
    peers: Mapping[str, Peer] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """The rows of one case: medians over the rounds, and what follows from them.

    Args:
        plan: options of the measurement.
        case: case that was measured.
        measured: rows of the case.
        bandwidth: measured bandwidth, in bytes per second.
        peers: peers among the rows, by their names.

    Returns:
        One dictionary of plain numbers for each row: times in milliseconds unless their name says seconds, sizes in
        bytes, speeds in bytes per second, and shares as fractions. What a row does not have is None.
    """
    # If there are several formats, the others are also compared with the first one.
    dense = {row.system: row for row in reversed(measured) if _is_dense(row.variant)}
    rows = []
    for row in measured:
        ours, variant = row.system == OURS, row.variant
        kept, cache, reading = plan.kept(variant), plan.sizes(case, variant).cache, plan.reading(case, variant)
        weights = reading.bytes - cache
        drafts = _drafts(plan, case, row)
        if drafts:
            weights, cache = drafts.pop("weights_bytes"), drafts.pop("cache_bytes")
        if not ours:
            # Peers' caches grow with the text; ours has all its slots from the start.
            peer, filled = peers[row.system], cache * (case.prompt + case.new // 2) // case.slots
            cache = filled * peer.cache_itemsize // plan.dtype.itemsize
            weights = weights if peer.weights_bytes is None else peer.weights_bytes
        times = {
            name: _median(row.samples, name) for name in ("prefill", "select", "prune", "first_prune", "init_decode")
        }
        step = _step(row, case)
        base = dense.get(row.baseline)
        is_pruned = variant.density < 1
        masked = ours and reading.masked
        # Rows are read and written. If they are refitted, that is not what takes the time.
        copied = 2 * reading.kept if ours and is_pruned and not masked and variant.quality == "griffin" else None
        ceiling = (weights + cache) / bandwidth
        result: dict[str, Any] = {
            "system": row.system,
            "baseline": row.baseline,
            "prompt": case.prompt,
            "new": case.new,
            "batch": case.batch,
            "experts": EXPERTS[not variant.shared] if ours and is_pruned and case.batch > 1 else None,
            "quality": "best" if variant.quality == "best" else None,
            "format": _format(plan, variant) if ours else None,
            "density": variant.density,
            "kept": None if kept is None else list(kept),
            "masked": masked,
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
            "drafts": drafts.get("drafts"),
            "draft_weights": drafts.get("draft_weights"),
            "draft_bytes": drafts.get("draft_bytes"),
            "draft_share": drafts.get("draft_share"),
            "accepted": drafts.get("accepted"),
            "tokens_per_pass": drafts.get("tokens_per_pass"),
            "bytes_share": drafts.get("bytes_share"),
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
        first = next((r for r in rows if r["system"] == row.baseline and r["density"] == 1 and not r["drafts"]), result)
        allowed = first["step_bytes"] / result["step_bytes"]
        result["speedup"] = speedup
        result["speedup_ceiling"] = None if speedup is None else allowed
        result["fraction_of_speedup"] = None if speedup is None else speedup / allowed
        rows.append(result)
    return rows


def _format(plan: Plan, variant: Variant) -> str | None:
    """The format of a row's matrices; None if all rows have the same one."""
    mixed = plan.mixed(variant)
    if mixed is None and len(plan.formats) == 1:
        return None
    return str(mixed or plan.precision(variant).weights)


def _is_dense(variant: Variant) -> bool:
    return variant.density == 1 and not variant.speculative


def _drafts(plan: Plan, case: Case, row: Measured) -> dict[str, Any]:
    """Figures that only speculative rows have; empty for other rows.

    Bytes are for each token of the answer, except the first one, which needs no step.
    """
    if row.drafting is None:
        return {}
    drafting, written = row.drafting, case.new - 1
    passes, steps, drafted = int(drafting.passes), int(drafting.steps), int(drafting.drafted.sum())
    draft, full = plan.draft_bytes(case, row.variant)
    cache = plan.sizes(case, row.variant).cache
    drafter = plan.drafting.drafter
    return {
        "drafts": "auto" if plan.drafting.speculative is True else case.drafts,
        "draft_weights": None if drafter is None else str(drafter),
        "draft_bytes": draft,
        "draft_share": draft / full,
        "accepted": int(drafting.accepted.sum()) / drafted,
        "tokens_per_pass": written / passes,
        "bytes_share": (passes + steps * draft / full) / written,
        "weights_bytes": round((passes * (full - cache) + steps * (draft - cache)) / written),
        "cache_bytes": round((passes + steps) * cache / written),
    }


def _median(samples: Sequence[dict[str, float]], name: str) -> float | None:
    """The median in milliseconds; None for a phase that the row does not have."""
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
    """Time of select and prune, as a fraction of prefill: what pruning takes before decoding, without the statistic."""
    if "select" not in samples[0]:
        return None
    return float(np.median([(sample["select"] + sample["prune"]) / sample["prefill"] for sample in samples]))


def _statistic_share(samples: Sequence[dict[str, float]]) -> float | None:
    """Time that collecting the statistic adds to prefill, as a fraction of prefill without it."""
    if "prefill_without" not in samples[0]:
        return None
    # Both prefills of a round are close in time, so the median of their ratios is steadier than the ratio of two
    # medians. Which one comes first alternates, and the two orders get equal weight.
    ratios = [sample["prefill"] / sample["prefill_without"] for sample in samples]
    orders = [np.median(half) for half in (ratios[::2], ratios[1::2]) if half]
    return math.prod(map(float, orders)) ** (1 / len(orders)) - 1
