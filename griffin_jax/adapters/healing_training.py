"""Trains a healing, the adapter of pruned models; see `griffin_jax.adapters.healing`.

In training, each sequence of text is a prompt and its answer. The full model reads the prompt, by which neurons are
selected. The pruned model with the adapter reads the answer, and the loss is the mean of KL(dense || pruned) over the
answer's tokens (distillation, arXiv 1503.02531). The model's own weights are never changed, and may be integers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from griffin_jax.adapters.adapter import Adapter, attach
from griffin_jax.adapters.config import Course
from griffin_jax.adapters.healing import Healing
from griffin_jax.extensions.pruner import Pruner
from griffin_jax.generation.prefill import prefill
from griffin_jax.generation.scoring import compare, teacher_force
from griffin_jax.model.transformer import Transformer
from griffin_jax.training.data import Batch, Packed
from griffin_jax.training.loop import (
    MeasuredLoss,
    TrainingState,
    init_state,
    make_measured_step,
    make_optimizer,
    train,
)

AGREE = "agree"
"""Name of a figure of an update: the share of tokens for which both models find the same token the most probable."""


def healing_loss(prompt: int) -> MeasuredLoss:
    """The loss, as a function of the adapter, of the full model with its `Pruner`, and of a batch.

    Args:
        prompt: number of tokens at the start of each sequence that are its prompt.
    """

    def loss(
        adapter: Adapter, frozen: tuple[Transformer, Pruner], batch: Batch
    ) -> tuple[Float[Array, ""], Mapping[str, Array]]:
        model, pruner = frozen
        tokens, lengths = jnp.asarray(batch.tokens), jnp.asarray(batch.lengths)
        answers, real = tokens[:, prompt:], jnp.maximum(lengths - prompt, 0)
        read = jnp.minimum(lengths, prompt)
        rows = pruner.rows_of_each(tokens.shape[0])
        prefilled = prefill(model, tokens[:, :prompt], read, max_new_tokens=answers.shape[1], rows=rows)
        dense, _ = teacher_force(model, prefilled, answers, real)
        scorer = pruner.scorer(model, prefilled.statistics, prefilled.rows)
        hidden, _ = teacher_force(attach(scorer, adapter), prefilled, answers, real)
        (found,) = compare(model, dense, (hidden,), answers)
        # The full model predicts the first token of an answer.
        columns = jnp.arange(answers.shape[1])
        counted = (columns >= 1) & (columns < real[:, None])
        total = jnp.maximum(jnp.sum(counted), 1)
        agree = jnp.sum(jnp.where(counted, found.agree, False)) / total
        return jnp.sum(jnp.where(counted, found.kl, 0.0)) / total, {AGREE: agree}

    return loss


def train_healing(
    model: Transformer,
    packed: Packed,
    pruner: Pruner,
    course: Course = Course(),
    *,
    fingerprint: str | None = None,
    folder: Path | None = None,
    save_every: int = 50,
    quiet: bool = False,
) -> tuple[Healing, list[float]]:
    """Train one adapter for all pruned forms of a model.

    Args:
        model: the full model, in any format; it is not changed.
        packed: the texts, in sequences of `course.training.length` tokens.
        pruner: how the models that the adapter is for are pruned.
        course: options of the adapter and its training.
        fingerprint: fingerprint of the model.
        folder: folder for checkpoints, from which an interrupted run resumes; None for none.
        save_every: number of updates between two checkpoints.
        quiet: whether to hide the progress bar.

    Returns:
        The healing, and the loss of each update that this call made.

    Raises:
        ValueError: the sequences have another length, the model cannot have such an adapter, or the folder has a
            checkpoint of another run.
        FloatingPointError: the loss is not finite.
    """
    training = course.training
    if packed.tokens.shape[1] != training.length:
        raise ValueError(f"sequences have {packed.tokens.shape[1]} tokens, and are to have {training.length}")
    optimizer = make_optimizer(training)
    state: TrainingState[Adapter] = init_state(
        Adapter.init(model.config, course.adapter, jax.random.key(training.seed)), optimizer
    )
    step = jax.jit(make_measured_step(healing_loss(course.prompt), optimizer), donate_argnums=0)
    about = {"model": fingerprint, "texts": packed.digest, "course": dataclasses.asdict(course)}
    about |= {"pruner": _digest(pruner)}
    state, losses = train(
        step,
        state,
        (model, pruner),
        packed.batches(training.batch, seed=training.seed),
        training.steps,
        folder=folder,
        about=json.dumps(about),
        save_every=save_every,
        description="healing",
        record=lambda _, figures: {AGREE: f"{float(figures[AGREE]):.3f}"},
        quiet=quiet,
    )
    return Healing(state.parameters, fingerprint), losses


def _digest(pruner: Pruner) -> str:
    """A hash of a pruner's options, and of what it has from a prior."""
    leaves, structure = jax.tree.flatten(pruner)
    whole = hashlib.sha256(repr(structure).encode())
    for leaf in map(np.asarray, leaves):
        whole.update(repr((leaf.shape, leaf.dtype.name)).encode())
        whole.update(leaf.tobytes())
    return whole.hexdigest()[:16]
