"""What goes beyond GRIFFIN, in one place: `Extensions`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

from griffin_jax.extensions.drafter import draft_format
from griffin_jax.extensions.healing import Heals
from griffin_jax.extensions.mixed import MixedFormat, others_format
from griffin_jax.extensions.prior import DEFAULT_WEIGHT, Prior, check_fusion, check_weight
from griffin_jax.extensions.reconstruction import CALIBRATION_WEIGHT, DEFAULT_ROWS, check_ridge
from griffin_jax.extensions.speculative import MOST_DRAFTS, MOST_WITH_COPIES, most_drafts
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.model.weights import WeightFormat
from griffin_jax.utils.options import count_or, flag, number, option, plain, whole

Quality = Literal["griffin", "best"]


def check_quality(quality: object) -> None:
    """Raise `ValueError` unless this is a `Quality`."""
    if quality not in get_args(Quality):
        raise ValueError(f"quality must be one of {', '.join(get_args(Quality))}, got {quality!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class Extensions:
    """The steps beyond GRIFFIN; without any argument, none of them.

    Attributes:
        quality: `griffin` is the paper's method with what is turned on below; `best` turns on everything that brings
            answers closer to the dense model's at the same cost of decoding: `budgets` and `refit`, with a `prior`.
        prior: choose neurons also by what they do in general text, which `griffin-jax prior` has measured for this
            model.
        prior_weight: of the prior's rank, in [0, 1].
        budgets: as many neurons in all, but each layer keeps a share of its own, which the prior found best.
        refit: refit the kept neurons to what the prompt had from all of them. True, or how many tokens of each prompt
            to fit to (or of all prompts together, if they share their neurons).
        ridge: of that fit; the larger, the less it changes.
        calibration: fit to the prior's calibration rows, too, if there are any.
        calibration_weight: tokens of a prompt that these count for.
        healing: an adapter that only the pruned model has, which was trained for it to predict what the full one does:
            a `griffin_jax.adapters.healing.Healing`, from `griffin-jax heal`.
        refresh_every: after every so many tokens the full model reads them in one pass, which corrects the cache and
            writes the next token, and neurons are chosen (and refitted) anew, by the prompt and all of the answer so
            far. 1 is dense decoding.
        speculative: the pruned model only drafts, and the full model decides, so that answers are those of the full
            model: the same tokens (up to rounding) if the temperature is 0, above it tokens of the same distribution.
            How many tokens are drafted for each pass of the full model; or True for as many as are worth it, by what
            was accepted so far. See `griffin_jax.extensions.speculative`.
        lookup: with speculative, drafts are also copied, which reads no weights: where the last tokens of an answer
            stand earlier in it or in the prompt, what came next there. At density 1 and without `draft_weights` all
            drafts are. See `griffin_jax.extensions.lookup`.
        draft_weights: what the drafting model's matrices are stored as, `int4` or `int8`, also with a group. They are
            held in addition to the model's, from the first such answer on, and a draft reads no others: at density 1 it
            is the full model in fewer bits that drafts. None for those of the model.
        mixed_weights: how the kept neurons that the prompt needs least are stored, and the part that is not: in
            `int4@0.25` the best quarter of the kept neurons has the model's weights, the others int4. Without a part,
            as in `int4`, a density is one of bytes: as many neurons as it pays for are read in int4, and with what is
            left once all of them are, the best have the model's weights. All neurons are held in that format in
            addition to the model, from the first such answer on. See `griffin_jax.extensions.mixed`. None for the
            model's weights for all of them.
        max_divergence: of a few fixed densities, of which `density` is the least, take the least one whose predictions
            diverge by no more than this from the dense model's, in nats per token, as far as a trial on the last tokens
            of the prompt can tell; all neurons if none does, or if the prompt is too short for a trial. See
            `griffin_jax.extensions.promise`. None for `density` whatever it loses.

    Raises:
        ValueError: a value is outside its range, or two do not go together.
    """

    quality: Quality = option(
        "griffin",
        "best: the same as --budgets --refit, with the --prior (by default the file next to the model)",
        choices=get_args(Quality),
    )
    prior: Prior | None = option(
        None, "choose also by general text: what griffin-jax prior measured for this model", type=str, metavar="FILE"
    )
    prior_weight: float = option(DEFAULT_WEIGHT, "of the prior, in [0, 1]", metavar="W")
    budgets: bool = option(False, "each layer keeps a share of its own, which the prior found best")
    refit: bool | int = option(
        False,
        "refit the kept neurons to what the prompt had from all of them, at ROWS of its tokens"
        f" (default: {DEFAULT_ROWS})",
        type=int,
        nargs="?",
        const=True,
        metavar="ROWS",
    )
    ridge: float = option(1.0, "of the refit: the larger, the less it changes", metavar="L")
    calibration: bool = True
    calibration_weight: float = option(
        CALIBRATION_WEIGHT, "tokens of the prompt that general text counts for in the refit", metavar="A"
    )
    healing: Heals | None = option(
        None, "give the pruned model the adapter that griffin-jax heal trained for it", type=str, metavar="FOLDER"
    )
    refresh_every: int | None = option(
        None,
        "after every N tokens read them with the full model, and choose the neurons to keep anew",
        type=int,
        metavar="N",
    )
    speculative: bool | int = option(
        False,
        "answer as the full model does, which decides about DRAFTS tokens of the pruned one at a time (default: as many"
        f" as are worth it, up to {MOST_DRAFTS}, with --lookup {MOST_WITH_COPIES})",
        type=int,
        nargs="?",
        const=True,
        metavar="DRAFTS",
    )

    lookup: bool = option(
        False, "with --speculative, copy drafts from where the last tokens stand in the prompt or the answer"
    )

    draft_weights: str | None = option(
        None, "draft with a copy of the weights in FORMAT, int4 or int8 (default: with those of the model)",
        type=str, metavar="FORMAT",
    )  # fmt: skip

    mixed_weights: str | None = option(
        None, "read the kept neurons that the prompt needs least in fewer bits: with int4@0.25 the best quarter of them"
        " has the model's weights, the others int4; with int4 the density counts bytes, and as many neurons are read as"
        " they pay for", type=str, metavar="FORMAT[@PART]",
    )  # fmt: skip

    max_divergence: float | None = option(
        None, "take the least of a few densities, from --density on, that diverges from the dense model by at most NATS"
        " per token at the end of the prompt, and the dense model if none does", type=float, metavar="NATS",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_quality(self.quality)
        for name in ("budgets", "calibration", "lookup"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        if self.quality == "best":
            object.__setattr__(self, "budgets", True)
            object.__setattr__(self, "refit", self.refit or True)
        if self.budgets and self.prior is None:
            raise ValueError('quality="best" and budgets need a prior, which griffin-jax prior measures for a model')
        for name, what in (("refit", "rows"), ("speculative", "drafts")):
            value = plain(getattr(self, name))
            if not isinstance(value, bool):
                value = whole(name, value, 0, also="True, False or ", of=what)
            object.__setattr__(self, name, value)
        ridge, weight = check_ridge(self.ridge, self.calibration_weight)
        object.__setattr__(self, "ridge", ridge)
        object.__setattr__(self, "calibration_weight", weight)
        object.__setattr__(self, "prior_weight", check_weight(self.prior_weight))
        if self.refresh_every is not None:
            object.__setattr__(self, "refresh_every", whole("refresh_every", self.refresh_every, 1, of="tokens"))
            if self.speculative:
                raise ValueError(
                    "speculative decoding needs no refresh, its cache is the full model's: refresh_every=None"
                )

        if self.lookup and not self.speculative:
            raise ValueError("lookup is for drafts, and nothing is drafted: speculative=True")
        if self.draft_weights is not None:
            object.__setattr__(self, "draft_weights", str(draft_format(self.draft_weights)))
            if not self.speculative:
                raise ValueError("draft_weights are for drafts, and nothing is drafted: speculative=True")
        if self.mixed_weights is not None:
            self._check_mixed(self.mixed_weights)
        if self.max_divergence is not None:
            found = number("max_divergence", self.max_divergence, "above 0 nats per token", lambda nats: nats > 0)
            object.__setattr__(self, "max_divergence", found)
            if self.speculative:
                raise ValueError(
                    "speculative answers are the dense model's, and diverge by nothing: max_divergence=None"
                )
            if self.mixed_weights is not None and others_format(self.mixed_weights)[1] is not None:
                raise ValueError(
                    "with max_divergence a density is taken, which mixed_weights count bytes by: give them without a"
                    " part, as int4"
                )
            if self.healing is not None:
                raise ValueError("a trial is of models without a healing: give healing or max_divergence, not both")

    def _check_mixed(self, text: str) -> None:
        try:
            _, share = others_format(text)
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"mixed_weights are {text!r}; the first format is the model's, and give for example int4@0.25: {error}"
            ) from error
        if self.refit and share is not None:
            raise ValueError(
                'rows in two formats are not refitted: quality="griffin" and refit=False, or mixed_weights without a'
                " part, as int4, with which rows are refitted where they have one format"
            )
        for name in ("refresh_every", "speculative", "healing"):
            if getattr(self, name):
                raise ValueError(f"mixed_weights do not go with {name}: give one of the two")

    @classmethod
    def best(cls, prior: Prior) -> Extensions:
        """All that brings answers closer to the dense model's at the same cost of decoding.

        Args:
            prior: of the model.
        """
        return cls(quality="best", prior=prior)

    @property
    def rows(self) -> int:
        """Tokens of a prompt that kept neurons are refitted to, at most; 0 if they are not."""
        return count_or(self.refit, DEFAULT_ROWS)

    @property
    def drafts(self) -> int:
        """Tokens that are drafted for each pass of the full model, at most; 0 if the pruned model writes the answer."""
        return most_drafts(self.speculative, lookup=self.lookup)

    @property
    def drafter(self) -> WeightFormat | None:
        """What the drafting model's matrices are stored as; None where they are the model's."""
        return None if self.draft_weights is None else WeightFormat.parse(self.draft_weights)

    def mixed(self, weights: WeightFormat) -> MixedFormat | None:
        """The formats of the kept neurons of a model that is stored in this one; None where all of them have it."""
        return None if self.mixed_weights is None else MixedFormat(weights, *others_format(self.mixed_weights))

    def check(self, config: GriffinConfig) -> None:
        """Raise `ValueError` unless these go together with how a model is pruned."""
        if self.mixed_weights is not None and config.method != "topk":
            raise ValueError(
                f'neurons have more bits by their rank, which method "topk" gives; method is {config.method!r}'
            )
        if self.max_divergence is not None and isinstance(config.density, Sequence):
            raise ValueError("max_divergence takes one density as the least of all layers, and there is one for each")
        if self.prior is not None:
            check_fusion(config.method, self.prior_weight)

    def budgeted(self, config: GriffinConfig) -> GriffinConfig:
        """The config with the prior's budgets, if they are wanted.

        Raises:
            ValueError: as `Prior.budgeted`.
        """
        return self.prior.budgeted(config) if self.budgets and self.prior is not None else config
