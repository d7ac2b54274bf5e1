"""The options of an adapter, `AdapterConfig`, and of one for pruned models, `Course`."""

from __future__ import annotations

import dataclasses

from griffin_jax.training.config import TrainingConfig
from griffin_jax.utils.options import flag, number, option, whole


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is like before it is trained.

    Attributes:
        rank: rows of A and columns of B of each linear layer; 0 for an adapter that changes nothing.
        alpha: B A is multiplied by alpha / rank.
        rslora: by alpha / sqrt(rank) instead (arXiv 2312.03732).
        targets: which linear layers: `attention`, `feed_forward`, or last parts of names such as `q_proj`, separated by
            commas.

    Raises:
        ValueError: a value is outside its range.
    """

    rank: int = option(8, "rank of an adapter", metavar="R")
    alpha: float = option(16.0, "an adapter's product is multiplied by alpha / rank", metavar="A")
    rslora: bool = option(False, "by alpha / sqrt(rank) instead")
    targets: str = option(
        "attention,feed_forward",
        "which linear layers: attention, feed_forward or names such as q_proj",
        metavar="NAMES",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", whole("rank", self.rank, 0))
        object.__setattr__(self, "alpha", number("alpha", self.alpha, "more than 0", lambda alpha: alpha > 0))
        object.__setattr__(self, "rslora", flag("rslora", self.rslora))
        if not isinstance(self.targets, str) or not self.names:
            raise ValueError(f"targets must be names separated by commas, got {self.targets!r}")

    def check_trainable(self) -> None:
        """Raise `ValueError` if an adapter of this rank has nothing to train."""
        if self.rank == 0:
            raise ValueError(
                "an adapter of rank 0 changes nothing, and there is nothing to train: rank must be at least 1"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The targets one by one."""
        return tuple(dict.fromkeys(name.strip() for name in self.targets.split(",") if name.strip()))

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return scale_of(self.alpha, self.rank, self.rslora)


@dataclasses.dataclass(frozen=True)
class Course:
    """How a healing is trained, see `griffin_jax.adapters.healing_training`.

    Attributes:
        adapter: what it is like.
        training: how it is trained.
        prompt: tokens of each sequence that are its prompt; the others are its answer.

    Raises:
        ValueError: no tokens are left for the answer.
    """

    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    prompt: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.prompt <= self.training.length - 2:
            raise ValueError(
                f"of sequences of {self.training.length} tokens a prompt has 1 to {self.training.length - 2}, got"
                f" {self.prompt}"
            )


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What B A is multiplied by; of rank 0 it does not matter."""
    return float(alpha) / (max(rank, 1) ** 0.5 if rslora else max(rank, 1))
