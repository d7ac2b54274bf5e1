"""`python -m convert SOURCE OUTPUT`: write a model in griffin_jax's native format."""

from __future__ import annotations

import sys

from griffin_jax.checkpoints import loading
from griffin_jax.cli.main import Parser, guarded


def main() -> int:
    parser = Parser(prog="python -m convert", description=__doc__)
    loading.add_arguments(parser)
    arguments = parser.parse_args()
    return guarded(parser.prog, lambda: loading.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
