"""What a model is (`ModelConfig`, `Rotary`) and how it is pruned (`GriffinConfig`).

All three are frozen and hashable, so they can be static arguments of `jax.jit`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RotaryKind = Literal["default", "linear", "llama3", "yarn"]
Method = Literal["topk", "sample", "topk_sample", "random", "magnitude"]


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and its context extensions.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: `default`; `linear` (positions divided by `factor`); `llama3` (Llama 3.1: long
            wavelengths divided by `factor`, a smooth blend between); `yarn` (arXiv 2309.00071).
        factor: how many times the context grows.
        original_positions: context of the unscaled model, in tokens (`llama3`, `yarn`).
        low_freq_factor: wavelengths above `original_positions / low_freq_factor` are scaled whole.
        high_freq_factor: wavelengths below `original_positions / high_freq_factor` stay as they are.
        beta_fast: rotations within the original context above which `yarn` leaves a wavelength alone.
        beta_slow: rotations below which `yarn` divides it by `factor`.
        truncate: whether `yarn` rounds the two limits of its blend to whole dimensions.
        attention_factor: multiplies the cosines and sines (`yarn`; elsewhere 1).
    """

    theta: float = 10_000.0
    kind: RotaryKind = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_choice("rotary kind", self.kind, get_args(RotaryKind))
        if self.theta <= 0 or self.factor <= 0:
            raise ValueError(f"rotary theta and factor must be positive, got {self.theta} and {self.factor}")
        if self.kind in ("llama3", "yarn") and self.original_positions < 1:
            raise ValueError(f"rotary kind {self.kind!r} needs original_positions, the context of the unscaled model")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Every difference between model families is one field here.

    Attributes:
        family: name of the module in `griffin_jax.families` that the weights came through.
        vocab_size: V, rows of the embedding.
        width: D, the residual stream.
        ff_width: F, neurons of each feed-forward layer before pruning.
        num_layers: number of transformer layers.
        num_heads: N query heads.
        num_kv_heads: G key/value heads; N is a multiple of G.
        head_dim: H.
        max_positions: the context, in tokens: prompt and answer together.
        activation: the non-linearity of the feed-forward layer. `gelu` is exact, `gelu_tanh` its
            tanh approximation.
        gated: z = act(Wg x) * (Wu x) if true, z = act(Wu x + b) if not.
        norm_eps: added to the mean square in RMSNorm.
        rotary: position embedding.
        tied_head: the head is the embedding.
        attention_bias: biases on query, key and value.
        attention_out_bias: bias on the attention's output projection.
        ff_bias: biases on all projections of the feed-forward layer.
        bos_token_id: first token of a text, or None.
        eos_token_ids: any of these ends an answer.
    """

    family: str
    vocab_size: int
    width: int
    ff_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    activation: Activation = "silu"
    gated: bool = True
    norm_eps: float = 1e-5
    rotary: Rotary = Rotary()
    tied_head: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    ff_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("activation", self.activation, get_args(Activation))
        for name in (
            "vocab_size", "width", "ff_width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"special token {token} is outside the vocabulary of {self.vocab_size}")

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` turns back into an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The config that `to_json` wrote.

        Raises:
            ValueError: a field is unknown, missing or outside its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown fields of ModelConfig: {', '.join(unknown)}")
        values = dict(fields)
        try:
            values["rotary"] = Rotary(**values.get("rotary", {}))
            values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a ModelConfig: {error}") from error


def kept_neurons(ff_width: int, density: float, multiple: int = 1) -> int:
    """k = floor(F * density), rounded up to a multiple and never above F.

    The density counts as the decimal that was written: 0.29 of 100 neurons is 29, although the
    nearest float64 lies below 0.29.

    Args:
        ff_width: F.
        density: share of neurons to keep, in (0, 1].
        multiple: k is rounded up to a multiple of this; 128 suits the tiles of GPUs and TPUs.

    Raises:
        ValueError: `density` is outside (0, 1], `multiple` is below 1, or k would be 0.
    """
    check_density(density)
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    k = math.floor(ff_width * Fraction(repr(float(density))))
    k = min(ff_width, -(-k // multiple) * multiple)
    if k < 1:
        raise ValueError(
            f"density {density} keeps 0 of {ff_width} neurons; it must be at least 1/{ff_width} to keep one"
        )
    return k


def check_density(density: object) -> None:
    """Raise `ValueError` unless `density` is a number in (0, 1]."""
    if not isinstance(density, float | int | np.floating) or isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")


@dataclasses.dataclass(frozen=True)
class GriffinConfig:
    """How a model is pruned for an answer.

    Attributes:
        density: share of feed-forward neurons kept, in (0, 1]; one for all layers or one per layer.
        method: `topk` is the paper's. `sample` draws without replacement in proportion to the
            statistic; `topk_sample` takes half of each; `random` and `magnitude` ignore the prompt
            and are the baselines it is compared with.
        shared: one set of experts for the whole batch (faster to decode), or one for every
            sequence (each answer as if it were alone, where nothing is drawn).
        multiple: the number of kept neurons is rounded up to a multiple of this.

    Raises:
        ValueError: a value is outside its range.
    """

    density: float | Sequence[float] = 0.5
    method: Method = "topk"
    shared: bool = False
    multiple: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.density, Sequence | np.ndarray) and not isinstance(self.density, str):
            object.__setattr__(self, "density", tuple(self.density))
        for density in self.density if isinstance(self.density, Sequence) else (self.density,):
            check_density(density)
        _check_choice("method", self.method, get_args(Method))
        if not isinstance(self.multiple, int | np.integer) or self.multiple < 1:
            raise ValueError(f"multiple must be a whole number of at least 1, got {self.multiple!r}")

    def kept(self, ff_widths: Sequence[int]) -> tuple[int, ...]:
        """k of every layer.

        Raises:
            ValueError: there is not one density per layer, or a layer would keep no neuron.
        """
        if not isinstance(self.density, Sequence):
            densities = [self.density] * len(ff_widths)
        elif len(self.density) == len(ff_widths):
            densities = self.density
        else:
            raise ValueError(f"{len(self.density)} densities for {len(ff_widths)} layers; give one, or one for each")
        return tuple(kept_neurons(f, d, self.multiple) for f, d in zip(ff_widths, densities, strict=True))
