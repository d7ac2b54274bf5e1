"""`griffin-jax bench`, with peers in PyTorch and llama.cpp on request."""

from __future__ import annotations

import argparse

from griffin_jax.bench import runner
from griffin_jax.bench.runner import add_arguments

__all__ = ["add_arguments", "run"]
__doc__ = runner.__doc__  # what --help shows


def run(options: argparse.Namespace) -> None:
    from benchmarks import peers

    runner.run(options, peers.find)
