"""`griffin-jax chat`: talk to a model."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from griffin_jax.cli.options import (
    add_dtype_argument,
    add_in_place_argument,
    add_mesh_argument,
    add_model_argument,
    add_options,
    chosen_healing,
    chosen_mesh,
    load_chosen,
    read_options,
)
from griffin_jax.cli.prior import chosen_prior
from griffin_jax.extensions.config import Extensions
from griffin_jax.generation.config import GenerationConfig
from griffin_jax.griffin.config import GriffinConfig, parse_density
from griffin_jax.llm.chat import Chat
from griffin_jax.llm.request import check_options
from griffin_jax.utils.download import cache_folder
from griffin_jax.utils.messages import shown

DESCRIPTION = """Starts a conversation with a model. The full model reads everything that is said, once; each
answer is written with only the feed-forward neurons that took part most in the conversation so far.
With --quality best, a model that has no prior file yet is measured first, which takes minutes. Ctrl-C
stops an answer, Ctrl-D ends the chat, and /help lists commands."""

HELP = """/density X    keep this share of the neurons from now on: one number, or one for each layer
/dense        keep all neurons from now on
/stats        show a table of the turns so far
/save FILE    save the conversation to FILE
/load FILE    go on with the conversation saved in FILE
/clear        forget the conversation
/quit         end the chat"""

NEW_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_model_argument(parser)
    add_dtype_argument(parser)
    add_mesh_argument(parser)
    add_in_place_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt: what the model is told before the first turn")
    add_options(parser.add_argument_group("pruning"), GriffinConfig, "density", "method", "round_to")
    beyond = parser.add_argument_group("beyond GRIFFIN")
    add_options(
        beyond, Extensions,
        "quality", "prior", "budgets", "prior_weight", "refit", "healing", "refresh_every", "speculative",
        "lookup", "draft_weights", "mixed_weights", "max_divergence",
    )  # fmt: skip
    answer = parser.add_argument_group("answer")
    add_options(answer, GenerationConfig, "max_new_tokens", default=NEW_TOKENS)
    add_options(answer, GenerationConfig, "temperature", "top_k", "top_p", "min_p", "seed", "stop")


def run(options: argparse.Namespace) -> None:
    """Answers what the user says until there is no more input."""
    settings = {
        "griffin": read_options(options, GriffinConfig),
        "extensions": read_options(options, Extensions, prior=chosen_prior(options), healing=chosen_healing(options)),
        "generation": read_options(options, GenerationConfig),
    }
    check_options(options.in_place, **settings)
    llm = load_chosen(options, chosen_mesh(options))
    chat = Chat(llm, options.system, **settings)
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{llm.name}, {_share(chat)} (Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists commands)")
    for line in _lines(_reader() if terminal else _next_line):
        if line.startswith("/"):
            try:
                if not _obey(chat, line):
                    return
            except (ValueError, OSError) as error:
                _say(str(error))
        else:
            _answer(chat, line)


def _lines(read: Callable[[], str]) -> Iterator[str]:
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            # Drops the line typed so far, as a shell does.
            print()
            continue
        if line:
            yield line


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _reader() -> Callable[[], str]:
    """A function that reads a line from a terminal, with history and editing if prompt_toolkit or readline is there."""
    if importlib.util.find_spec("prompt_toolkit") is None:
        if importlib.util.find_spec("readline") is not None:
            importlib.import_module("readline")
        return lambda: input("> ")
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        history = FileHistory(str(cache_folder() / "chat-history"))
    except OSError:
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(history=history)
    return lambda: session.prompt("> ")


def _answer(chat: Chat, text: str) -> None:
    """Prints the answer while it is written. Ctrl-C stops it, and what was written by then stays in the chat."""
    start, pieces = time.perf_counter(), chat.stream(text)
    try:
        for piece in pieces:
            print(shown(piece, sys.stdout), end="", flush=True)
    except KeyboardInterrupt:
        print()
        _say("stopped")
    except (ValueError, MemoryError) as error:
        _say(str(error))
        return
    else:
        print()
    finally:
        pieces.close()
    if sys.stdin.isatty() and chat.turns and chat.turns[-1].generation is not None:
        print(f"[{_took(chat)}, {time.perf_counter() - start:.1f} s]", file=sys.stderr)


def _took(chat: Chat) -> str:
    turn = chat.turns[-1]
    assert turn.generation is not None
    rate = turn.generation.decode_tokens_per_second
    speed = f", {rate:.1f} tokens/s" if rate == rate else ""
    return f"{turn.read} of {turn.tokens} tokens read, {len(turn.generation.tokens[0])} written{speed}"


def _share(chat: Chat) -> str:
    density = chat.options["griffin"].density
    if density == 1:
        return "dense"
    return "a density for each layer" if isinstance(density, tuple) else f"density {density:g}"


def _say(message: str) -> None:
    print(f"[{message}]", flush=True)


def _obey(chat: Chat, line: str) -> bool:
    """Runs a command such as `/stats`; returns whether the chat goes on.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the command does not exist, or its argument is wrong.
    """
    try:
        name, *arguments = shlex.split(line)
    except ValueError as error:
        raise ValueError(f"{line}: {error}") from error
    takes = {"/density": "a share in (0, 1]", "/save": "a file", "/load": "a file"}
    if name in takes and len(arguments) != 1:
        raise ValueError(f"{name} takes {takes[name]}")
    if name == "/quit":
        return False
    if name == "/help":
        print(HELP)
    elif name in ("/density", "/dense"):
        density = parse_density(arguments[0]) if arguments else 1.0
        griffin = dataclasses.replace(chat.options["griffin"], density=density)
        griffin.kept(chat.neuron_ranges)
        chat.options["griffin"] = griffin
        _say(_share(chat))
    elif name == "/stats":
        print(_stats(chat))
    elif name == "/save":
        chat.save(Path(arguments[0]).expanduser())
        _say(f"saved {len(chat.messages)} messages to {arguments[0]}")
    elif name == "/load":
        chat.load(Path(arguments[0]).expanduser())
        _say(f"{len(chat.messages)} messages of {arguments[0]}")
    elif name == "/clear":
        chat.clear()
        _say("cleared")
    else:
        raise ValueError(f"there is no command {name}; /help lists them")
    return True


def _stats(chat: Chat) -> str:
    """A table with a row for each turn."""
    lines = [f"{'turn':>4} {'tokens':>7} {'read':>6} {'written':>8} {'kept':>6} {'prefill s':>10} {'tokens/s':>9}"]
    for number, turn in enumerate(chat.turns, start=1):
        row = f"{number:>4} {turn.tokens:>7,} {turn.read:>6,}"
        if turn.generation is None:
            lines.append(f"{row}  stopped")
            continue
        out, share = turn.generation, sum(turn.generation.kept) / sum(chat.neurons)
        rate = out.decode_tokens_per_second
        speed = f"{rate:9.1f}" if rate == rate else f"{'':9}"
        lines.append(f"{row} {len(out.tokens[0]):>8,} {share:>6.0%} {out.seconds['prefill']:>10.2f} {speed}")
    return "\n".join(lines)
