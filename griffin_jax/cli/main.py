"""The command line: `griffin-jax generate | chat | convert | info | families | compile | bench | eval | ...`.

Each command is a module with `DESCRIPTION`, `add_arguments` and `run`. It is imported only when it is called, so
`griffin-jax --help` and `griffin-jax --version` load no JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

from griffin_jax import __version__
from griffin_jax.utils.address_space import check_start
from griffin_jax.utils.messages import printable

PROGRAM = "griffin-jax"
BAD_INPUT = 2
INTERRUPTED = 130

COMMANDS = {
    "generate": ("generate", "answer a prompt with a pruned (or dense) model"),
    "chat": ("chat", "talk to a model, which chooses its neurons anew at each turn"),
    "convert": ("convert", "convert a checkpoint to the native format"),
    "info": ("info", "describe a model without loading its weights"),
    "families": ("families", "list the model families that are supported, and those that are refused"),
    "compile": (
        "compile",
        "compile for a GPU or TPU that you do not have: memory, kernels, and the speed that bandwidth allows",
    ),
    "bench": (
        "bench",
        "time a model with and without pruning on this machine, next to what its memory bandwidth allows",
    ),
    "eval": ("evaluate", "measure what pruning costs in quality on your own texts: KL divergence, perplexity, ROUGE"),
    "flocking": ("flocking", "draw the paper's figures that show why pruning works, for your own model and texts"),
    "analyze": ("analyze", "analyse a model's experts: their weights, their outputs, and which tokens choose them"),
    "moin": ("moin", "train adapters independently of each other, and answer each prompt with one of them"),
    "factorize": ("factorize", "divide a dense model into experts, and train routers that choose among them"),
    "prior": ("prior", "measure how a model's neurons behave in general text, which helps to choose among them"),
    "heal": ("heal", "train an adapter for pruned models, so that they predict what the full model does"),
    "lm-eval": ("lm_eval", "run lm-evaluation-harness with griffin_jax as its model; takes the harness's arguments"),
}
"""The module of each command, and its summary."""

CACHED = ("generate", "chat", "eval", "flocking", "analyze", "prior")
"""Commands that cache the programs they compile for later runs."""

UNPARSED = ("lm-eval",)
"""Commands that hand all their arguments, even `--help`, to another program; argparse cannot leave options alone."""


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, or 2 with one line on stderr for bad input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] not in COMMANDS:
        return _unwound(PROGRAM, lambda: _overview().parse_args(arguments) and None)
    name, *rest = arguments
    program = f"{PROGRAM} {name}"

    def command() -> int | None:
        check_start(_module_name(name))
        if name in UNPARSED:
            return _module(name).run(rest)
        return _run(_module(name), parser_of(name).parse_args(rest))

    return guarded(program, command)


def parser_of(name: str) -> Parser:
    """The argument parser of one command."""
    module = _module(name)
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=textwrap.dedent(module.DESCRIPTION),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=name)
    module.add_arguments(parser)
    if name in CACHED:
        parser.add_argument(
            "--no-compilation-cache", action="store_true",
            help="neither read nor write compiled programs in the user's cache folder",
        )  # fmt: skip
    return parser


def _module(name: str) -> ModuleType:
    return importlib.import_module(_module_name(name))


def _module_name(name: str) -> str:
    return f"griffin_jax.cli.{COMMANDS[name][0]}"


def _overview() -> Parser:
    """The parser for arguments that do not begin with a command, such as `--help`; it always ends the program."""
    parser = Parser(prog=PROGRAM, description="GRIFFIN (arXiv 2404.01365) for JAX.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser


def _run(module: ModuleType, options: argparse.Namespace) -> int | None:
    from griffin_jax.parallel import distributed
    from griffin_jax.utils import compilation_cache

    if options.command in CACHED and not options.no_compilation_cache:
        compilation_cache.enable()
    with distributed.joined(getattr(options, "distributed", None)):
        return module.run(options)


def guarded(name: str, command: Callable[[], int | None]) -> int:
    """Runs a command; an error in its input becomes one line on stderr and exit code 2.

    Warnings of this package, for example that weights lose precision, also become one line on stderr.
    """
    from griffin_jax.utils.deprecation import GriffinDeprecationWarning
    from griffin_jax.utils.messages import CheckpointWarning, SpeedWarning

    ours = (CheckpointWarning, GriffinDeprecationWarning, SpeedWarning)
    # A command may open a checkpoint, and so warn, more than once.
    shown: set[str] = set()

    def warned() -> int | None:
        with warnings.catch_warnings():
            for category in ours:
                warnings.simplefilter("always", category)
            usual = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
                if issubclass(category, ours):
                    if str(message) in shown:
                        return
                    shown.add(str(message))
                    print(f"{name}: warning: {message}", file=sys.stderr)
                else:
                    usual(message, category, *rest, **more)

            warnings.showwarning = show
            return command()

    return _unwound(name, warned)


def _unwound(name: str, command: Callable[[], int | None]) -> int:
    """Runs a function that prints. However it ends, its clean-up runs, and an error is reported in one line."""
    try:
        with _ending_as_by_the_keyboard():
            try:
                return command() or 0
            finally:
                # Also reached when argparse exits after printing its help.
                if sys.stdout is not None:
                    sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the pipe, such as `head`, has seen enough.
        _silence_stdout()
        return 0
    except _Terminated as error:
        print(f"{name}: terminated", file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
        _silence_stdout()
        unsaid = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
        message = printable(" ".join(str(error).split())) or unsaid
        print(f"{name}: {message}", file=sys.stderr)
        return BAD_INPUT


class _Terminated(KeyboardInterrupt):
    """Raised when a signal asks the program to end."""

    def __init__(self, number: int):
        self.number = number


@contextlib.contextmanager
def _ending_as_by_the_keyboard() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the program as Ctrl-C does, so that it removes half-written files."""
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # Handlers that others have installed stay, and SIGHUP stays ignored under nohup.
    ours = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise _Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _silence_stdout() -> None:
    """Drop output that could not be written; Python would otherwise try again when it exits, and complain."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
