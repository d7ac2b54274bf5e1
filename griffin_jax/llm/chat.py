"""`Chat`: a conversation of several turns, of which every turn reads only what is new.

    chat = llm.chat("Answer briefly.", density=0.5)
    print(chat.say("How high is Mount Everest?").texts[0])
    print(chat.say("And where is it?").texts[0])

At every turn the neurons are chosen anew, by all that was said. That includes the model's earlier answers, which the
full model reads at the next turn: their keys and values in the cache are then the full model's, too. A refit is fitted
to the newest tokens, as after a refresh.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from griffin_jax.extensions.promise import trial_tokens
from griffin_jax.generation import jitted
from griffin_jax.generation.padding import DEFAULT_CHUNK, bucket
from griffin_jax.generation.prefill import Prefilled
from griffin_jax.llm.llm import LLM, Plan
from griffin_jax.llm.memory import Continued
from griffin_jax.llm.request import Request, updated
from griffin_jax.llm.results import Generation
from griffin_jax.model.cache import KVCache
from griffin_jax.utils.wholefile import write_text

FORMAT = "griffin_jax chat 1"
"""What a saved conversation calls its format."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one turn took.

    Attributes:
        tokens: tokens of the conversation, up to where the answer begins.
        read: how many of them were read at this turn; the others were in the cache.
        generation: the answer; None if it was interrupted.
    """

    tokens: int
    read: int
    generation: Generation | None


class Chat:
    """A conversation with a model. Usually made by `LLM.chat`.

    Args:
        llm: the model, with a tokenizer that has a chat template. With `in_place` every turn reads the whole
            conversation, because the rows of weights move.
        system: what the model is told before the first turn.
        **options: those of `LLM.generate`, for every turn that does not change them.

    Attributes:
        messages: what was said so far, as `{"role": ..., "content": ...}`.
        turns: what each turn took.

    Raises:
        TypeError: there is no such option.
        ValueError: there is no chat template, or an option is outside its range.
    """

    def __init__(self, llm: LLM, system: str | None = None, **options: Any):
        if llm.tokenizer is None or not llm.tokenizer.chat_template:
            raise ValueError(f"{llm.name} has no chat template, so it was not trained to chat; use generate")
        Request.of("chat", **options)
        self.options = options
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[Turn] = []
        self._llm = llm
        self._forget()

    @property
    def neuron_ranges(self) -> tuple[tuple[int, ...], ...]:
        """The sizes of the ranges of each layer's neurons that are chosen from one by one."""
        return self._llm.model.config.neuron_ranges

    @property
    def neurons(self) -> tuple[int, ...]:
        """Neurons of each feed-forward layer of the full model."""
        return self._llm.model.neurons

    def say(self, text: str, **options: Any) -> Generation:
        """The answer to what the user says next.

        Args:
            text: what the user says.
            **options: those of `LLM.generate` that are others at this turn.

        Raises:
            TypeError: there is no such option.
            ValueError: as `LLM.generate`; the conversation then stays as it was.
        """
        stream = self.stream(text, **options)
        while True:
            try:
                next(stream)
            except StopIteration as stopped:
                return stopped.value

    def stream(self, text: str, **options: Any) -> Generator[str, None, Generation | None]:
        """Yields the answer as it is written; the generator's return value is the `Generation`.

        An answer that is interrupted, because the generator is closed or an exception comes, is part of the
        conversation as far as it was written.

        Args:
            text: what the user says.
            **options: those of `LLM.generate` that are others at this turn.

        Raises:
            TypeError: there is no such option.
            ValueError: as `LLM.generate`; the conversation then stays as it was.
        """
        request = Request.of("chat", **updated(self.options, options))
        messages = [*self.messages, {"role": "user", "content": text}]
        assert self._llm.tokenizer is not None
        prompt = self._llm.tokenizer.chat(messages)
        written, generation = "", None
        answering = self._llm.answering([prompt], request, self)
        try:
            for finished, (piece,) in answering:
                generation = finished
                written += piece
                if piece:
                    yield piece
        finally:
            answering.close()
            if written or generation is not None:
                self.messages = [*messages, {"role": "assistant", "content": written}]
                self.turns.append(Turn(len(prompt), len(prompt) - self._kept, generation))
        return generation

    def clear(self) -> None:
        """Forget everything that was said but what the model is told before the first turn."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        self.turns = []
        self._forget()

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the conversation to a JSON file, which `load` reads."""
        content = {"format": FORMAT, "model": self._llm.name, "messages": self.messages}
        write_text(Path(file), json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    def load(self, file: str | os.PathLike[str]) -> None:
        """Go on with a conversation that was saved.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no saved conversation.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            messages = content["messages"] if content["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: is no saved conversation ({type(error).__name__}: {error})") from error
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ValueError(f"{file}: is no saved conversation")
        self.messages, self.turns = messages, []
        self._forget()

    # ---- the cache, from turn to turn: a `griffin_jax.llm.llm.Reader` ----

    def _forget(self) -> None:
        self._state: Prefilled | None = None
        self._read: list[int] = []
        self._kept = 0
        self._is_long = False

    def read(self, plan: Plan) -> Prefilled:
        """What the full model records of the conversation, of which it reads what it has not read yet. The last tokens
        for a trial are among that."""
        (sequence,) = plan.sequences
        answer = bucket(plan.new + plan.drafts)
        model, self._is_long = self._llm.model, self._is_long_rope(len(sequence) + plan.new)
        self._kept = len(self._read)
        new = sequence[len(self._read) :]
        trial = trial_tokens(len(sequence), len(new)) if plan.trial else 0
        parts = _parts(new)
        room, state = self._room(plan, parts), self._state
        if state is None:
            state = jitted.start(model, room, rows=plan.rows)
        elif state.cache.slots < room:
            state = dataclasses.replace(state, cache=jitted.with_room(state.cache, room))
        context = jnp.full_like(state.cache.context, len(sequence) + plan.new)
        cache = dataclasses.replace(state.cache, context=context)
        state = dataclasses.replace(state, cache=cache, max_new_tokens=0)
        # While a part is read its arrays are donated; an interruption there leaves nothing to go on with.
        self._state = None
        for number, part in enumerate(parts, start=1):
            tokens = np.zeros((1, bucket(len(part))), np.int32)
            tokens[0, : len(part)] = part
            last = trial if number == len(parts) else 0
            state = jitted.read_more(model, state, tokens, np.int32(len(part)), last=last)
        last, state = state.last, dataclasses.replace(state, last=None)
        self._state, self._read = state, list(sequence)
        if plan.every:
            # A refresh takes them over, and goes on with them.
            statistics, used_rows = jax.tree.map(jnp.copy, (state.statistics, state.rows))
            state = dataclasses.replace(state, statistics=statistics, rows=used_rows)
        return dataclasses.replace(state, max_new_tokens=answer, last=last)

    def continued(self, plan: Plan) -> Continued:
        """How much of the sequence of a plan is read at a time, and into which cache."""
        (sequence,) = plan.sequences
        if not self._goes_on(plan):
            # Its memory is free for what is read instead.
            self._forget()
        there = 0 if self._state is None else self._state.cache.slots
        parts = _parts(sequence[len(self._read) :] if there else sequence)
        most = max((bucket(len(part)) for part in parts), default=0)
        return Continued(most, max(self._room(plan, parts), there), there)

    def _room(self, plan: Plan, parts: Sequence[Sequence[int]]) -> int:
        """Slots of the cache that the conversation needs, with its answer and what the last part is padded to."""
        (sequence,) = plan.sequences
        return bucket(len(sequence) + bucket(len(parts[-1]) if parts else 1) + bucket(plan.new + plan.drafts))

    def give_back(self, cache: KVCache) -> None:
        """Takes the cache over again, without the answer, which the full model has not read."""
        if self._state is None or _is_deleted(cache) or self._llm.is_in_place:
            self._forget()
            return
        self._state = dataclasses.replace(self._state, cache=jitted.cut(cache, np.int32(len(self._read))))

    def _goes_on(self, plan: Plan) -> bool:
        """Whether the sequence of a plan begins with all that was read, in the same way. A template may change what was
        said earlier."""
        (sequence,) = plan.sequences
        if self._state is None or _is_deleted(self._state):
            return False
        rows = self._state.rows[0].shape[1] if self._state.rows else 0
        if rows != plan.rows or self._is_long != self._is_long_rope(len(sequence) + plan.new):
            return False
        return len(self._read) <= len(sequence) and list(sequence[: len(self._read)]) == self._read

    def _is_long_rope(self, context: int) -> bool:
        """Whether a LongRoPE has its wavelengths for long texts, with which all keys are others."""
        rotary = self._llm.config.rotary
        return rotary is not None and rotary.kind == "longrope" and context > rotary.original_positions


def _parts(tokens: Sequence[int]) -> list[Sequence[int]]:
    """Tokens in parts of at most `DEFAULT_CHUNK`, of which only the first may have fewer: a trial is in the last."""
    first = len(tokens) % DEFAULT_CHUNK
    starts = [*([0] if first else []), *range(first, len(tokens), DEFAULT_CHUNK)]
    return [tokens[start:stop] for start, stop in itertools.pairwise([*starts, len(tokens)])]


def _is_deleted(tree: Any) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def _is_message(message: object) -> bool:
    return (
        isinstance(message, Mapping)
        and message.keys() == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
    )
