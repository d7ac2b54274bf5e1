"""The step and the loop around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from griffin_jax.parallel.mesh import to_host
from griffin_jax.training.config import TrainingConfig

Parameters = TypeVar("Parameters")

Loss = Callable[[Any, Any, Any], Float[Array, ""]]
"""A function of what is trained, of what is not, and of a batch."""

MeasuredLoss = Callable[[Any, Any, Any], tuple[Float[Array, ""], Mapping[str, Array]]]
"""The same, with further figures that are only shown and kept."""

LOSS = "loss"
"""Name of the loss among the figures of an update."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainingState(Generic[Parameters]):
    """Everything that an update changes.

    Attributes:
        parameters: what is trained, a pytree of floating arrays.
        optimizer: the optimiser's own state.
        step: number of updates so far.
    """

    parameters: Parameters
    optimizer: Any
    step: Int[Array, "*n"]


Record = Callable[[int, Mapping[str, np.ndarray]], Mapping[str, str]]
"""A function of the number of an update and of its figures: what a progress bar shows of them."""

Step = Callable[[TrainingState, Any, Any], tuple[TrainingState, Any]]
"""A function of a state, of what is not trained and of a batch: the next state, and the loss before the update, or
several figures by their names, `LOSS` among them."""


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW with clipped gradients, a linear warm-up and half a cosine."""
    rate = config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        rate if config.warmup == 0 else 0.0,
        rate,
        config.warmup,
        max(config.steps, config.warmup + 1),
        rate * config.final,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay),
    )


def init_state(parameters: Parameters, optimizer: optax.GradientTransformation) -> TrainingState[Parameters]:
    """The state before the first update."""
    return TrainingState(parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32))  # pyright: ignore[reportArgumentType]


def make_step(loss: Loss, optimizer: optax.GradientTransformation) -> Step:
    """The pure function that makes one update; jit it, vmap it, or put it into a loop of your own.

    Args:
        loss: to be made smaller.
        optimizer: such as `make_optimizer` gives.
    """

    def step(state: TrainingState, frozen: Any, batch: Any) -> tuple[TrainingState, Array]:
        value, gradients = jax.value_and_grad(loss)(state.parameters, frozen, batch)
        return updated(state, gradients, optimizer), value

    return step


def make_measured_step(loss: MeasuredLoss, optimizer: optax.GradientTransformation, accumulate: int = 1) -> Step:
    """`make_step` of a loss that has further figures, which the step returns next to it.

    Args:
        loss: to be made smaller, and the figures.
        optimizer: such as `make_optimizer` gives.
        accumulate: parts that a batch is differentiated in, so that memory is that of one part; gradients, loss and
            figures are means over the parts. It divides the leading axis of everything in a batch.
    """

    def differentiated(parameters: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        (value, figures), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, frozen, batch)
        return gradients, {LOSS: value, **figures}

    def step(state: TrainingState, frozen: Any, batch: Any) -> tuple[TrainingState, Mapping[str, Array]]:
        if accumulate == 1:
            gradients, figures = differentiated(state.parameters, frozen, batch)
            return updated(state, gradients, optimizer), figures
        parts = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), batch)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, differentiated(state.parameters, frozen, part)), None

        # All parts in one loop: XLA's CPU code (jax 0.10.2) has memory of its own for what is differentiated outside.
        one = jax.eval_shape(differentiated, state.parameters, frozen, jax.tree.map(lambda leaf: leaf[0], parts))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
        total, _ = jax.lax.scan(add, nothing, parts)
        gradients, figures = jax.tree.map(lambda leaf: leaf / accumulate, total)
        return updated(state, gradients, optimizer), figures

    return step


def updated(state: TrainingState, gradients: Any, optimizer: optax.GradientTransformation) -> TrainingState:
    """The state after an update with these gradients."""
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
    return TrainingState(optax.apply_updates(state.parameters, updates), optimizer_state, state.step + 1)


def train(
    step: Step,
    state: TrainingState[Parameters],
    frozen: Any,
    batches: Callable[[int], Any],
    steps: int,
    *,
    folder: Path | None = None,
    about: str = "",
    save_every: int = 100,
    description: str = "training",
    record: Record | None = None,
    quiet: bool = False,
) -> tuple[TrainingState[Parameters], list[float]]:
    """Makes updates until there were `steps`, and goes on where an earlier call was interrupted.

    Training that goes on gives what it would have given without a break: a batch depends on the number of its step
    alone, and a checkpoint has all of the state.

    Args:
        step: from `make_step`, compiled.
        state: before the first update.
        frozen: what the loss needs and nobody trains.
        batches: gives the batch of a step.
        steps: updates in all.
        folder: where checkpoints are kept; None for none. Written by Orbax.
        about: what is trained, on what and how; a checkpoint of something else is an error.
        save_every: updates between two checkpoints; there is one after the last, too.
        description: for the progress bar.
        record: is given the number of each update and its figures, and returns what the progress bar shows.
        quiet: no progress bar.

    Returns:
        The state after the last update, and the loss of each update that was made by this call.

    Raises:
        ValueError: the folder has checkpoints of something else.
        FloatingPointError: the loss is not finite.
    """
    if folder is None:
        return _run(step, state, frozen, batches, steps, None, about, save_every, description, record, quiet)
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            found = manager.restore(latest, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            if found != {"about": about}:
                raise ValueError(
                    f"{folder} has a checkpoint of another run ({found['about']}, this one is {about}); delete it, or"
                    " train with the same texts and options"
                )
            restored = manager.restore(latest, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
            state = restored["state"]
        return _run(step, state, frozen, batches, steps, manager, about, save_every, description, record, quiet)


def _run(
    step: Step,
    state: TrainingState[Parameters],
    frozen: Any,
    batches: Callable[[int], Any],
    steps: int,
    manager: ocp.CheckpointManager | None,
    about: str,
    save_every: int,
    description: str,
    record: Record | None,
    quiet: bool,
) -> tuple[TrainingState[Parameters], list[float]]:
    losses: list[float] = []
    first = int(np.max(np.asarray(state.step)))
    with tqdm(total=steps, initial=first, unit="step", desc=description, disable=quiet or None) as progress:
        for number in range(first, steps):
            state, found = step(state, frozen, batches(number))
            figures = to_host(found if isinstance(found, Mapping) else {LOSS: found})
            losses.append(float(np.mean(figures[LOSS])))
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"{description}: the loss of step {number} is {losses[-1]}; lower learning_rate"
                )
            shown = record(number, figures) if record is not None else {}
            progress.set_postfix({LOSS: f"{losses[-1]:.3f}", **shown}, refresh=False)
            progress.update()
            if manager is not None and ((number + 1) % save_every == 0 or number + 1 == steps):
                args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave({"about": about}))
                manager.save(number + 1, args=args)
    return state, losses
