"""Healing: an adapter that only pruned models have, trained to predict what the dense model does.

    experts = select(prefilled.statistics, GriffinConfig(0.5))
    healed = healing.heal(prune(model, experts), experts)

The prompt is read by the full model as it is; the adapter changes what is decoded with, and nothing that selects. Of
a model that is pruned once, low-rank adapters make good for much of what was lost, after little training
(arXiv 2403.17887 calls that healing). Here every prompt has a pruned model of its own, and one adapter serves all of
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
"""Next to an adapter's own files: which model it heals, and how it was trained."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Healing:
    """What `griffin_jax.extensions.config.Extensions` takes as `healing`.

    Attributes:
        adapter: of the pruned models, one alone.
        model: the fingerprint of the full model that it was trained for; None if that is not known.
    """

    adapter: Adapter
    model: str | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], config: ModelConfig) -> Healing:
        """What `save` wrote.

        Args:
            folder: with an adapter in PEFT's format, and notes.
            config: of the model.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: the files are damaged, or of another model.
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
            folder: that does not exist yet.
            config: of the model.
            base: name or path of the model, which the files mention.
            about: how it was trained, for people.

        Raises:
            FileExistsError: the folder exists.
            OSError: it cannot be written.
        """
        notes = json.dumps({"model": self.model, **about}, indent=2) + "\n"
        save_adapter(self.adapter, folder, config, base, {NOTES: notes})

    def check(self, config: ModelConfig, model: str) -> None:
        """Raise `ValueError` unless this was trained for a model.

        Args:
            config: of the model.
            model: its fingerprint.
        """
        self.adapter.check(config)
        if self.model not in (None, model):
            raise ValueError(
                "this healing was trained for a model with other weights; griffin-jax heal trains one for this model"
            )

    def step_bytes(self, config: ModelConfig, kept: Sequence[int], *, quantised: bool) -> int:
        """Bytes that a decode step reads of the adapter, beside the model: of what `heal` leaves apart.

        Args:
            config: of the full model.
            kept: neurons that each layer keeps.
            quantised: whether the model's weights are integers.
        """
        return step_bytes(self.adapter, config, kept, merged=not quantised)

    def heal(self, pruned: Transformer, experts: ExpertNeurons) -> Transformer:
        """The pruned model with its adapter.

        What is added to floating rows of kept neurons is added up with them, into their memory, so that decoding costs
        what it costs without. Next to integers, and to attention, which belongs to the full model, it stays apart.

        Args:
            pruned: from `prune`, used up if its weights are floating; or from `mask`.
            experts: the neurons it keeps.

        Raises:
            ValueError: as `griffin_jax.attach`.
        """
        if any(layer.ff.mask is not None for layer in pruned.layers):
            return attach(pruned, self.adapter)
        healed = attach(pruned, self.adapter, experts=experts)
        return healed if healed.weights.quantised else merge_neurons(healed)
