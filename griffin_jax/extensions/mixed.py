"""Bits by importance: of the kept neurons, those that a prompt needs most are read in all of their bits, others in few.

    precise, others = select_mixed(statistics, config, MixedFormat.parse("int8+int4@0.25"))
    pruned = prune_mixed(model, coarse(model), precise, others)

GRIFFIN has two levels, a neuron is read or it is not. Between them are the bits that its rows are read in. Half of what
4 bits lose is lost in the tenth of the neurons that take part most. `griffin-jax eval front` compares this with uniform
formats and with pruning, at the bytes that a token reads; docs/tried.md has other ways to choose these neurons.

Without a part, as in `int8+int4`, a density counts bytes instead of neurons (`MixedFormat.at`): what pruning would save
by leaving neurons out is saved by reading them in fewer bits first, which loses far less.

Each feed-forward layer has two groups of rows (`FeedForward.rest`), each in its own format; attention, embedding and
head stay as the model has them. The rows in fewer bits are held in addition to the model, for all neurons, since any of
them may be chosen.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.extensions.drafter import round_feed_forward
from griffin_jax.extensions.reconstruction import Reconstruction
from griffin_jax.generation import jitted
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.masked import mask
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.griffin.prune import check_whole, prune
from griffin_jax.griffin.select import Fuse
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.feed_forward import Mask, NeuronModule
from griffin_jax.model.sizes import Sizes
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import WeightFormat
from griffin_jax.utils import programs

FEW_BITS = WeightFormat.parse("int4")
"""What the other neurons are read in, where nothing is said."""

Chosen = tuple[ExpertNeurons | None, ExpertNeurons | None]
"""The neurons that are kept in the first format, and those in the second one; None instead of no neuron."""


def others_format(text: str) -> tuple[WeightFormat, float | None]:
    """Of `int4@0.25`, the format that the less important of the kept neurons have, and the part that does not have it.

    The part is None where none is given, as in `int4`.

    Raises:
        ValueError: the format is none of integers, or there is no such part.
    """
    name, at, share = text.partition("@")
    try:
        part = float(share) if at else None
    except ValueError:
        part = -1.0
    if part is not None and not 0 <= part < 1:
        raise ValueError(
            "two formats go with the part, in [0, 1), of the kept neurons that has the first one, such as int4@0.25, or"
            " with none, so that a density counts bytes"
        )
    found = WeightFormat.parse(name)
    if not found.quantised:
        raise ValueError("the second format is one of integers, such as int4")
    return found, part


@dataclasses.dataclass(frozen=True)
class MixedFormat:
    """Two formats of the feed-forward rows, and which part of the kept neurons has the first one.

    Attributes:
        fine: how the model's matrices are stored, and the rows of the precise neurons among them.
        coarse: how the rows of the other kept neurons are stored, in fewer bits.
        share: part of the kept neurons that is precise, in [0, 1); None for as many as the bytes of a density pay for,
            see `at`.

    Raises:
        ValueError: there is no share, and the coarse format does not have fewer bits.
    """

    fine: WeightFormat
    coarse: WeightFormat
    share: float | None

    def __post_init__(self) -> None:
        if self.share is None and self.coarse.bits >= self.fine.bits:
            bits = f"{self.coarse} takes {self.coarse.bits:g} bits and {self.fine} {self.fine.bits:g}"
            raise ValueError(f"{bits}: the second format needs fewer bits than the first, or a part, as int4@0.25")

    @classmethod
    def parse(cls, text: str) -> MixedFormat | WeightFormat:
        """`int8+int4@0.25`, `int8+int4`, or a format without a plus.

        Raises:
            ValueError: it is neither.
        """
        fine, plus, rest = text.partition("+")
        if not plus:
            return WeightFormat.parse(text)
        try:
            return cls(WeightFormat.parse(fine), *others_format(rest))
        except ValueError as error:
            raise ValueError(f"weights are {text!r}; {error}") from error

    def __str__(self) -> str:
        return f"{self.fine}+{self.coarse}" + ("" if self.share is None else f"@{self.share:g}")

    def at(self, density: float | Sequence[float]) -> tuple[MixedFormat | WeightFormat, float | Sequence[float]]:
        """What a density stands for: the formats with their share, and the part of all neurons that is kept.

        With a share both are as they are given. Without one, the density is the part that is read of the bytes of all
        rows in the first format. As many neurons as that pays for are kept in the second format; if all are, what is
        left pays for a share of precise ones, in hundredths. At a density of 1 there is only the first format.

        Args:
            density: in (0, 1]; or of each layer, for formats with a share.

        Raises:
            ValueError: there are several densities of bytes.
        """
        if self.share is not None:
            return self, density
        if isinstance(density, Sequence):
            raise ValueError(
                f"a density of bytes is one for all layers, and there are {len(density)}: give one, or the part of the"
                f" kept neurons that is precise, such as {self.coarse}@0.25"
            )
        if density == 1:
            return self.fine, 1.0
        of_fine = Fraction(self.coarse.bits) / Fraction(self.fine.bits)
        bytes_left = Fraction(repr(float(density)))
        if bytes_left <= of_fine:
            neurons = bytes_left / of_fine
            # A part such as 8/9 of 13,824 neurons is whole, and its float, as the decimals that it counts for, less.
            part = float(neurons)
            part = part if Fraction(repr(part)) >= neurons else math.nextafter(part, 1.0)
            return dataclasses.replace(self, share=0.0), part
        share = math.floor(100 * (bytes_left - of_fine) / (1 - of_fine)) / 100
        return dataclasses.replace(self, share=share), 1.0

    def check(self, width: int, embedding_width: int | None = None) -> None:
        """Raise `ValueError` unless both formats fit a model of this width."""
        self.fine.check(width, embedding_width)
        self.coarse.check(width)

    def counts(self, config: GriffinConfig, neurons: Sequence[int | Sequence[int]]) -> tuple[list[int], list[int]]:
        """How many neurons of each layer are precise, and how many of the kept ones are not.

        Args:
            config: how many neurons are kept.
            neurons: of each layer, or of the ranges that they lie in.

        Raises:
            ValueError: as `GriffinConfig.kept`, or as `precise`; or after rounding only some layers have neurons of the
                second format.
        """
        fewer = self.precise(config)
        if fewer is None:
            return [0] * len(neurons), list(config.kept(neurons))
        ranges = [tuple(layer) if isinstance(layer, Sequence) else (layer,) for layer in neurons]
        kept, precise = config.kept_of_ranges(ranges), fewer.kept_of_ranges(ranges)
        others = [tuple(k - few for k, few in zip(*layer, strict=True)) for layer in zip(kept, precise, strict=True)]
        without = next((layer for layer, rest in enumerate(others) if 0 in rest), None)
        if without is not None and any(map(any, others)):
            raise ValueError(
                f"rounded up to multiples of {config.round_to}, all neurons that layer {without} keeps would be in"
                f" {self.fine}, while other layers have some in {self.coarse}: give a smaller round_to, or another part"
            )
        return list(map(sum, precise)), list(map(sum, others))

    def masks_are_less(self, neurons: int, precise: int, others: int, sets: int) -> bool:
        """Whether a step reads no more if it reads all neurons in each format, once, than if it reads those that each
        sequence keeps.

        Args:
            neurons: of the full model.
            precise: of these by each sequence in the first format.
            others: likewise in the second one.
            sets: sequences that each keep neurons of their own.
        """
        fine, rough = self.fine.bits, self.coarse.bits
        all_of_them = neurons * ((fine if precise else 0) + (rough if others else 0))
        return sets > 1 and sets * (precise * fine + others * rough) >= all_of_them

    def precise(self, config: GriffinConfig) -> GriffinConfig | None:
        """The config that selects the precise ones of the neurons that `config` keeps; None if there are none.

        Raises:
            ValueError: there is no share; `at` a density there is.
        """
        if self.share is None:
            raise ValueError(f"how many neurons of {self} are precise depends on the density, which `at` takes")
        if self.share == 0:
            return None

        # Both count as the decimals that were written.
        share = Fraction(repr(float(self.share)))

        def part(density: float) -> float:
            return float(share * Fraction(repr(float(density))))

        density = config.density
        few = tuple(map(part, density)) if isinstance(density, Sequence) else part(density)
        return dataclasses.replace(config, density=few)


class MixedSizes:
    """Bytes of the kept rows in two formats, as `griffin_jax.model.sizes.Sizes` has them of one.

    Args:
        mixed: both formats.
        config: which neurons are kept.
        ranges: of each layer the neurons, or the ranges that they lie in.
        sizes: the parts of the model in a format, where each sequence has copies of its rows.
        refitted: whether rows are refitted, which are always copies.

    Attributes:
        precise: kept neurons of each layer in the first format.
        others: likewise in the second one.
        masked: whether decoding reads all rows of both formats, with masks, instead of copies for each sequence.
    """

    def __init__(
        self,
        mixed: MixedFormat,
        config: GriffinConfig,
        ranges: Sequence[int | Sequence[int]],
        sizes: Callable[[WeightFormat], Sizes],
        *,
        refitted: bool = False,
    ):
        self._fine, self._coarse = sizes(mixed.fine), sizes(mixed.coarse)
        self.precise, self.others = mixed.counts(config, ranges)
        neurons, precise, others = sum(self._fine.config.neurons), sum(self.precise), sum(self.others)
        sets, routed = self._fine.sets, self._fine.config.routing is not None
        fewer_bytes = not refitted and mixed.masks_are_less(neurons, precise, others, sets)
        self.masked = (routed and sets > 1) or fewer_bytes
        # All neurons in one of the formats are there already.
        self._copies = not self.masked and neurons not in (precise, others)

    @property
    def copied(self) -> tuple[int, int]:
        """Bytes of the copies in each format, next to both models."""
        if not self._copies:
            return 0, 0
        return self._fine.ff(self.precise), self._coarse.ff(self.others)

    @property
    def step(self) -> int:
        """Bytes that one decode step must read."""
        rest = self._fine.step(None) - self._fine.read(None)
        if self._copies:
            return rest + self._fine.read(self.precise) + self._coarse.read(self.others)
        fine = self._fine.read(None) if any(self.precise) else 0
        return rest + fine + (self._coarse.read(None) if any(self.others) else 0)


def coarse(model: Transformer, weights: WeightFormat = FEW_BITS) -> Transformer:
    """The same model with its feed-forward matrices in another format, and all other arrays those of the model.

    Args:
        model: the full one, in any format. It stays as it is.
        weights: an integer format.

    Raises:
        ValueError: groups of the format do not divide the model's rows, or the model is no full one.
    """
    check_whole(model)
    weights.check(model.config.width)
    few: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for layer in few.layers:
        round_feed_forward(layer.ff, weights)
    return few


def select_mixed(
    statistics: Statistics,
    config: GriffinConfig,
    mixed: MixedFormat,
    *,
    fuse: Fuse | None = None,
    magnitudes: tuple[Float[Array, "_f"], ...] | None = None,
    kept: ExpertNeurons | None = None,
) -> Chosen:
    """The neurons to keep in the first format, and those to keep in the second one.

    Args:
        statistics: of the prompts.
        config: how many neurons are kept in all, by method `topk`.
        mixed: which part of them is precise.
        fuse: as for `griffin_jax.select`.
        magnitudes: likewise.
        kept: the neurons that `griffin_jax.select` chose by these, if that is known already.

    Returns:
        The precise neurons and the others; None instead of no neuron.

    Raises:
        ValueError: as `griffin_jax.select`; or the method is not `topk`, whose neurons at a smaller density are among
            those at a larger one.
    """
    if config.method != "topk":
        raise ValueError(f'neurons are precise by their rank, which method "topk" gives; method is {config.method!r}')
    every = kept if kept is not None else jitted.select(statistics, config, fuse=fuse, magnitudes=magnitudes)
    fewer = mixed.precise(config)
    if fewer is None:
        return None, every
    precise = jitted.select(statistics, fewer, fuse=fuse, magnitudes=magnitudes)
    return precise, _others(every, precise) if precise.kept != every.kept else None


@programs.jit
def _others(kept: ExpertNeurons, precise: ExpertNeurons) -> ExpertNeurons:
    """The kept neurons that are not precise, which are as many for all sequences."""

    def indices(of_all: Bool[Array, "*b f"], of_precise: Bool[Array, "*b f"], k: int) -> Int[Array, "*b k"]:
        # The sort is stable, so that those of equal value stay in ascending order.
        return jnp.argsort(~(of_all & ~of_precise), axis=-1)[..., :k].astype(jnp.int32)

    layers = zip(kept.masks(), precise.masks(), kept.kept, precise.kept, strict=True)
    found = tuple(indices(a, p, k - few) for a, p, k, few in layers)
    shares = tuple(
        tuple(k - few for k, few in zip(*layer, strict=True)) for layer in zip(kept.shares, precise.shares, strict=True)
    )
    return dataclasses.replace(kept, indices=found, shares=shares)


def prune_mixed(
    model: Transformer,
    few: Transformer,
    precise: ExpertNeurons | None,
    others: ExpertNeurons | None,
    *,
    reuse: Transformer | None = None,
    refit: Reconstruction | None = None,
) -> Transformer:
    """The model that reads some neurons in its own format and others in fewer bits.

    Where all neurons are kept in fewer bits, it is `few`.

    Args:
        model: the full one.
        few: what `coarse` made of it.
        precise: the neurons to keep in the model's format; None for none.
        others: those to keep in that of `few`; None for none.
        reuse: an earlier result for as many neurons that is no longer needed, and whose memory is used.
        refit: what kept rows are fitted to, where all of them have one format.

    Raises:
        ValueError: as `griffin_jax.prune`, both are None, or rows in two formats are to be refitted.
    """
    if precise is None or others is None:
        only, experts = _only(model, few, precise, others)
        return only if _all_of(only, experts) else prune(only, experts, reuse=reuse, refit=refit)
    _check_one_format(refit)
    first, second = (None, None) if reuse is None else _groups(reuse)
    return _joined(prune(model, precise, reuse=first), prune(few, others, reuse=second))


def mask_mixed(
    model: Transformer,
    few: Transformer,
    precise: ExpertNeurons | None,
    others: ExpertNeurons | None,
    *,
    refit: Reconstruction | None = None,
) -> Transformer:
    """What `prune_mixed` gives, without a copy of any weight: for scoring given tokens.

    Raises:
        ValueError: as `griffin_jax.griffin.masked.mask`, there is no neuron, or rows in two formats are to be refitted.
    """
    if precise is None or others is None:
        only, experts = _only(model, few, precise, others)
        return only if _all_of(only, experts) else mask(only, experts, refit=refit)
    _check_one_format(refit)
    return _joined(mask(model, precise), mask(few, others))


def _only(
    model: Transformer, few: Transformer, precise: ExpertNeurons | None, others: ExpertNeurons | None
) -> tuple[Transformer, ExpertNeurons]:
    """The neurons that there are, where all have one format, and the model that holds them in it."""
    if precise is not None:
        return model, precise
    if others is not None:
        return few, others
    raise ValueError("a model keeps at least one neuron of each layer: give precise or other neurons")


def _all_of(model: Transformer, experts: ExpertNeurons) -> bool:
    """Whether these are all neurons of a model."""
    return experts.kept == model.neurons


def _check_one_format(refit: Reconstruction | None) -> None:
    if refit is not None:
        raise ValueError("rows in two formats are not refitted: give no refit, or neurons in one format only")


def _joined(model: Transformer, other: Transformer) -> Transformer:
    """The first model, whose feed-forward layers have the rows of the second one behind their own."""
    joined: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for number, (layer, more) in enumerate(zip(joined.layers, other.layers, strict=True)):
        for part, others in zip(layer.ff.parts(), more.ff.parts(), strict=True):
            rest: NeuronModule = jax.tree.map(lambda leaf: leaf, others)
            # The outputs of both are added up, and the bias is in one of them.
            rest.down_bias = None
            part.rest = nnx.data(rest)
        if model.config.routed(number) and layer.ff.mask is not None:
            sizes = model.config.neuron_ranges[number]
            layer.ff.mask = nnx.data(Mask(_side_by_side(layer.ff.mask.kept, more.ff.mask.kept, sizes)))
    return joined


def _side_by_side(
    first: Bool[Array, "*b f"], second: Bool[Array, "*b f"], sizes: tuple[int, ...]
) -> Bool[Array, "*b both"]:
    """Two masks of all neurons of a layer as one, range by range."""
    found, start = [], 0
    for size, alike in itertools.groupby(sizes):
        stop = start + len(list(alike)) * size
        both = [part[..., start:stop].reshape(*part.shape[:-1], -1, size) for part in (first, second)]
        found.append(jnp.concatenate(both, axis=-1).reshape(*first.shape[:-1], -1))
        start = stop
    return jnp.concatenate(found, axis=-1)


def with_each_group(mixed: Transformer, change: Callable[[Transformer], Transformer]) -> Transformer:
    """A model in two formats, of which each group of rows was changed as those of a model of its own."""
    first, second = map(change, _groups(mixed))
    for layer, more in zip(first.layers, second.layers, strict=True):
        for part, others in zip(layer.ff.parts(), more.ff.parts(), strict=True):
            part.rest = nnx.data(others)
    return first


def _groups(mixed: Transformer) -> tuple[Transformer, Transformer]:
    """The two models that `_joined` made one of."""
    first, second = (jax.tree.map(lambda leaf: leaf, mixed) for _ in range(2))
    for number, (layer, other) in enumerate(zip(first.layers, second.layers, strict=True)):
        for part in layer.ff.parts():
            part.rest = nnx.data(None)
        if mixed.config.routed(number):
            other.ff.experts = other.ff.experts.rest
            other.ff.shared = nnx.data(None if other.ff.shared is None else other.ff.shared.rest)
        else:
            other.ff = other.ff.rest
    return first, second
