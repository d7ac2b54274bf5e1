"""`python -m convert SOURCE OUTPUT [--dtype DTYPE]`: write a model in griffin_jax's native format."""

from __future__ import annotations

import argparse
import sys

from griffin_jax.loading import add_arguments, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m convert", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
