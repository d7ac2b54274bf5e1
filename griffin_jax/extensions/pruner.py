"""`Pruner`: the one place where select, prune, refit, healing and formats of rows are joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jaxtyping import Array, Float, Int

from griffin_jax.extensions.config import Extensions
from griffin_jax.extensions.healing import Heals
from griffin_jax.extensions.mixed import Chosen, MixedFormat, mask_mixed, prune_mixed, select_mixed
from griffin_jax.extensions.prior import Fusion
from griffin_jax.extensions.reconstruction import CALIBRATION_WEIGHT, Reconstruction, rows_of_each
from griffin_jax.generation import jitted
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.masked import mask
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.griffin.prune import prune
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.sizes import masks_are_less
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import local_sequences, mesh_of

Rows = tuple[Float[Array, "b _r _f"], ...]
"""The relative activations of R tokens of every sequence, (B, R, F) for each layer, as in `Prefilled.rows`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Pruner:
    """Everything that decides which neurons a model keeps and how their rows are refitted.

    It is a pytree, so functions that prune can be jitted with it, and another prior compiles nothing.

    Attributes:
        config: how many neurons are kept, and by which method they are chosen.
        rows: the largest number of tokens of a prompt (of all prompts together if they share their neurons) that the
            kept rows are refitted to; 0 for no refit.
        fuse: combines the scores of the prompt with those of a prior; None to use the prompt's alone.
        calibration: rows that stand for general text, to which the kept rows are fitted as well, (C, F) for each
            layer; empty for none.
        ridge: strength of the regularisation of the fit.
        calibration_weight: weight of general text in the fit, as a number of prompt tokens.
        healing: the adapter that pruned models get; None for none.
    """

    config: GriffinConfig = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(default=0, metadata={"static": True})
    fuse: Fusion | None = None
    calibration: tuple[Float[Array, "_c _f"], ...] = ()
    ridge: float = 1.0
    calibration_weight: float = CALIBRATION_WEIGHT
    healing: Heals | None = None

    @classmethod
    def of(cls, config: GriffinConfig, extensions: Extensions = Extensions()) -> Pruner:
        """The pruner for these options.

        Args:
            config: the options of GRIFFIN.
            extensions: the options of the steps beyond GRIFFIN.

        Raises:
            ValueError: the options exclude each other.
        """
        extensions.check(config)
        prior = extensions.prior
        return cls(
            extensions.budgeted(config),
            extensions.rows,
            None if prior is None else prior.fusion(extensions.prior_weight),
            prior.rows if prior is not None and extensions.rows and extensions.calibration else (),
            extensions.ridge,
            extensions.calibration_weight,
            extensions.healing,
        )

    def shares(self, experts: ExpertNeurons | None) -> bool:
        """Whether the sequences of a batch share their neurons: by these experts, or by the config if None."""
        return self.config.shared if experts is None else experts.shared or experts[0].shape[0] == 1

    def rows_of_each(self, batch: int, experts: ExpertNeurons | None = None) -> int:
        """The number of tokens of each sequence whose relative activations `prefill` must record, its `rows`.

        Args:
            batch: number of sequences.
            experts: the expert neurons, if they are known already. If None, the config says whether the batch shares
                its neurons.
        """
        return rows_of_each(self.rows, batch, self.shares(experts))

    def select(
        self,
        model: Transformer,
        statistics: Statistics,
        seed: int | Int[Array, "*b"] = 0,
        magnitudes: tuple[Float[Array, "_f"], ...] | None = None,
    ) -> ExpertNeurons:
        """Choose the neurons to keep by the statistics of the prompts.

        Args:
            model: the full model.
            statistics: statistics of the prompts.
            seed: seed for the methods that draw: one, or one for each sequence, (B,).
            magnitudes: as for `griffin_jax.select`; computed from the model if None.

        Raises:
            ValueError: as for `griffin_jax.select`.
        """
        # For other methods the model would only be one more input to check and hash.
        scored = model if self.config.method == "magnitude" else None
        if magnitudes is None:
            magnitudes = jitted.magnitudes_of(model)
        given = {"seed": seed, "fuse": self.fuse, "magnitudes": magnitudes}
        return jitted.select(statistics, self.config, model=scored, **given)

    def refit(self, rows: Rows) -> Reconstruction | None:
        """The refit of the kept rows to these rows; None if refits are off or there are no rows."""
        if not rows or not self.rows:
            return None
        return Reconstruction(rows, self.ridge, self.calibration, self.calibration_weight)

    def prune(
        self, model: Transformer, experts: ExpertNeurons, rows: Rows = (), *, reuse: Transformer | None = None
    ) -> Transformer:
        """Prune the model to the given neurons, and refit it to `rows` if the options say so.

        The model is masked instead of pruned if each sequence keeps its own neurons and together they keep at least as
        many as there are: a step then reads no more, and nothing is copied. Refitted rows are always copies, except
        that a model with routed experts is masked for every batch whose sequences keep different neurons.

        Args:
            model: the full model.
            experts: the neurons to keep.
            rows: relative activations of the prompts, from `prefill` with `rows_of_each` tokens of every sequence.
            reuse: as for `griffin_jax.prune`.

        Raises:
            ValueError: as for `griffin_jax.prune`.
        """
        refit = self.refit(rows)
        if masks(model, [sum(experts.kept)], _sets(model, experts), refitted=refit is not None):
            return self._healed(mask(model, experts, refit=refit), experts)
        if reuse is not None and any(layer.ff.mask is not None for layer in reuse.layers):
            reuse = None
        return self._healed(prune(model, experts, reuse=reuse, refit=refit), experts)

    def mask(self, model: Transformer, experts: ExpertNeurons, rows: Rows = ()) -> Transformer:
        """A masked model that computes what the one from `prune` does, without a copy of any weight.

        It is for scoring given tokens, see `griffin_jax.griffin.masked`.

        Args:
            model: the full model.
            experts: the neurons to keep.
            rows: as for `prune`.

        Raises:
            ValueError: as for `griffin_jax.griffin.masked.mask`.
        """
        return self._healed(mask(model, experts, refit=self.refit(rows)), experts)

    def select_mixed(
        self,
        model: Transformer,
        statistics: Statistics,
        formats: MixedFormat,
        kept: ExpertNeurons | None = None,
    ) -> Chosen:
        """Choose the neurons to keep in each of two formats by the statistics of the prompts.

        Args:
            model: the full model.
            statistics: statistics of the prompts.
            formats: the two formats, and the share of the kept neurons that has the first.
            kept: the result of `select` for these statistics, if it is known already.

        Raises:
            ValueError: as for `griffin_jax.extensions.mixed.select_mixed`.
        """
        magnitudes = jitted.magnitudes_of(model)
        return select_mixed(statistics, self.config, formats, fuse=self.fuse, magnitudes=magnitudes, kept=kept)

    def prune_mixed(
        self,
        model: Transformer,
        few: Transformer,
        formats: MixedFormat,
        chosen: Chosen,
        rows: Rows = (),
        *,
        masked: bool = False,
        reuse: Transformer | None = None,
    ) -> Transformer:
        """Prune the model to neurons in two formats, without a healing.

        If the options ask for a refit, kept rows are refitted only if all of them are in the format of fewer bits. If
        each sequence keeps its own neurons, the model is masked as in `prune` when a step then reads no more bytes in
        both formats together.

        Args:
            model: the full model.
            few: the same model with feed-forward matrices in fewer bits, from `griffin_jax.extensions.mixed.coarse`.
            formats: the two formats.
            chosen: the neurons in each format, from `select_mixed`.
            rows: relative activations of the prompts, from `prefill` with `rows_of_each` tokens of every sequence.
            masked: whether to mask the model in any case, so that no weights are copied; for scoring given tokens.
            reuse: as for `griffin_jax.extensions.mixed.prune_mixed`.

        Raises:
            ValueError: as for `griffin_jax.extensions.mixed.prune_mixed`.
        """
        refit = self.refit(rows) if chosen[0] is None else None
        sets = _sets(model, next(each for each in chosen if each is not None))
        counts = [0 if each is None else sum(each.kept) for each in chosen]
        if masked or masks(model, counts, sets, formats, refitted=refit is not None):
            return mask_mixed(model, few, *chosen, refit=refit)
        return prune_mixed(model, few, *chosen, reuse=reuse, refit=refit)

    def mix(
        self,
        model: Transformer,
        few: Transformer,
        formats: MixedFormat,
        statistics: Statistics,
        rows: Rows = (),
        *,
        masked: bool = False,
    ) -> Transformer:
        """Both steps: select the neurons in two formats by the prompts, and prune the model to them."""
        chosen = self.select_mixed(model, statistics, formats)
        return self.prune_mixed(model, few, formats, chosen, rows, masked=masked)

    def _healed(self, pruned: Transformer, experts: ExpertNeurons) -> Transformer:
        return pruned if self.healing is None else self.healing.heal(pruned, experts)

    def scorer(
        self, model: Transformer, statistics: Statistics, rows: Rows = (), *, seed: int | Int[Array, "*b"] = 0
    ) -> Transformer:
        """Both steps without copies, for scoring given tokens: select neurons by the prompts, and mask the model."""
        return self.mask(model, self.select(model, statistics, seed), rows)

    def __call__(
        self,
        model: Transformer,
        statistics: Statistics,
        rows: Rows = (),
        *,
        seed: int | Int[Array, "*b"] = 0,
        reuse: Transformer | None = None,
    ) -> tuple[ExpertNeurons, Transformer]:
        """Both steps: select neurons by the prompts, and prune the model to them."""
        experts = self.select(model, statistics, seed)
        return experts, self.prune(model, experts, rows, reuse=reuse)


def masks(
    model: Transformer,
    counts: Sequence[int],
    sets: int,
    formats: MixedFormat | None = None,
    *,
    refitted: bool = False,
) -> bool:
    """Whether sequences with neurons of their own get masks of the model's rows instead of copies of those they keep.

    Args:
        model: the full model.
        counts: number of neurons that a sequence keeps; if there are two formats, the number in each.
        sets: number of sequences on a device that keep their own neurons; 1 if all keep the same.
        formats: the two formats of the kept neurons; None if all have the model's.
        refitted: whether the kept rows are refitted to the prompts.
    """
    # Otherwise each sequence would need a copy of all routed experts.
    if model.config.routing is not None and sets > 1:
        return True
    if refitted:
        return False
    neurons = sum(model.neurons)
    if formats is None:
        return masks_are_less(neurons, sum(counts), sets)
    precise, others = counts
    return formats.masks_are_less(neurons, precise, others, sets)


def _sets(model: Transformer, experts: ExpertNeurons) -> int:
    """The number of sets of kept neurons on each device: one for each of its sequences, or one for all of them."""
    return 1 if experts.shared else local_sequences(mesh_of(model.embedding[...]), experts[0].shape[0])
