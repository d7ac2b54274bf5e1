"""select -> prune -> refit, in the one place where they are joined."""

from __future__ import annotations

import dataclasses

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
"""Per layer, relative activations of some tokens of every sequence."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Pruner:
    """Everything that decides which neurons a model keeps, and how they are refitted.

    A pytree, so that functions that prune can be jitted with it: another prior compiles nothing.

    Attributes:
        config: how many neurons are kept, and by which method.
        rows: tokens of a prompt that kept neurons are refitted to, at most (of all prompts together if they share
            their neurons); 0 for no refit.
        fuse: what the scores of the prompt are fused with.
        calibration: per layer, the rows of general text that are fitted to, too.
        ridge: of the fit.
        calibration_weight: tokens of a prompt that general text counts for.
        healing: what pruned models have in addition; None for nothing.
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
        """The pruner of these options.

        Raises:
            ValueError: they do not go together.
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

    def rows_of_each(self, batch: int, experts: ExpertNeurons | None = None) -> int:
        """Tokens of each sequence whose activations `prefill` must record.

        Args:
            batch: sequences.
            experts: neurons that are given; else they are shared as the config says.
        """
        together = self.config.shared if experts is None else experts.shared or experts[0].shape[0] == 1
        return rows_of_each(self.rows, batch, together)

    def select(
        self,
        model: Transformer,
        statistics: Statistics,
        seed: int | Int[Array, "*b"] = 0,
        magnitudes: tuple[Float[Array, "_f"], ...] | None = None,
    ) -> ExpertNeurons:
        """The neurons to keep, by what was recorded of the prompts.

        Args:
            model: the full one.
            statistics: of the prompts.
            seed: for the methods that draw: one, or one for each sequence.
            magnitudes: as for `griffin_jax.select`; those of the model if None.

        Raises:
            ValueError: as `griffin_jax.select`.
        """
        # Elsewhere the model would be one more input to check and hash.
        scored = model if self.config.method == "magnitude" else None
        if magnitudes is None:
            magnitudes = jitted.magnitudes_of(model)
        given = {"seed": seed, "fuse": self.fuse, "magnitudes": magnitudes}
        return jitted.select(statistics, self.config, model=scored, **given)

    def refit(self, rows: Rows) -> Reconstruction | None:
        """What the kept rows are fitted to; None without a refit, or without rows."""
        if not rows or not self.rows:
            return None
        return Reconstruction(rows, self.ridge, self.calibration, self.calibration_weight)

    def prune(
        self, model: Transformer, experts: ExpertNeurons, rows: Rows = (), *, reuse: Transformer | None = None
    ) -> Transformer:
        """The model that keeps these neurons, refitted to `rows` if the options say so.

        Where each sequence keeps neurons of its own, and these are as many together as all, the model is masked: its
        steps read no more, and nothing is copied. Rows that are refitted are always copies.

        Args:
            model: the full one.
            experts: which neurons.
            rows: of the prompts, `rows_of_each` of every sequence.
            reuse: as for `griffin_jax.prune`.

        Raises:
            ValueError: as `griffin_jax.prune`.
        """
        refit = self.refit(rows)
        sets = _sets(model, experts)
        if model.config.routing is not None and sets > 1:
            # Each sequence would need a copy of all experts.
            return self._healed(mask(model, experts, refit=refit), experts)
        if refit is None and masks_are_less(sum(model.neurons), sum(experts.kept), sets):
            return self._healed(mask(model, experts), experts)
        if reuse is not None and any(layer.ff.mask is not None for layer in reuse.layers):
            reuse = None
        return self._healed(prune(model, experts, reuse=reuse, refit=refit), experts)

    def mask(self, model: Transformer, experts: ExpertNeurons, rows: Rows = ()) -> Transformer:
        """What `prune` gives, without a copy of any weight: for scoring given tokens, see `griffin_jax.griffin.masked`.

        Args:
            model: the full one.
            experts: which neurons.
            rows: as for `prune`.

        Raises:
            ValueError: as `griffin_jax.griffin.masked.mask`.
        """
        return self._healed(mask(model, experts, refit=self.refit(rows)), experts)

    def select_mixed(
        self,
        model: Transformer,
        statistics: Statistics,
        formats: MixedFormat,
        kept: ExpertNeurons | None = None,
    ) -> Chosen:
        """The neurons to keep in each of two formats, by what was recorded of the prompts.

        Args:
            model: the full one.
            statistics: of the prompts.
            formats: both, and which part of the kept neurons is precise.
            kept: what `select` gave for them, where it is known.

        Raises:
            ValueError: as `griffin_jax.extensions.mixed.select_mixed`.
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
        """The model that reads these neurons in two formats, without a healing.

        Kept rows are refitted, if the options say so, where all of them are in fewer bits. Where each sequence keeps
        neurons of its own, the model is masked as in `prune`, if its steps read no more of both formats then.

        Args:
            model: the full one.
            few: what `griffin_jax.extensions.mixed.coarse` made of it.
            formats: both.
            chosen: what `select_mixed` gave.
            rows: of the prompts, `rows_of_each` of every sequence.
            masked: whether it is for scoring given tokens, and no weights are copied.
            reuse: as for `griffin_jax.extensions.mixed.prune_mixed`.

        Raises:
            ValueError: as `griffin_jax.extensions.mixed.prune_mixed`.
        """
        refit = self.refit(rows) if chosen[0] is None else None
        sets = _sets(model, next(each for each in chosen if each is not None))
        precise, others = (0 if each is None else sum(each.kept) for each in chosen)
        # Each sequence would need a copy of all routed experts.
        masked |= model.config.routing is not None and sets > 1
        masked |= refit is None and formats.masks_are_less(sum(model.neurons), precise, others, sets)
        if masked:
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
        """Both steps: the model that reads the neurons which the prompts choose in two formats."""
        chosen = self.select_mixed(model, statistics, formats)
        return self.prune_mixed(model, few, formats, chosen, rows, masked=masked)

    def _healed(self, pruned: Transformer, experts: ExpertNeurons) -> Transformer:
        return pruned if self.healing is None else self.healing.heal(pruned, experts)

    def scorer(
        self, model: Transformer, statistics: Statistics, rows: Rows = (), *, seed: int | Int[Array, "*b"] = 0
    ) -> Transformer:
        """What scores given tokens as the model would that keeps the neurons which the prompts choose."""
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
        """Both steps: the neurons that the prompts choose, and the model that keeps them."""
        experts = self.select(model, statistics, seed)
        return experts, self.prune(model, experts, rows, reuse=reuse)


def _sets(model: Transformer, experts: ExpertNeurons) -> int:
    """How many sets of kept neurons each device has: one for each of its sequences, or one for all of them."""
    return 1 if experts.shared else local_sequences(mesh_of(model.embedding[...]), experts[0].shape[0])
