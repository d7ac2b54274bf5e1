"""Trains the adapters of a library. Each is a separate job, which needs the base model and one shard of text.

Nothing that a job draws or computes depends on another job, so jobs can run anywhere and in any order, and give the
same results. On one device, several can also run at once, as one job whose arrays have one more axis (`jax.vmap`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from griffin_jax.adapters.adapter import Adapter, attach, unstack
from griffin_jax.adapters.config import AdapterConfig
from griffin_jax.adapters.library import Library
from griffin_jax.adapters.peft import save_adapter
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.transformer import Transformer
from griffin_jax.text.tokenizer import Tokenizer
from griffin_jax.training.config import TrainingConfig
from griffin_jax.training.data import Batch, Packed, pack
from griffin_jax.training.loop import TrainingState, init_state, make_optimizer, make_step, train
from griffin_jax.training.loss import next_token_loss

NOTES = "training.json"
"""Name of the file, next to an adapter's own, that says how it was trained."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Options of the training of a library's adapters.

    Attributes:
        adapter: options of each adapter.
        training: options of the training.
    """

    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()

    def seed_of(self, number: int) -> int:
        """The seed of a cluster, different for each one."""
        return int(np.random.SeedSequence([self.training.seed, number]).generate_state(1)[0] >> 1)

    def start(self, number: int, config: ModelConfig) -> TrainingState[Adapter]:
        """The state before the first update of a cluster's adapter."""
        adapter = Adapter.init(config, self.adapter, jax.random.key(self.seed_of(number)))
        return init_state(adapter, make_optimizer(self.training))

    def batches(self, number: int, packed: Packed) -> Callable[[int], Batch]:
        """A function that returns the batch of a step."""
        return packed.batches(self.training.batch, seed=self.seed_of(number))


def adapter_loss(adapter: Adapter, model: Transformer, batch: Batch) -> jax.Array:
    """The loss of the model with an adapter, as a function of the adapter."""
    return next_token_loss(attach(model, adapter), batch)


@functools.lru_cache(maxsize=4)
def _step(training: TrainingConfig, together: bool) -> Any:
    step = make_step(adapter_loss, make_optimizer(training))
    return jax.jit(jax.vmap(step, in_axes=(0, None, 0)) if together else step, donate_argnums=0)


def train_clusters(
    model: Transformer,
    tokenizer: Tokenizer,
    library: Library,
    numbers: Sequence[int],
    job: Job,
    *,
    base: str = "",
    at_once: int = 1,
    save_every: int = 100,
    quiet: bool = False,
) -> list[int]:
    """Train the adapters of some clusters, one after the other or several at once, except those that are finished.

    A job that was interrupted resumes from its last checkpoint.

    Args:
        model: the base model, in any format.
        tokenizer: tokenizer of the model.
        library: library that has the shards of these clusters.
        numbers: numbers of the clusters.
        job: how the adapters are trained.
        base: name or path of the base, which the adapters' files mention.
        at_once: number of adapters that are trained together, on one device.
        save_every: number of updates between two checkpoints.
        quiet: whether to hide the progress bars.

    Returns:
        The numbers of the clusters that this call trained.

    Raises:
        ValueError: an adapter or a checkpoint exists that was trained with other texts or options.
    """
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1, got {at_once}")
    waiting = []
    for number in numbers:
        packed = _packed(library, number, tokenizer, model.config, job.training.length)
        about = _about(library, job, number, packed)
        if library.adapter_folder(number).is_dir():
            _check_same(library.adapter_folder(number) / NOTES, about)
        else:
            waiting.append((number, packed, about))
    for start in range(0, len(waiting), at_once):
        few = waiting[start : start + at_once]
        _train(model, library, few, job, base, save_every, quiet)
    return [number for number, *_ in waiting]


def _packed(library: Library, number: int, tokenizer: Tokenizer, config: ModelConfig, length: int) -> Packed:
    end = config.eos_token_ids[0] if config.eos_token_ids else None
    return pack([tokenizer.encode(text) for text in library.texts(number)], length, end)


def _about(library: Library, job: Job, number: int, packed: Packed) -> str:
    return json.dumps(
        {
            "model": library.model,
            "cluster": number,
            "texts": packed.digest,
            "adapter": dataclasses.asdict(job.adapter),
            "training": dataclasses.asdict(job.training),
        }
    )


def _check_same(notes: Path, about: str) -> None:
    try:
        found = json.loads(notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # The adapter was made elsewhere.
        return
    if found != json.loads(about):
        raise ValueError(
            f"{notes.parent} was trained with other texts or options than these; delete it to train it anew, or give"
            " the same"
        )


def _train(
    model: Transformer,
    library: Library,
    few: Sequence[tuple[int, Packed, str]],
    job: Job,
    base: str,
    save_every: int,
    quiet: bool,
) -> None:
    numbers = [number for number, *_ in few]
    states = [job.start(number, model.config) for number in numbers]
    batches = [job.batches(number, packed) for number, packed, _ in few]
    together = len(few) > 1
    name = "-".join(f"{number:03}" for number in numbers)
    checkpoints = library.folder / "training" / name
    state, _ = train(
        _step(job.training, together),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *states) if together else states[0],
        model,
        (lambda step: _stacked([batch(step) for batch in batches])) if together else batches[0],
        job.training.steps,
        folder=checkpoints,
        about=" ".join(about for *_, about in few),
        save_every=save_every,
        description=f"cluster {name}" if together else f"cluster {numbers[0]}",
        quiet=quiet,
    )
    adapters = unstack(state.parameters) if together else [state.parameters]
    (library.folder / "adapters").mkdir(exist_ok=True)
    for (number, _, about), adapter in zip(few, adapters, strict=True):
        notes = {NOTES: json.dumps(json.loads(about), indent=2) + "\n"}
        save_adapter(adapter, library.adapter_folder(number), model.config, base, notes)
    shutil.rmtree(checkpoints)


def _stacked(batches: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
