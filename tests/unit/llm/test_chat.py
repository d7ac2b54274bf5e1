"""Conversations: each turn is what `generate` answers to all that was said, though little of it is read again."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from conftest import first_and_slow

import griffin_jax as gj
from griffin_jax.generation import jitted
from griffin_jax.generation.config import GenerationConfig
from griffin_jax.llm.chat import Chat
from griffin_jax.llm.memory import Continued
from griffin_jax.llm.request import Request
from griffin_jax.model.assembly import random_model
from griffin_jax.parallel.mesh import make_mesh
from griffin_jax.utils import memory

SAID = ("The river is slow.", "And the bridge?", "It was built of iron, a long time ago.")


@pytest.fixture
def llm(worded) -> gj.LLM:
    return worded.llm


def replies(chat: Chat, **options: object) -> list[list[int]]:
    return [chat.say(text, **options).tokens[0] for text in SAID]


def by_generate(llm: gj.LLM, **options: object) -> list[list[int]]:
    """The same answers by `generate`, which reads the whole conversation each time."""
    messages: list[dict[str, str]] = []
    found = []
    for text in SAID:
        messages.append({"role": "user", "content": text})
        out = llm.generate([messages], **options)
        found.append(out.tokens[0])
        messages.append({"role": "assistant", "content": out.texts[0]})
    return found


OPTIONS = {"max_new_tokens": 6, "ignore_eos": True}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    first_and_slow(
        1,
        {"density": 0.5, "temperature": 1.0, "seed": 3},
        {"density": 0.25, "refresh_every": 2},
        {"density": 0.5, "speculative": 2, "lookup": True},
        {"density": 1.0, "mixed_weights": "int4@0.25"},
        {"density": 0.5},
        {"density": 1.0},
    ),
    ids=["sampled", "refreshed", "speculative", "mixed", "half", "dense"],
)
def test_turns_are_what_generate_answers(llm, options):
    chat = llm.chat(**OPTIONS, **options)
    assert replies(chat) == by_generate(llm, **OPTIONS, **options)


@pytest.mark.thorough
def test_the_cache_that_is_there_is_not_asked_for_again(llm, monkeypatch):
    """But for one that has to grow, which is there twice for a while."""
    chat = llm.chat(**OPTIONS, density=1.0)
    asked: list[int] = []
    monkeypatch.setattr(memory, "check", lambda parts, *_: asked.append(parts.get("cache", 0)))
    slots = [0]
    for text in SAID * 2:
        chat.say(text)
        slots.append(chat._state.cache.slots)
    grew = [after > before for before, after in itertools.pairwise(slots)]
    assert [cache > 0 for cache in asked] == grew
    assert set(grew) == {True, False}


@pytest.mark.thorough
def test_a_cache_that_is_of_no_use_is_not_in_the_way(llm, monkeypatch):
    """If the whole conversation must be read anew, the memory of its old cache is free for that, even if refused."""
    chat, held = llm.chat(**OPTIONS), []
    chat.say(SAID[0], refit=True)

    def refuses(*_) -> None:
        held.append(chat._state)
        raise MemoryError("too little")

    with monkeypatch.context() as patched:
        patched.setattr(memory, "check", refuses)
        with pytest.raises(MemoryError, match="too little"):
            chat.say(SAID[1], refit=False)
    assert held == [None]
    assert len(chat.say(SAID[1]).tokens[0]) == 6


def test_what_is_read_is_what_was_asked_for(llm, monkeypatch):
    chat, asked, read = llm.chat(**OPTIONS, density=1.0), [], []
    check, read_more = gj.LLM._check_memory, jitted.read_more

    def recorded(model, state, tokens, *more, **options):
        read.append((tokens.shape[1], state.cache.slots))
        return read_more(model, state, tokens, *more, **options)

    monkeypatch.setattr(gj.LLM, "_check_memory", lambda self, *given: asked.append(given[1]) or check(self, *given))
    monkeypatch.setattr(jitted, "read_more", recorded)
    slots = [0]
    for text in SAID * 2:
        chat.say(text)
        slots.append(chat._state.cache.slots)
    assert [(one.read, one.slots) for one in asked] == read
    # Where what was said is other tokens now, the cache is dropped.
    went_on = [turn.read < turn.tokens for turn in chat.turns]
    assert [one.there for one in asked] == [there * on for there, on in zip(slots, went_on, strict=False)]


def test_long_turns_are_asked_for_before_they_are_read():
    """Of what is too much for one part only the first has fewer tokens."""
    config = gj.ModelConfig("llama", 64, 16, 40, 1, 2, 1, 8, 8192)
    llm = gj.LLM(random_model(config))
    chat, tokens = object.__new__(Chat), [5] * 3000
    chat._llm = llm
    chat._forget()

    def asked(length: int) -> Continued:
        request = Request.of("chat", max_new_tokens=512, density=1.0)
        return chat.continued(llm._plan([tokens[:length]], request, stream=False))

    assert asked(600) == Continued(768, 2048)
    assert asked(1000) == Continued(1024, 2560)
    chat._state, chat._read = jitted.start(llm.model, 4096), tokens[:2000]
    assert asked(3000) == Continued(1024, 5120, 4096)
    assert asked(2010) == Continued(16, 4096, 4096)
    assert asked(1000) == Continued(1024, 2560)


def test_only_what_is_new_is_read(llm):
    # Of answers that end in half a character, none of which are written here, everything is read again.
    chat = llm.chat("Be short.", **OPTIONS)
    replies(chat)
    first, second, third = chat.turns
    assert first.read == first.tokens
    assert second.read == second.tokens - first.tokens
    assert third.read == third.tokens - second.tokens
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 3]


@pytest.mark.thorough
def test_rows_of_a_refit_are_recorded_from_the_first_turn(long):
    """As many as later turns need, for which nothing is read again."""
    chat = long.llm.chat(refit=True, **OPTIONS)
    for text in (SAID[0], " ".join(SAID * 4), SAID[1]):
        chat.say(text)
    first, second, third = chat.turns
    assert first.tokens < 64 < second.tokens
    assert (first.read, second.read) == (first.tokens, second.tokens - first.tokens)
    assert third.read == third.tokens - second.tokens


def test_the_neurons_are_those_of_all_that_was_said(llm):
    chat = llm.chat(**OPTIONS)
    replies(chat)
    experts = llm.experts([chat.messages[:-1]])
    for got, expected in zip(chat.turns[-1].generation.experts, experts, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.thorough
def test_options_may_change_from_turn_to_turn(llm):
    chat = llm.chat(**OPTIONS)
    chat.say(SAID[0])
    dense = chat.say(SAID[1], density=1.0)
    assert dense.experts is None
    assert chat.turns[-1].read < chat.turns[-1].tokens
    # Rows for a refit were not recorded before, so everything is read again.
    other = llm.chat(**OPTIONS)
    other.messages = list(chat.messages)
    assert chat.say(SAID[2], refit=8).tokens == other.say(SAID[2], refit=8).tokens
    assert chat.turns[-1].read == chat.turns[-1].tokens
    chat.say(SAID[0], refit=8)
    assert chat.turns[-1].read < chat.turns[-1].tokens


def test_whole_groups_of_a_turn_replace_the_options_of_the_chat(llm):
    chat = llm.chat(density=0.5, max_new_tokens=3, ignore_eos=True)
    groups = {"griffin": gj.GriffinConfig(0.25), "generation": GenerationConfig(max_new_tokens=5, ignore_eos=True)}
    answer = chat.say(SAID[0], **groups)
    assert answer.tokens == llm.generate(SAID[0], **groups | {"chat": True}).tokens
    assert (set(answer.kept), len(answer.tokens[0])) == ({12}, 5)
    assert len(chat.say(SAID[1]).tokens[0]) == 3


@pytest.mark.slow
def test_long_turns_are_read_in_parts(llm, monkeypatch):
    monkeypatch.setattr("griffin_jax.llm.chat.DEFAULT_CHUNK", 16)
    assert replies(llm.chat(**OPTIONS)) == by_generate(llm, **OPTIONS)


def test_an_answer_that_is_interrupted_stays_as_far_as_it_was_written(llm):
    chat = llm.chat(**{**OPTIONS, "max_new_tokens": 24})
    stream = chat.stream(SAID[0])
    piece = next(stream)
    stream.close()
    assert chat.messages[-1] == {"role": "assistant", "content": piece}
    assert chat.turns[-1].generation is None
    messages = [*chat.messages, {"role": "user", "content": SAID[1]}]
    assert chat.say(SAID[1]).tokens == llm.generate([messages], **{**OPTIONS, "max_new_tokens": 24}).tokens
    assert chat.turns[-1].read < chat.turns[-1].tokens


@pytest.mark.parametrize("step", first_and_slow(1, "_write_more", "_prune", "_select"))
def test_a_failure_at_any_step_leaves_a_chat_that_goes_on(llm, monkeypatch, step):
    options = {**OPTIONS, "max_new_tokens": 16}
    chat = llm.chat(**options)
    chat.say(SAID[0])
    original, messages = getattr(gj.LLM, step), list(chat.messages)

    def fails(self, *arguments, **more):
        if step == "_write_more":
            original(self, *arguments, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gj.LLM, step, fails)
        with pytest.raises(KeyboardInterrupt):
            chat.say(SAID[1])
    assert chat.messages[: len(messages)] == messages
    messages = [*chat.messages, {"role": "user", "content": SAID[2]}]
    assert chat.say(SAID[2]).tokens == llm.generate([messages], **options).tokens


def test_a_template_that_changes_the_past_is_read_again(llm, monkeypatch):
    chat = llm.chat(**OPTIONS)
    chat.say(SAID[0])
    original = llm.tokenizer.chat
    monkeypatch.setattr(llm.tokenizer, "chat", lambda messages: original(messages)[1:])
    prompt = llm.tokenizer.chat([*chat.messages, {"role": "user", "content": SAID[1]}])
    assert chat.say(SAID[1]).tokens == llm.generate([prompt], **OPTIONS).tokens
    assert chat.turns[-1].read == chat.turns[-1].tokens


def test_in_place(worded):
    usual, single = worded.llm, gj.load(worded.folder, "float32", in_place=True)
    assert replies(single.chat(**OPTIONS)) == replies(usual.chat(**OPTIONS))


def test_what_is_wrong_leaves_the_conversation_as_it_was(llm, tiny):
    chat = llm.chat(**OPTIONS)
    chat.say(SAID[0])
    messages = list(chat.messages)
    said = [*messages, {"role": "user", "content": SAID[1]}]
    with pytest.raises(ValueError, match="is longer than the model's context"):
        chat.say(SAID[1], max_new_tokens=10**6)
    with pytest.raises(TypeError, match=r"chat\(\) got unexpected options: densty"):
        chat.say(SAID[1], densty=0.5)
    assert chat.messages == messages
    assert chat.say(SAID[1]).tokens == llm.generate([said], **OPTIONS).tokens
    with pytest.raises(ValueError, match="no chat template"):
        gj.LLM(llm.model).chat()
    with pytest.raises(ValueError, match="density must be"):
        llm.chat(density=2)


def test_saved_and_cleared(llm, tmp_path):
    chat = llm.chat("Be brief.", **OPTIONS)
    chat.say(SAID[0])
    chat.save(tmp_path / "c.json")
    other = llm.chat(**OPTIONS)
    other.load(tmp_path / "c.json")
    assert other.messages == chat.messages
    assert other.say(SAID[1]).tokens == chat.say(SAID[1]).tokens
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.turns == []
    for content in ("[]", "{}", "x", json.dumps({"format": "griffin_jax chat 1", "messages": [{"role": 1}]})):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(ValueError, match=r"c\.json: is no saved conversation"):
            other.load(tmp_path / "c.json")


@pytest.mark.slow
def test_on_several_devices(worded):
    divided = gj.load(worded.folder, "float32", mesh=make_mesh(1, 2))
    assert replies(divided.chat(groups=1, **OPTIONS)) == replies(worded.llm.chat(**OPTIONS))
