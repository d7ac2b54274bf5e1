"""The memory that work needs at most, predicted from the architecture before anything is loaded or computed.

    needs = Needs(config, Precision.of("float32"))
    needs.generation(batch=8, prompt=512, new=128, kept=kept)    {"weights": ..., "kept neurons": ..., ...}

Each method goes through the phases of its work and gives the parts of the phase that needs most; their sum is an upper
bound. What is held for long (weights, kept rows, cache, statistics) is counted; what XLA needs while a program runs is
modelled by what its CPU compiler (jaxlib 0.10) was seen to allocate for models of several shapes: it keeps the scores
of all blocks of queries of a layer, and the intermediates of one layer, at a time.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh

from griffin_jax.adapters.adapter import Adapter
from griffin_jax.adapters.library import Library
from griffin_jax.checkpoints.loading import open_source, parse_dtype, parse_weights, precision_of
from griffin_jax.checkpoints.sources import loading_bytes
from griffin_jax.extensions.drafter import BLOCK, drafter_bytes
from griffin_jax.extensions.mixed import MixedFormat, MixedSizes
from griffin_jax.extensions.promise import ENDS
from griffin_jax.factor.config import TOKENS, FactorTraining
from griffin_jax.generation.padding import DEFAULT_CHUNK, bucket, chunk_count
from griffin_jax.generation.scoring import LOGITS_BYTES
from griffin_jax.griffin.config import GriffinConfig
from griffin_jax.llm.request import AdapterLike
from griffin_jax.model.attention import QUERY_BLOCK
from griffin_jax.model.config import ModelConfig
from griffin_jax.model.products import BLOCK_ROWS
from griffin_jax.model.sharding import HEADS, VOCABULARY, check_mesh, divided, with_kv_copies, with_whole_experts
from griffin_jax.model.sizes import Sizes, held_bytes, local_arrays
from griffin_jax.model.transformer import Transformer
from griffin_jax.model.weights import Precision, WeightFormat
from griffin_jax.parallel.mesh import MODEL_AXIS, axis_size, local_sequences, mesh_of
from griffin_jax.utils import memory

Parts = dict[str, int]
"""Bytes that are needed together, by what they are for."""

Mixed = tuple[MixedFormat, GriffinConfig]
"""Two formats of the kept neurons, and which are kept."""

COMPILER_BYTES_PER_LAYER = 12 << 20
"""Host memory for compiling and keeping the programs of an answer, for each layer of a model. An evaluation has twice
as many programs, and an update with its backward pass is as large as these."""

ADDED = 4
"""Numbers that are made of each number of an adapter, at most: linear layers that are one matrix here have columns of
their own for the rows of all of them, and pruning gathers some of these rows."""

STATES = 3
"""Numbers that AdamW holds of each that is trained: itself and two moments. While it makes an update, gradients and
updates come to them."""

TOKENIZER_BYTES = 1500
"""Host memory of a tokenizer for each token of its vocabulary, with the libraries that read it."""


@dataclasses.dataclass(frozen=True)
class Continued:
    """How a prompt is read by what goes on with a cache, such as a chat.

    Attributes:
        read: tokens that are read at a time, at most, padding included.
        slots: of the cache, all of which these tokens attend to.
        there: slots that it has already, before it grows; 0 if it is a new one.
    """

    read: int
    slots: int
    there: int = 0


@dataclasses.dataclass(frozen=True)
class Needs:
    """What work with a model needs on each of its devices, in bytes.

    Attributes:
        config: the model.
        precision: how the model computes, and how its matrices are stored.
        mesh: what the model is divided among; None for one device.
        platform: `cpu`, or another for an accelerator, whose host is not counted.
        loaded: whether the weights are there already, and so not needed any more.
    """

    config: ModelConfig
    precision: Precision
    mesh: Mesh | AbstractMesh | None = None
    platform: str = "cpu"
    loaded: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the computation, and so of a key or value."""
        return self.precision.itemsize

    @property
    def _on_cpu(self) -> bool:
        return self.platform == "cpu"

    @property
    def _parts(self) -> int:
        return axis_size(self.mesh, MODEL_AXIS)

    def in_memory(self, stored: int, weights: WeightFormat) -> int:
        """Bytes that numbers of a format take in memory: on CPUs those of 4 bits are held in a byte each."""
        return 2 * stored if self._on_cpu and weights.dtype == "int4" else stored

    def drafter(self, weights: WeightFormat) -> int:
        """Bytes of what a drafter in this format holds in addition to the model."""
        precision = Precision(self.precision.dtype, weights)
        return self.in_memory(drafter_bytes(self.config, precision, self._parts), weights)

    def rows(self, batch: int) -> int:
        """Sequences of a batch that each device has."""
        return local_sequences(self.mesh, batch)

    def _sizes(self, batch: int, slots: int, shared: bool, refitted: bool = False) -> Sizes:
        one, own = shared or batch == 1, self.rows(batch)
        return Sizes(self.config, own, slots, self.precision, shared=one, devices=self._parts, refitted=refitted)

    def _worst(self, *phases: Mapping[str, int], programs: int = 1) -> Parts:
        """The phase that needs most, with what is there in all of them."""
        sizes = self._sizes(1, 1, True)
        weights = self.in_memory(sizes.weights(None), self.precision.weights)
        held: Parts = {"weights": 0 if self.loaded else weights}
        if self._on_cpu:
            held["compiled programs"] = programs * COMPILER_BYTES_PER_LAYER * self.config.num_layers
            if not self.loaded:
                held["tokenizer"] = TOKENIZER_BYTES * self.config.vocab_size
            if self.precision.weights != WeightFormat("float32"):
                # Some rows of a matrix at a time are converted in products with many tokens.
                widest = max(self.config.width, *map(max, self.config.neuron_ranges))
                held["rows in float32"] = 8 * BLOCK_ROWS * widest
        loading = {} if self.loaded else {"loading": self.loading()}
        worst = max(({**held, **phase} for phase in (loading, *phases)), key=lambda parts: sum(parts.values()))
        # Devices that are one processor's have one memory.
        together = self.mesh.size if self.mesh is not None and self._on_cpu else 1
        once = ("compiled programs", "tokenizer")
        first = ("weights", "kept neurons", "cache")
        ordered = sorted(worst, key=lambda name: (first.index(name) if name in first else len(first), -worst[name]))
        return {name: worst[name] * (1 if name in once else together) for name in ordered if worst[name]}

    def loading(self) -> int:
        """Bytes that loading needs at most next to the weights, on each device."""
        arrays = local_arrays(self.config, self._parts, self.precision).values()
        return loading_bytes([math.prod(array.shape) for array in arrays], self.itemsize)

    def _logits(self, rows: int) -> int:
        shares = self._parts if divided(self.config, self._parts)[VOCABULARY] else 1
        return 4 * rows * self.config.vocab_size // shares

    def _activations(self, batch: int, tokens: int, slots: int) -> int:
        """What one layer takes to read `tokens` of each sequence at a time, with `slots` of the cache before them."""
        c, rows = self.config, self.rows(batch)
        share = self._parts if divided(c, self._parts)[HEADS] else 1
        itemsize = 4 if self._on_cpu else self.itemsize
        blocks = [(start, min(start + QUERY_BLOCK, tokens)) for start in range(0, tokens, QUERY_BLOCK)]
        seen = sum((stop - start) * (slots + stop) for start, stop in blocks)
        scores = 2 * 4 * rows * c.num_heads * seen // share
        projected = 2 * itemsize * rows * tokens * (c.num_heads + 2 * c.kv_heads) * c.head_dim // share
        neurons = ((3 if c.gated else 2) * itemsize + 4) * rows * tokens * self._read_at_once() // self._parts
        return max(scores + projected, neurons) + 5 * itemsize * rows * tokens * c.width

    def _reading(self, batch: int, prompt: int, new: int, *, collect: bool, rows: int) -> tuple[Parts, Parts]:
        """What is held after prompts were read, and what that takes, with it."""
        c, own = self.config, self.rows(batch)
        chunks = chunk_count(prompt, DEFAULT_CHUNK)
        tokens = -(-prompt // chunks)
        slots = chunks * tokens + new
        neurons = own * sum(c.neurons) // self._parts
        held: Parts = {
            "cache": self._sizes(batch, slots, True).cache,
            "statistics": 4 * neurons if collect else 0,
            "rows of the refit": self.itemsize * rows * neurons,
        }
        # The loop over chunks has a second copy of what it carries.
        again = 0 if chunks == 1 else sum(held.values())
        reading = self._activations(batch, tokens, 0 if chunks == 1 else chunks * tokens)
        return held, {**held, "reading the prompt": reading + again + self._logits(own)}

    def _reading_on(self, continued: Continued, *, rows: int, copied: bool) -> tuple[Parts, Parts]:
        """As `_reading`, by what goes on with a cache: what it has recorded stays, and is copied for refreshes."""
        neurons, copies = sum(self.config.neurons) // self._parts, 2 if copied else 1
        held: Parts = {
            "cache": self._sizes(1, continued.slots, True).cache,
            "statistics": copies * 4 * neurons,
            "rows of the refit": copies * self.itemsize * rows * neurons,
        }
        reading = self._activations(1, continued.read, continued.slots) + self._logits(1)
        return held, {**held, "reading the prompt": reading}

    def _read_at_once(self) -> int:
        """Intermediates of a token: the neurons of a layer, or those of the experts that it chooses.

        Pairs of a token and an expert are sorted, which takes their tokens and their outputs once more.
        """
        c = self.config
        if c.routing is None:
            return c.ff_width
        routed = c.routing.active * (c.routing.width + 2 * c.width) + c.routing.shared_width
        return max(routed, c.ff_width if c.routing.dense_layers else 0)

    def _refit_of_layer(self, sets: int, rows: int, calibration: int) -> tuple[int, int]:
        """What the system of one layer takes while it is made, and what its solution takes."""
        c = self.config
        system = rows + calibration
        made = sets * system * (3 * 4 * max(c.neurons) // self._parts + 2 * 4 * system + 2 * 4 * c.width)
        return made, 4 * sets * system * c.width

    def generation(
        self,
        batch: int,
        prompt: int,
        new: int,
        kept: Sequence[int] | None = None,
        *,
        shared: bool = False,
        select: bool = True,
        rows: int = 0,
        calibration: int = 0,
        every: int | None = None,
        drafts: int = 0,
        drafter: WeightFormat | None = None,
        drafter_is_there: bool = False,
        mixed: Mixed | None = None,
        mixed_is_there: bool = False,
        trial: int = 0,
        in_place: bool = False,
        spare: bool = False,
        repeated: bool = False,
        adapters: int = 0,
        continued: Continued | None = None,
    ) -> Parts:
        """What the answers of a pruned model need: prefill, select, prune, decode.

        Args:
            batch: sequences.
            prompt: tokens of the longest prompt.
            new: tokens of the longest answer, with drafts.
            kept: neurons of every layer; None for the dense model.
            shared: whether the sequences keep the same neurons.
            select: whether neurons are selected by the prompts.
            rows: tokens of each prompt that kept neurons are refitted to.
            calibration: rows of general text that they are fitted to, too.
            every: tokens of the answer after which the full model reads them in one pass; None if it never does.
            drafts: tokens that are drafted for each pass of the full model.
            drafter: what the drafting model's matrices are stored as; None where they are the model's.
            drafter_is_there: whether there is such a model already.
            mixed: the formats of the kept neurons, and how many there are; None where all have the model's.
            mixed_is_there: whether all neurons are held in the second one already.
            trial: tokens at the end of the prompts that pruned models are tried on.
            in_place: whether every neuron is held once.
            spare: whether an earlier answer's kept rows are there, one set of the same sizes, whose memory those of
                this one get.
            repeated: whether the same is done again and again: the kept rows of the answer before are there while the
                next one begins, and the cache of the prompts is copied for every answer.
            adapters: bytes of the prompts' adapters and of what is made of these.
            continued: how the prompt, which is one, is read if that is not by `prefill`.
        """
        c, own = self.config, self.rows(batch)
        collect = kept is not None and select
        if continued is None:
            slots = bucket(prompt) + bucket(new)
            read = self._reading(batch, bucket(prompt), bucket(new), collect=collect, rows=rows)
        else:
            slots = continued.slots
            read = self._reading_on(continued, rows=rows, copied=every is not None)
        held, reading = ({**parts, "adapters": adapters} for parts in read)
        sizes = self._sizes(batch, slots, shared, refitted=rows > 0)
        if drafter is not None:
            precision = Precision(self.precision.dtype, drafter)
            few = 0 if drafter_is_there else self.drafter(drafter)
            held |= {"drafting model": few, "rounding": 6 * 4 * BLOCK if few else 0}
            one = shared or own == 1
            sizes = Sizes(c, own, sizes.slots, precision, shared=one, devices=self._parts, refitted=rows > 0)
        reused = spare and (shared or batch == 1)
        neurons = 0 if kept is None or in_place or reused else sizes.copied(kept)
        neurons = self.in_memory(neurons, sizes.precision.weights)
        masked = sizes.masked(kept)
        if mixed is not None and kept is not None:
            copied, neurons, masked = self._in_two_formats(batch, shared, mixed, refitted=rows > 0)
            copied = 0 if mixed_is_there else copied
            held |= {"neurons in fewer bits": copied, "rounding": 6 * 4 * BLOCK if copied else 0}
        trying: list[Parts] = []
        if trial:
            # What the tokens before the trial choose by; and in the trial a cache for each of the densities.
            before = {part: 2 * held[part] for part in ("statistics", "rows of the refit")}
            reading, tried = reading | before, held | before | {"copies of the cache": ENDS * held["cache"]}
            refit = {"rows": rows, "calibration": calibration, "shared": shared}
            trying = self._forcing(ENDS * batch, trial, sizes.slots, tried, 1, **refit)
        # Of two formats each has masks of its own.
        masks = (1 if mixed is None else 2) * own * sum(c.neurons) // self._parts if masked else 0
        if repeated:
            again: Parts = {"kept neurons": neurons, "masks": masks, "cache": 2 * held["cache"]}
            held, reading = held | again, reading | again
        held["masks"] = masks
        decoding: Parts = {
            **held,
            "rows of the refit": held["rows of the refit"] if every or repeated or continued else 0,
            "kept neurons": neurons,
            # Of each draft, logits and the distributions of both models, as they are and as they are sorted.
            "decoding": 4 * self._logits(own) + 8 * self._logits(own * drafts),
        }
        sets = 1 if shared or batch == 1 else own
        if kept is not None and not in_place and sets > 1 and c.gated and self._on_cpu:
            # XLA's CPU code wants gate and up of each sequence together, and copies them before its loop.
            decoding["kept neurons, transposed"] = (sizes.copied(kept) if mixed is None else neurons) * 2 // 3
        pruning: Parts = {**held, "kept neurons": neurons}
        if every is not None and every < new:
            decoding["refreshing"] = self._activations(batch, every, slots)
            if adapters and batch > 1 and kept is not None:
                # Where each sequence has an adapter, new rows do not get the memory of those before them.
                pruning["kept neurons"] += self.in_memory(sizes.copied(kept), sizes.precision.weights)
        if in_place and kept is not None:
            # A matrix with a row for each neuron is there twice while its rows are regrouped.
            arrays = local_arrays(c, self._parts, self.precision).items()
            pruning["regrouping"] = max(held_bytes(array, self.platform) for path, array in arrays if ".ff." in path)
        if rows and kept is not None:
            together = rows * (own if sets == 1 else 1)
            system = together + calibration
            made, _ = self._refit_of_layer(sets, together, calibration)
            dropped = 4 * sets * (max(c.neurons) - min(kept)) * c.width // self._parts
            # The systems of all layers are solved together.
            solving = c.num_layers * 4 * sets * system * (2 * system + 3 * c.width)
            pruning["refitting"] = made + dropped + solving
        phases = [reading, *trying, pruning, decoding]
        if continued is not None and continued.there:
            there = self._sizes(batch, continued.there, True).cache
            # What is there is not asked for, but while the cache grows it is there next to the new one.
            growing: Parts = {"cache": held["cache"] if continued.slots > continued.there else 0}
            phases = [growing, *({**phase, "cache": phase["cache"] - there} for phase in phases)]
        return self._worst(*phases, programs=2 if trial else 1)

    def _in_two_formats(self, batch: int, shared: bool, mixed: Mixed, *, refitted: bool) -> tuple[int, int, bool]:
        """Bytes of all neurons in the second format, and of the kept ones in both; and whether there are masks instead
        of these."""
        formats, config = mixed

        def sizes(weights: WeightFormat) -> Sizes:
            precision = Precision(self.precision.dtype, weights)
            one, own = shared or batch == 1, self.rows(batch)
            return Sizes(self.config, own, 1, precision, shared=one, devices=self._parts, refitted=True)

        both = MixedSizes(formats, config, self.config.neuron_ranges, sizes, refitted=refitted)
        kept = sum(map(self.in_memory, both.copied, (formats.fine, formats.coarse)))
        return self.in_memory(sizes(formats.coarse).ff(None), formats.coarse), kept, both.masked

    def selecting(self, batch: int, prompt: int, adapters: int = 0) -> Parts:
        """What reading prompts and choosing their neurons needs, as `LLM.experts` does.

        Args:
            batch: sequences.
            prompt: tokens of the longest prompt.
            adapters: bytes of the prompts' adapters and of what is made of these.
        """
        _, reading = self._reading(batch, bucket(prompt), 0, collect=True, rows=0)
        return self._worst(reading | {"adapters": adapters})

    def logits(self, batch: int, length: int, prompt: int) -> Parts:
        """What the logits of whole texts need, as `LLM.logits` gives them.

        Args:
            batch: sequences.
            length: tokens of each.
            prompt: how many of them are read by the full model.
        """
        own = self.rows(batch)
        scores = self._logits(own * length)
        # The rest attends to all slots of the cache, those that are empty among them.
        less, more = sorted((self._activations(batch, prompt, 0), self._activations(batch, length - prompt, length)))
        return self._worst(
            {
                "cache": self._sizes(batch, length, True).cache,
                # Both are read in one program, in which not all of the memory of one is used again for the other: up to
                # an eighth was seen to come to it.
                "reading": more + less // 8,
                "logits": scores * (1 if prompt == length else 2),
            }
        )

    def scoring(
        self,
        batch: int,
        prompt: int,
        new: int,
        variants: int,
        *,
        rows: int = 0,
        calibration: int = 0,
        shared: bool = False,
        answers: bool = False,
    ) -> Parts:
        """What scoring given tokens with masked models needs, see `griffin_jax.griffin.masked`.

        Args:
            batch: sequences.
            prompt: tokens of the longest prompt.
            new: tokens that are scored, at most.
            variants: models whose scores are compared at a time; 0 if they are not compared.
            rows: tokens of each prompt that kept neurons are refitted to.
            calibration: rows of general text that they are fitted to, too.
            shared: whether the sequences keep the same neurons.
            answers: whether the dense model writes answers, too.
        """
        width = bucket(new)
        held, reading = self._reading(batch, bucket(prompt), width, collect=True, rows=rows)
        # Statistics of the answers, which the oracle selects by.
        held["statistics"] *= 2
        refit = {"rows": rows, "calibration": calibration, "shared": shared}
        phases = [reading, *self._forcing(batch, width, bucket(prompt) + width, held, variants, **refit)]
        if answers:
            copied = {"copy of the cache": held["cache"], "decoding": 4 * self._logits(self.rows(batch))}
            phases.append({**phases[1], "reading": 0, **copied})
        return self._worst(*phases, programs=2)

    def _forcing(
        self,
        batch: int,
        width: int,
        slots: int,
        held: Parts,
        variants: int,
        *,
        rows: int,
        calibration: int,
        shared: bool,
    ) -> list[Parts]:
        """The phases of reading given tokens with masked models and of scoring them; the first is that of reading.

        Args:
            batch: sequences.
            width: tokens of each.
            slots: of the cache.
            held: what is there meanwhile.
            variants: models whose scores are compared at a time; 0 if they are not compared.
            rows: tokens of each prompt that kept neurons are refitted to.
            calibration: rows of general text that they are fitted to, too.
            shared: whether the sequences keep the same neurons.
        """
        c, own = self.config, self.rows(batch)
        hidden = self.itemsize * own * width * c.width
        held = held | {
            "masks": 2 * own * sum(c.neurons) // self._parts,
            "residual streams": (variants + 2) * hidden,
        }
        forcing = {**held, "reading": self._activations(batch, min(width, DEFAULT_CHUNK), slots)}
        phases = [forcing]
        if rows:
            sets, together = (1, rows * own) if shared else (own, rows)
            made, solution = self._refit_of_layer(sets, together, calibration)
            solved = {"solutions of the refit": c.num_layers * solution}
            phases += [{**held, **solved, "refitting": made}, {**forcing, **solved}]
        columns = min(max(LOGITS_BYTES, self._logits(own)), self._logits(own * width))
        return [*phases, {**held, "logits": (variants + 4 if variants else 3) * columns}]

    def flocking(self, batch: int, prompt: int, new: int, window: int) -> Parts:
        """What measuring flocking needs, see `griffin_jax.analysis.flocking`.

        Args:
            batch: texts at a time.
            prompt: tokens of each prompt.
            new: tokens that follow.
            window: tokens of a window.
        """
        of_windows = 2 * 4 * self.rows(batch) * -(-new // window) * sum(self.config.neurons)
        found = self.scoring(batch, prompt, new, 1, answers=True)
        return found | {"statistics of windows": of_windows // self._parts}

    def analysis(self, batch: int, tokens: int, sets: int) -> Parts:
        """What comparing the outputs of experts needs, see `griffin_jax.analysis.experts`.

        Args:
            batch: texts at a time.
            tokens: of each text.
            sets: neuron sets that stand for experts in a model without routers.
        """
        c, length = self.config, bucket(tokens)
        experts = sets if c.routing is None else c.routing.experts
        read = self.rows(batch) * length
        return self._worst(
            {
                "cache": self._sizes(batch, length, True).cache,
                "reading": self._activations(batch, length, 0),
                "layers' inputs": self.itemsize * c.num_layers * read * c.width,
                "experts' outputs": 3 * 4 * experts * read * c.width,
                "pairs of experts": 4 * 4 * experts**2 * read,
                "all neurons": 3 * 4 * read * max(c.neurons),
            },
            programs=2,
        )

    def prior(self, batch: int, window: int, *, rows: int, sketched: int, budgets: bool, written: bool) -> Parts:
        """What measuring a prior needs, see `griffin_jax.evaluation.general_text`.

        Args:
            batch: texts at a time.
            window: tokens of each.
            rows: calibration rows of each layer.
            sketched: tokens of each text that go into them, at most.
            budgets: whether the sensitivity of neurons is measured.
            written: whether the model writes the texts.
        """
        c = self.config
        neurons = sum(c.neurons) // self._parts
        bases = 4 * neurons * min(max(c.neurons), -(-4 * rows // 3))
        recorded = min(bucket(window), sketched) if rows else 0
        _, reading = self._reading(batch, bucket(window), 0, collect=True, rows=recorded)
        phases = [{**reading, "bases of calibration rows": 3 * bases}]
        if written:
            phases.append(self.generation(batch, 1, window - 1))
        if budgets:
            # A backward pass over one text has the activations of all layers.
            tokens = bucket(min(window, 256))
            layer = 2 * self._activations(1, tokens, 0) + 4 * tokens * 3 * max(c.neurons) // self._parts
            phases.append({"backward pass": c.num_layers * layer + 5 * self._logits(tokens)})
            half = -(-window // 2)
            phases.append(self.scoring(batch, half, half, 2, rows=256, calibration=rows))
        return self._worst(*phases, programs=2)

    def likelihood(self, batch: int, length: int, adapters: int = 0) -> Parts:
        """What the likelihood of whole texts needs, see `griffin_jax.evaluation.moin`.

        Args:
            batch: sequences.
            length: tokens of each.
            adapters: bytes of all adapters, and of what is made of those of a batch.
        """
        return self._worst(
            {
                "adapters": adapters,
                "cache": self._sizes(batch, length, True).cache,
                "reading": self._activations(batch, length, 0),
                "logits": 3 * self._logits(self.rows(batch) * length),
            }
        )

    def adapter_training(self, parameters: int, batch: int, length: int, at_once: int = 1) -> Parts:
        """What training adapters needs, see `griffin_jax.adapters.jobs`.

        Args:
            parameters: numbers of an adapter.
            batch: sequences of an update of each.
            length: tokens of a sequence.
            at_once: adapters that are trained together.
        """
        numbers = 4 * at_once * parameters
        kept = self._kept_for_gradients(batch, length, 9 * self._read_at_once())
        return self._worst(
            {
                "adapters": STATES * numbers,
                # Of what is made of an adapter there are gradients, too.
                "gradients and updates": (2 + 2 * ADDED) * numbers,
                "activations": at_once * kept,
                "logits": at_once * 4 * self._logits(self.rows(batch) * length),
            },
            programs=2,
        )

    def healing_training(
        self, parameters: int, batch: int, length: int, *, rows: int = 0, calibration: int = 0
    ) -> Parts:
        """What training a healing needs, see `griffin_jax.adapters.healing_training`.

        Args:
            parameters: numbers of the adapter.
            batch: sequences of an update.
            length: tokens of a sequence.
            rows: tokens of each prompt that kept neurons are refitted to.
            calibration: rows of general text, if they are fitted to, too.
        """
        c, found = self.config, self.adapter_training(parameters, batch, length)
        refit = rows * (sum(c.neurons) // self._parts) + (rows + calibration) * c.num_layers * c.width
        return found | {"refit": 4 * self.rows(batch) * refit if rows else 0}

    def factor_training(self, training: FactorTraining, experts: int, *, coactivation: bool = False) -> Parts:
        """What dividing a dense model into experts and training these needs, see `griffin_jax.factor`.

        Args:
            training: how it is trained.
            experts: of each layer.
            coactivation: whether they are found by activations of all neurons.
        """
        neurons, length = sum(self.config.neurons) // self._parts, training.length
        sequences = max(TOKENS // length, 1)
        phases: list[Parts] = [{"activations": self._activations_of_experts(sequences, length, experts)}]
        if training.router_steps:
            phases.append(self._training_routers(training, experts))
        if training.steps:
            phases.append(self._training_experts(training, experts))
        # The dense model stays, and the factored one shares all else with it.
        copied = self.in_memory(self._sizes(1, 1, True).ff(None), self.precision.weights)
        phases = [{"experts": copied, **phase} for phase in phases]
        if coactivation:
            _, reading = self._reading(sequences, length, 0, collect=True, rows=self.rows(sequences) * length)
            phases.append(reading | {"activations of all neurons": 2 * sequences * length * neurons})
        return self._worst(*phases, programs=2)

    def _activations_of_experts(self, batch: int, tokens: int, experts: int) -> int:
        """What one layer takes to read so many tokens, with the outputs of all its experts."""
        return self._activations(batch, tokens, 0) + 3 * 4 * self.rows(batch) * tokens * experts * self.config.width

    def _training_routers(self, training: FactorTraining, experts: int) -> Parts:
        """Inputs and labels of all layers are kept, and divided among updates."""
        c, tokens = self.config, self.rows(training.batch) * training.length
        return {
            "layers' inputs": 2 * self.itemsize * c.num_layers * tokens * (c.width + experts),
            "activations": self._activations_of_experts(training.batch, training.length, experts),
            "routers": 2 * STATES * 4 * c.num_layers * experts * c.width,
        }

    def _training_experts(self, training: FactorTraining, experts: int) -> Parts:
        """An update of experts and routers together; a batch is read part by part."""
        c, batch = self.config, training.batch // training.accumulate
        numbers = 4 * sum(c.neurons) // self._parts * c.width * (3 if c.gated else 2)
        kept = self._kept_for_gradients(batch, training.length, 6 * c.ff_width + 2 * experts * c.width)
        return {
            "trained experts": STATES * numbers,
            # And sums of those of several parts.
            "gradients and updates": (2 if training.accumulate == 1 else 3) * numbers,
            "activations": kept,
            "logits": 5 * self._logits(self.rows(batch) * training.length),
        }

    def _kept_for_gradients(self, batch: int, tokens: int, of_neurons: int) -> int:
        """What a backward pass needs of all layers, and takes for one of them.

        Of each layer XLA's CPU code was seen to hold six numbers for each one of the residual stream, two for each one
        of queries, keys and values, and one to two for each pair of tokens and head.

        Args:
            batch: sequences.
            tokens: of each.
            of_neurons: numbers of a token that the feed-forward layer keeps.
        """
        c, rows = self.config, self.rows(batch)
        share = self._parts if divided(c, self._parts)[HEADS] else 1
        blocks = [(start, min(start + QUERY_BLOCK, tokens)) for start in range(0, tokens, QUERY_BLOCK)]
        pairs = 4 * rows * c.num_heads * sum((stop - start) * stop for start, stop in blocks) // share
        heads = 2 * (c.num_heads + 2 * c.kv_heads) * c.head_dim // share
        itemsize = 4 if self._on_cpu else self.itemsize
        of_token = 7 * c.width + heads + of_neurons // self._parts
        return c.num_layers * (itemsize * rows * tokens * of_token + 2 * pairs)


def adapter_bytes(adapter: AdapterLike | None, batch: int) -> int:
    """Bytes that the adapters of a batch of prompts take, but for those that somebody has in memory already.

    Args:
        adapter: of `LLM.generate`.
        batch: prompts.
    """
    if adapter is None:
        return 0
    if isinstance(adapter, Adapter):
        return ADDED * 4 * adapter.parameters
    if isinstance(adapter, Library):
        # Adapters are read when prompts have chosen them.
        size, kinds, read = adapter.adapter_bytes, min(batch, len(adapter)), min(batch, len(adapter))
    else:
        size = 4 * max((one.parameters for one in adapter if one is not None), default=0)
        kinds, read = len({id(one) for one in adapter}), 0
    # Different ones are stacked, and each prompt takes its own from the stack.
    return size * (read + (ADDED if kinds == 1 else (2 + ADDED) * batch))


def needs_before_loading(
    source: str | os.PathLike[str],
    dtype: str | None = None,
    weights: str | None = None,
    allow_pickle: bool = False,
    mesh: Mesh | None = None,
    expert_parallel: bool = False,
) -> Needs:
    """What work with a model needs, from its files' headers alone; arguments are those of `griffin_jax.load`.

    Raises:
        FileNotFoundError: as `griffin_jax.load`.
        ValueError: likewise.
    """
    parts = axis_size(mesh, MODEL_AXIS)
    opened = open_source(os.fspath(source), allow_pickle)
    config = with_whole_experts(opened.config, mesh) if expert_parallel else opened.config
    check_mesh(config, parts)
    precision = precision_of(config, parse_dtype(dtype), parse_weights(weights), opened)
    return Needs(with_kv_copies(config, parts), precision, mesh, jax.default_backend())


def needs_of(model: Transformer) -> Needs:
    """What work with a loaded model needs, next to its weights, which are there already."""
    weights = model.embedding[...]
    platform = next(iter(weights.devices())).platform
    return Needs(model.config, Precision.of(model.dtype, model.weights), mesh_of(weights), platform, loaded=True)


def free_for(model: Transformer) -> int | None:
    """Bytes that are free on each of the devices of a model; None where that is not known."""
    return memory.free(model.embedding[...].devices())


def fitting(
    needed: Mapping[int, Parts], available: int | None, advice: str, *, wanted: int | None = None
) -> tuple[int, str]:
    """The batch to take: the one that somebody wants, or the largest that fits, and a line that says so.

    Args:
        needed: what batches need, by their size; the wanted one is among them.
        available: bytes that are free; None if that is not known, and everything fits.
        advice: what to change if nothing fits, as in "take a smaller batch".
        wanted: the batch that somebody wants; None to choose.

    Raises:
        MemoryError: the wanted batch, or the smallest, does not fit.
    """

    def total(size: int) -> int:
        return sum(needed[size].values())

    sizes = sorted(needed, reverse=True)
    fit = [size for size in sizes if available is None or total(size) <= available]
    chosen = wanted or (fit[0] if fit else sizes[-1])
    memory.check(needed[chosen], available, advice)
    free = "" if available is None else f", and {memory.shown(available)} are free"
    line = f"batches of {chosen}, which need at most about {memory.shown(total(chosen))} of memory{free}"
    if wanted is None and chosen < sizes[0]:
        larger = sizes[sizes.index(chosen) - 1]
        line += f"; of {larger} they would need {memory.shown(total(larger))}"
    return chosen, line
