"""Measures where the seconds of a generation go."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import jax

_spans = threading.local()


def _record(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith("/jax/core/compile/"):
        now = time.perf_counter()
        for listener in getattr(_spans, "listeners", ()):
            listener.append((now - duration_secs, now))


jax.monitoring.register_event_duration_secs_listener(_record)


class Stopwatch:
    """Seconds by the name of a phase. Time for tracing and compiling within a phase counts as `compile`.

    Attributes:
        seconds: seconds of each phase measured so far, by its name, and of `compile`.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"compile": 0.0}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name`; what the block computes must be ready at its end."""
        spans: list[tuple[float, float]] = []
        if not hasattr(_spans, "listeners"):
            _spans.listeners = []
        _spans.listeners.append(spans)
        start = time.perf_counter()
        try:
            yield
        finally:
            total = time.perf_counter() - start
            _spans.listeners.pop()
            compiling = min(total, _covered(spans))
            self.seconds["compile"] += compiling
            self.seconds[name] = self.seconds.get(name, 0.0) + total - compiling


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans: tracing a function also reports the functions that are traced inside it."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
