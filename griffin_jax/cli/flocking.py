"""`griffin-jax flocking`: draw the paper's figures that show why pruning works."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from griffin_jax.analysis import flocking, flocking_report
from griffin_jax.analysis.flocking import Texts, heat_maps, measure
from griffin_jax.cli.options import (
    add_batch_argument,
    add_dtype_argument,
    add_excerpt_arguments,
    add_mesh_argument,
    add_model_argument,
    check_files,
    check_folder,
    check_matplotlib,
    chosen_batch,
    chosen_mesh,
    chosen_needs,
    load_reader,
    made_by,
    numbers,
)
from griffin_jax.evaluation.batches import Item
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
from griffin_jax.llm.memory import Parts
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.utils.wholefile import replacing, write_text

FORMAT = "griffin_jax flocking 1"
"""The name of the format of flocking.json."""

RESULTS, ACTIVATIONS = "flocking.json", "activations.npz"

OWN, TEXT = "own", "text"
"""What follows a prompt: the dense model's greedy answer, or the text itself."""


DESCRIPTION = flocking.__doc__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="text files (UTF-8) of one text each, or JSONL files with one text per line",
    )
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "--column", default="text", help="column of JSONL files that holds the text (default: %(default)s)"
    )
    add_excerpt_arguments(texts)
    texts.add_argument("--limit", type=int, metavar="N", help="use the first N texts that can be used")
    texts.add_argument(
        "--prompt-tokens", type=int, metavar="P", default=256,
        help="tokens of each text that are the prompt; shorter texts are left out (default: %(default)s)",
    )  # fmt: skip
    texts.add_argument(
        "--new-tokens", type=int, metavar="G", default=128, help="tokens after each prompt (default: %(default)s)"
    )
    texts.add_argument(
        "--continuation", choices=(OWN, TEXT), default=OWN,
        help="what these tokens are: the dense model's own greedy answer, or the text itself (default: %(default)s)",
    )  # fmt: skip
    texts.add_argument(
        "--window", type=int, metavar="W", default=32, help="tokens of a window; must divide G (default: %(default)s)"
    )
    what = parser.add_argument_group("what is shown")
    what.add_argument(
        "--density", type=float, metavar="D", default=0.5,
        help="share of neurons that are experts, in figures for a single density (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--densities", metavar="D,...", default="0.05,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
        help="densities of the curves, separated by commas (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--layer", metavar="L,...",
        help="layers of the heat maps, numbered from 0 (default: the first, middle and last)",
    )  # fmt: skip
    what.add_argument(
        "--text", metavar="N,...", default="1,2",
        help="texts of the heat maps, numbered from 1 among the texts used (default: %(default)s)",
    )  # fmt: skip
    add_model_argument(parser)
    add_dtype_argument(parser)
    add_mesh_argument(parser)
    how = parser.add_argument_group("measurement")
    add_batch_argument(how, 4)
    how.add_argument(
        "--seed", type=int, default=0, help="seed of permutations and random tokens (default: %(default)s)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, metavar="FOLDER", default=Path("flocking"),
        help="folder for the figures and numbers (default: %(default)s)",
    )  # fmt: skip
    output.add_argument("--json", action="store_true", help=f"print {RESULTS} as the last line")


def run(options: argparse.Namespace) -> None:
    """Runs the command, from its options to the files and the table."""
    densities = _checked_densities(options)
    chosen = numbers("--text", options.text, int)
    layers = None if options.layer is None else numbers("--layer", options.layer, int)
    folder: Path = options.output
    check_folder("--output", folder, RESULTS)
    check_matplotlib("flocking")
    check_files(options.files, once=True)
    # A line of JSONL is identified by the name of its file, any other text by its whole path.
    check_files([file for file in options.files if file.suffix == ".jsonl"], by_name=True)

    mesh = chosen_mesh(options)
    needs = chosen_needs(options, mesh)

    def needed(batch: int) -> Parts:
        return needs.flocking(batch, options.prompt_tokens, options.new_tokens, options.window)

    options.batch = chosen_batch(options, needed, "fewer --prompt-tokens or --new-tokens", mesh)
    llm = load_reader(options, mesh)
    assert llm.tokenizer is not None
    count, context = llm.config.num_layers, llm.config.max_positions
    if options.prompt_tokens + options.new_tokens > context:
        raise ValueError(
            f"{options.prompt_tokens} + {options.new_tokens} tokens are more than the model's context of {context};"
            " give less of --prompt-tokens or --new-tokens"
        )
    layers = list(dict.fromkeys([0, count // 2, count - 1])) if layers is None else layers
    if not all(0 <= layer < count for layer in layers):
        raise ValueError(f"--layer: the model's layers are 0 to {count - 1}, got {options.layer}")
    GriffinConfig(min(densities)).kept(llm.config.neuron_ranges)

    skipped = Skipped()
    whole = dict(itertools.islice(_texts(options, llm.tokenizer.encode, skipped), options.limit))
    skipped.report()
    if not whole:
        raise nothing_left(skipped, ", ".join(map(str, options.files)))
    if len(whole) == 1:
        raise ValueError(f"only {next(iter(whole))} can be used; similarity needs two texts or more")
    if not all(1 <= number <= len(whole) for number in chosen):
        raise ValueError(f"--text: {len(whole)} texts can be used, numbered from 1, got {options.text}")

    names = list(whole)
    end = options.prompt_tokens + (options.new_tokens if options.continuation == TEXT else 0)
    start = options.prompt_tokens
    front = llm.tokenizer.beginning
    texts = Texts(
        [Item(name, tokens[:start], tokens[start:end]) for name, tokens in whole.items()],
        len(front) if all(tokens[: len(front)] == front for tokens in whole.values()) else 0,
        min(llm.tokenizer.size, llm.config.vocab_size),
    )
    measured = measure(
        llm, texts, densities, new=options.new_tokens, window=options.window, size=options.batch, seed=options.seed
    )
    results = {
        **made_by(FORMAT, options.model),
        "model": fingerprint(llm.model),
        "dtype": str(llm.model.dtype),
        "layers": count,
        "routed": llm.config.routing is not None,
        "files": [str(file) for file in options.files],
        "texts": sha256_of_files(options.files),
        "column": options.column,
        "after": options.after,
        "before": options.before,
        "used": len(whole),
        "left_out": as_json(skipped),
        "prompt": options.prompt_tokens,
        "new": options.new_tokens,
        "continuation": options.continuation,
        "window": options.window,
        "density": options.density,
        "seed": options.seed,
        "drawn_texts": {number: names[number - 1] for number in chosen},
        "drawn_layers": layers,
        **measured,
    }
    maps = {number: heat_maps(llm.model, whole[names[number - 1]], layers) for number in chosen}
    folder.mkdir(exist_ok=True)
    write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    arrays = {
        f"text {number}, layer {layer}": array
        for number, found in maps.items()
        for layer, array in found.items()
    }  # fmt: skip
    with replacing(folder / ACTIVATIONS) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    flocking_report.plot_activations(maps, options.model, folder / "activations.png")
    flocking_report.plot_similarity(results, folder / "similarity.png")
    flocking_report.plot_stability(results, folder / "stability.png")
    print(flocking_report.table(results))
    if options.json:
        print(json.dumps(results))


def _checked_densities(options: argparse.Namespace) -> list[float]:
    """Checks the options that need no model, and returns all densities in ascending order."""
    for name in ("limit", "prompt_tokens", "new_tokens", "window", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.new_tokens % options.window:
        raise ValueError(f"--new-tokens must be whole windows of {options.window}, got {options.new_tokens}")
    densities = {options.density, *numbers("--densities", options.densities, float)}
    for density in densities:
        check_density(density)
    return sorted(densities)


def _texts(
    options: argparse.Namespace, encode: Callable[[str], list[int]], skipped: Skipped
) -> Iterator[tuple[str, list[int]]]:
    """Yields the name and the tokens of each text that is long enough."""
    cut = excerpt(options.after, options.before)
    needed = options.prompt_tokens + (options.new_tokens if options.continuation == TEXT else 0)
    named = ((name, cut(text)) for name, text in read_files(options.files, options.column, skipped))
    return long_enough(named, encode, needed, skipped)
