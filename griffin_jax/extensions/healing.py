"""What a pruned model may have in addition, beyond GRIFFIN: see `griffin_jax.adapters.healing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.transformer import Transformer


@runtime_checkable
class Heals(Protocol):
    """What changes pruned models as a whole, so that they predict what the full one does.

    It is a pytree. `griffin_jax.adapters.healing.Healing` is one.
    """

    def check(self, config: ModelConfig, model: str) -> None:
        """Raise `ValueError` unless this is for a model of this config and this fingerprint."""
        ...

    def step_bytes(self, config: ModelConfig, kept: Sequence[int], *, quantised: bool) -> int:
        """Bytes that a decode step reads for it, beside the model whose layers keep so many neurons."""
        ...

    def heal(self, pruned: Transformer, experts: ExpertNeurons) -> Transformer:
        """A pruned or masked model, which may be used up, with what was learned for it."""
        ...
