"""The architecture of a model as plain data: `ModelConfig` and its parts `Rotary`, `Alibi` and `Routing`.

All are frozen and hashable, so that they can be static arguments of `jax.jit`.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from griffin_jax.utils.options import check_choice

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared", "xielu"]
RotaryKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
NormKind = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post", "output", "sandwich"]
HeadNorm = Literal["none", "shared", "own", "joint"]
RouterScores = Literal["softmax", "sigmoid", "sparsemixer", "equal"]


LARGEST_SIZE = 2**31 - 1
"""The largest value of anything that is counted, since positions and indices are int32."""
LARGEST_FLOAT = float(np.finfo(np.float32).max)
MOST_LAYERS = 1 << 16
"""The largest number of layers that a model may have; far more than any has."""


def check_types(instance: Any) -> None:
    """Raise `ValueError` unless every field of a dataclass has the type of its annotation, and all numbers are finite.

    Numbers must also fit into float32 or int32, in which they are used.
    """
    for name, kind in _kinds(type(instance)).items():
        value = getattr(instance, name)
        if not _fits(value, kind):
            raise ValueError(f"{name} must be {_described(kind)}, got {value!r:.100}")


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    return {name: kind for name, kind in get_type_hints(cls).items() if get_origin(kind) is not Literal}


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind in (int, float) and (isinstance(value, bool) or not isinstance(value, int | kind)):
        return False
    if kind is int:
        return -LARGEST_SIZE <= value <= LARGEST_SIZE
    # The comparison is false for NaN.
    return -LARGEST_FLOAT <= value <= LARGEST_FLOAT if kind is float else isinstance(value, kind)


def _described(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_described, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"several, each {_described(get_args(kind)[0])}"
    names: dict[Any, str] = {
        int: "a whole number of at most 2^31 - 1",
        float: "a finite number",
        types.NoneType: "None",
    }
    return names[kind] if kind in names else str(kind.__name__)


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and its context extensions.

    Attributes:
        theta: base of the wavelengths, which form a geometric series.
        kind: `default`; `linear` (positions divided by `factor`); `llama3` (Llama 3.1: the frequencies of long
            wavelengths divided by `factor`, with a smooth blend between); `yarn` (arXiv 2309.00071); `longrope`
            (arXiv 2402.13753: a factor for every wavelength).
        dims: number of leading dimensions of a head that turn, while the others are left alone; None for all.
        interleaved: whether dimension 2i turns with 2i + 1 (GPT-J) instead of i with i + dims/2.
        factor: how many times the context grows.
        original_positions: context of the unscaled model, in tokens (`llama3`, `yarn`, `longrope`).
        low_freq_factor: wavelengths above `original_positions / low_freq_factor` are scaled by the whole `factor`.
        high_freq_factor: wavelengths below `original_positions / high_freq_factor` are left alone.
        beta_fast: `yarn` leaves wavelengths alone that make more than this many rotations within the original context.
        beta_slow: `yarn` divides the frequencies that make fewer than this many rotations by `factor`.
        truncate: whether `yarn` rounds the two limits of its blend to whole dimensions.
        attention_factor: factor of the cosines and sines (`yarn`, `longrope`; 1 for the other kinds).
        short_factors: the numbers by which `longrope` divides the frequencies, one for each pair of dimensions, in
            texts of at most `original_positions` tokens.
        long_factors: the same for longer texts.
        query_growth: queries at position p are multiplied by 1 + query_growth ln(1 + floor(p / original_positions))
            after rotary embedding (Llama 4, Ministral 3).

    Raises:
        ValueError: a value is outside its range, or does not belong to the kind.
    """

    theta: float = 10_000.0
    kind: RotaryKind = "default"
    dims: int | None = None
    interleaved: bool = False
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    query_growth: float = 0.0

    def __post_init__(self) -> None:
        check_choice("rotary kind", self.kind, get_args(RotaryKind))
        for name in ("short_factors", "long_factors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        if self.theta <= 0 or self.factor <= 0:
            raise ValueError(f"rotary theta and factor must be positive, got {self.theta} and {self.factor}")
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            if getattr(self, name) <= 0:
                raise ValueError(f"rotary {name} must be positive, got {getattr(self, name)}")
        if self.kind == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise ValueError(
                f"rotary low_freq_factor and high_freq_factor must differ, both are {self.low_freq_factor}"
            )
        if self.kind == "yarn" and self.theta == 1:
            raise ValueError("rotary theta must not be 1 where the kind is 'yarn'")
        if self.dims is not None and (self.dims < 2 or self.dims % 2):
            raise ValueError(f"rotary dims must be even and at least 2, got {self.dims}")
        if self.kind in ("llama3", "yarn", "longrope") and self.original_positions < 1:
            raise ValueError(f"rotary kind {self.kind!r} needs original_positions, the context of the unscaled model")
        if self.query_growth < 0 or (self.query_growth and self.original_positions < 1):
            raise ValueError(
                f"rotary query_growth must be at least 0, and needs original_positions, got {self.query_growth} and "
                f"{self.original_positions}"
            )
        for name in ("short_factors", "long_factors"):
            factors = getattr(self, name)
            if (self.kind == "longrope") != bool(factors):
                raise ValueError(f"{name} belong to rotary kind 'longrope' and to no other; kind is {self.kind!r}")
            if not all(factor > 0 for factor in factors):
                raise ValueError(f"rotary {name} must be positive, got {factors}")


@dataclasses.dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (arXiv 2108.12409): a score falls by slope x distance.

    Attributes:
        max_bias: the slopes of N heads are 2^(-max_bias i / N), i = 1 ... N. If N is not a power of two, they are the
            slopes for the next smaller power, followed by every other one of those for the next larger.
        scaled: whether the bias is multiplied by the attention's scale, as the scores are (Falcon).
        rounded: whether slopes and biases are rounded to bfloat16, whatever the model's dtype (Falcon).

    Raises:
        ValueError: `max_bias` is not positive.
    """

    max_bias: float = 8.0
    scaled: bool = False
    rounded: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if not self.max_bias > 0:
            raise ValueError(f"alibi max_bias must be positive, got {self.max_bias}")


@dataclasses.dataclass(frozen=True)
class Routing:
    """Routed experts (a mixture of experts): feed-forward layers with several experts, from which a router chooses some
    for each token (arXiv 1701.06538).

    Attributes:
        experts: E, the number of experts of a layer.
        active: number of experts that each token chooses.
        width: F_e, the number of neurons of each expert.
        scores: how the router's logits become scores. `softmax`: a softmax over all experts. `sigmoid`: the sigmoid of
            each logit (DeepSeek V3). `sparsemixer` (arXiv 2409.12136, Phi-3.5-MoE): each choice has a separate softmax
            over the logits that are near it. `equal` (FactorLLM, arXiv 2408.11855): the logits only choose, and every
            chosen expert has the weight 1.
        normalised: whether the weights of the chosen experts are divided by their sum.
        scale: factor of the weights.
        router_bias: whether the router's logits have a bias (gpt-oss).
        choice_bias: whether each expert has a number that is added to its score when experts are chosen, but not to its
            weight (DeepSeek V3).
        groups: number of equal groups that the experts lie in; a token chooses from `active_groups` of them (DeepSeek).
        active_groups: number of groups that a token chooses from, which are those with the best scores.
        group_best: a group's score is the sum of this many of its best experts' scores.
        tolerance: for `sparsemixer`: logits that differ from the best one by more than this fraction are left out.
        shared_width: number of neurons of the shared experts, which every token reads in addition to the experts that
            it chooses; 0 if there are none.
        shared_gate: whether the shared experts' output is multiplied by the sigmoid of a projection of the input
            (Qwen2-MoE).
        dense_layers: numbers of the layers that have `ff_width` neurons and no router.
        centred: whether the layer has a bias that is added whichever experts a token chooses, besides the biases of the
            experts' down projections. The layer's bias can then hold what the experts give on average, and each
            expert's bias how it differs from that.

    Raises:
        ValueError: a value is outside its range, or contradicts another.
    """

    experts: int
    active: int
    width: int
    scores: RouterScores = "softmax"
    normalised: bool = False
    scale: float = 1.0
    router_bias: bool = False
    choice_bias: bool = False
    groups: int = 1
    active_groups: int = 1
    group_best: int = 1
    tolerance: float = 0.02
    shared_width: int = 0
    shared_gate: bool = False
    dense_layers: tuple[int, ...] = ()
    centred: bool = False

    def __post_init__(self) -> None:
        check_choice("router scores", self.scores, get_args(RouterScores))
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        check_types(self)
        for name in ("experts", "active", "width", "groups", "active_groups", "group_best"):
            if getattr(self, name) < 1:
                raise ValueError(f"routing {name} must be at least 1, got {getattr(self, name)}")
        if self.active > self.experts:
            raise ValueError(f"a token cannot choose {self.active} of {self.experts} experts")
        if self.experts % self.groups:
            raise ValueError(f"{self.experts} experts cannot lie in {self.groups} equal groups")
        size = self.experts // self.groups
        if self.active_groups > self.groups or self.group_best > size or self.active > self.active_groups * size:
            raise ValueError(
                f"{self.active} of {self.experts} experts cannot be chosen from {self.active_groups} of {self.groups}"
                f" groups, which are ranked by their best {self.group_best}"
            )
        if self.scores == "sparsemixer" and (self.normalised or self.choice_bias or self.groups > 1):
            raise ValueError(
                "sparsemixer chooses one expert after the other, without groups, biases or a sum of weights"
            )
        if self.scores == "equal" and self.normalised:
            raise ValueError("equal weights are not divided by their sum; give a scale")
        if self.shared_width < 0 or (self.shared_gate and not self.shared_width):
            raise ValueError(f"shared_width must be at least 0, and above for a shared_gate, got {self.shared_width}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Every difference between model families is one field here.

    Attributes:
        family: name of the module in `griffin_jax.checkpoints.families` that read the weights.
        vocab_size: V, the number of rows of the embedding.
        width: D, the width of the residual stream.
        ff_width: F, the number of neurons of each feed-forward layer before pruning; for layers with routed experts,
            `routing` says it.
        num_layers: number of transformer layers.
        num_heads: N, the number of query heads.
        num_kv_heads: G, the number of key/value heads; N is a multiple of G.
        head_dim: H, the size of a head.
        max_positions: the context, in tokens: prompt and answer together.
        activation: the non-linearity act of the feed-forward layer. `gelu` is exact, `gelu_tanh` its tanh
            approximation, `gelu_quick` x * sigmoid(1.702 x) (gpt-oss); `relu_squared` is max(x, 0)^2 (Nemotron);
            `xielu` (arXiv 2411.13010, Apertus) has two parameters in each layer.
        gated: z = act(Wg x) * (Wu x) if true, z = act(Wu x + b) if not.
        norm: `rms` (RMSNorm) or `layer` (LayerNorm).
        norm_eps: what norms add to the mean square or the variance.
        norm_scale: whether norms multiply by a scale; the norms of OLMo 1 do not.
        norm_bias: whether norms have a bias (LayerNorm).
        norm_plus_one: whether norms multiply by 1 + scale instead of scale (Gemma, Nemotron).
        norm_placement: where a sublayer f, attention or feed-forward, has its norms. `pre`: x + f(norm(x)); `post`:
            norm(x + f(x)) (OPT-350m); `output`: x + norm(f(x)) (OLMo 2); `sandwich`: x + norm(f(norm(x))) (Gemma 2).
        final_norm: whether there is a norm before the head.
        head_norm: how queries and keys are normalised. `none`: not at all; `shared`: each head separately, with one
            scale for all heads (Qwen3); `own`: each head separately, with a scale for each head (StableLM 2); `joint`:
            over all heads together (OLMo 2).
        head_norm_after_rotary: whether this norm comes after rotary embedding (HunYuan) instead of before.
        parallel: whether attention and feed-forward read the same x: x + attention(norm(x)) + ff(norm(x)).
        shared_norm: whether parallel layers also share one norm.
        rotary: rotary position embedding; None for none.
        local_rotary: the rotary embedding of layers with a window, if it differs from `rotary` (Gemma 3).
        unrotated_layers: numbers of the layers without rotary embedding (SmolLM3).
        alibi: linear attention biases; None for none.
        learned_positions: whether an embedding of the position is added to that of the token.
        windows: for each layer, how many tokens back a query reads, itself included; 0 for all. Empty if no layer has a
            window.
        attention_scale: factor of the scores; None for head_dim^-0.5.
        attention_softcap: scores s become cap * tanh(s / cap); None for no cap.
        attention_sinks: whether each head has an additional score that takes part in the softmax but has no value
            (gpt-oss).
        qkv_clip: queries, keys and values are clipped to [-qkv_clip, qkv_clip]; None for no clip.
        embedding_width: E, the number of columns of the embedding and the head, if it is not D: two projections then
            connect them to the layers (OPT-350m). None for D.
        embedding_scale: factor of the embedding.
        embedding_norm: whether there is a norm after the embedding (BLOOM).
        residual_scale: factor of what a sublayer adds to the residual stream (Granite).
        logit_scale: factor of the logits.
        logit_softcap: logits l become cap * tanh(l / cap); None for no cap.
        tied_head: whether the head is the embedding.
        head_bias: whether the head has a bias.
        attention_bias: whether query, key and value have biases.
        attention_out_bias: whether the attention's output projection has a bias.
        ff_bias: whether the projections of the feed-forward layer have biases.
        ff_clip: Wg x is limited to at most ff_clip before the activation, and Wu x is clipped to [-ff_clip, ff_clip]
            (gpt-oss); None for no limit.
        up_plus_one: whether z = act(Wg x) * (Wu x + 1) (gpt-oss).
        routing: the routed experts of the layers that have any; None if no layer has.
        bos_token_id: first token of a text, or None.
        eos_token_ids: tokens that end an answer.
        kv_copies: how many copies of each key/value head the model holds, each with an equal share of its query heads.
            This is not a property of a checkpoint: with more devices than heads, devices hold copies, which change no
            result; see `griffin_jax.model.sharding.with_kv_copies`.
        expert_parallel: whether each of the devices that share the model holds whole experts, instead of a part of the
            neurons of every expert. This is not a property of a checkpoint, either; see
            `griffin_jax.model.sharding.with_whole_experts`.

    Raises:
        ValueError: a value is outside its range, or contradicts another.
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
    norm: NormKind = "rms"
    norm_eps: float = 1e-5
    norm_scale: bool = True
    norm_bias: bool = False
    norm_plus_one: bool = False
    norm_placement: NormPlacement = "pre"
    final_norm: bool = True
    head_norm: HeadNorm = "none"
    head_norm_after_rotary: bool = False
    parallel: bool = False
    shared_norm: bool = False
    rotary: Rotary | None = Rotary()
    local_rotary: Rotary | None = None
    unrotated_layers: tuple[int, ...] = ()
    alibi: Alibi | None = None
    learned_positions: bool = False
    windows: tuple[int, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    qkv_clip: float | None = None
    embedding_width: int | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied_head: bool = False
    head_bias: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    ff_bias: bool = False
    ff_clip: float | None = None
    up_plus_one: bool = False
    routing: Routing | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    kv_copies: int = 1
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, get_args(Activation))
        for name in (
            "vocab_size", "width", "ff_width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions",
            "kv_copies",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r:.100}")
        check_types(self)
        if self.num_heads % self.kv_heads:
            groups = f"num_kv_heads {self.num_kv_heads}" + (f" x {self.kv_copies}" if self.kv_copies > 1 else "")
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of {groups}")
        check_choice("norm", self.norm, get_args(NormKind))
        check_choice("norm_placement", self.norm_placement, get_args(NormPlacement))
        check_choice("head_norm", self.head_norm, get_args(HeadNorm))
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")
        for name in ("attention_softcap", "logit_softcap", "qkv_clip", "embedding_width", "ff_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive or None, got {value}")
        if not self.norm_scale and (self.norm_bias or self.norm_plus_one):
            raise ValueError("norms without a scale have no bias, and add no one to it")
        if self.head_norm_after_rotary and self.head_norm == "none":
            raise ValueError("head_norm_after_rotary needs a head_norm")
        if self.shared_norm and not self.parallel:
            raise ValueError("shared_norm is for parallel attention and feed-forward layers only")
        if self.parallel and self.norm_placement != "pre":
            raise ValueError(f"parallel layers have norm_placement 'pre', got {self.norm_placement!r}")
        self._check_positions()
        if self.routing is not None and any(not 0 <= n < self.num_layers for n in self.routing.dense_layers):
            raise ValueError(f"dense_layers must lie in [0, {self.num_layers - 1}], got {self.routing.dense_layers}")
        if self.expert_parallel and self.routing is None:
            raise ValueError("expert_parallel is for models with routed experts")
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"special token {token} is outside the vocabulary of {self.vocab_size}")

    def _check_positions(self) -> None:
        for rotary in (self.rotary, self.local_rotary):
            if rotary is None:
                continue
            dims = self.head_dim if rotary.dims is None else rotary.dims
            if dims > self.head_dim or dims % 2:
                raise ValueError(f"rotary embedding turns an even number of dimensions up to head_dim, got {dims}")
            for name in ("short_factors", "long_factors"):
                factors = getattr(rotary, name)
                if factors and len(factors) != dims // 2:
                    raise ValueError(f"rotary {name} must be {dims // 2}, one for each pair, got {len(factors)}")
        if self.local_rotary is not None and self.rotary is None:
            raise ValueError("local_rotary needs rotary, that of the other layers")
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise ValueError(f"windows must be {self.num_layers} whole numbers of at least 0, got {self.windows}")
        if any(not 0 <= layer < self.num_layers for layer in self.unrotated_layers):
            raise ValueError(f"unrotated_layers must lie in [0, {self.num_layers - 1}], got {self.unrotated_layers}")

    def routed(self, layer: int) -> bool:
        """Whether a layer has routed experts."""
        return self.routing is not None and layer not in self.routing.dense_layers

    @property
    def neuron_ranges(self) -> tuple[tuple[int, ...], ...]:
        """The sizes of the ranges that the neurons of each layer lie in, one after the other: a single range of all
        neurons or, with routed experts, one range for each expert and a last one for the shared experts, if there are
        any."""
        return tuple(self._ranges(layer) for layer in range(self.num_layers))

    def _ranges(self, layer: int) -> tuple[int, ...]:
        if self.routing is None or layer in self.routing.dense_layers:
            return (self.ff_width,)
        shared = (self.routing.shared_width,) if self.routing.shared_width else ()
        return (self.routing.width,) * self.routing.experts + shared

    @property
    def neurons(self) -> tuple[int, ...]:
        """Number of feed-forward neurons of each layer before pruning, counting those of all experts."""
        return tuple(map(sum, self.neuron_ranges))

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads that the model holds, copies included."""
        return self.num_kv_heads * self.kv_copies

    @property
    def score_scale(self) -> float:
        """The factor of attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window(self, layer: int) -> int:
        """How many tokens back a query of this layer reads, itself included; 0 for all."""
        return self.windows[layer] if self.windows else 0

    def layer_rotary(self, layer: int) -> Rotary | None:
        """The rotary embedding of this layer; None if it has none."""
        if layer in self.unrotated_layers:
            return None
        return self.local_rotary if self.local_rotary is not None and self.window(layer) else self.rotary

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary from which `from_json` makes an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The config from a dictionary that `to_json` made.

        Raises:
            ValueError: a field is unknown, missing or outside its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown fields of ModelConfig: {', '.join(unknown)}")
        values = dict(fields)
        try:
            kinds = {"rotary": Rotary, "local_rotary": Rotary, "alibi": Alibi, "routing": Routing}
            for name, kind in kinds.items():
                if values.get(name) is not None:
                    values[name] = kind(**values[name])
            for name in ("eos_token_ids", "windows", "unrotated_layers"):
                values[name] = tuple(values.get(name, ()))
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a ModelConfig: {error}") from error
