"""`griffin-jax bench`: what pruning gains on this machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from griffin_jax.bench import report, runner
from griffin_jax.bench.runner import EXPERTS, PEERS, Case, Peer, Plan, check_memory, measure
from griffin_jax.checkpoints import demo, loading
from griffin_jax.checkpoints.sources import Source
from griffin_jax.cli.options import (
    add_dtype_argument,
    add_mesh_argument,
    add_options,
    add_pickle_argument,
    check_output,
    check_plot,
    chosen_mesh,
    numbers,
)
from griffin_jax.extensions.config import Extensions, Quality, check_quality
from griffin_jax.extensions.mixed import others_format
from griffin_jax.extensions.prior import Prior, load_for_best
from griffin_jax.extensions.reconstruction import DEFAULT_CALIBRATION
from griffin_jax.griffin.config import GriffinConfig, check_density
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.named import NAMED, named
from griffin_jax.model.sharding import check_mesh, with_kv_copies, with_whole_experts
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size
from griffin_jax.utils.wholefile import write_text

LENGTHS = {"cpu": "512+64"}
"""Lengths of prompt and answer that are measured by default, by backend. On other backends they are `OTHER_LENGTHS`,
the setting of arXiv 2404.01365, table 4."""
OTHER_LENGTHS = "2048+128"


DESCRIPTION = runner.__doc__

FindPeers = Callable[
    [Mapping[WeightFormat, Transformer], str, "tuple[str, ...]", contextlib.ExitStack],
    "tuple[list[Peer], dict[str, str]]",
]
"""A function (the model in each format, its source, names of peers, a stack for clean-up) that returns the peers that
can run, and the reasons why the others cannot, by name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--model",
        default=demo.NAME,
        help="any model that griffin_jax loads, or one of these names, for random weights in the true shape of that"
        f" model: {', '.join(NAMED)} (default: %(default)s)",
    )
    what.add_argument("--layers", type=int, metavar="L", help="with random weights, use only the first L layers")
    add_dtype_argument(what, weights=False)
    what.add_argument(
        "--weights",
        metavar="FORMATS",
        help="formats in which the weight matrices are stored, as in generate, separated by commas (float32,int8); each"
        " is a separate model, and the models are measured in turn (default: as in generate)",
    )
    what.add_argument(
        "--density",
        nargs="+",
        default=["1,0.75,0.5,0.25"],
        metavar="D",
        help="densities, separated by commas or spaces; 1, which the others are compared with, is always among them"
        " (default: 1,0.75,0.5,0.25)",
    )
    what.add_argument(
        "--lengths",
        metavar="P+N",
        help="tokens of prompt and answer; several pairs are separated by commas, such as 2048+128,2048+2048"
        f" (default: {LENGTHS['cpu']} on CPU, else {OTHER_LENGTHS})",
    )
    what.add_argument(
        "--prompt",
        "--prompt-tokens",
        type=int,
        metavar="P",
        help="tokens of the prompt (with --new, instead of --lengths)",
    )
    what.add_argument("--new", "--new-tokens", type=int, metavar="N", help="tokens of the answer (with --prompt)")
    what.add_argument(
        "--batch",
        default="1",
        metavar="B",
        help="number of sequences, or several such numbers, separated by commas (default: %(default)s)",
    )
    what.add_argument(
        "--experts",
        default=",".join(EXPERTS),
        help="neurons that a batch of several sequences keeps: shared (one set for all), per-sequence (one set for"
        " each), or both, separated by commas and measured in turn (default: %(default)s)",
    )
    what.add_argument(
        "--quality",
        default="griffin",
        help="griffin, best (prior, budgets and refit, as in generate), or griffin,best to measure each in turn"
        " (default: %(default)s)",
    )
    what.add_argument(
        "--prior",
        type=Path,
        metavar="FILE",
        help="file that griffin-jax prior has measured, for --quality best (default: the file next to the model)",
    )
    drafts = "at batch 1, also measure speculative decoding, in which the other models draft DRAFTS tokens at a time"
    add_options(what, Extensions, "speculative", help=f"{drafts} for the full model (default: adaptive)")
    add_options(what, Extensions, "draft_weights")
    mixed = "also measure every pruned model with its kept neurons in two formats, as in generate"
    add_options(what, Extensions, "mixed_weights", help=mixed)
    add_options(what, GriffinConfig, "round_to")
    what.add_argument(
        "--in-place",
        action="store_true",
        help="hold every neuron once, the kept rows and the others in two groups, as griffin_jax.load(in_place=True)"
        " does; takes one density below 1, and measures shared neurons only",
    )
    add_mesh_argument(parser)
    what.add_argument(
        "--repeats", type=int, default=5, help="number of rounds that medians are taken of (default: %(default)s)"
    )
    what.add_argument(
        "--peers",
        nargs="?",
        const="",
        metavar="NAMES",
        help="also measure other systems that are installed, in turn and on the same work, on the CPU and at batch 1: "
        f"{', '.join(PEERS)}. NAMES are some of these, separated by commas; by default those that hold their weights as"
        " one of --weights does, and llama.cpp with a GGUF file as it is. Only in a checkout: python -m benchmarks run",
    )
    add_pickle_argument(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    output.add_argument("--json-file", type=Path, metavar="FILE", help="write the JSON object to FILE")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw speed-up against density as a PNG (needs griffin-jax[plot])"
    )
    output.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="show the ratio of each figure to the one in an earlier --json-file",
    )


def check(options: argparse.Namespace) -> Plan:
    """Checks all options before anything is loaded or allocated, and makes a plan of them.

    Raises:
        FileNotFoundError: the model, the prior or the folder for an output does not exist.
        ValueError: a value is malformed or outside its range, or a mesh does not divide the model.
        ImportError: a plot is wanted, and matplotlib is not installed.
        MemoryError: the largest case needs more memory than is free.
    """
    densities = numbers("--density", ",".join(part.strip(",") for part in options.density), float)
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
    if mesh is not None and (options.peers is not None or options.in_place):
        other = "--peers" if options.peers is not None else "--in-place"
        raise ValueError(f"--mesh does not go with {other}: give one of the two")
    config, source = _config(options)
    random = source is None
    config = with_whole_experts(config, mesh) if options.expert_parallel else config
    check_mesh(config, axis_size(mesh, MODEL_AXIS))
    config = with_kv_copies(config, axis_size(mesh, MODEL_AXIS))
    for prompt, new in lengths:
        if prompt + new > config.max_positions:
            raise ValueError(
                f"{prompt} + {new} tokens are more than the model's context of {config.max_positions}; see --lengths"
            )
    formats = _formats(options, config, source)
    drafting = _drafting(options, config, densities, batches)
    mixing = _mixing(options, config, formats, qualities)
    plan = Plan(
        source=options.model,
        config=config,
        random=random,
        formats=formats,
        densities=(1.0, *sorted({d for d in densities if d < 1}, reverse=True)),
        cases=tuple(
            Case(prompt, new, batch, min(drafting.drafts, new - 1) if batch == 1 else 0)
            for prompt, new in lengths
            for batch in batches
        ),
        shared=(True,) if options.in_place else tuple(name == "shared" for name in experts),
        qualities=tuple(quality for quality in get_args(Quality) if quality in qualities),
        prior=_prior(options, config, random) if "best" in qualities else None,
        drafting=drafting,
        mixing=mixing,
        round_to=options.round_to,
        in_place=options.in_place,
        mesh=mesh,
        repeats=options.repeats,
        peers=_peers(options, formats),
    )
    if plan.in_place and len(plan.densities) != 2:
        raise ValueError(
            f"--in-place takes one density below 1, got {', '.join(f'{d:g}' for d in plan.densities[1:]) or 'none'};"
            " give for example --density 0.5"
        )
    for density in plan.densities:
        griffin = GriffinConfig(density, round_to=options.round_to)
        check_mesh(config, axis_size(mesh, MODEL_AXIS), griffin.kept_of_ranges(config.neuron_ranges))
    for variant in (variant for case in plan.cases for variant in plan.variants(case)):
        mixed, _ = plan.resolved(variant)
        if mixed is not None:
            for counts in mixed.counts_of_ranges(plan.pruner(variant).config, config.neuron_ranges):
                check_mesh(config, axis_size(mesh, MODEL_AXIS), counts)
    check_memory(plan)
    return plan


def _formats(options: argparse.Namespace, config: ModelConfig, source: Source | None) -> tuple[Precision, ...]:
    dtype = loading.parse_dtype(options.dtype)
    given = [None] if options.weights is None else [part.strip() for part in options.weights.split(",")]
    formats = [loading.precision_of(config, dtype, loading.parse_weights(each), source) for each in given]
    return tuple(dict.fromkeys(formats))


def _drafting(
    options: argparse.Namespace, config: ModelConfig, densities: Sequence[float], batches: Sequence[int]
) -> Extensions:
    """The options of speculative decoding: how many tokens are drafted at a time, and in which format."""
    drafting = Extensions(speculative=options.speculative, draft_weights=options.draft_weights)
    if not drafting.drafts:
        return drafting
    if options.mesh is not None:
        raise ValueError("--mesh does not go with --speculative: give one of the two")
    if 1 not in batches:
        raise ValueError("--speculative is for single requests: give --batch 1, also with others")
    if drafting.drafter is None and min(densities) == 1:
        raise ValueError("--speculative needs something that drafts: give a --density below 1 or --draft-weights int4")
    if drafting.drafter is not None:
        if options.in_place:
            raise ValueError("--in-place moves the model's rows, and not those of --draft-weights: give one of the two")
        drafting.drafter.check(config.width, config.embedding_width)
    return drafting


def _mixing(
    options: argparse.Namespace, config: ModelConfig, formats: Sequence[Precision], qualities: Sequence[str]
) -> Extensions:
    """The option by which the less important of the kept neurons are read in fewer bits."""
    mixing = Extensions(mixed_weights=options.mixed_weights)
    if mixing.mixed_weights is None:
        return mixing
    if options.in_place:
        raise ValueError("--in-place moves the model's rows, and not those of --mixed-weights: give one of the two")
    others, share = others_format(mixing.mixed_weights)
    others.check(config.width)
    if share is None and all(others.bits >= each.weights.bits for each in formats):
        raise ValueError(
            f"--mixed-weights {others} has no fewer bits than --weights {', '.join(str(f.weights) for f in formats)}:"
            f" give a model in more bits, or a part, as {others}@0.25"
        )
    if share is not None and "best" in qualities:
        raise ValueError("--quality best refits rows, and those in two formats are not: give --mixed-weights no part")
    return mixing


def _peers(options: argparse.Namespace, formats: tuple[Precision, ...]) -> tuple[str, ...]:
    if options.peers is None:
        return ()
    if options.peers:
        names = [name.strip() for name in options.peers.split(",")]
        for name in names:
            if name not in PEERS:
                raise ValueError(f"--peers: {name!r} is none of {', '.join(PEERS)}")
        return tuple(dict.fromkeys(names))
    of_format = {
        "float32": ("transformers", "published GRIFFIN", "llama.cpp F32"),
        "bfloat16": ("llama.cpp F16",),
        "float16": ("llama.cpp F16",),
        "int8": ("llama.cpp Q8_0",),
    }
    alike = {name for each in formats for name in of_format.get(each.weights.dtype, ())}
    return tuple(name for name in PEERS if name in alike or name == "llama.cpp")


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
        if options.peers is not None and prompt < 2:
            raise ValueError("--peers needs prompts of 2 tokens or more: the published code takes one for decoding")
    return list(dict.fromkeys(pairs))


def check_outputs(options: argparse.Namespace) -> None:
    """Raise unless the output files can be written and the file of --compare can be read."""
    if options.json_file is not None:
        check_output("--json-file", options.json_file)
    if options.plot is not None:
        check_plot("--plot", options.plot)
    if options.compare is not None:
        report.read(options.compare)


def _config(options: argparse.Namespace) -> tuple[ModelConfig, Source | None]:
    """The model's architecture and the source of its weights, which is None for random weights."""
    source = options.model
    exists = Path(os.path.expanduser(source)).exists()
    if not exists and any(source.lower() == name.lower() for name in NAMED):
        return named(source, options.layers), None
    if options.layers is not None:
        raise ValueError("--layers is for random weights: give --model the name of a well-known model")
    if not exists and source != demo.NAME and not loading.HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"there is no model {source!r}; give {loading.SOURCES}, or for random weights one of {', '.join(NAMED)}"
        )
    opened = loading.open_source(source, options.allow_pickle)
    return opened.config, opened


def _prior(options: argparse.Namespace, config: ModelConfig, random: bool) -> Prior:
    """The prior of --prior or next to the model; for random weights, a random one of the usual size."""
    if random:
        if options.prior is not None:
            raise ValueError("random weights have a random prior: leave out --prior")
        draw = np.random.default_rng(0)
        squares, weights = (
            tuple(jnp.asarray(draw.random(width), jnp.float32) for width in config.neurons) for _ in range(2)
        )
        shapes = [(min(DEFAULT_CALIBRATION, width), width) for width in config.neurons]
        rows = tuple(jnp.asarray(draw.standard_normal(s) * s[1] ** -0.5, jnp.float16) for s in shapes)
        ranges = () if config.routing is None else config.neuron_ranges
        return Prior(squares, rows, "random", 0, weights, strength=0.5, uniform="", ranges=ranges)
    return load_for_best(options.model, options.prior)


def _load(options: argparse.Namespace, plan: Plan, precision: Precision) -> Transformer:
    if plan.random:
        return random_model(plan.config, plan.dtype, mesh=plan.mesh, weights=precision.weights)
    weights = None if options.weights is None else precision.weights
    model, _ = loading.load_model(
        options.model,
        options.dtype,
        allow_pickle=options.allow_pickle,
        mesh=plan.mesh,
        weights=weights,
        expert_parallel=options.expert_parallel,
    )
    return model


def run(options: argparse.Namespace, find_peers: FindPeers | None = None) -> None:
    """Run the benchmark.

    Args:
        options: parsed arguments of `add_arguments`.
        find_peers: finds the peers that can run; without it, --peers is refused.

    Raises:
        Exception: see `check` and `griffin_jax.load`.
    """
    if options.peers is not None and find_peers is None:
        raise ValueError("--peers needs a checkout of the project: python -m benchmarks run --peers")
    plan = check(options)
    earlier: Path | None = options.compare
    before = None if earlier is None else report.read(earlier)
    with contextlib.ExitStack() as stack:
        models = {each.weights: jax.block_until_ready(_load(options, plan, each)) for each in plan.formats}
        if plan.prior is not None and not plan.random:
            plan.prior.check(fingerprint(next(iter(models.values()))))
        found = find_peers(models, options.model, plan.peers, stack) if plan.peers and find_peers else ([], {})
        result = measure(plan, models, *found)
    print(report.table(result))
    if before is not None:
        print(f"\n{report.comparison(result, before, str(earlier))}")
    if options.plot is not None:
        report.plot(result, options.plot)
    if options.json_file is not None:
        write_text(options.json_file, json.dumps(result) + "\n")
    if options.json:
        print(json.dumps(result))
