"""Compiling a full-size model for an accelerator that is not there.

XLA compiles for a chip from its description alone, and needs no weights, only their shapes. What comes out is the
very program that would run: how much memory it takes, how many kernels a token launches, and whether the decode loop
copies anything that it should only read. It is not a time. What is said about speed here is a ceiling: the bytes that
a token must read, over the bandwidth that the chip's vendor publishes.

The compiler runs in a process of its own, because it must be set up before JAX is, and differently.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from griffin_jax.aot import compilers
from griffin_jax.aot.hlo import Collective, Module
from griffin_jax.aot.targets import Chip, gpu_target_config, target, topology
from griffin_jax.checkpoints.loading import parse_dtype, parse_weights, precision_of
from griffin_jax.extensions.config import Extensions, Quality, check_quality
from griffin_jax.extensions.mixed import MixedFormat, MixedSizes
from griffin_jax.extensions.reconstruction import DEFAULT_ROWS
from griffin_jax.generation.padding import bucket
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.sharding import check_mesh, divided, neuron_groups, with_kv_copies, with_whole_experts
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.transformer import LAYER_SCOPE
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.parallel.mesh import MODEL_AXIS

TPU_VMEM = 1
"""XLA's number for the memory space on a TPU core, which weights are fetched into ahead of their use."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Decoding as it was compiled, dense or pruned. Sizes in bytes, those of each device.

    Attributes:
        kept: neurons of each feed-forward layer, by each sequence.
        few_bits: how many of these are in the second of two formats; empty if there is one.
        weights: of the model that decodes.
        memory: that `prefill`, `prune`, `decode` and, if they were asked for, `refresh` and `speculative` hold at most,
            the full model always among it; None for what XLA refused to compile because it needs more than the chip
            has.
        fits: whether the largest of them is no more than the chip's memory.
        temporaries: of the decode loop, besides weights and cache; None if it was refused.
        step_bytes: that one step of the loop must read: weights in use and all slots of the cache.
        kernels_per_step: launches in one turn of the loop; on TPUs, operations.
        ff_copies_per_step: instructions of the loop that copy, gather, transpose or convert a whole
            feed-forward matrix. None are wanted.
        ff_copies_per_call: the same before or after the loop.
        cache_copies_per_step: the same in the loop, of a layer's keys or values.
        cache_copies_per_call: the same before or after the loop.
        collectives_in_layers: how often devices communicate in all layers of one step together, by kind.
        collectives_elsewhere: the same before and after the layers, in the embedding, the head or the sampler.
        communicated_per_step: bytes of what these sum, put together or send, on each device.
        collectives_in_prune: how often devices communicate in `prune`, by kind; None if nothing is pruned.
        communicated_in_prune: bytes, likewise.
        ceiling: tokens per second of the whole batch if a step took no longer than reading
            `step_bytes` at the published bandwidth, communication not counted. Computed, not measured.
    """

    kept: tuple[int, ...]
    few_bits: tuple[int, ...]
    weights: int
    memory: dict[str, int | None]
    fits: bool
    temporaries: int | None
    step_bytes: int
    kernels_per_step: int | None
    ff_copies_per_step: tuple[str, ...] | None
    ff_copies_per_call: tuple[str, ...] | None
    cache_copies_per_step: tuple[str, ...] | None
    cache_copies_per_call: tuple[str, ...] | None
    collectives_in_layers: dict[str, int] | None
    collectives_elsewhere: dict[str, int] | None
    communicated_per_step: int | None
    collectives_in_prune: dict[str, int] | None
    communicated_in_prune: int | None
    ceiling: float

    @property
    def precise(self) -> tuple[int, ...]:
        """Neurons of each layer that are kept in the model's own format."""
        if not self.few_bits:
            return self.kept
        return tuple(every - few for every, few in zip(self.kept, self.few_bits, strict=True))


@dataclasses.dataclass(frozen=True)
class Report:
    """What compiling a model for a chip showed.

    Attributes:
        target: name of the chip in `griffin_jax.aot.targets.TARGETS`.
        chip: its published figures.
        devices: how many of it the model is divided among.
        replicated: what every device has all of, because it cannot be shared evenly: `heads` (attention and the
            cache) or `vocabulary` (embedding and head).
        kv_copies: how often each key/value head is there, so that the devices can share attention.
        dtype: of the computation and the cache.
        weights: how the matrices are stored.
        mixed: the formats of the kept neurons, if there are two.
        batch: sequences.
        prompt: tokens of each.
        new: tokens of each answer.
        slots: tokens that each row of the cache has room for: prompt and answer, each in its bucket.
        layers: of the model as compiled.
        parameters: of the full model as compiled.
        ff_width: F of the largest layer, the neurons of all its experts.
        cache: bytes of keys and values on each device.
        shared: whether the batch shares its experts.
        groups: ranges of neurons that each keep as many of their best; 1 if the best of all are kept.
        density: as it was asked for.
        dense: the full model.
        pruned: the pruned model; None at a density of 1.
        masked: whether the pruned model is the full one with a mask for each sequence, since these keep as many neurons
            together as there are.
        refusals: what XLA said about programs that it did not compile.
        speculative: drafts of a round of speculative decoding, if it was compiled.
        expert_parallel: whether devices have whole experts each.
    """

    target: str
    chip: Chip
    devices: int
    replicated: tuple[str, ...]
    kv_copies: int
    dtype: str
    weights: str
    batch: int
    prompt: int
    new: int
    slots: int
    layers: int
    parameters: int
    ff_width: int
    cache: int
    shared: bool
    groups: int
    density: float | Sequence[float]
    dense: Compiled
    pruned: Compiled | None
    refusals: tuple[str, ...]
    speculative: int | None = None
    masked: bool = False
    expert_parallel: bool = False
    mixed: str | None = None

    @property
    def speedup_ceiling(self) -> float | None:
        """How many times faster pruned decoding is at most, if reading is all that takes time; None at density 1."""
        return None if self.pruned is None else self.dense.step_bytes / self.pruned.step_bytes

    @property
    def round_bytes(self) -> int | None:
        """Bytes that a round of speculative decoding reads on each device: the pruned model for each draft, and the
        full model once; None if it was not compiled."""
        if self.speculative is None or self.pruned is None:
            return None
        return self.speculative * self.pruned.step_bytes + self.dense.step_bytes

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary of every attribute, the speed-up's ceiling and the bytes of a round of drafts."""
        own = dataclasses.asdict(self)
        return own | {"speedup_ceiling": self.speedup_ceiling, "round_bytes": self.round_bytes}


def compile_for(
    name: str,
    config: ModelConfig,
    *,
    devices: int = 1,
    expert_parallel: bool = False,
    density: float | Sequence[float] = 0.5,
    round_to: int = 1,
    groups: int | None = None,
    shared: bool = False,
    batch: int = 1,
    prompt: int = 2048,
    new: int = 128,
    dtype: str = "bfloat16",
    weights: str | None = None,
    quality: Quality = "griffin",
    refresh_every: int | None = None,
    speculative: int | None = None,
    mixed_weights: str | None = None,
    hlo: str | os.PathLike[str] | None = None,
    notice: Callable[[str], None] = lambda line: None,
) -> Report:
    """Compiles prefill, prune and decoding, dense and pruned, for a chip that need not be there.

    Nothing of the model is allocated, and the backend of this process is not touched.

    Args:
        name: of the chip, one of `griffin_jax.aot.targets.TARGETS`.
        config: the model.
        devices: how many of the chip the model is divided among, as `griffin_jax.model.sharding` says.
        expert_parallel: whether these have whole experts each, of a model with routed experts.
        density: share of neurons kept; one for all layers or one for each.
        round_to: the number of kept neurons is rounded up to a multiple of this.
        groups: of so many equal ranges of neurons, each keeps as many, see `GriffinConfig`; if None as many as devices,
            where these have a part of any range.
        shared: whether the batch shares its experts, or every sequence has its own.
        batch: sequences.
        prompt: tokens of each.
        new: tokens of each answer.
        dtype: of the computation and the cache.
        weights: how the matrices are stored, such as `int8`, see `griffin_jax.model.weights`; in `dtype` if None.
        quality: `best` keeps rows of the prompt, and refits what is kept to them and to as many rows of general text as
            a prior has by default. (Layers keep the same share all the same, since a prior is needed to know better.)
        refresh_every: compile refreshing, too: the pass over this many tokens.
        speculative: compile speculative decoding, too, with this many drafts.
        mixed_weights: the pruned model has kept neurons in two formats, as
            `griffin_jax.extensions.config.Extensions` says; all neurons are held in the second one, too.
        hlo: a folder that the optimised HLO of every program is written to, that of `select`, too; none if None.
        notice: is called with one line before a compiler is downloaded: see `griffin_jax.aot.compilers`.

    Raises:
        ValueError: an argument is outside its range, there is no such chip or not in this number, the devices
            cannot share the neurons or the kept ones evenly, or prompt and answer are more than the model's context.
        RuntimeError: the compiler for this chip can neither be found nor fetched, or failed.
    """
    chip = target(name)
    numbers = {"batch": batch, "prompt": prompt, "new": new, "refresh_every": refresh_every, "speculative": speculative}
    optional = ("refresh_every", "speculative")
    for argument, value in numbers.items():
        if value is None and argument in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument} must be a whole number of at least 1, got {value!r}")
    check_quality(quality)
    if refresh_every is not None and refresh_every >= new:
        raise ValueError(f"refresh_every is {refresh_every}: an answer of {new} tokens ends before")
    if prompt + new > config.max_positions:
        raise ValueError(f"{prompt} + {new} tokens are more than the model's context of {config.max_positions} tokens")
    precision = precision_of(config, parse_dtype(dtype), parse_weights(weights))
    if expert_parallel:
        config = with_whole_experts(config, AbstractMesh((devices,), (MODEL_AXIS,)))
    widths = config.neuron_ranges
    mixed, part = None, density
    if mixed_weights is not None:
        # It goes with neither of the two, which go with each other here: the programs of both can be compiled.
        Extensions(mixed_weights=mixed_weights, refresh_every=refresh_every)
        mixing = Extensions(mixed_weights=mixed_weights, speculative=speculative or False)
        mixed, part = _resolved(mixing, precision.weights, config, density)
        if mixed is not None and mixed.share and quality == "best":
            raise ValueError("rows in two formats are not refitted: quality griffin, or all of the kept neurons in one")
    griffin = GriffinConfig(part, round_to=round_to, groups=1 if groups is None else groups)
    kept = griffin.kept(widths)
    check_mesh(config, devices, griffin.kept_of_ranges(widths))
    groups = neuron_groups(config, devices) if groups is None else groups
    griffin = dataclasses.replace(griffin, groups=groups)
    if mixed is not None:
        for counts in mixed.counts_of_ranges(griffin, widths):
            check_mesh(config, devices, counts)
    config = with_kv_copies(config, devices)
    slice_name = topology(chip, devices)
    compiler = compilers.fetch("tpu" if chip.gpu is None else "cuda", notice)
    task: dict[str, Any] = {
        "config": config.to_json(),
        "gpu": None if chip.gpu is None else gpu_target_config(chip),
        "topology": slice_name,
        "devices": devices,
        "kept": None if mixed is None and kept == config.neurons else kept,
        "density": griffin.density,
        "round_to": round_to,
        "shared": shared or batch == 1,
        "groups": groups,
        "mixed": None if mixed is None else [str(mixed.coarse), mixed.share],
        "batch": batch,
        "prompt": bucket(prompt),
        # Lossless decoding may write some tokens more than are asked for.
        "max_new_tokens": bucket(new + (speculative or 0)),
        "rows": DEFAULT_ROWS if quality == "best" else 0,
        "refresh": refresh_every,
        "speculative": speculative,
        "dtype": precision.dtype.name,
        "weights": str(precision.weights),
        "hlo": None if hlo is None else os.path.abspath(hlo),
    }

    def sizes_of(weights: WeightFormat, *, copied: bool = True) -> Sizes:
        return Sizes(
            config,
            batch,
            task["prompt"] + task["max_new_tokens"],
            Precision(precision.dtype, weights),
            shared=task["shared"],
            devices=devices,
            refitted=copied,
        )

    sizes = sizes_of(precision.weights, copied=task["rows"] > 0)
    pruned = _Pruned.of(sizes, kept)
    if mixed is not None:
        both = MixedSizes(mixed, griffin, widths, sizes_of, refitted=task["rows"] > 0)
        pruned = _Pruned.mixed(sizes, sizes_of(mixed.coarse), both)
    found = _in_child(task | {"masked": pruned.masked, "copied": pruned.copied > 0}, compiler)
    variants = {}
    for variant, widths in (("dense", config.neurons), ("pruned", kept)):
        if variant not in found:
            continue
        decoded, pruning = found[variant], variant == "pruned"
        # The full model stays: it reads the next prompt. The compiler knows what goes into each program only.
        memory = {"prefill": _total(found["prefill"], beside=pruned.few if pruning else 0)}
        if pruning and pruned.copied:
            others = sizes.weights(None) - sizes.ff(None) + sizes.cache
            memory["prune"] = _total(found["prune"], beside=others + pruned.unread)
        memory["decode"] = _total(decoded, beside=pruned.beside if pruning else 0)
        if pruning and "refresh" in found:
            memory["refresh"] = _total(found["refresh"], beside=pruned.copied)
        if pruning and "speculative" in found:
            memory["speculative"] = _total(found["speculative"])
        needed = list(memory.values())
        program = decoded or dict.fromkeys(PROGRAM_FIELDS)
        moved = found.get("prune") or {} if pruning else {}
        variants[variant] = Compiled(
            kept=widths,
            few_bits=pruned.few_bits if pruning else (),
            weights=pruned.weights if pruning else sizes.weights(None),
            memory=memory,
            fits=all(size is not None and size <= chip.memory for size in needed),
            temporaries=program["temporaries"],
            step_bytes=pruned.step if pruning else sizes.step(None),
            collectives_in_prune=moved.get("collectives"),
            communicated_in_prune=moved.get("communicated"),
            ceiling=batch * chip.bandwidth / (pruned.step if pruning else sizes.step(None)),
            **{field: _tuple(program[field]) for field in PROGRAM_FIELDS if field != "temporaries"},
        )
    return Report(
        target=name.lower(), chip=chip, devices=devices,
        replicated=tuple(what for what, shared_out in divided(config, devices).items() if not shared_out),
        kv_copies=config.kv_copies,
        dtype=precision.dtype.name, weights=str(precision.weights), batch=batch, prompt=prompt, new=new,
        slots=sizes.slots, layers=config.num_layers,
        parameters=sizes.parameters, ff_width=max(config.neurons), cache=sizes.cache, shared=shared, groups=groups,
        density=density,
        dense=variants["dense"], pruned=variants.get("pruned"), refusals=tuple(found["refusals"]),
        speculative=speculative, masked=pruned.masked, expert_parallel=expert_parallel,
        mixed=None if mixed is None else str(mixed),
    )  # fmt: skip


def _resolved(
    mixing: Extensions, weights: WeightFormat, config: ModelConfig, density: float | Sequence[float]
) -> tuple[MixedFormat | None, float | Sequence[float]]:
    """The formats of the kept neurons, None where a density leaves only the first one, and the part that is kept."""
    mixed = mixing.mixed(weights)
    assert mixed is not None
    mixed.check(config.width, config.embedding_width)
    formats, part = mixed.at(density)
    return formats if isinstance(formats, MixedFormat) else None, part


@dataclasses.dataclass(frozen=True)
class _Pruned:
    """Bytes of the pruned model on each device.

    Attributes:
        weights: of the model that decodes.
        copied: of its rows that are copies.
        beside: of rows that are there while it decodes, and which it does not read.
        unread: of rows that are there while it is pruned, and which are not read for that.
        few: of all rows in the second of two formats.
        step: that one decode step must read.
        masked: whether it has masks instead of copies.
        few_bits: neurons of each layer in the second format.
    """

    weights: int
    copied: int
    beside: int
    unread: int
    few: int
    step: int
    masked: bool
    few_bits: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sizes, kept: tuple[int, ...]) -> _Pruned:
        """Of a model with one format."""
        masked = sizes.masked(kept)
        beside = 0 if masked else sizes.ff(None)
        return cls(sizes.weights(kept), sizes.copied(kept), beside, 0, 0, sizes.step(kept), masked, ())

    @classmethod
    def mixed(cls, fine: Sizes, coarse: Sizes, both: MixedSizes) -> _Pruned:
        """Of a model with two."""
        every, copied = fine.ff(None) + coarse.ff(None), sum(both.copied)
        precise, others = any(both.precise), any(both.others)
        # What is not copied is read where it is: both formats through masks, or all neurons in the second one.
        read = copied or (fine.ff(None) if precise else 0) + (coarse.ff(None) if others else 0)
        rest = fine.weights(None) - fine.ff(None)
        beside = every - (0 if copied else read)
        unread = (0 if precise else fine.ff(None)) + (0 if others else coarse.ff(None))
        return cls(rest + read, copied, beside, unread, coarse.ff(None), both.step, both.masked, tuple(both.others))


PROGRAM_FIELDS = (
    "temporaries", "kernels_per_step", "ff_copies_per_step", "ff_copies_per_call", "cache_copies_per_step",
    "cache_copies_per_call", "collectives_in_layers", "collectives_elsewhere", "communicated_per_step",
)  # fmt: skip
"""What the child finds out about each decode loop."""


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _total(program: dict[str, Any] | None, beside: int = 0) -> int | None:
    """Bytes held while a program runs: its inputs, outputs in other memory, temporaries, and all besides it."""
    if program is None:
        return None
    return program["arguments"] + program["outputs"] - program["aliased"] + program["temporaries"] + beside


def child_environment(compiler: Path | None) -> dict[str, str]:
    """The environment of a process that compiles for another chip than this machine has; see `compilers.fetch`."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        # What went wrong is the last line of a whole traceback, and not of a filtered one.
        "JAX_TRACEBACK_FILTERING": "off",
        # Autotuning would run kernels, and there is nothing to run them on.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip(),
        "TPU_SKIP_MDS_QUERY": "1",
        "PYTHONPATH": compilers.search_path(compiler),
    }


def _in_child(task: dict[str, Any], compiler: Path | None) -> dict[str, Any]:
    """Runs `_child` in a new process."""
    result = subprocess.run(
        # -P: nothing is imported from the current folder, unless this process does so, too.
        [sys.executable, "-P", "-c", "from griffin_jax.aot.compilation import _child; _child()"],
        input=json.dumps(task), capture_output=True, text=True, env=child_environment(compiler), check=False,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        said = [line for line in result.stderr.splitlines() if line.strip()]
        reason = said[-1] if said else f"exit code {result.returncode}"
        raise RuntimeError(f"the compiler failed: {reason}")
    return json.loads(lines[-1])


def _child() -> None:
    """Compiles the task on stdin; writes what it found as the last line of stdout."""
    print(json.dumps(_compile_all(json.load(sys.stdin))))


def _compile_all(task: dict[str, Any]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from griffin_jax.extensions import jitted as jitted_extensions
    from griffin_jax.extensions.mixed import mask_mixed, prune_mixed, with_each_group
    from griffin_jax.extensions.reconstruction import DEFAULT_CALIBRATION, Reconstruction
    from griffin_jax.generation import jitted
    from griffin_jax.generation.decode import init_decode
    from griffin_jax.generation.prefill import prefill as read_prompt
    from griffin_jax.griffin.masked import mask
    from griffin_jax.griffin.neurons import ExpertNeurons
    from griffin_jax.griffin.prune import prune
    from griffin_jax.model import sharding
    from griffin_jax.model.assembly import abstract_model
    from griffin_jax.model.feed_forward import FeedForward
    from griffin_jax.model.transformer import Transformer

    if task["gpu"]:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="one", target_config=task["gpu"], topology=task["topology"]
        )
    else:
        described = topologies.get_topology_desc(task["topology"], platform="tpu")
    mesh = jax.sharding.Mesh(np.asarray(described.devices[: task["devices"]]), (MODEL_AXIS,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any, at: Any = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=at)

    def placed(tree: Any, shardings: Any = None) -> Any:
        if shardings is None:
            return jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), tree)
        return jax.tree.map(lambda leaf, at: array(leaf.shape, leaf.dtype, at), tree, shardings)

    def divided_model(model: Transformer) -> Transformer:
        return placed(model, sharding.model_shardings(model, mesh))

    config = ModelConfig.from_json(task["config"])
    batch, max_new_tokens = task["batch"], task["max_new_tokens"]
    model = divided_model(abstract_model(config, jnp.dtype(task["dtype"]), WeightFormat.parse(task["weights"])))
    prompt = array((batch, task["prompt"]), jnp.int32), array((batch,), jnp.int32)
    prefill = functools.partial(read_prompt, max_new_tokens=max_new_tokens, rows=task["rows"])
    prefilled = jax.eval_shape(prefill, model, *prompt)
    rows, statistics = placed(prefilled.rows), placed(prefilled.statistics)
    answer = placed(jax.eval_shape(init_decode, prefilled))
    cache = placed(answer.cache, sharding.cache_shardings(answer.cache, config, mesh))
    answer = dataclasses.replace(answer, cache=cache)
    until = array((), jnp.int32)

    def kept_rows(
        models: list[Transformer], experts: list[ExpertNeurons | None], reconstruction: Reconstruction | None
    ) -> list[FeedForward]:
        """What pruning computes; the rest of its result is passed through, which jit would copy."""
        form: Any = prune if len(models) == 1 else prune_mixed
        return [layer.ff for layer in form(*models, *experts, refit=reconstruction).layers]

    def local(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        assert leaf.sharding is not None
        return leaf.sharding.shard_shape(leaf.shape)

    found: dict[str, Any] = {"refusals": []}

    def compiled(name: str, lower: Callable[[], Any]) -> Any:
        try:
            # Kernels are lowered for the device of this mesh; without it jax 0.12 looks for one that is there.
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                lowered = lower()
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not needs_more_memory(str(error)):
                raise
            found["refusals"].append(f"{name}: {' '.join(str(error).split())[:300]}")
            found[name] = None
            return None
        sizes = program.memory_analysis()
        found[name] = {
            "arguments": sizes.argument_size_in_bytes,
            "outputs": sizes.output_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "aliased": sizes.alias_size_in_bytes,
        }
        text = program.as_text()
        if task["hlo"]:
            folder = Path(task["hlo"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        return text

    def decode(name: str, model: Any) -> None:
        text = compiled(name, lambda: jitted.decode.lower(model, answer, until))
        if text is not None:
            groups = [part for layer in model.layers for part in layer.ff.parts()]
            parts = [part for group in groups for part in (group, group.rest) if part is not None]
            matrices = {local(m.get_value()) for part in parts for m in (part.gate_up, part.down)}
            weights = matrices | {shape[1:] for shape in matrices if len(shape) > 2}
            caches = {local(leaf) for leaf in (*answer.cache.keys, *answer.cache.values)}
            found[name] |= inspect(text, weights, caches, on_chip=None if task["gpu"] else TPU_VMEM)

    compiled("prefill", lambda: jitted.prefill.lower(model, *prompt, max_new_tokens=max_new_tokens, rows=task["rows"]))
    decode("dense", model)
    if task["kept"] is not None:
        sets = () if task["shared"] else (batch,)
        options = {name: task[name] for name in ("density", "shared", "round_to", "groups")}
        every = GriffinConfig(**options)

        def experts_of(*counts: tuple[Sequence[int], Sequence[Sequence[int]]]) -> ExpertNeurons:
            """As many neurons as the first counts have more than the others, of layers and of their ranges."""
            layers = [count - sum(others) for count, *others in zip(*(of_all for of_all, _ in counts), strict=True)]
            zeros = jax.eval_shape(lambda: tuple(jnp.zeros((*sets, k), jnp.int32) for k in layers))
            if config.routing is None:
                return ExpertNeurons(placed(zeros), model.neurons, task["groups"])
            shares = zip(*(of_ranges for _, of_ranges in counts), strict=True)
            shares = tuple(tuple(count - sum(others) for count, *others in zip(*one, strict=True)) for one in shares)
            return ExpertNeurons(placed(zeros), model.neurons, task["groups"], None, config.neuron_ranges, shares)

        def counts(of: GriffinConfig) -> tuple[Sequence[int], Sequence[Sequence[int]]]:
            return of.kept(config.neuron_ranges), of.kept_of_ranges(config.neuron_ranges)

        models, experts, forms = [model], [experts_of(counts(every))], (mask, prune)
        if task["mixed"]:
            coarse, share = task["mixed"]
            few: Transformer = jax.tree.map(lambda leaf: leaf, model)
            rough = divided_model(abstract_model(config, jnp.dtype(task["dtype"]), WeightFormat.parse(coarse)))
            for layer, other in zip(few.layers, rough.layers, strict=True):
                layer.ff = other.ff
            fine = WeightFormat.parse(task["weights"])
            fewer = MixedFormat(fine, WeightFormat.parse(coarse), share).precise(every)
            models, forms = [model, few], (mask_mixed, prune_mixed)
            experts = [None, *experts]
            if fewer is not None:
                alike = fewer.kept(config.neuron_ranges) == every.kept(config.neuron_ranges)
                experts = [experts_of(counts(fewer)), None if alike else experts_of(counts(every), counts(fewer))]
        if task["hlo"]:
            compiled("select", lambda: jitted.select.lower(statistics, every))
        form = forms[not task["masked"]]
        pruned = jax.eval_shape(form, *models, *experts)
        several = any(part.rest is not None for layer in pruned.layers for part in layer.ff.parts())
        pruned = with_each_group(pruned, divided_model) if several else divided_model(pruned)
        reconstruction = None
        if rows:
            general: Any = tuple(array((DEFAULT_CALIBRATION, width), jnp.float16) for width in model.neurons)
            reconstruction = Reconstruction(rows, calibration=general)
        text = None
        if task["copied"]:
            shardings = [jax.tree.map(lambda leaf: leaf.sharding, layer.ff) for layer in pruned.layers]
            gather = jax.jit(kept_rows, out_shardings=shardings)
            text = compiled("prune", lambda: gather.lower(models, experts, reconstruction))
        if text is not None:
            module = Module.parse(text)
            collectives = module.collectives(module.run())
            found["prune"] |= {"collectives": _kinds(collectives), "communicated": _bytes(collectives)}
        decode("pruned", pruned)
        if task["refresh"]:
            compiled(
                "refresh",
                lambda: jitted_extensions.refresh.lower(model, answer, statistics, task["refresh"], rows=rows),
            )
        if task["speculative"]:
            compiled(
                "speculative",
                lambda: jitted_extensions.decode_speculative.lower(
                    model, pruned, answer, until, drafts=task["speculative"]
                ),
            )
    return found


def needs_more_memory(refusal: str) -> bool:
    """Whether XLA refused a program because the chip has too little memory for it, from XLA's message.

    TPU programs that need more memory than there is are refused; GPU programs are not. The message about a kernel that
    needs more shared memory than a GPU gives it begins in the same way, but a smaller model would be refused as well.
    """
    return "RESOURCE_EXHAUSTED" in refusal and "Shared memory" not in refusal


def inspect(
    text: str, weights: set[tuple[int, ...]], caches: set[tuple[int, ...]], on_chip: int | None = None
) -> dict[str, Any]:
    """What the optimised HLO of `decode` does at every step and around its loop.

    Args:
        text: the HLO.
        weights: shapes of the feed-forward matrices.
        caches: shapes of a layer's keys and values.
        on_chip: number of the memory space on the chip, which may be written; None if there is none.

    Returns:
        All of `PROGRAM_FIELDS` but the temporaries.

    Raises:
        ValueError: the text is not that of a program with one loop.
    """
    module = Module.parse(text)
    loop = module.loop()
    collectives = module.collectives(module.computations_of(loop))
    inside, around = list(module.computations_of(loop)), [module.computations[module.entry]]
    return {
        "kernels_per_step": module.kernels(loop),
        "ff_copies_per_step": module.copies(inside, weights, on_chip),
        "ff_copies_per_call": module.copies(around, weights, on_chip),
        "cache_copies_per_step": module.copies(inside, caches, on_chip),
        "cache_copies_per_call": module.copies(around, caches, on_chip),
        "collectives_in_layers": _kinds(c for c in collectives if LAYER_SCOPE in c.origin),
        "collectives_elsewhere": _kinds(c for c in collectives if LAYER_SCOPE not in c.origin),
        "communicated_per_step": _bytes(collectives),
    }


def _kinds(collectives: Iterable[Collective]) -> dict[str, int]:
    return dict(sorted(Counter(c.kind for c in collectives).items()))


def _bytes(collectives: Iterable[Collective]) -> int:
    return sum(c.size for c in collectives)
