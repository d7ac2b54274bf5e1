"""`griffin-jax bench`, optionally with peers in PyTorch and llama.cpp."""

from __future__ import annotations

import argparse

from griffin_jax.cli import bench
from griffin_jax.cli.bench import add_arguments

__all__ = ["add_arguments", "run"]
__doc__ = bench.DESCRIPTION  # what --help shows


def run(options: argparse.Namespace) -> None:
    from benchmarks import peers

    bench.run(options, peers.find)
