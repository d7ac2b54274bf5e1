"""The options of an adapter, `AdapterConfig`, and of the training of a healing, `Course`."""

from __future__ import annotations

import dataclasses

from griffin_jax.training.config import TrainingConfig
from griffin_jax.utils.options import flag, number, option, whole


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Options of an adapter before it is trained.

    Attributes:
        rank: number of rows of A and of columns of B, in each linear layer; 0 for an adapter that changes nothing.
        alpha: B A is multiplied by alpha / rank.
        rslora: whether B A is multiplied by alpha / sqrt(rank) instead (arXiv 2312.03732).
        targets: the linear layers that get an adapter, separated by commas: `attention`, `feed_forward`, or the last
            parts of names, such as `q_proj`.

    Raises:
        ValueError: a value is outside its range.
    """

    rank: int = option(8, "rank of the adapter", metavar="R")
    alpha: float = option(16.0, "the adapter's product B A is multiplied by alpha / rank", metavar="A")
    rslora: bool = option(False, "multiply the adapter's product by alpha / sqrt(rank) instead")
    targets: str = option(
        "attention,feed_forward",
        "linear layers that get an adapter, separated by commas: attention, feed_forward, or names such as q_proj",
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
        """The targets, one by one."""
        return tuple(dict.fromkeys(name.strip() for name in self.targets.split(",") if name.strip()))

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return scale_of(self.alpha, self.rank, self.rslora)


@dataclasses.dataclass(frozen=True)
class Course:
    """Options of the training of a healing; see `griffin_jax.adapters.healing_training`.

    Attributes:
        adapter: options of the adapter.
        training: options of the training.
        prompt: number of tokens at the start of each sequence that are its prompt; the others are its answer.

    Raises:
        ValueError: `prompt` is less than 1, or leaves fewer than two tokens for the answer.
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
    """The factor of B A; for rank 0 it does not matter."""
    return float(alpha) / (max(rank, 1) ** 0.5 if rslora else max(rank, 1))
