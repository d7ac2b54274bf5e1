"""`griffin-jax heal`: train an adapter for pruned models, so that they predict what the full model does."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
from jax.sharding import Mesh

from griffin_jax.adapters.adapter import parameters_of
from griffin_jax.adapters.config import AdapterConfig, Course
from griffin_jax.cli.options import (
    add_options,
    check_fits,
    chosen_mesh,
    chosen_needs,
    load_reader,
    read_options,
)
from griffin_jax.cli.prior import chosen_prior
from griffin_jax.cli.training import (
    add_checkpoint_arguments,
    add_source_arguments,
    check_length,
    check_training,
    checkpoints,
    packed_texts,
)
from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.llm.memory import Needs
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.parallel.distributed import is_first
from griffin_jax.training.config import TrainingConfig

DESCRIPTION = """Trains a low-rank adapter for the pruned forms of a model, whose own weights do not change. The full
model reads the first tokens of each sequence of the texts, and neurons are chosen by them. The adapter
is trained so that the pruned model predicts the other tokens as the full model does. One adapter serves
all prompts; generate, chat and most kinds of eval take it as --healing. After an interruption, the
same command resumes. It needs extra packages: pip install '.[factor]' or '.[moin]'."""

RANK, TARGETS = 16, "feed_forward"
"""Defaults of the adapter. Next to floating weights, one of feed-forward matrices alone costs decoding nothing."""

SHOWN = 10
"""Number of updates over which the printed figures are averaged."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_source_arguments(parser)
    pruned = parser.add_argument_group("pruned models that the adapter is for")
    add_options(pruned, GriffinConfig, "density")
    add_options(pruned, Extensions, "quality", "prior", "prior_weight", "budgets", "refit")
    adapter = parser.add_argument_group("adapter")
    add_options(adapter, AdapterConfig, "rank", default=RANK)
    add_options(adapter, AdapterConfig, "alpha", default=2.0 * RANK)
    add_options(adapter, AdapterConfig, "rslora")
    add_options(adapter, AdapterConfig, "targets", default=TARGETS)
    training = parser.add_argument_group("training")
    training.add_argument(
        "--prompt-tokens", metavar="P", type=int, default=Course.prompt,
        help="number of first tokens of a sequence by which neurons are chosen (default: %(default)s)",
    )  # fmt: skip
    add_options(training, TrainingConfig)
    add_checkpoint_arguments(parser, "checkpoints", "updates")


def _check_memory(needs: Needs, course: Course, pruner: Pruner, mesh: Mesh | None) -> None:
    """Raise `MemoryError` unless there is enough free memory to train the adapter."""
    training, parameters = course.training, parameters_of(needs.config, course.adapter)
    calibration = pruner.calibration[0].shape[0] if pruner.calibration else 0
    parts = needs.healing_training(
        parameters, training.batch, training.length, rows=min(pruner.rows, course.prompt), calibration=calibration
    )
    check_fits(parts, "take a smaller --batch or a shorter --length", mesh)


def run(options: argparse.Namespace) -> None:
    """Train the adapter, save it, and print its loss in the first and the last updates."""
    from griffin_jax.adapters.healing_training import train_healing

    training = read_options(options, TrainingConfig)
    course = Course(read_options(options, AdapterConfig), training, options.prompt_tokens)
    course.adapter.check_trainable()
    check_training(options)
    griffin = read_options(options, GriffinConfig)
    mesh = chosen_mesh(options)
    needs = chosen_needs(options, mesh)
    if griffin.kept(needs.config.neuron_ranges) == needs.config.neurons:
        raise ValueError(f"density {options.density} keeps all neurons, and there is nothing to heal")
    check_length(needs.config, training.length)
    prior = chosen_prior(options)
    pruner = Pruner.of(griffin, read_options(options, Extensions, prior=prior))
    _check_memory(needs, course, pruner, mesh)
    llm = load_reader(options, mesh)
    model = fingerprint(llm.model)
    if prior is not None:
        prior.check(model)
    packed = packed_texts(llm, options.text, options.column, training.length)
    healing, losses = train_healing(
        llm.model, packed, pruner, course, fingerprint=model, folder=checkpoints(options), save_every=options.save_every
    )
    if not is_first():
        return
    about = {"density": options.density, "quality": options.quality, **dataclasses.asdict(course)}
    healing.save(options.output, llm.config, options.model, about)
    trained = training.steps * training.batch * (training.length - course.prompt)
    print(
        f"{options.output}: rank {healing.adapter.rank}, {healing.adapter.parameters:,} numbers, trained on"
        f" {trained:,} tokens"
    )
    if losses:
        first, last = (float(np.mean(few)) for few in (losses[:SHOWN], losses[-SHOWN:]))
        epochs = training.steps * training.batch / len(packed)
        texts = "texts that were new to it" if epochs <= 1 else f"the texts that it is trained on ({epochs:.1f} times)"
        print(
            f"KL to the full model on {texts}: {first:.3f} nats per token in the first {len(losses[:SHOWN])} updates of"
            f" this run, {last:.3f} in the last {len(losses[-SHOWN:])}"
        )
