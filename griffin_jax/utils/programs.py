"""Compiled functions, like those of `jax.jit`, with a bounded number of programs for the whole process.

    @programs.jit(static_argnames="config")
    def select(statistics, config): ...

`jax.jit` keeps every program that it has compiled for as long as the function exists: one for each combination of
static arguments, shapes and dtypes. In this package, a density, a batch size or a number of drafts is a shape or a
static argument, so a process that serves requests would compile without end. On CPUs each program takes some hundred
memory maps. Linux allows a process 65,530 of them; the next one is a segmentation fault.

In jax 0.10 to 0.12, a program is held by the C++ cache of the jitted function, and by caches that refer weakly to the
function below it or to its jaxpr. So every program here has a separate `jax.jit`, over a separate function; when
`clear_cache` is called on it and nothing else refers to it, its memory maps are gone. (An executable from
`lower().compile()` is held just as long, by the jitted function that it came from.) JAX's caches of what it has traced
remain. They have thousands of entries, and it is impossible to remove selected ones, so all of them are cleared from
time to time.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
from jax.core import Tracer

MAX_PROGRAMS = 64
"""Programs that a process keeps; the least recently used are dropped first. An answer uses five or six, three of which
are specific to its density."""

MAX_SHARE_OF_MAPS = 0.5
"""Share of the memory maps that Linux allows a process; if the process has more, programs are dropped, too."""

DROPS_UNTIL_CLEARED = 512
"""Dropped programs after which `jax.clear_caches` clears JAX's own caches, which hold some of what was traced for each.
Everything in use then compiles once more, including a user's own functions."""

MAPS, MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")

_programs: OrderedDict[Hashable, Any] = OrderedDict()
_lock = threading.RLock()
_warned = False
_dropped = 0


def jit(
    function: Callable[..., Any] | None = None,
    *,
    static_argnames: str | Sequence[str] = (),
    donate_argnames: str | Sequence[str] = (),
    keep_unused: bool = False,
) -> Any:
    """`jax.jit` with programs that count among the `MAX_PROGRAMS` of the process; also a decorator.

    If the result is called with tracers, as inside a user's own `jax.jit`, it acts like a plain `jax.jit`, and no
    program is kept here.

    Args:
        function: function of named arguments, some of which may be keyword-only; None to get a decorator with the other
            arguments.
        static_argnames: as for `jax.jit`.
        donate_argnames: as for `jax.jit`.
        keep_unused: as for `jax.jit`.
    """
    options = _names(static_argnames), _names(donate_argnames), keep_unused
    if function is None:
        return lambda function: _Jitted(function, *options)
    return _Jitted(function, *options)


def count() -> int:
    """Number of programs that are kept."""
    return len(_programs)


def clear() -> None:
    """Drop all programs; later calls compile anew."""
    with _lock:
        for program in _programs.values():
            program.clear_cache()
        _programs.clear()


class _Jitted:
    """A function whose programs are kept in `_programs`."""

    def __init__(self, function: Callable[..., Any], static: frozenset[str], donated: frozenset[str], unused: bool):
        functools.update_wrapper(self, function)
        self._function, self._static, self._donated, self._keep_unused = function, static, donated, unused
        self._signature = inspect.signature(function)
        self._plain = self._jit(function)

    def _jit(self, function: Callable[..., Any]) -> Any:
        return jax.jit(
            function,
            static_argnames=tuple(self._static),
            donate_argnames=tuple(self._donated),
            keep_unused=self._keep_unused,
        )

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            bound = self._signature.bind(*arguments, **keywords).arguments
        except TypeError:
            # The function itself says what is wrong, or it takes names that its signature lacks.
            return self._plain(*arguments, **keywords)
        static, donated, others = {}, {}, {}
        for name, value in bound.items():
            (static if name in self._static else donated if name in self._donated else others)[name] = value
        donated, donated_structure = jax.tree.flatten(donated)
        others, structure = jax.tree.flatten(others)
        leaves = donated + others
        if any(issubclass(kind, Tracer) for kind in set(map(type, leaves))):
            return self._plain(*arguments, **keywords)
        # Devices are not part of it: the same shapes on other devices share an entry, whose `jax.jit` tells them apart.
        kinds = tuple([getattr(leaf, "aval", None) or _kind(leaf) for leaf in leaves])
        key = (self, tuple(static.items()), donated_structure, structure, kinds)
        with _lock:
            program = _programs.get(key)
            if program is not None:
                _programs.move_to_end(key)
        if program is not None:
            return program(donated, others)
        program = self._program(static, donated_structure, structure)
        found = program(donated, others)
        with _lock:
            # Another thread may have compiled the same program meanwhile.
            _programs.setdefault(key, program)
            _make_room()
        return found

    def _program(self, static: dict[str, Any], donated_structure: Any, structure: Any) -> Any:
        function, donates = self._function, bool(self._donated)

        def of_leaves(donated: list[Any], others: list[Any]) -> Any:
            dynamic = {**donated_structure.unflatten(donated), **structure.unflatten(others)}
            return function(**static, **dynamic)

        # Profiles and logs show the name.
        of_leaves.__name__ = getattr(function, "__name__", type(function).__name__)
        return jax.jit(of_leaves, donate_argnums=(0,) if donates else (), keep_unused=self._keep_unused)

    def lower(self, *arguments: Any, **keywords: Any) -> Any:
        """Like the method of `jax.jit`; the result is not kept here."""
        fresh = functools.wraps(self._function)(lambda *a, **k: self._function(*a, **k))
        return self._jit(fresh).lower(*arguments, **keywords)

    def eval_shape(self, *arguments: Any, **keywords: Any) -> Any:
        """Like the method of `jax.jit`."""
        return self._plain.eval_shape(*arguments, **keywords)

    def clear_cache(self) -> None:
        """Drop the programs of this function."""
        self._plain.clear_cache()
        with _lock:
            for key in [key for key in _programs if cast(Any, key)[0] is self]:
                _programs.pop(key).clear_cache()


def _names(names: str | Sequence[str]) -> frozenset[str]:
    return frozenset((names,) if isinstance(names, str) else names)


def _kind(leaf: Any) -> Hashable:
    """What programs depend on in an argument that is not a JAX array: its type, shape and dtype."""
    return type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None)


def _make_room() -> None:
    """Drop the least recently used programs while there are too many, but never the newest."""
    global _dropped
    most = _most_maps()
    while len(_programs) > 1 and (len(_programs) > MAX_PROGRAMS or _too_many_maps(most)):
        _warn_once()
        _, program = _programs.popitem(last=False)
        program.clear_cache()
        _dropped += 1
    if _dropped >= DROPS_UNTIL_CLEARED:
        _dropped = 0
        jax.clear_caches()


def _too_many_maps(most: int | None) -> bool:
    if most is None:
        return False
    with contextlib.suppress(OSError):
        return MAPS.read_bytes().count(b"\n") > MAX_SHARE_OF_MAPS * most
    return False


def _most_maps() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(MOST_MAPS.read_text())
    return None


def _warn_once() -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"{len(_programs)} programs are compiled, and those that were not used for longest are dropped from now on;"
        " they compile again when they are needed. Requests need programs of their own if they differ in density,"
        " method, round_to, groups, shared, refit, refresh_every, speculative, batch size, or the power of two that"
        " prompt or answer is padded to: use fewer of these, or raise griffin_jax.utils.programs.MAX_PROGRAMS"
        f" ({MAX_PROGRAMS})",
        RuntimeWarning,
        stacklevel=4,
    )
