"""The options of a training run: `TrainingConfig`."""

from __future__ import annotations

import dataclasses

from griffin_jax.utils.options import number, option, whole


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Options of a training run with AdamW, whose learning rate has a warm-up followed by half a cosine.

    Attributes:
        steps: number of updates.
        batch: number of sequences in each update.
        length: number of tokens in a sequence.
        learning_rate: learning rate after the warm-up.
        warmup: number of updates in the warm-up, in which the rate rises linearly from 0, so that the first update
            changes nothing.
        final: share of the learning rate that is left at the end.
        weight_decay: weight decay of AdamW.
        beta1: decay rate of AdamW's mean of gradients.
        beta2: decay rate of AdamW's mean of squared gradients.
        clip: largest norm of all gradients together; larger gradients are scaled down to it.
        seed: seed of the order of sequences, and of what is drawn before the first update.

    Raises:
        ValueError: a value is outside its range.
    """

    steps: int = option(200, "number of updates", metavar="N")
    batch: int = option(4, "number of sequences in each update", metavar="B")
    length: int = option(256, "number of tokens in a sequence", metavar="T")
    learning_rate: float = option(1e-3, "learning rate after the warm-up", metavar="R")
    warmup: int = option(10, "number of updates in which the learning rate rises linearly from 0", metavar="N")
    final: float = option(0.1, "share of the learning rate that is left at the end", metavar="P")
    weight_decay: float = option(0.0, "weight decay of AdamW", metavar="W")
    beta1: float = option(0.9, "decay rate of AdamW's mean of gradients", metavar="B")
    beta2: float = option(0.999, "decay rate of AdamW's mean of squared gradients", metavar="B")
    clip: float = option(1.0, "largest norm of all gradients together; larger ones are scaled down", metavar="C")
    seed: int = option(0, "random seed for the order of sequences and the initial parameters", metavar="S")

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
