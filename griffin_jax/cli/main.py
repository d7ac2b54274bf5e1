"""The command line: `griffin-jax generate | convert | info | families | compile | bench | eval | ...`.

A command is a module with `DESCRIPTION`, `add_arguments` and `run`. It is imported when it is asked for: `--help` and
`--version` load no JAX.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from griffin_jax import __version__

PROGRAM = "griffin-jax"
BAD_INPUT = 2
INTERRUPTED = 130

COMMANDS = {
    "generate": ("generate", "answer a prompt with a pruned (or dense) model"),
    "convert": ("convert", "write a checkpoint in the native format"),
    "info": ("info", "describe a model without loading its weights"),
    "families": ("families", "list the model families that are supported, and what is refused"),
    "compile": ("compile", "what a model needs and can reach on an accelerator that is not there"),
    "bench": ("bench", "what pruning gains on this machine, next to what its memory bandwidth allows"),
    "eval": ("evaluate", "what pruning costs in quality: divergence, perplexity or ROUGE on your own texts"),
    "flocking": ("flocking", "the paper's figures of why pruning works, for your own model and texts"),
    "prior": ("prior", "measure what a model's neurons do in general text, which helps to choose among them"),
    "lm-eval": ("lm_eval", "lm-evaluation-harness with the model griffin_jax; takes its arguments"),
}
"""The module of each command, and what it does."""

UNPARSED = ("lm-eval",)
"""Commands whose arguments are another program's, `--help` too; argparse has no way to leave options alone."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, or 2 with one line on stderr for bad input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] not in COMMANDS:
        _overview().parse_args(arguments)
    name, *rest = arguments
    program = f"{PROGRAM} {name}"
    if name in UNPARSED:
        return guarded(program, lambda: _module(name).run(rest))
    module = _module(name)
    options = parser_of(name).parse_args(rest)
    return guarded(program, lambda: _run(module, options))


def parser_of(name: str) -> Parser:
    """The parser of one command's arguments."""
    module = _module(name)
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=textwrap.dedent(module.DESCRIPTION),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=name)
    module.add_arguments(parser)
    return parser


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"griffin_jax.cli.{COMMANDS[name][0]}")


def _overview() -> Parser:
    """What the program is and which commands it has; it accepts none, and so always ends the program."""
    parser = Parser(prog=PROGRAM, description="GRIFFIN (arXiv 2404.01365) for JAX.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser


def _run(module: ModuleType, options: argparse.Namespace) -> int | None:
    from griffin_jax.parallel import distributed

    with distributed.joined(getattr(options, "distributed", None)):
        return module.run(options)


def guarded(name: str, command: Callable[[], int | None]) -> int:
    """Runs a command; what is wrong with its input becomes one line on stderr and exit code 2.

    Warnings of this package, such as that weights lose something, become one line on stderr, too.
    """
    from griffin_jax.checkpoints.planning import NarrowingWarning
    from griffin_jax.utils.deprecation import GriffinDeprecationWarning
    from griffin_jax.utils.messages import CheckpointWarning

    ours = (NarrowingWarning, GriffinDeprecationWarning, CheckpointWarning)
    # A command may open a checkpoint more than once.
    shown: set[str] = set()
    try:
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
            code = command() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has what it wanted; without this Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{name}: {message}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
