"""The options of an adapter: `AdapterConfig`."""

from __future__ import annotations

import dataclasses

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

    @property
    def names(self) -> tuple[str, ...]:
        """The targets one by one."""
        return tuple(dict.fromkeys(name.strip() for name in self.targets.split(",") if name.strip()))

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return scale_of(self.alpha, self.rank, self.rslora)


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What B A is multiplied by; of rank 0 it does not matter."""
    return float(alpha) / (max(rank, 1) ** 0.5 if rslora else max(rank, 1))
