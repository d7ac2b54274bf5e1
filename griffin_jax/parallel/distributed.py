"""Runs several processes as one, with `jax.distributed`: one for each host, all started with the same command.

    griffin-jax generate --prompt "..." --mesh data=2,model=8 --distributed host0:1234,0,2        on the first host
    griffin-jax generate --prompt "..." --mesh data=2,model=8 --distributed host0:1234,1,2        on the second one

Each process runs the same program on its share of the mesh. The first one writes text and files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 30
"""Seconds without a sign of life after which a process counts as dead, and all others end."""

START_SECONDS = 300
"""Seconds that processes wait for each other at the start, as imports take longer on some hosts than on others."""

AUTO = "auto"

_WANTED = re.compile(r"(?P<coordinator>[^,\s]+:\d+),(?P<process>\d+),(?P<count>\d+)")


def parse(text: str) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` that `HOST:PORT,PROCESS,COUNT` or `auto` stands for.

    Raises:
        ValueError: the text is neither, or its process is not one of COUNT.
    """
    if text == AUTO:
        return {}
    match = _WANTED.fullmatch(text)
    if match is None:
        raise ValueError(
            f"--distributed must be HOST:PORT,PROCESS,COUNT, such as host0:1234,0,2, or {AUTO}; got {text!r}"
        )
    process, count = int(match["process"]), int(match["count"])
    if process >= count:
        raise ValueError(f"--distributed: of {count} processes the last one is {count - 1}, got {process}")
    return {"coordinator_address": match["coordinator"], "process_id": process, "num_processes": count}


@contextlib.contextmanager
def joined(text: str | None) -> Iterator[None]:
    """Join the other processes for the duration of a block, before JAX is used; only the first process prints.

    Args:
        text: a text as `parse` takes it; None for a process that runs alone.

    Raises:
        ValueError: the text is malformed.
        RuntimeError: the other processes do not join in time.
    """
    if text is None:
        yield
        return
    wanted = parse(text)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        **wanted,
        initialization_timeout=START_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
    with _own_stdout():
        yield
    jax.distributed.shutdown()


@contextlib.contextmanager
def _own_stdout() -> Iterator[None]:
    """Reserve stdout for what Python prints in the first process: Gloo also writes there, whenever it connects."""
    sys.stdout.flush()
    before = os.dup(1)
    text = os.dup(1) if is_first() else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    try:
        with open(text, "w", encoding=sys.stdout.encoding) as stdout, contextlib.redirect_stdout(stdout):
            yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def is_first() -> bool:
    """Whether this process writes text and files."""
    return jax.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
    """The result of a function that is called in the first process only, sent as JSON to all processes.

    Raises:
        ValueError: the function raised a `ValueError` or an `OSError` in the first process.
    """
    if jax.process_count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"value": function()}
        except (ValueError, OSError) as error:
            outcome = {"error": str(error)}
    content = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    sent = multihost_utils.broadcast_one_to_all(content if is_first() else np.zeros(size, np.uint8))
    outcome = json.loads(bytes(np.asarray(sent, np.uint8)))
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]


def check_same(name: str, value: Any) -> None:
    """Raise `ValueError` unless all processes have the same value, without which they could not work together.

    Args:
        name: name of what is compared, for the message.
        value: value of this process, compared by its `repr`.
    """
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.uint32(zlib.crc32(repr(value).encode())))
    if others := [number for number, other in enumerate(found) if other != found[0]]:
        raise ValueError(
            f"{name} of process {', '.join(map(str, others))} is not that of process 0; start all with the same command"
            " and the same files"
        )
