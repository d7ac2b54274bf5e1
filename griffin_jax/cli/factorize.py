"""`griffin-jax factorize`: divide a dense model into experts, train its routers and, if asked to, its experts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from griffin_jax.checkpoints.native import check_free, save
from griffin_jax.cli.options import (
    add_dtype_argument,
    add_mesh_argument,
    add_model_argument,
    add_options,
    check_files,
    check_output,
    check_plot,
    chosen_mesh,
    chosen_needs,
    load_reader,
    read_options,
)
from griffin_jax.evaluation.samples import Skipped, nothing_left, read_files
from griffin_jax.factor.config import FactorConfig, FactorTraining
from griffin_jax.factor.factorize import check_factors
from griffin_jax.llm.llm import LLM
from griffin_jax.llm.memory import Needs
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.distributed import is_first
from griffin_jax.training.data import Packed, pack
from griffin_jax.utils import memory

DESCRIPTION = """FactorLLM (arXiv 2408.11855): the neurons of each feed-forward layer are divided into experts, of which
a router chooses some for each token. All experts together are the dense layer, exactly.

Routers are trained first, by forward passes of the dense model; with --steps experts and routers are trained together
afterwards. The result is a checkpoint like any other. Checkpoints of the training and the figures of every step are in
a folder next to it; the same command goes on there after an interruption, and one with other --steps begins with the
routers that it finds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write; must not exist yet")
    add_model_argument(parser)
    add_dtype_argument(parser)
    add_mesh_argument(parser)
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", type=Path, required=True,
        help="JSONL files with a text on each line, or text files (UTF-8) that are one text each",
    )  # fmt: skip
    parser.add_argument("--column", default="text", help="of JSONL files (default: %(default)s)")
    add_options(parser.add_argument_group("experts"), FactorConfig)
    add_options(parser.add_argument_group("training"), FactorTraining)
    parser.add_argument(
        "--training", metavar="FOLDER", type=Path, help="of checkpoints and figures (default: OUTPUT.training)"
    )
    parser.add_argument(
        "--save-every", metavar="N", type=int, default=50, help="steps between two checkpoints (default: %(default)s)"
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw agreement and load as a PNG")


def run(options: argparse.Namespace) -> None:
    """Divides, trains and saves."""
    from griffin_jax.factor.training import train_factors

    factors, training = read_options(options, FactorConfig), read_options(options, FactorTraining)
    if options.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, got {options.save_every}")
    check_free(options.output)
    check_output("OUTPUT", options.output)
    if options.plot is not None:
        check_plot("--plot", options.plot)
    check_files(options.text)
    mesh = chosen_mesh(options)
    needs = chosen_needs(options, mesh)
    check_factors(needs.config, factors.experts, factors.active)
    if training.length > needs.config.max_positions:
        raise ValueError(f"--length {training.length} is more than the context of {needs.config.max_positions} tokens")
    if training.steps and needs.precision.weights.quantised:
        raise ValueError(
            f"{options.model} holds {needs.precision.weights}, and only floating weights are trained: give --steps 0,"
            " or --weights float32"
        )
    _check_memory(needs, factors, training, mesh)
    llm = load_reader(options, mesh)
    packed = packed_texts(llm, options.text, options.column, training.length)
    factored = prepared(llm, packed, factors, training.seed)
    folder = options.training or options.output.with_name(f"{options.output.name}.training")
    model, curve = train_factors(
        factored, packed, training, oracle=factors.oracle, folder=folder, save_every=options.save_every
    )
    if not is_first():
        return
    save(model, options.output, llm.tokenizer)
    routing = model.config.routing
    assert routing is not None
    print(
        f"{options.output}: {routing.active} of {routing.experts} experts of {routing.width} neurons,"
        f" {factors.grouping}, in {len(model.layers)} layers"
    )
    for name in dict.fromkeys(line["stage"] for line in curve):
        last = [line for line in curve if line["stage"] == name][-SHOWN:]
        agreement, load = (np.mean([line[key] for line in last], axis=0) for key in ("agreement", "load"))
        print(
            f"{name}: {last[-1]['tokens']:,} tokens; in the last {len(last)} steps loss"
            f" {np.mean([line['loss'] for line in last]):.3f}, agreement with the oracle {agreement.mean():.3f}"
            f" ({agreement.min():.2f} to {agreement.max():.2f}), load {load.min():.2f} to {load.max():.2f}"
        )
    if options.plot is not None:
        from griffin_jax.factor.plot import plot_curve

        plot_curve(curve, str(options.output), options.plot)


def _check_memory(needs: Needs, factors: FactorConfig, training: FactorTraining, mesh: Mesh | None) -> None:
    """Raise `MemoryError` unless a model can be divided and trained with what is free."""
    parts = needs.factor_training(training, factors.experts, coactivation=factors.grouping == "coactivation")
    devices = jax.devices()[:1] if mesh is None else mesh.devices.flat
    shorter = ", a shorter --length or more parts (--accumulate)" if training.steps else " or a shorter --length"
    memory.check(parts, memory.free(devices), f"take a smaller --batch{shorter}")


SHOWN = 10
"""Steps that the last figures are means of."""


def packed_texts(llm: LLM, files: Sequence[Path], column: str, length: int) -> Packed:
    """The texts of JSONL and text files as sequences of one length.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: no text can be used.
    """
    skipped = Skipped()
    texts = [text for _, text in read_files(files, column, skipped)]
    skipped.report(sys.stderr)
    if not texts:
        raise nothing_left(skipped, ", ".join(map(str, files)))
    assert llm.tokenizer is not None
    end = llm.config.eos_token_ids[0] if llm.config.eos_token_ids else None
    return pack([llm.tokenizer.encode(text) for text in texts], length, end)


def prepared(llm: LLM, packed: Packed, factors: FactorConfig, seed: int) -> Transformer:
    """The factored model before training."""
    from griffin_jax.factor.factorize import factorize
    from griffin_jax.factor.general import activations, centred

    given = activations(llm.model, packed, seed=seed) if factors.grouping == "coactivation" else ()
    factored = factorize(
        llm.model, factors.experts, factors.active,
        grouping=factors.grouping, activations=given, scale=factors.scale, seed=seed,
    )  # fmt: skip
    return factored if factors.uncentred else centred(factored, packed, oracle=factors.oracle, seed=seed)
