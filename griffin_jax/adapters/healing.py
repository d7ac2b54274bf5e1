"""Healing: an adapter that only pruned models have, trained so that they predict what the dense model predicts.

    experts = select(prefilled.statistics, GriffinConfig(0.5))
    healed = healing.heal(prune(model, experts), experts)

The unchanged full model reads the prompt. The adapter changes decoding only, and not which neurons are selected. If a
model is pruned once and for all, low-rank adapters recover much of what was lost, after little training
(arXiv 2403.17887 calls that healing). Here every prompt has a different pruned model, and one adapter serves all of
them: a kept neuron's rows of the low-rank product belong to that neuron, whichever others are kept with it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from griffin_jax.adapters.adapter import Adapter, attach, merge_neurons, step_bytes
from griffin_jax.adapters.peft import load_adapter, save_adapter
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.transformer import Transformer

NOTES = "healing.json"
"""Name of the file, next to an adapter's own, that says which model it heals and how it was trained."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Healing:
    """A healing, which `griffin_jax.extensions.config.Extensions` takes as `healing`.

    Attributes:
        adapter: the single adapter of all pruned models.
        model: fingerprint of the full model that it was trained for; None if that is unknown.
    """

    adapter: Adapter
    model: str | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], config: ModelConfig) -> Healing:
        """Load a healing that `save` wrote.

        Args:
            folder: folder with an adapter in PEFT's format, and notes.
            config: configuration of the model.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: the files are damaged, or for another model.
        """
        adapter, notes = load_adapter(folder, config), Path(folder) / NOTES
        if not notes.is_file():
            raise FileNotFoundError(
                f"{folder}: there is no {NOTES}, so this adapter is not for pruned models alone; griffin-jax heal"
                " trains one that is, and adapter= takes this one"
            )
        try:
            model = json.loads(notes.read_text(encoding="utf-8"))["model"]
        except (UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{notes}: does not say which model it is for; griffin-jax heal writes it") from error
        return cls(adapter, model)

    def save(
        self, folder: str | os.PathLike[str], config: ModelConfig, base: str = "", about: Mapping[str, Any] = {}
    ) -> None:
        """Write a folder in PEFT's format, with notes.

        Args:
            folder: folder to write; it must not exist yet.
            config: configuration of the model.
            base: name or path of the model, which the files mention.
            about: how the healing was trained, for people to read.

        Raises:
            FileExistsError: the folder exists already.
            OSError: the folder cannot be written.
        """
        notes = json.dumps({"model": self.model, **about}, indent=2) + "\n"
        save_adapter(self.adapter, folder, config, base, {NOTES: notes})

    def check(self, config: ModelConfig, model: str) -> None:
        """Raise `ValueError` unless this was trained for the given model.

        Args:
            config: configuration of the model.
            model: fingerprint of the model.
        """
        self.adapter.check(config)
        if self.model not in (None, model):
            raise ValueError(
                "this healing was trained for a model with other weights; griffin-jax heal trains one for this model"
            )

    def step_bytes(self, config: ModelConfig, kept: Sequence[int], *, quantised: bool) -> int:
        """Bytes that a decode step reads in addition to the model: of those parts of the adapter that stay separate.

        Args:
            config: configuration of the full model.
            kept: number of neurons that each layer keeps.
            quantised: whether the model's weights are integers.
        """
        return step_bytes(self.adapter, config, kept, merged=not quantised)

    def heal(self, pruned: Transformer, experts: ExpertNeurons) -> Transformer:
        """Attach the adapter to a pruned model.

        If the weights are floating, the adapter's part for the rows of kept neurons is merged into them, in their own
        memory, so decoding costs what it costs without an adapter. The adapter stays separate next to integers, and
        next to attention, whose matrices belong to the full model.

        Args:
            pruned: a model from `prune`, which is used up if its weights are floating; or from `mask`.
            experts: the neurons that the model keeps.

        Raises:
            ValueError: as for `griffin_jax.attach`.
        """
        if any(layer.ff.mask is not None for layer in pruned.layers):
            return attach(pruned, self.adapter)
        healed = attach(pruned, self.adapter, experts=experts)
        return healed if healed.weights.quantised else merge_neurons(healed)
