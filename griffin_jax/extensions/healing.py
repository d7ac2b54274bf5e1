"""Beyond GRIFFIN: the interface of a healing, an adapter for pruned models; see `griffin_jax.adapters.healing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.transformer import Transformer


@runtime_checkable
class Heals(Protocol):
    """A trained change of pruned models that brings their predictions closer to the full model's.

    It must be a pytree. An implementation is `griffin_jax.adapters.healing.Healing`.
    """

    def check(self, config: ModelConfig, model: str) -> None:
        """Raise `ValueError` unless this healing fits a model.

        Args:
            config: the architecture of the model.
            model: the model's `griffin_jax.model.fingerprint.fingerprint`.
        """
        ...

    def step_bytes(self, config: ModelConfig, kept: Sequence[int], *, quantised: bool) -> int:
        """The bytes that a decode step reads for the healing, in addition to the pruned model.

        Args:
            config: the architecture of the model.
            kept: number of neurons that each layer keeps.
            quantised: whether the model's matrices are stored as integers.
        """
        ...

    def heal(self, pruned: Transformer, experts: ExpertNeurons) -> Transformer:
        """Apply the healing to a pruned or masked model.

        Args:
            pruned: the model; it may be modified and must not be used afterwards.
            experts: the neurons that it keeps.

        Returns:
            The healed model.
        """
        ...
