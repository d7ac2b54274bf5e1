"""`python -m convert SOURCE OUTPUT`: writes a model in griffin_jax's native format."""

from __future__ import annotations

import sys

from griffin_jax.cli import convert
from griffin_jax.cli.main import Parser, guarded


def main() -> int:
    parser = Parser(prog="python -m convert", description=__doc__)
    convert.add_arguments(parser)
    arguments = parser.parse_args()
    return guarded(parser.prog, lambda: convert.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
