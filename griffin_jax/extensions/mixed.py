"""Beyond GRIFFIN: bits by importance. Kept neurons that a prompt needs most are read in all bits, others in fewer.

    precise, others = select_mixed(statistics, config, MixedFormat.parse("int8+int4@0.25"))
    pruned = prune_mixed(model, coarse(model), precise, others)

GRIFFIN knows two levels: a neuron is read or not. Reading its rows in fewer bits lies between them. Half of the loss
from rounding to 4 bits comes from the tenth of the neurons that take part most. `griffin-jax eval front` compares mixed
formats with uniform formats and with pruning, at the number of bytes that a token reads; docs/tried.md has other ways
to choose the precise neurons.

The two formats are written as `int8+int4@0.25`: the best quarter of the kept neurons is read in int8, the format of the
model, and the other kept neurons in int4. The former are called precise. Without a share, as in `int8+int4`, a density
counts bytes instead of neurons (`MixedFormat.at`): what pruning would save by leaving neurons out is first saved by
reading neurons in fewer bits, which loses far less.

Each feed-forward layer has two groups of rows (`FeedForward.rest`), each in its own format. Attention, embedding and
head are the model's. The rows in fewer bits are held for all neurons, in addition to the model, since any of them may
be chosen.
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
"""The default format of the other neurons, which are not precise."""

Chosen = tuple[ExpertNeurons | None, ExpertNeurons | None]
"""The neurons that are kept in the first format, and those that are kept in the second; None for no neurons."""


def others_format(text: str) -> tuple[WeightFormat, float | None]:
    """Parses the second format and the share of precise neurons, as in `int4@0.25`.

    Returns:
        The format of the kept neurons that are less important, and the share of the kept neurons that are not in it;
        None if no share is given, as in `int4`.

    Raises:
        ValueError: the format is not an integer format, or the share is not in [0, 1).
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
    """Two formats of feed-forward rows, and the share of the kept neurons that has the first one.

    Attributes:
        fine: the first format: that of the model's matrices, and so of the rows of the precise neurons.
        coarse: the second format: that of the rows of the other kept neurons.
        share: share of the kept neurons that are precise, in [0, 1); None for as many as the bytes of a density pay
            for, see `at`.

    Raises:
        ValueError: `share` is None, and the coarse format does not have fewer bits than the fine one.
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
        """Parses two formats, as in `int8+int4@0.25` or `int8+int4`, or a single format, as in `int8`.

        Raises:
            ValueError: the text is neither.
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
        """Translates a density into formats with a share, and the density of neurons to keep.

        With a share, both are returned as given. Without one, the density is a budget of bytes: the share that a step
        may read of the bytes of all rows in the first format. As many neurons as the budget pays for are kept in the
        second format. If it pays for all of them, the rest of the budget pays for a share of precise neurons, rounded
        down to hundredths. A density of 1 gives the first format alone.

        Args:
            density: the density, in (0, 1]; for formats with a share, it may also be one density for each layer.

        Returns:
            The formats with their share (or the first format alone), and the density of neurons to keep.

        Raises:
            ValueError: each layer has its own density, but the formats have no share.
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
            # A share such as 8/9 of 13,824 neurons is a whole number, but the decimals of its float may be less.
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
        """The numbers of kept neurons in each layer, first those that are precise, then the others.

        Args:
            config: how many neurons are kept.
            neurons: number of neurons of each layer, or of each range in it.

        Raises:
            ValueError: as for `GriffinConfig.kept` or `precise`; or after rounding, only some layers (or ranges) have
                neurons in the second format.
        """
        precise, others = self.counts_of_ranges(config, neurons)
        return list(map(sum, precise)), list(map(sum, others))

    def counts_of_ranges(
        self, config: GriffinConfig, neurons: Sequence[int | Sequence[int]]
    ) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """The numbers of kept neurons in each range of each layer, first those that are precise, then the others.

        Args:
            config: how many neurons are kept.
            neurons: as for `counts`.

        Raises:
            ValueError: as for `counts`.
        """
        fewer, kept = self.precise(config), config.kept_of_ranges(neurons)
        if fewer is None:
            return [(0,) * len(layer) for layer in kept], list(kept)
        precise = fewer.kept_of_ranges(neurons)
        others = [tuple(k - few for k, few in zip(*layer, strict=True)) for layer in zip(kept, precise, strict=True)]
        without = next((layer for layer, rest in enumerate(others) if 0 in rest), None)
        if without is not None and any(map(any, others)):
            raise ValueError(
                f"rounded up to multiples of {config.round_to}, all neurons that layer {without} keeps would be in"
                f" {self.fine}, while other layers have some in {self.coarse}: give a smaller round_to, or another part"
            )
        return list(precise), others

    def masks_are_less(self, neurons: int, precise: int, others: int, sets: int) -> bool:
        """Whether a decode step with masks reads no more bytes than one with copies of each sequence's kept rows.

        With masks, a step reads all neurons in each format that is used, once for all sequences.

        Args:
            neurons: number of neurons of the full model.
            precise: number of neurons that each sequence keeps in the first format.
            others: number of neurons that each sequence keeps in the second format.
            sets: number of sequences that each keep their own neurons.
        """
        fine, rough = self.fine.bits, self.coarse.bits
        all_of_them = neurons * ((fine if precise else 0) + (rough if others else 0))
        return sets > 1 and sets * (precise * fine + others * rough) >= all_of_them

    def precise(self, config: GriffinConfig) -> GriffinConfig | None:
        """The config that selects the precise neurons among those that `config` keeps; None if there are none.

        Raises:
            ValueError: there is no share; `at` gives one for a density.
        """
        if self.share is None:
            raise ValueError(f"how many neurons of {self} are precise depends on the density, which `at` takes")
        if self.share == 0:
            return None

        # Both are taken as the decimal numbers that were written.
        share = Fraction(repr(float(self.share)))

        def part(density: float) -> float:
            return float(share * Fraction(repr(float(density))))

        density = config.density
        few = tuple(map(part, density)) if isinstance(density, Sequence) else part(density)
        return dataclasses.replace(config, density=few)


class MixedSizes:
    """Bytes of the kept rows in two formats, as `griffin_jax.model.sizes.Sizes` counts those in one format.

    Args:
        mixed: the two formats.
        config: how many neurons are kept.
        ranges: number of neurons of each layer, or of each range in it.
        sizes: gives the sizes of the parts of the model in a format, for copies of rows for each sequence.
        refitted: whether rows are refitted; refitted rows are always copies.

    Attributes:
        precise: number of kept neurons in the first format, for each layer.
        others: number of kept neurons in the second format, for each layer.
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
        # If all neurons are kept in one of the formats, they are in memory already.
        self._copies = not self.masked and neurons not in (precise, others)

    @property
    def copied(self) -> tuple[int, int]:
        """Bytes of the copies of kept rows in each format, in addition to both models."""
        if not self._copies:
            return 0, 0
        return self._fine.ff(self.precise), self._coarse.ff(self.others)

    @property
    def step(self) -> int:
        """The bytes that one decode step must read."""
        rest = self._fine.step(None) - self._fine.read(None)
        if self._copies:
            return rest + self._fine.read(self.precise) + self._coarse.read(self.others)
        fine = self._fine.read(None) if any(self.precise) else 0
        return rest + fine + (self._coarse.read(None) if any(self.others) else 0)


def coarse(model: Transformer, weights: WeightFormat = FEW_BITS) -> Transformer:
    """A copy of the model with its feed-forward matrices in another format; it shares all other arrays with the model.

    Args:
        model: the full model, in any format. It stays as it is.
        weights: the integer format of the feed-forward matrices.

    Raises:
        ValueError: the format's groups do not divide the model's rows evenly; or the model is pruned for every
            sequence, masked or held in two groups of rows.
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
    """Choose the neurons to keep in the first format, and those to keep in the second.

    Args:
        statistics: statistics of the prompts.
        config: how many neurons are kept in all; the method must be `topk`.
        mixed: the share of the kept neurons that are precise.
        fuse: as for `griffin_jax.select`.
        magnitudes: as for `griffin_jax.select`.
        kept: the result of `griffin_jax.select` for the same arguments, if it is known already.

    Returns:
        The precise neurons and the others; None for no neurons.

    Raises:
        ValueError: as for `griffin_jax.select`; or the method is not `topk`. (Only `topk` guarantees that the neurons
            of a lower density are among those of a higher one.)
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
    """The kept neurons that are not precise; their number is the same for all sequences."""

    def indices(of_all: Bool[Array, "*b f"], of_precise: Bool[Array, "*b f"], k: int) -> Int[Array, "*b k"]:
        # The sort is stable, so indices of equal values stay in ascending order.
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
    """Prune a model to some neurons in its own format and others in fewer bits.

    If all neurons are kept in a single format, the result is `model` or `few` itself.

    Args:
        model: the full model.
        few: the same model in fewer bits, from `coarse`.
        precise: the neurons to keep in the model's format; None for none.
        others: the neurons to keep in the format of `few`; None for none.
        reuse: an earlier result for equal numbers of neurons that is no longer needed; its memory is used.
        refit: the refit of the kept rows, which must then all have one format.

    Raises:
        ValueError: as for `griffin_jax.prune`; or both sets of neurons are None, or rows in two formats are to be
            refitted.
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
    """A masked model that computes what the one from `prune_mixed` does, without a copy of any weight.

    It is for scoring given tokens. The arguments are those of `prune_mixed`.

    Raises:
        ValueError: as for `griffin_jax.griffin.masked.mask`; or both sets of neurons are None, or rows in two formats
            are to be refitted.
    """
    if precise is None or others is None:
        only, experts = _only(model, few, precise, others)
        return only if _all_of(only, experts) else mask(only, experts, refit=refit)
    _check_one_format(refit)
    return _joined(mask(model, precise), mask(few, others))


def _only(
    model: Transformer, few: Transformer, precise: ExpertNeurons | None, others: ExpertNeurons | None
) -> tuple[Transformer, ExpertNeurons]:
    """For kept neurons that all have one format: the model that holds them in that format, and the neurons."""
    if precise is not None:
        return model, precise
    if others is not None:
        return few, others
    raise ValueError("a model keeps at least one neuron of each layer: give precise or other neurons")


def _all_of(model: Transformer, experts: ExpertNeurons) -> bool:
    """Whether the expert neurons are all neurons of a model."""
    return experts.kept == model.neurons


def _check_one_format(refit: Reconstruction | None) -> None:
    if refit is not None:
        raise ValueError("rows in two formats are not refitted: give no refit, or neurons in one format only")


def _joined(model: Transformer, other: Transformer) -> Transformer:
    """The first model, with the feed-forward rows of the second as the second group of rows of each layer."""
    joined: Transformer = jax.tree.map(lambda leaf: leaf, model)
    for number, (layer, more) in enumerate(zip(joined.layers, other.layers, strict=True)):
        for part, others in zip(layer.ff.parts(), more.ff.parts(), strict=True):
            rest: NeuronModule = jax.tree.map(lambda leaf: leaf, others)
            # The outputs of both groups are added up, so only one of them may have the bias.
            rest.down_bias = None
            part.rest = nnx.data(rest)
        if model.config.routed(number) and layer.ff.mask is not None:
            sizes = model.config.neuron_ranges[number]
            layer.ff.mask = nnx.data(Mask(_side_by_side(layer.ff.mask.kept, more.ff.mask.kept, sizes)))
    return joined


def _side_by_side(
    first: Bool[Array, "*b f"], second: Bool[Array, "*b f"], sizes: tuple[int, ...]
) -> Bool[Array, "*b both"]:
    """Joins two masks over all neurons of a layer into one: within each range, the first mask and then the second."""
    found, start = [], 0
    for size, alike in itertools.groupby(sizes):
        stop = start + len(list(alike)) * size
        both = [part[..., start:stop].reshape(*part.shape[:-1], -1, size) for part in (first, second)]
        found.append(jnp.concatenate(both, axis=-1).reshape(*first.shape[:-1], -1))
        start = stop
    return jnp.concatenate(found, axis=-1)


def with_each_group(mixed: Transformer, change: Callable[[Transformer], Transformer]) -> Transformer:
    """Applies a change to each group of rows of a model in two formats, as if each group were a separate model."""
    first, second = map(change, _groups(mixed))
    for layer, more in zip(first.layers, second.layers, strict=True):
        for part, others in zip(layer.ff.parts(), more.ff.parts(), strict=True):
            part.rest = nnx.data(others)
    return first


def _groups(mixed: Transformer) -> tuple[Transformer, Transformer]:
    """The two models that `_joined` combined."""
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
