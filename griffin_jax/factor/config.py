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
"""Number of tokens of text that are enough to group neurons and to take means of experts."""

ROUTER_FINAL = 0.05
"""Share of the routers' learning rate that is left at the end of the first stage."""


@dataclasses.dataclass(frozen=True)
class FactorConfig:
    """Options of how a dense model is divided into experts.

    Attributes:
        experts: N, the number of experts in each layer.
        active: k, the number of experts that each token chooses.
        grouping: how neurons are grouped; see `griffin_jax.factor.grouping`.
        scale: factor of the sum of the chosen experts; FactorLLM uses N / k.
        oracle: which experts count as the best for a token; see `griffin_jax.factor.losses.oracle_labels`.
        uncentred: whether each expert keeps its average output over the tokens that do not choose it. By default this
            average becomes part of the layer's bias.

    Raises:
        ValueError: a value is outside its range.
    """

    experts: int = option(4, "number of experts in each layer", metavar="N")
    active: int = option(2, "number of experts that each token chooses", metavar="K")
    grouping: Grouping = option("kmeans", "how neurons are grouped", choices=get_args(Grouping), type=str)
    scale: float = option(1.0, "factor of the sum of the chosen experts; FactorLLM uses N / K", metavar="S")
    oracle: Oracle = option(
        "joint",
        "which experts are the best for a token: those that each have the least error alone (each), or the best set"
        " together (joint)",
        choices=get_args(Oracle), type=str,
    )  # fmt: skip
    uncentred: bool = option(
        False, "do not move each expert's average output, over the tokens that do not choose it, to the layer's bias"
    )

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
    """Options of how a factored model is trained: first its routers alone, then experts and routers together.

    Attributes:
        router_steps: number of batches on which the routers are trained alone, with forward passes of the dense model;
            0 for none.
        router_updates: number of updates per batch in the first stage; the tokens of the batch are divided among them.
        router_rate: learning rate of the first stage.
        steps: number of updates in the second stage, which trains experts and routers together; 0 for none.
        batch: number of sequences in a batch.
        accumulate: in the second stage, number of parts of a batch that are differentiated one after the other.
        length: number of tokens in a sequence.
        learning_rate: learning rate of the second stage after the warm-up.
        warmup: number of updates of the second stage until that rate is reached.
        final: share of that rate that is left at the end.
        weight_decay: weight decay of AdamW in the second stage; the first stage has none.
        beta1: decay rate of AdamW's mean of gradients.
        beta2: decay rate of AdamW's mean of squared gradients.
        clip: largest norm of all gradients together; larger gradients are scaled down to it.
        objective: loss of the second stage: `kl`, the divergence from the dense model's predictions, or `ce`, the
            cross-entropy of the text.
        approximate: weight of the Prior-Approximate loss, summed over layers, in the second stage.
        balance: weight of the balance loss, summed over layers, in the second stage. In the first stage, the weights
            of the two losses have the same ratio.
        seed: seed of the order of sequences, of the groups, and of the routers' first values.

    Raises:
        ValueError: a value is outside its range.
    """

    router_steps: int = option(100, "number of batches that first train the routers alone; 0 for none", metavar="N")
    router_updates: int = option(4, "number of updates on each of these batches", metavar="N")
    router_rate: float = option(1e-2, "learning rate while routers are trained alone", metavar="R")
    steps: int = option(0, "number of updates that train experts and routers together; 0 for none", metavar="N")
    batch: int = option(4, "number of sequences in a batch", metavar="B")
    accumulate: int = option(
        1, "number of parts of a batch that are differentiated one after the other, to save memory", metavar="N"
    )
    length: int = option(256, "number of tokens in a sequence", metavar="T")
    learning_rate: float = option(5e-4, "learning rate of experts and routers together, after the warm-up", metavar="R")
    warmup: int = option(10, "number of updates in which the learning rate rises linearly from 0", metavar="N")
    final: float = option(0.05, "share of the learning rate that is left at the end", metavar="P")
    weight_decay: float = option(1e-5, "weight decay of AdamW, for experts and routers together", metavar="W")
    beta1: float = option(0.9, "decay rate of AdamW's mean of gradients", metavar="B")
    beta2: float = option(0.95, "decay rate of AdamW's mean of squared gradients", metavar="B")
    clip: float = option(1.0, "largest norm of all gradients together; larger ones are scaled down", metavar="C")
    objective: Objective = option(
        "kl", "loss of experts and routers together: divergence from the dense model (kl), or loss of the text (ce)",
        choices=get_args(Objective), type=str,
    )  # fmt: skip
    approximate: float = option(0.05, "weight of the Prior-Approximate loss of each layer", metavar="W")
    balance: float = option(0.01, "weight of the balance loss of each layer", metavar="W")
    seed: int = option(0, "random seed for the order of sequences, the groups and the routers", metavar="S")

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
        """The options of the second stage. If it has no steps, they stand for one without a warm-up."""
        steps = max(self.steps, 1)
        names = ("batch", "length", "learning_rate", "final", "weight_decay", "beta1", "beta2", "clip", "seed")
        given = {name: getattr(self, name) for name in names}
        return TrainingConfig(steps=steps, warmup=self.warmup if self.steps else 0, **given)

    def routers(self) -> TrainingConfig:
        """The options of the first stage, whose steps are updates."""
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
