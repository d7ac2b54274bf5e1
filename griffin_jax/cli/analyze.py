"""`griffin-jax analyze`: analyse the experts of a model."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from griffin_jax.analysis.experts import claims, report, texts, weights
from griffin_jax.analysis.experts.checkpoint import RandomExperts, StoredExperts
from griffin_jax.analysis.experts.figures import shown_layers
from griffin_jax.analysis.experts.report import RANDOM_SETS, RANDOM_WEIGHTS, Drawing
from griffin_jax.analysis.experts.texts import Measured, Reading
from griffin_jax.checkpoints.loading import open_source
from griffin_jax.checkpoints.sources import Source
from griffin_jax.cli.options import (
    add_batch_argument,
    add_dtype_argument,
    add_excerpt_arguments,
    add_pickle_argument,
    check_batch,
    check_files,
    check_folder,
    check_matplotlib,
    chosen_batch,
    chosen_needs,
    load_reader,
    made_by,
    numbers,
)
from griffin_jax.evaluation.samples import (
    Skipped,
    as_json,
    excerpt,
    long_enough,
    nothing_left,
    read_files,
    sha256_of_files,
)
from griffin_jax.griffin.config import GriffinConfig, check_density
from griffin_jax.model.assembly import random_model
from griffin_jax.model.config import ModelConfig
from griffin_jax.utils.wholefile import replacing, write_text

FORMAT = "griffin_jax analysis 1"
"""The name of the format of analysis.json."""

RESULTS, ARRAYS, PAGE = "analysis.json", "analysis.npz", "report.html"

DESCRIPTION = """Repeats the analyses of "A Closer Look into Mixture-of-Experts" (arXiv 2406.18219) for any model with
routed experts: how similar the experts' weights are, whether experts with similar weights also have
similar router weights, what the experts output, and which experts tokens choose, all next to null
models. The weights are read layer by layer, and the whole model is loaded only if there are texts.
For a model without routers, GRIFFIN's neuron sets of different texts are compared, so texts are
required.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder written by griffin-jax convert, a Hugging Face folder or repository id, or a GGUF file",
    )
    parser.add_argument(
        "files", metavar="TEXTS", nargs="*", type=Path,
        help="text files (UTF-8) of one text each, or JSONL files with one text per line; without any, only weights are"
        " analysed",
    )  # fmt: skip
    read = parser.add_argument_group("texts")
    read.add_argument(
        "--column", default="text", help="column of JSONL files that holds the text (default: %(default)s)"
    )
    add_excerpt_arguments(read)
    read.add_argument(
        "--limit",
        type=int,
        metavar="N",
        default=16,
        help="use the first N texts that can be used (default: %(default)s)",
    )
    read.add_argument(
        "--tokens", type=int, metavar="T", default=256,
        help="tokens that are read of each text; shorter texts are left out (default: %(default)s)",
    )  # fmt: skip
    what = parser.add_argument_group("what is analysed")
    what.add_argument(
        "--layers", metavar="L,...",
        help="layers to analyse, numbered from 0 (default: all with routed experts, or all if there are none)",
    )  # fmt: skip
    what.add_argument(
        "--density", type=float, metavar="D", default=0.5,
        help="share of neurons that GRIFFIN keeps for a text (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--sets", type=int, metavar="N", default=8,
        help="in a model without routers, number of texts whose neuron sets stand for experts (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--neurons", type=int, metavar="N", default=1024,
        help="match at most N neurons of an expert with those of another; the time grows with N^2 F"
        " (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--pairs", type=int, metavar="N", default=6,
        help="match the neurons of at most N pairs of experts of a layer, drawn at random if there are more"
        " (default: %(default)s)",
    )  # fmt: skip
    add_pickle_argument(parser)
    add_dtype_argument(parser)
    how = parser.add_argument_group("measurement")
    add_batch_argument(how, 4)
    how.add_argument("--seed", type=int, default=0, help="seed of all random draws (default: %(default)s)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, metavar="FOLDER", default=Path("analysis"),
        help="folder for the page, the figures and the numbers (default: %(default)s)",
    )  # fmt: skip
    output.add_argument("--json", action="store_true", help=f"print {RESULTS} as the last line")


def run(options: argparse.Namespace) -> None:
    """Runs the command, from its options to the files and the table."""
    _check(options)
    source = open_source(options.model, options.allow_pickle)
    config = source.config
    layers = _chosen_layers(options, config)
    GriffinConfig(options.density).kept_of_ranges(config.neuron_ranges)
    routed = config.routing is not None
    found = null = None
    if not routed and not options.files:
        raise ValueError(
            f"{options.model} has no routed experts: what its neurons have in common is a matter of texts; give some"
        )
    measured, nulls, drawing, told = None, {}, Drawing(), {"used": 0, "left_out": None, "dtype": None}
    if options.files:
        measured, nulls, drawing, told = _of_texts(options, layers)
    if routed:
        found, null = _of_weights(options, source, layers)
        drawing = dataclasses.replace(drawing, weights=found)
    evidence = [*([] if found is None else claims.evidence_of_weights(found, options.seed))]
    if measured is not None:
        evidence = [*claims.evidence_of_texts(measured, nulls, routed, options.seed), *evidence]
    results = {
        **made_by(FORMAT, options.model),
        "kind": "routed" if routed else "sets",
        "config": config.to_json(),
        "files": [str(file) for file in options.files],
        "texts_sha256": sha256_of_files(options.files) if options.files else None,
        "tokens": options.tokens,
        "density": options.density,
        "sets": options.sets,
        "neurons": options.neurons,
        "pairs": options.pairs,
        "seed": options.seed,
        **told,
        "verdicts": claims.verdicts(evidence),
        "evidence": [each.to_json() for each in evidence],
        "weights": None if found is None else weights.numbers_of(found),
        "weights_null": None if null is None else weights.numbers_of(null),
        "texts": None if measured is None else claims.summary(measured, options.seed),
        "nulls": {name: claims.summary(each, options.seed) for name, each in nulls.items()},
    }
    _write(options.output, results, drawing, _about(options, config, told["used"]))
    print(report.table(results))
    print(f"{options.output / PAGE}")
    if options.json:
        print(json.dumps(results))


def _check(options: argparse.Namespace) -> None:
    """Raise unless the options that need no model are valid."""
    least = {"limit": 2, "tokens": 2, "sets": 2, "neurons": 2, "pairs": 1}
    for name, value in least.items():
        if getattr(options, name) < value:
            raise ValueError(f"--{name} must be at least {value}, got {getattr(options, name)}")
    check_density(options.density)
    check_batch(options)
    check_folder("--output", options.output, RESULTS)
    check_matplotlib("analyze")
    check_files(options.files, once=True)


def _chosen_layers(options: argparse.Namespace, config: ModelConfig) -> tuple[int, ...]:
    possible = texts.layers_of(config)
    if config.routing is not None and config.routing.experts < 2:
        raise ValueError(f"{options.model} has one expert in a layer; two or more can be compared")
    if options.layers is None:
        return possible
    chosen = sorted(numbers("--layers", options.layers, int))
    if wrong := [layer for layer in chosen if layer not in possible]:
        which = "with routed experts " if config.routing is not None else ""
        raise ValueError(
            f"--layers: layer {wrong[0]} is none of the layers {which}of {options.model}, which are"
            f" {possible[0]} to {possible[-1]}"
        )
    return tuple(chosen)


def _of_weights(
    options: argparse.Namespace, source: Source, layers: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The analysis of the weights, and that of random weights."""
    sampling = weights.Sampling(options.neurons, options.pairs, options.seed)
    random = RandomExperts(source.config, options.seed)
    return (
        weights.analyse(StoredExperts(source), layers, sampling),
        weights.analyse(random, random.layers, sampling),
    )


def _of_texts(
    options: argparse.Namespace, layers: tuple[int, ...]
) -> tuple[Measured, dict[str, Measured], Drawing, dict[str, Any]]:
    """The analysis of texts, that of null models, the data of the figures, and what was read."""
    needs = chosen_needs(options)
    options.batch = chosen_batch(
        options, lambda batch: needs.analysis(batch, options.tokens, options.sets), "fewer --tokens"
    )
    llm = load_reader(options)
    if options.tokens > llm.config.max_positions:
        raise ValueError(
            f"{options.tokens} tokens are more than the model's context of {llm.config.max_positions}; give fewer"
            " --tokens"
        )
    skipped = Skipped()
    read = _texts(options, llm, skipped)
    reading = Reading(options.density, options.batch, options.sets)
    model, config = llm.model, llm.config
    measured = texts.measure(model, read, layers, reading)
    drawn = [layers[place] for place in shown_layers(layers, 3)]
    states = texts.gate_states(model, read[0], drawn)
    nulls = {}
    if config.routing is None:
        nulls[RANDOM_SETS] = texts.measure_random_sets(model, read, layers, reading, options.seed)
    dtype, stored = model.dtype, model.weights
    # Memory may not hold two models at once.
    del llm, model
    random = random_model(config, dtype, options.seed, weights=stored)
    nulls[RANDOM_WEIGHTS] = texts.measure(random, read, layers, reading)
    drawing = Drawing(
        similarity=measured.similarity, ranks=measured.ranks, chosen=measured.chosen,
        token_cosines=measured.token_cosines,
        states=states,
    )  # fmt: skip
    return measured, nulls, drawing, {"used": len(read), "left_out": as_json(skipped), "dtype": str(dtype)}


def _texts(options: argparse.Namespace, llm: Any, skipped: Skipped) -> list[list[int]]:
    """The tokens of the first texts that are long enough."""
    cut = excerpt(options.after, options.before)
    named = ((name, cut(text)) for name, text in read_files(options.files, options.column, skipped))
    usable = itertools.islice(long_enough(named, llm.tokenizer.encode, options.tokens, skipped), options.limit)
    found = [tokens[: options.tokens] for _, tokens in usable]
    skipped.report()
    if not found:
        raise nothing_left(skipped, ", ".join(map(str, options.files)))
    if len(found) == 1:
        raise ValueError(
            "only one text can be used; texts are compared with each other, so that two or more are needed"
        )
    return found


def _about(options: argparse.Namespace, config: ModelConfig, used: int) -> str:
    """Two sentences about the model and the texts."""
    routing = config.routing
    if routing is None:
        layers = (
            f"{config.num_layers} layers without routers; their experts are the neuron sets that GRIFFIN keeps of the"
            f" first halves of {min(options.sets, used)} texts at density {options.density:g}"
        )
    else:
        shared = f" next to {routing.shared_width:,} shared neurons" if routing.shared_width else ""
        layers = (
            f"{len(texts.layers_of(config))} layers of {routing.experts} experts with {routing.width:,} neurons"
            f"{shared}, of which a token chooses {routing.active}"
        )
    read = f"{used} texts of {options.tokens} tokens." if used else "Weights only, without texts."
    return f"{layers}. {read}"


def _write(folder: Path, results: Mapping[str, Any], drawing: Drawing, about: str) -> None:
    folder.mkdir(exist_ok=True)
    images = report.draw(results, drawing)
    write_text(folder / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    arrays = {} if drawing.weights is None else weights.arrays_of(dict(drawing.weights))
    for name in ("similarity", "ranks", "chosen", "token_cosines"):
        if (array := getattr(drawing, name)) is not None:
            arrays[f"outputs {name}"] = array
    arrays |= {f"states {layer}": array for layer, array in drawing.states.items()}
    with replacing(folder / ARRAYS) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    for key, of_study in images.items():
        for count, image in enumerate(of_study.values(), start=1):
            with replacing(folder / f"{key}-{count}.png") as partial:
                partial.write_bytes(image)
    write_text(folder / PAGE, report.page(results, images, about))
