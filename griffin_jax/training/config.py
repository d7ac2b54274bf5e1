"""The options of a training run: `TrainingConfig`."""

from __future__ import annotations

import dataclasses

from griffin_jax.utils.options import number, option, whole


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How something is trained: AdamW, with a warm-up and half a cosine after it.

    Attributes:
        steps: updates.
        batch: sequences of each.
        length: tokens of a sequence.
        learning_rate: after the warm-up.
        warmup: steps of the warm-up, in which the rate rises linearly from 0, so that the first update changes nothing.
        final: part of the learning rate that is left at the end.
        weight_decay: of AdamW.
        beta1: decay of its mean of gradients.
        beta2: decay of its mean of squares.
        clip: norm of all gradients together, at most.
        seed: of the order of sequences, and of what is drawn before the first step.

    Raises:
        ValueError: a value is outside its range.
    """

    steps: int = option(200, "updates", metavar="N")
    batch: int = option(4, "sequences of an update", metavar="B")
    length: int = option(256, "tokens of a sequence", metavar="T")
    learning_rate: float = option(1e-3, "after the warm-up", metavar="R")
    warmup: int = option(10, "updates until the learning rate is reached", metavar="N")
    final: float = option(0.1, "part of the learning rate that is left at the end", metavar="P")
    weight_decay: float = option(0.0, "of AdamW", metavar="W")
    beta1: float = option(0.9, "of AdamW", metavar="B")
    beta2: float = option(0.999, "of AdamW", metavar="B")
    clip: float = option(1.0, "norm of all gradients together, at most", metavar="C")
    seed: int = option(0, "of the order of sequences, and of what is drawn before the first update", metavar="S")

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "batch": 1, "length": 2, "warmup": 0, "seed": 0}.items():
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        for name in ("learning_rate", "clip"):
            object.__setattr__(self, name, number(name, getattr(self, name), "more than 0", lambda value: value > 0))
        for name in ("final", "weight_decay"):
            object.__setattr__(self, name, number(name, getattr(self, name), "in [0, 1]", lambda v: 0 <= v <= 1))
        for name in ("beta1", "beta2"):
            object.__setattr__(self, name, number(name, getattr(self, name), "in [0, 1)", lambda v: 0 <= v < 1))
        if self.warmup > self.steps:
            raise ValueError(f"warmup is {self.warmup} steps of {self.steps}")
        if self.warmup == self.steps == 1:
            raise ValueError("the only step would be the first of the warm-up, whose learning rate is 0: warmup=0")
