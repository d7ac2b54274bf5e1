"""`python -m benchmarks COMMAND`: measures what pruning gains, and what conversion needs, on this machine."""

from __future__ import annotations

import argparse
import sys

from benchmarks import adapters, factored, gpu, memory, routed, run
from griffin_jax.cli.main import Parser, guarded


def main() -> int:
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (run, gpu, memory, adapters, routed, factored):
        name = module.__name__.rpartition(".")[2]
        # The command's name before it measured more than one density at a time.
        aliases = ["speed"] if module is run else []
        command = commands.add_parser(
            name,
            aliases=aliases,
            help=(module.__doc__ or "").partition("\n")[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args()
    return guarded(f"{parser.prog} {options.command}", lambda: options.run(options))


if __name__ == "__main__":
    sys.exit(main())
