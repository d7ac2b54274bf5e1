"""`griffin-jax families`: list the model families that are supported, and those that are refused."""

from __future__ import annotations

import argparse

from griffin_jax.checkpoints import families

DESCRIPTION = "Lists the model families that are supported, and those that are refused, with the reason."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run(options: argparse.Namespace) -> None:
    """Prints the table."""
    del options
    print(families.table())
