"""Which tensor is which parameter, and how its axes lie."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from griffin_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of an axis: a letter, a number, or a sum of them of which one part is taken.

    Attributes:
        parts: the summands; only one where nothing is cut out.
        taken: number of the part that is taken.
    """

    parts: tuple[str, ...]
    taken: int = 0

    @classmethod
    def parse(cls, text: str) -> Factor:
        """The factor that a text such as `H`, `2` or `[N]+G+G` describes."""
        parts = text.split("+")
        taken = next((i for i, part in enumerate(parts) if part.startswith("[")), 0)
        return cls(tuple(part.strip("[]") for part in parts), taken)

    @property
    def letter(self) -> str:
        """The part that is taken."""
        return self.parts[self.taken]

    def size(self, sizes: Mapping[str, int]) -> int:
        """The size of the whole factor."""
        return sum(_size(part, sizes) for part in self.parts)

    def cut(self, sizes: Mapping[str, int]) -> slice:
        """The slice of the part that is taken."""
        start = sum(_size(part, sizes) for part in self.parts[: self.taken])
        return slice(start, start + _size(self.letter, sizes))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of a checkpoint's tensor become those of a parameter.

    Attributes:
        before: axes of the checkpoint's tensor; an axis of several factors has the size of their product.
        after: axes of the parameter, with the same letters. Factors of 1 may be added and left out.
    """

    before: tuple[tuple[Factor, ...], ...]
    after: tuple[tuple[Factor, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that a text describes: `D (N H) -> N H D`, or `([N]+G+G H) D -> N H D` for a part of a tensor.

        A text without an arrow leaves the tensor as it is.
        """
        before, _, after = text.partition("->")
        return cls(_axes(before), _axes(after or before))

    def shape_before(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the checkpoint's tensor."""
        return tuple(math.prod(factor.size(sizes) for factor in axis) for axis in self.before)

    def shape_after(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(math.prod(_size(factor.letter, sizes) for factor in axis) for axis in self.after)

    def apply(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The parameter from the checkpoint's tensor; a view of it where that is possible."""
        factors = [factor for axis in self.before for factor in axis]
        parts = array.reshape([factor.size(sizes) for factor in factors])
        parts = parts[tuple(factor.cut(sizes) for factor in factors)]
        parts = parts.squeeze(tuple(axis for axis, factor in enumerate(factors) if factor.letter == "1"))
        letters = [factor.letter for factor in factors if factor.letter != "1"]
        order = [letters.index(factor.letter) for axis in self.after for factor in axis if factor.letter != "1"]
        return parts.transpose(order).reshape(self.shape_after(sizes))


def _axes(text: str) -> tuple[tuple[Factor, ...], ...]:
    groups = re.findall(r"\([^)]*\)|\S+", text)
    return tuple(tuple(Factor.parse(factor) for factor in group.strip("()").split()) for group in groups)


def _size(letter: str, sizes: Mapping[str, int]) -> int:
    return int(letter) if letter.isdigit() else sizes[letter]


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The sizes that the letters of layouts stand for in a model.

    In addition to those of `griffin_jax.model`: C positions of the context, E columns of the embedding, P pairs of
    dimensions of a head, Q query heads of each of four devices; X experts of M neurons each, S neurons of the shared
    experts (0 in models without).
    """
    routing = config.routing
    return {
        "C": config.max_positions,
        "D": config.width,
        "E": config.embedding_width or config.width,
        "F": config.ff_width,
        "G": config.num_kv_heads,
        "H": config.head_dim,
        "M": 0 if routing is None else routing.width,
        "N": config.num_heads,
        "P": config.head_dim // 2,
        "Q": config.num_heads // 4,
        "R": config.num_heads // config.num_kv_heads,
        "S": 0 if routing is None else routing.shared_width,
        "V": config.vocab_size,
        "X": 0 if routing is None else routing.experts,
    }


EACH = ("{head}", "{expert}")
"""What stands for numbers in names, where there are tensors of their own for each head or expert of a layer."""


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Which tensor of a checkpoint a parameter comes from.

    A rule applies to models that have the parameter: that of a bias only to models with biases, that of the head only
    where it is not tied. Several rules may take their parts of one fused tensor.

    Attributes:
        name: name of the tensor; `{layer}` stands for the number of the layer, `{head}` for the number of a head, where
            every head has a tensor of its own, and `{expert}` for that of an expert.
        path: path of the parameter in the module tree.
        layout: how the tensor's axes become the parameter's, see `Layout`. With `{head}` or `{expert}`, the tensors of
            all of them are stacked along a new first axis.
        add: number that is added to the stored values.
    """

    name: str
    path: str
    layout: str
    add: float = 0.0

    def in_layer(self, layer: int) -> TensorRule:
        """The rule with a number in place of `{layer}`."""
        name, path = (text.replace("{layer}", str(layer)) for text in (self.name, self.path))
        return dataclasses.replace(self, name=name, path=path)

    def tensors(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the rule reads."""
        shape = Layout.parse(self.layout).shape_before(sizes)
        each = next((each for each in EACH if each in self.name), None)
        if each is None:
            return {self.name: shape}
        return {self.name.replace(each, str(number)): shape[1:] for number in range(shape[0])}


def layer_rules(prefix: str, *rules: tuple[str, str, str]) -> tuple[TensorRule, ...]:
    """Rules for the tensors of a layer, each from its name after `prefix`, path within the layer, and layout."""
    return tuple(TensorRule(prefix + name, f"layers.{{layer}}.{path}", layout) for name, path, layout in rules)


Rules = tuple[TensorRule, ...] | Callable[[ModelConfig], tuple[TensorRule, ...]]
"""Rules of a family; a function where they depend on more of the configuration than which parameters it has."""


GGUF_RULES = (
    TensorRule("token_embd.weight", "embedding", "V D"),
    TensorRule("token_embd_norm.weight", "embedding_norm.scale", "D"),
    TensorRule("token_embd_norm.bias", "embedding_norm.bias", "D"),
    TensorRule("position_embd.weight", "position_embedding", "C D"),
    TensorRule("output_norm.weight", "norm.scale", "D"),
    TensorRule("output_norm.bias", "norm.bias", "D"),
    TensorRule("output.weight", "head", "V D"),
    *layer_rules(
        "blk.{layer}.",
        ("attn_norm.weight", "attention_norm.scale", "D"),
        ("attn_norm.bias", "attention_norm.bias", "D"),
        ("attn_q.weight", "attention.query", "(N H) D -> N H D"),
        ("attn_k.weight", "attention.key", "(G H) D -> G H D"),
        ("attn_v.weight", "attention.value", "(G H) D -> G H D"),
        ("attn_output.weight", "attention.out", "D (N H) -> N H D"),
        ("attn_q.bias", "attention.query_bias", "(N H) -> N H"),
        ("attn_k.bias", "attention.key_bias", "(G H) -> G H"),
        ("attn_v.bias", "attention.value_bias", "(G H) -> G H"),
        ("attn_output.bias", "attention.out_bias", "D"),
        ("ffn_norm.weight", "ff_norm.scale", "D"),
        ("ffn_norm.bias", "ff_norm.bias", "D"),
        ("ffn_gate.weight", "ff.gate", "F D"),
        ("ffn_up.weight", "ff.up", "F D"),
        ("ffn_down.weight", "ff.down", "D F -> F D"),
        ("ffn_gate.bias", "ff.gate_bias", "F"),
        ("ffn_up.bias", "ff.up_bias", "F"),
        ("ffn_down.bias", "ff.down_bias", "D"),
        ("ffn_gate_inp.weight", "ff.router", "X D"),
        ("ffn_gate_inp.bias", "ff.router_bias", "X"),
        ("exp_probs_b.bias", "ff.choice_bias", "X"),
        ("ffn_gate_exps.weight", "ff.experts.gate", "X M D"),
        ("ffn_up_exps.weight", "ff.experts.up", "X M D"),
        ("ffn_down_exps.weight", "ff.experts.down", "X D M -> X M D"),
        ("ffn_gate_exps.bias", "ff.experts.gate_bias", "X M"),
        ("ffn_up_exps.bias", "ff.experts.up_bias", "X M"),
        ("ffn_down_exps.bias", "ff.experts.down_bias", "X D"),
        ("ffn_gate_inp_shexp.weight", "ff.shared_gate", "D"),
        ("ffn_gate_shexp.weight", "ff.shared.gate", "S D"),
        ("ffn_up_shexp.weight", "ff.shared.up", "S D"),
        ("ffn_down_shexp.weight", "ff.shared.down", "D S -> S D"),
    ),
)
"""Rules with llama.cpp's names, which are the same for all architectures.

A family whose files differ adds its own rules after these: of several rules for the same parameter the last one counts.
"""

FUSED_GGUF_RULES = (
    *GGUF_RULES,
    *layer_rules(
        "blk.{layer}.",
        ("attn_qkv.weight", "attention.query", "([N]+G+G H) D -> N H D"),
        ("attn_qkv.weight", "attention.key", "(N+[G]+G H) D -> G H D"),
        ("attn_qkv.weight", "attention.value", "(N+G+[G] H) D -> G H D"),
        ("attn_qkv.bias", "attention.query_bias", "([N]+G+G H) -> N H"),
        ("attn_qkv.bias", "attention.key_bias", "(N+[G]+G H) -> G H"),
        ("attn_qkv.bias", "attention.value_bias", "(N+G+[G] H) -> G H"),
    ),
)
"""The same for architectures whose queries, keys and values are one tensor; llama.cpp stores them in this order."""
