"""What `LLM.generate` returns."""

from __future__ import annotations

import dataclasses

from griffin_jax.extensions.promise import Promised
from griffin_jax.extensions.speculative import Drafting
from griffin_jax.griffin.neurons import ExpertNeurons


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """Answers to a batch of prompts.

    Attributes:
        texts: the answers without special tokens, cut before a stop string. Empty strings if the
            model has no tokenizer.
        tokens: their token ids, up to and with the one that ended them.
        prompt_tokens: length of every prompt, in tokens.
        finished: why each answer ended: `eos` (a token that ends answers), `stop` (a stop string) or `length`.
        kept: kept neurons of each layer.
        experts: which neurons those were, with refreshes the last ones; None if nothing was pruned.
        seconds: of `compile`, `route` (if there are adapters), `prefill`, `try` (the trials of `max_divergence`),
            `select`, `prune`, `decode` and, if there were any, of all that was done for each `refresh`. Compilation is
            counted apart from the phase in which it happened.
        decode_tokens_per_second: all rows together, without the first token of each, which comes from
            prefill, and without what a stop string cut off; refreshes take their part of the time. NaN if
            nothing was decoded.
        refreshes: how often the full model read what was written.
        drafting: how the drafts fared; None unless the answer was drafted.
        clusters: of the library that chose an adapter for each prompt; None if none did.
        promised: how the promise of `max_divergence` was kept; None if nothing was promised.
    """

    texts: list[str]
    tokens: list[list[int]]
    prompt_tokens: list[int]
    finished: list[str]
    kept: tuple[int, ...]
    experts: ExpertNeurons | None
    seconds: dict[str, float]
    decode_tokens_per_second: float
    refreshes: int = 0
    drafting: Drafting | None = None
    clusters: list[int] | None = None
    promised: Promised | None = None
