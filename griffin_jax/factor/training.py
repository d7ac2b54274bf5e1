"""Trains a factored model: first its routers, with forward passes alone, then experts and routers end to end.

Both stages have a pure step, `router_step` and `expert_step`, which you can jit or use in your own loop;
`train_factors` is such a loop. The teacher is the untrained factored model itself, since all its experts together are
the dense layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from griffin_jax.factor.config import FactorTraining
from griffin_jax.factor.layer import Parameters, in_training, trainable, with_parameters
from griffin_jax.factor.losses import Oracle, balance, k_hot, prior_approximate
from griffin_jax.model.cache import EMPTY, empty_cache
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.ops import float32_product
from griffin_jax.model.transformer import Observer, Transformer
from griffin_jax.parallel.mesh import mesh_of, over_data
from griffin_jax.training.data import Batch, Packed
from griffin_jax.training.loop import (
    LOSS,
    Step,
    TrainingState,
    init_state,
    make_measured_step,
    make_optimizer,
    train,
    updated,
)

ROUTERS, TOGETHER = "routers", "together"
"""The two stages of training: routers alone, then experts and routers together."""

CURVE = "curve.jsonl"
"""Name of the file with the figures of every step, next to the checkpoints."""

Figures = Mapping[str, Array]


def read(model: Transformer, batch: Batch, observe: Observer | None = None) -> tuple[Array, Bool[Array, "b r"], Any]:
    """The residual stream of all tokens that predict another one, which of these are real, and what was observed."""
    mesh = mesh_of(model.embedding[...])
    tokens, lengths = (over_data(mesh, jnp.asarray(array)) for array in (batch.tokens, batch.lengths))
    columns = jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32)
    real = columns < lengths[:, None] - 1
    positions = jnp.where(real, columns, EMPTY)
    cache = empty_cache(model.config, positions.shape[0], positions.shape[1], model.dtype)
    hidden, _, seen = model(tokens[:, :-1], positions, cache, read_slots=0, observe=observe)
    return hidden, real, seen


def _mean(values: Float[Array, "*t"], real: Bool[Array, "*t"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(real, values, 0)) / jnp.maximum(jnp.sum(real), 1)


def router_figures(
    logits: Float[Array, "*t e"], labels: Float[Array, "*t e"], real: Bool[Array, "*t"], active: int
) -> dict[str, Array]:
    """Figures that say how good the router of one layer is.

    Args:
        logits: the router's logits.
        labels: labels from `griffin_jax.factor.losses.oracle_labels`.
        real: which tokens are not padding.
        active: number of experts that a token chooses.

    Returns:
        `approximate` and `balance`, the router's losses; `agreement`, the share of its choices that are also in the
        labels; and `load`, the share of the tokens that choose each expert.
    """
    chosen = k_hot(jax.lax.top_k(logits, active)[1], logits.shape[-1])
    counted = real[..., None]
    load = jnp.sum(jnp.where(counted, chosen, 0), axis=tuple(range(real.ndim))) / jnp.maximum(jnp.sum(real), 1)
    return {
        "approximate": _mean(prior_approximate(logits, labels), real),
        "balance": _mean(balance(logits, chosen), real),
        "agreement": _mean(jnp.sum(chosen * labels, axis=-1) / active, real),
        "load": load,
    }


def _stacked(layers: tuple[dict[str, Array], ...]) -> dict[str, Array]:
    """The figures of all layers, stacked along a first axis."""
    return {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}


def router_step(config: ModelConfig, training: FactorTraining, oracle: Oracle = "joint") -> Step:
    """The pure step of the first stage: a batch is read densely, and the router of each layer learns from its inputs.

    The tokens of the batch are divided among `training.router_updates` updates, so that neighbouring tokens are in
    different updates. Only the routers are differentiated.

    Args:
        config: configuration of the factored model.
        training: how it is trained.
        oracle: how the labels are found.

    Returns:
        A function of a `TrainingState` of `trainable(model, experts=False)`, of the untrained factored model, and of a
        batch.
    """
    assert config.routing is not None
    active, parts = config.routing.active, training.router_updates
    optimizer = make_optimizer(training.routers())

    def losses(parameters: Parameters, seen: Any) -> tuple[Array, Figures]:
        layers = []
        for own, (x, labels, real) in zip(parameters, seen, strict=True):
            logits = float32_product("td,ed->te", x, own["router"]) + own["router_bias"]
            layers.append(router_figures(logits, labels, real, active))
        figures = _stacked(tuple(layers))
        total = jnp.sum(figures["approximate"] + _ratio(training) * figures["balance"])
        return total, figures

    def step(state: TrainingState, model: Transformer, batch: Batch) -> tuple[TrainingState, Figures]:
        def observe(_number: int, z: Any, real: Array) -> tuple[Array, Array, Array]:
            return z.inputs, z.labels, real

        _, _, seen = read(in_training(model, routes="all", oracle=oracle), batch, observe)
        tokens = seen[0][2].size // parts * parts

        def divided(leaf: Array) -> Array:
            flat = leaf.reshape(-1, *leaf.shape[2:])[:tokens]
            return flat.reshape(-1, parts, *flat.shape[1:]).swapaxes(0, 1)

        def update(state: TrainingState, part: Any) -> tuple[TrainingState, Figures]:
            (value, figures), gradients = jax.value_and_grad(losses, has_aux=True)(state.parameters, part)
            return updated(state, gradients, optimizer), {LOSS: value, **figures}

        after, figures = jax.lax.scan(update, state, jax.tree.map(divided, seen))
        figures = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), figures)
        return dataclasses.replace(after, step=state.step + 1), figures

    return step


def _ratio(training: FactorTraining) -> float:
    """The weight of the balance loss in the first stage, in which the Prior-Approximate loss has weight 1."""
    return training.balance / training.approximate if training.approximate else training.balance


def expert_loss(
    parameters: Parameters, model: Transformer, batch: Batch, *, training: FactorTraining, oracle: Oracle = "joint"
) -> tuple[Float[Array, ""], Figures]:
    """The loss of the second stage, and its figures.

    Args:
        parameters: parameters as from `trainable(model, experts=True)`.
        model: the untrained factored model.
        batch: the sequences.
        training: options with the objective and the weights of the other losses.
        oracle: how the labels are found.
    """
    assert model.config.routing is not None
    active = model.config.routing.active

    def observe(_number: int, z: Any, real: Array) -> dict[str, Array]:
        return router_figures(z.logits, z.labels, real, active)

    student = in_training(model, parameters, oracle=oracle)
    hidden, real, seen = read(student, batch, observe)
    scores = jax.nn.log_softmax(student.logits(hidden))
    if training.objective == "kl":
        teacher = in_training(model, routes="all")
        target = jax.nn.log_softmax(teacher.logits(read(teacher, batch)[0]))
        losses = jnp.sum(jnp.exp(target) * (target - scores), axis=-1)
    else:
        losses = -jnp.take_along_axis(scores, jnp.asarray(batch.tokens)[:, 1:, None], axis=-1)[..., 0]
    value, figures = _mean(losses, real), _stacked(seen)
    whole = value + jnp.sum(training.approximate * figures["approximate"] + training.balance * figures["balance"])
    return whole, {training.objective: value, **figures}


def expert_step(training: FactorTraining, oracle: Oracle = "joint") -> Step:
    """The pure step of the second stage.

    Args:
        training: how the model is trained.
        oracle: how the labels are found.

    Returns:
        A function of a `TrainingState` of `trainable(model, experts=True)`, of the untrained factored model, and of a
        batch.
    """
    loss = functools.partial(expert_loss, training=training, oracle=oracle)
    return make_measured_step(loss, make_optimizer(training.together()), training.accumulate)


def train_factors(
    model: Transformer,
    packed: Packed,
    training: FactorTraining,
    *,
    oracle: Oracle = "joint",
    folder: Path | None = None,
    save_every: int = 50,
    quiet: bool = False,
) -> tuple[Transformer, list[dict[str, Any]]]:
    """Train the routers of a factored model and, if `training.steps` is not 0, then its experts and routers together.

    After an interruption, the same call resumes from the last checkpoint and gives the same bits. A folder in which
    only routers were trained also serves a later call with `training.steps` and the same options of the first stage.

    Args:
        model: a factored model before any training, on a mesh or not.
        packed: the texts.
        training: how the model is trained.
        oracle: how the labels are found.
        folder: folder for checkpoints and the figures of every step; None for neither.
        save_every: number of steps between two checkpoints.
        quiet: whether to hide the progress bars.

    Returns:
        The trained model, and a dictionary for each step, with its `stage`, its `step`, the `tokens` read so far, and
        the figures by name.

    Raises:
        ValueError: the folder has a checkpoint of a run with another model, other texts or other options; or the
            experts are to be trained, and are integers.
        FloatingPointError: the loss is not finite.
    """
    curve = Curve(None if folder is None else folder / CURVE, training.batch * training.length)
    batches = packed.batches(training.batch, seed=training.seed)
    run = {"model": fingerprint(model), "texts": packed.digest, "oracle": oracle}
    # Without the options of the second stage, so that trained routers can be the start of any second stage.
    alone = {"updates": training.router_updates, "balance": _ratio(training)}
    abouts = {
        ROUTERS: json.dumps({**run, **dataclasses.asdict(training.routers()), **alone}),
        TOGETHER: json.dumps({**run, **dataclasses.asdict(training)}),
    }

    def stage(name: str, parameters: Parameters, step: Step, steps: int, first: int) -> Parameters:
        state, _ = train(
            jax.jit(step, donate_argnums=0),
            init_state(parameters, make_optimizer(training.routers() if name == ROUTERS else training.together())),
            model,
            lambda number: batches(first + number),
            steps,
            folder=None if folder is None else folder / name,
            about=abouts[name],
            save_every=save_every,
            description=name,
            record=functools.partial(curve.add, name, first),
            quiet=quiet,
        )
        return state.parameters

    routers = trainable(model, experts=False)
    if training.router_steps:
        routers = stage(ROUTERS, routers, router_step(model.config, training, oracle), training.router_steps, 0)
    stages = [name for name, steps in ((ROUTERS, training.router_steps), (TOGETHER, training.steps)) if steps]
    if not training.steps:
        return trained(model, routers), curve.of(*stages)
    together = tuple({**of, **own} for of, own in zip(trainable(model, experts=True), routers, strict=True))
    found = stage(TOGETHER, together, expert_step(training, oracle), training.steps, training.router_steps)
    return trained(model, found), curve.of(*stages)


def trained(model: Transformer, parameters: Parameters) -> Transformer:
    """The factored model with these parameters in place of its own."""
    changed: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for layer, own in zip(changed.layers, parameters, strict=True):
        layer.ff = with_parameters(layer.ff, own)
    return changed


class Curve:
    """The figures of every step, in memory and as lines of JSON in a file.

    If a resumed run repeats a step, the new figures replace the old ones.

    Args:
        file: file to continue or to begin; None to keep the figures in memory only.
        tokens: number of tokens in a step.
    """

    def __init__(self, file: Path | None, tokens: int):
        self._file, self._tokens = file, tokens
        self._found: dict[tuple[str, int], dict[str, Any]] = {}
        if file is not None and file.is_file():
            for line in load_curve(file):
                _put(self._found, line)
            # A line that a killed run left incomplete must not be continued.
            if not file.read_bytes().endswith(b"\n"):
                with file.open("a", encoding="utf-8") as end:
                    end.write("\n")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The figures of all steps so far, in order."""
        return sorted(self._found.values(), key=lambda line: line["tokens"])

    def of(self, *stages: str) -> list[dict[str, Any]]:
        """The figures of these stages; another run in the same folder may have left those of other stages."""
        return [line for line in self.lines if line["stage"] in stages]

    def add(self, stage: str, first: int, step: int, figures: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Record the figures of a step; returns what the progress bar shows of them."""
        line = {"stage": stage, "step": step, "tokens": (first + step + 1) * self._tokens}
        line |= {name: np.asarray(value, np.float64).round(6).tolist() for name, value in figures.items()}
        _put(self._found, line)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        load = figures["load"]
        return {"agreement": f"{figures['agreement'].mean():.3f}", "load": f"{load.min():.2f}-{load.max():.2f}"}


def load_curve(file: Path) -> list[dict[str, Any]]:
    """The figures in a file that `train_factors` wrote, with each step once."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8").splitlines():
        # A killed run may have left an incomplete line.
        with contextlib.suppress(json.JSONDecodeError):
            _put(found, json.loads(text))
    return sorted(found.values(), key=lambda line: line["tokens"])


def _put(found: dict[tuple[str, int], dict[str, Any]], line: dict[str, Any]) -> None:
    """Add a line, and drop the lines of later steps of its stage, which an earlier run left."""
    for stage, step in [key for key in found if key[0] == line["stage"] and key[1] > line["step"]]:
        del found[stage, step]
    found[line["stage"], line["step"]] = line
