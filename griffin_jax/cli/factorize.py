"""`griffin-jax factorize`: divide a dense model into experts, and train its routers and, optionally, its experts."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from griffin_jax.checkpoints.native import save
from griffin_jax.cli.options import (
    add_options,
    check_fits,
    check_plot,
    chosen_mesh,
    chosen_needs,
    load_reader,
    read_options,
)
from griffin_jax.cli.training import (
    add_checkpoint_arguments,
    add_source_arguments,
    check_length,
    check_training,
    checkpoints,
    packed_texts,
)
from griffin_jax.factor.config import FactorConfig, FactorTraining
from griffin_jax.factor.factorize import check_factors
from griffin_jax.llm.llm import LLM
from griffin_jax.llm.memory import Needs
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.distributed import is_first
from griffin_jax.training.data import Packed

DESCRIPTION = """FactorLLM (arXiv 2408.11855): divides the neurons of each feed-forward layer into experts, and trains
routers that choose some of them for each token. All experts together are exactly the dense layer.

Routers are trained first, with forward passes of the dense model. With --steps, experts and routers are
then trained together. The result is a checkpoint like any other.

Checkpoints of the training and the figures of every step are in the folder of --training. After an
interruption, the same command resumes there. The folder of a run with --steps 0 also serves a later run
with --steps, which starts from the routers in it, if the texts and every option that affects the experts
or the first stage are the same. Once the folder holds a checkpoint of the second stage, that stage can
only be resumed with the same options.

It needs extra packages: pip install '.[factor]'."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_source_arguments(parser)
    add_options(parser.add_argument_group("experts"), FactorConfig)
    add_options(parser.add_argument_group("training"), FactorTraining)
    add_checkpoint_arguments(parser, "checkpoints and figures", "steps")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw loss, agreement and load as a PNG")


def run(options: argparse.Namespace) -> None:
    """Divide the model, train it, save it, and print the last figures of each stage."""
    from griffin_jax.factor.training import train_factors

    factors, training = read_options(options, FactorConfig), read_options(options, FactorTraining)
    check_training(options)
    if options.plot is not None:
        check_plot("--plot", options.plot)
    mesh = chosen_mesh(options)
    needs = chosen_needs(options, mesh)
    check_factors(needs.config, factors.experts, factors.active)
    check_length(needs.config, training.length)
    if training.steps and needs.precision.weights.quantised:
        raise ValueError(
            f"{options.model} holds {needs.precision.weights}, and only floating weights are trained: give --steps 0,"
            " or --weights float32"
        )
    _check_memory(needs, factors, training, mesh)
    llm = load_reader(options, mesh)
    packed = packed_texts(llm, options.text, options.column, training.length)
    factored = prepared(llm, packed, factors, training.seed)
    model, curve = train_factors(
        factored, packed, training, oracle=factors.oracle, folder=checkpoints(options), save_every=options.save_every
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
    """Raise `MemoryError` unless there is enough free memory to divide the model and train it."""
    parts = needs.factor_training(training, factors.experts, coactivation=factors.grouping == "coactivation")
    shorter = ", a shorter --length or more parts (--accumulate)" if training.steps else " or a shorter --length"
    check_fits(parts, f"take a smaller --batch{shorter}", mesh)


SHOWN = 10
"""Number of last steps over which the printed figures are averaged."""


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
