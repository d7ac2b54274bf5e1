"""The options of factored models and of their training."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from griffin_jax.factor.grouping import Grouping
from griffin_jax.factor.losses import Oracle
from griffin_jax.training.config import TrainingConfig
from griffin_jax.utils.options import check_choice, number, option, whole

Objective = Literal["kl", "ce"]

TOKENS = 2048
"""Tokens of text that are enough for groups and means."""

ROUTER_FINAL = 0.05
"""Part of the routers' learning rate that is left at the end of the first stage."""


@dataclasses.dataclass(frozen=True)
class FactorConfig:
    """How a dense model is divided into experts.

    Attributes:
        experts: N, experts of each layer.
        active: k, experts that each token chooses.
        grouping: how neurons are grouped, see `griffin_jax.factor.grouping`.
        scale: what the sum of the chosen experts is multiplied by; FactorLLM has N / k.
        oracle: which experts are best for a token, see `griffin_jax.factor.losses.oracle_labels`.
        uncentred: whether what each expert gives on average, where it is not chosen, is left to it instead of becoming
            the layer's.

    Raises:
        ValueError: a value is outside its range.
    """

    experts: int = option(4, "experts of each layer", metavar="N")
    active: int = option(2, "experts that each token chooses", metavar="K")
    grouping: Grouping = option("kmeans", "how neurons are grouped", choices=get_args(Grouping), type=str)
    scale: float = option(1.0, "of the sum of the chosen experts; FactorLLM has N / K", metavar="S")
    oracle: Oracle = option(
        "joint", "which experts are best for a token: those of least error, each alone, or the best set together",
        choices=get_args(Oracle), type=str,
    )  # fmt: skip
    uncentred: bool = option(False, "leave what an expert gives on average, where it is not chosen, to the expert")

    def __post_init__(self) -> None:
        check_choice("grouping", self.grouping, get_args(Grouping))
        check_choice("oracle", self.oracle, get_args(Oracle))
        for name in ("experts", "active"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        object.__setattr__(self, "scale", number("scale", self.scale, "more than 0", lambda value: value > 0))
        if self.active > self.experts:
            raise ValueError(f"active must be a whole number from 1 to the {self.experts} experts, got {self.active}")


@dataclasses.dataclass(frozen=True)
class FactorTraining:
    """How a factored model is trained: first its routers alone, then experts and routers together.

    Attributes:
        router_steps: batches that the routers are trained on, by forward passes of the dense model.
        router_updates: updates of each of these batches, whose tokens are divided among them.
        router_rate: learning rate of the routers, while they are trained alone.
        steps: updates of experts and routers together.
        batch: sequences of each update.
        accumulate: parts that a batch is differentiated in, one after the other.
        length: tokens of a sequence.
        learning_rate: of experts and routers together, after the warm-up.
        warmup: steps until it is reached.
        final: part of it that is left at the end.
        weight_decay: of AdamW, for experts and routers together; routers alone are not decayed.
        beta1: of AdamW.
        beta2: of AdamW.
        clip: norm of all gradients together, at most.
        objective: of the second stage: `kl`, to the predictions of the dense model, or `ce`, of the text.
        approximate: weight of the Prior-Approximate loss, summed over layers, in the second stage.
        balance: weight of the balance loss, likewise; in the first stage it has the same part of the whole.
        seed: of the order of sequences, of random groups and routers.

    Raises:
        ValueError: a value is outside its range.
    """

    router_steps: int = option(100, "batches that routers are trained on, before all else; 0 for none", metavar="N")
    router_updates: int = option(4, "updates of each of these batches", metavar="N")
    router_rate: float = option(1e-2, "learning rate of the routers alone", metavar="R")
    steps: int = option(0, "updates of experts and routers together; 0 for none", metavar="N")
    batch: int = option(4, "sequences of an update", metavar="B")
    accumulate: int = option(1, "parts that a batch is differentiated in, one after the other", metavar="N")
    length: int = option(256, "tokens of a sequence", metavar="T")
    learning_rate: float = option(5e-4, "of experts and routers together", metavar="R")
    warmup: int = option(10, "updates until the learning rate is reached", metavar="N")
    final: float = option(0.05, "part of the learning rate that is left at the end", metavar="P")
    weight_decay: float = option(1e-5, "of AdamW, for experts and routers together", metavar="W")
    beta1: float = option(0.9, "of AdamW", metavar="B")
    beta2: float = option(0.95, "of AdamW", metavar="B")
    clip: float = option(1.0, "norm of all gradients together, at most", metavar="C")
    objective: Objective = option(
        "kl", "what is made smaller: the divergence from the dense model's predictions, or the loss of the text",
        choices=get_args(Objective), type=str,
    )  # fmt: skip
    approximate: float = option(0.05, "weight of the Prior-Approximate loss of each layer", metavar="W")
    balance: float = option(0.01, "weight of the balance loss of each layer", metavar="W")
    seed: int = option(0, "of the order of sequences, and of random groups and routers", metavar="S")

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, get_args(Objective))
        for name, least in {"router_steps": 0, "router_updates": 1, "steps": 0, "accumulate": 1}.items():
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        rate = number("router_rate", self.router_rate, "more than 0", lambda value: value > 0)
        object.__setattr__(self, "router_rate", rate)
        for name in ("approximate", "balance"):
            value = number(name, getattr(self, name), "at least 0", lambda value: value >= 0)
            object.__setattr__(self, name, value)
        checked = self.together()
        for name in ("batch", "length", "learning_rate", "weight_decay", "final", "clip", "seed"):
            object.__setattr__(self, name, getattr(checked, name))
        if self.batch % self.accumulate:
            raise ValueError(f"{self.batch} sequences cannot be read in {self.accumulate} equal parts")
        if self.router_updates > self.batch * (self.length - 1):
            raise ValueError(
                f"{self.batch} sequences of {self.length} tokens are too few for {self.router_updates} updates"
            )

    def together(self) -> TrainingConfig:
        """The second stage."""
        steps = max(self.steps, 1)
        names = ("batch", "length", "learning_rate", "final", "weight_decay", "beta1", "beta2", "clip", "seed")
        given = {name: getattr(self, name) for name in names}
        return TrainingConfig(steps=steps, warmup=self.warmup if self.steps else 0, **given)

    def routers(self) -> TrainingConfig:
        """The first stage, in updates."""
        return TrainingConfig(
            steps=max(self.router_steps, 1) * self.router_updates,
            batch=self.batch,
            length=self.length,
            learning_rate=self.router_rate,
            warmup=0,
            final=ROUTER_FINAL,
            beta1=self.beta1,
            beta2=self.beta2,
            clip=self.clip,
            seed=self.seed,
        )
