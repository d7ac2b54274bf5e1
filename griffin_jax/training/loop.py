"""The pure step of a training, and the loop around it."""

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
"""A function of the trained parameters, of whatever else it needs, and of a batch, that returns the loss."""

MeasuredLoss = Callable[[Any, Any, Any], tuple[Float[Array, ""], Mapping[str, Array]]]
"""The same, but it also returns further figures, which are only shown and recorded."""

LOSS = "loss"
"""Name of the loss among the figures of an update."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TrainingState(Generic[Parameters]):
    """Everything that an update changes.

    Attributes:
        parameters: the trained parameters, a pytree of floating arrays.
        optimizer: state of the optimiser.
        step: number of updates so far.
    """

    parameters: Parameters
    optimizer: Any
    step: Int[Array, "*n"]


Record = Callable[[int, Mapping[str, np.ndarray]], Mapping[str, str]]
"""A function of the number of an update and of its figures, that returns what the progress bar shows of them."""

Step = Callable[[TrainingState, Any, Any], tuple[TrainingState, Any]]
"""A function of a state, of what is not trained and of a batch. It returns the next state, and either the loss before
the update or several figures by their names, `LOSS` among them."""


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW with clipped gradients, and a learning rate with a linear warm-up followed by half a cosine."""
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
    """The pure function that makes one update; jit it, vmap it, or use it in your own loop.

    Args:
        loss: the loss to minimise.
        optimizer: an optimiser, such as one from `make_optimizer`.
    """

    def step(state: TrainingState, frozen: Any, batch: Any) -> tuple[TrainingState, Array]:
        value, gradients = jax.value_and_grad(loss)(state.parameters, frozen, batch)
        return updated(state, gradients, optimizer), value

    return step


def make_measured_step(loss: MeasuredLoss, optimizer: optax.GradientTransformation, accumulate: int = 1) -> Step:
    """Like `make_step`, for a loss with further figures, which the step returns together with the loss.

    Args:
        loss: a function that returns the loss to minimise, and the figures.
        optimizer: an optimiser, such as one from `make_optimizer`.
        accumulate: number of parts of a batch that are differentiated one after the other, so that only one part needs
            memory at a time. Gradients, loss and figures are means over the parts. It must divide the leading axis of
            every array in a batch.
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

        # All parts in one loop: XLA's CPU code (jax 0.10.2) takes extra memory for what is differentiated outside.
        one = jax.eval_shape(differentiated, state.parameters, frozen, jax.tree.map(lambda leaf: leaf[0], parts))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
        total, _ = jax.lax.scan(add, nothing, parts)
        gradients, figures = jax.tree.map(lambda leaf: leaf / accumulate, total)
        return updated(state, gradients, optimizer), figures

    return step


def updated(state: TrainingState, gradients: Any, optimizer: optax.GradientTransformation) -> TrainingState:
    """The state after an update with the given gradients."""
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
    """Make updates until there have been `steps` of them, resuming where an earlier call was interrupted.

    A resumed training gives what it would have given without the interruption: a batch depends only on the number of
    its step, and a checkpoint holds the whole state.

    Args:
        step: compiled function from `make_step`.
        state: state before the first update.
        frozen: whatever the loss needs that is not trained.
        batches: function that returns the batch of a step.
        steps: total number of updates.
        folder: folder for checkpoints, which Orbax writes; None for none.
        about: description of the parameters, the texts and the options. It is an error if the folder has a checkpoint
            with another description.
        save_every: number of updates between two checkpoints; the last update is always followed by one.
        description: text for the progress bar.
        record: function of the number of each update and its figures, that returns what the progress bar shows of them.
        quiet: whether to hide the progress bar.

    Returns:
        The state after the last update, and the loss of each update that this call made.

    Raises:
        ValueError: the folder has a checkpoint of another run.
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
