"""The options of everything that goes beyond GRIFFIN: `Extensions`."""

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
    """The steps beyond GRIFFIN. By default, all of them are off.

    Attributes:
        quality: `griffin` is the paper's method, plus whatever is turned on below. `best` turns on everything that
            brings answers closer to the dense model's without making decoding slower: `budgets` and `refit`, which
            need a `prior`.
        prior: how the model's neurons behave in general text, as measured by `griffin-jax prior`; they are then chosen
            by both the prompt and the prior.
        prior_weight: weight of the prior's ranking of the neurons against that of the prompt, in [0, 1].
        budgets: let layers keep different numbers of neurons, in the proportions that the prior found best. The total
            stays the same.
        refit: refit the kept rows of the down projection, by ridge regression, so that they reproduce the output that
            all neurons had on the prompt. True, or the number of tokens to fit to: of each prompt, or of all prompts
            together if they share their neurons.
        ridge: strength of that regularisation; larger values change the rows less.
        calibration: also fit to the calibration rows of the prior, if it has any.
        calibration_weight: weight of the calibration rows in the fit, as a number of prompt tokens.
        healing: a LoRA adapter for the pruned model only, trained by `griffin-jax heal` to restore the predictions of
            the full model: a `griffin_jax.adapters.healing.Healing`.
        refresh_every: after every this many tokens, the full model reads them in one pass. This corrects the cache,
            writes the next token, and chooses (and refits) the neurons anew by the prompt and all of the answer so far.
            1 is dense decoding.
        speculative: speculative decoding. The pruned model drafts and the full model verifies, so answers are the full
            model's: the same tokens (up to rounding) at temperature 0, tokens of the same distribution above it. The
            number of tokens drafted for each pass of the full model, or True to adapt it to how many drafts have been
            accepted so far. See `griffin_jax.extensions.speculative`.
        lookup: with `speculative`, also draft by copying, which reads no weights: if the last tokens of the answer
            occur earlier in the prompt or the answer, what followed there is drafted. At density 1 and without
            `draft_weights`, all drafts are copies. See `griffin_jax.extensions.lookup`.
        draft_weights: format of the draft model's matrices, `int4` or `int8`, optionally with a group size (`int4:64`).
            They are held in addition to the model's own from the first such answer on. At density 1, the draft model is
            the full model in fewer bits. None drafts with the model's own matrices.
        mixed_weights: a format with fewer bits for the kept neurons that the prompt needs least, and the share that is
            spared: with `int4@0.25`, the best quarter of the kept neurons is read in the model's own format and the
            others in int4. Without a share, as in `int4`, the density is a budget of bytes: it first pays for reading
            as many neurons as possible in int4, and what is left after all of them upgrades the best to the model's own
            format. All neurons are held in that format in addition to the model, from the first such answer on. None
            reads every kept neuron in the model's own format. See `griffin_jax.extensions.mixed`.
        max_divergence: promise that predictions diverge from the dense model's by at most this many nats per token. A
            trial on the last tokens of the prompt picks the lowest of a few fixed densities (`density` is the lowest of
            them) that keeps the promise. If none does, or the prompt is too short for a trial, the answer is dense.
            None uses `density` as it is. See `griffin_jax.extensions.promise`.

    Raises:
        ValueError: a value is outside its range, or two options exclude each other.
    """

    quality: Quality = option(
        "griffin",
        "best is short for --budgets --refit with the --prior; without --prior the file next to the model is used",
        choices=get_args(Quality),
    )
    prior: Prior | None = option(
        None,
        "also choose neurons by what they do in general text, as griffin-jax prior has measured for this model",
        type=str,
        metavar="FILE",
    )
    prior_weight: float = option(DEFAULT_WEIGHT, "weight of the --prior against the prompt, in [0, 1]", metavar="W")
    budgets: bool = option(False, "let layers keep different shares of their neurons, as the --prior found best")
    refit: bool | int = option(
        False,
        "refit the kept rows of the down projection to the output of all neurons, on ROWS tokens of the prompt"
        f" (default: {DEFAULT_ROWS})",
        type=int,
        nargs="?",
        const=True,
        metavar="ROWS",
    )
    ridge: float = option(
        1.0, "strength of the refit's regularisation; larger values change the rows less", metavar="L"
    )
    calibration: bool = True
    calibration_weight: float = option(
        CALIBRATION_WEIGHT, "weight of the prior's general text in the refit, as a number of prompt tokens", metavar="A"
    )
    healing: Heals | None = option(
        None, "the adapter that griffin-jax heal has trained for the pruned model", type=str, metavar="FOLDER"
    )
    refresh_every: int | None = option(
        None,
        "after every N tokens, let the full model read them and choose the neurons to keep anew",
        type=int,
        metavar="N",
    )
    speculative: bool | int = option(
        False,
        "speculative decoding: the pruned model drafts DRAFTS tokens at a time and the full model verifies them, so the"
        f" answer is the full model's (default: adaptive, up to {MOST_DRAFTS}, or {MOST_WITH_COPIES} with --lookup)",
        type=int,
        nargs="?",
        const=True,
        metavar="DRAFTS",
    )

    lookup: bool = option(
        False,
        "with --speculative, also draft by copying what followed an earlier occurrence of the last tokens; with"
        " --density 1 and no --draft-weights, copies are the only drafts",
    )

    draft_weights: str | None = option(
        None, "draft with a second copy of the weights, in FORMAT: int4 or int8 (default: with the model's own)",
        type=str, metavar="FORMAT",
    )  # fmt: skip

    mixed_weights: str | None = option(
        None, "read the less important kept neurons in fewer bits, from a second copy of their weights: int4@0.25"
        " reads the best quarter in the model's format, the others in int4; int4 makes the density a budget of bytes,"
        " in which neurons are read in 4 bits before any is left out", type=str, metavar="FORMAT[@PART]",
    )  # fmt: skip

    max_divergence: float | None = option(
        None, "use the lowest of a few densities, from --density up, whose predictions at the end of the prompt diverge"
        " from the dense model's by at most NATS per token; the answer is dense if none does or the prompt is short",
        type=float, metavar="NATS",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_quality(self.quality)
        for name in ("budgets", "calibration", "lookup"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        if self.has_budgets and self.prior is None:
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
        if self.rows and share is not None:
            raise ValueError(
                'rows in two formats are not refitted: quality="griffin" and refit=False, or mixed_weights without a'
                " part, as int4, with which rows are refitted where they have one format"
            )
        for name in ("refresh_every", "speculative", "healing"):
            if getattr(self, name):
                raise ValueError(f"mixed_weights do not go with {name}: give one of the two")

    @classmethod
    def best(cls, prior: Prior) -> Extensions:
        """Everything that brings answers closer to the dense model's without making decoding slower.

        Args:
            prior: measured for this model, by `griffin-jax prior`.
        """
        return cls(quality="best", prior=prior)

    @property
    def rows(self) -> int:
        """The most tokens of a prompt that kept rows are refitted to; 0 without a refit."""
        return count_or(self.refit or self.quality == "best", DEFAULT_ROWS)

    @property
    def has_budgets(self) -> bool:
        """Whether layers keep different shares of their neurons: by `budgets`, or because `quality` is `best`."""
        return self.budgets or self.quality == "best"

    @property
    def drafts(self) -> int:
        """The most tokens drafted for each pass of the full model; 0 if the pruned model writes the answer."""
        return most_drafts(self.speculative, lookup=self.lookup)

    @property
    def drafter(self) -> WeightFormat | None:
        """The format of the draft model's matrices; None if they are the model's own."""
        return None if self.draft_weights is None else WeightFormat.parse(self.draft_weights)

    def mixed(self, weights: WeightFormat) -> MixedFormat | None:
        """The two formats of the kept neurons, given the model's own; None if all are read in that one."""
        return None if self.mixed_weights is None else MixedFormat(weights, *others_format(self.mixed_weights))

    def check(self, config: GriffinConfig) -> None:
        """Raise `ValueError` if these options do not go together with how the model is pruned."""
        if self.mixed_weights is not None and config.method != "topk":
            raise ValueError(
                f'neurons have more bits by their rank, which method "topk" gives; method is {config.method!r}'
            )
        if self.max_divergence is not None and isinstance(config.density, Sequence):
            raise ValueError("max_divergence takes one density as the least of all layers, and there is one for each")
        if self.prior is not None:
            check_fusion(config.method, self.prior_weight)

    def budgeted(self, config: GriffinConfig) -> GriffinConfig:
        """The config with one density for each layer, if `budgets` is on.

        Raises:
            ValueError: as `Prior.budgeted`.
        """
        return self.prior.budgeted(config) if self.has_budgets and self.prior is not None else config
