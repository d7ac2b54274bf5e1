"""Options that stand once: fields of frozen dataclasses, with what the command line says about each.

    @dataclasses.dataclass(frozen=True)
    class Greeting:
        name: str = option("world", "whom to greet", metavar="NAME")

Checks and help texts belong to the field, so that Python and every command have the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

STAND_INS = (Tracer, jax.ShapeDtypeStruct, jax.stages.ArgInfo)
"""What JAX puts into a pytree in place of its numbers, to trace, lower or describe it."""


def option(default: Any, help: str, **flag: Any) -> Any:
    """A field of an options class.

    Args:
        default: its value where nobody says anything.
        help: what it is, for the command line.
        **flag: further arguments of `argparse.ArgumentParser.add_argument`: `metavar`, `choices`, `type`, `nargs`,
            `const`, `action`. Where there is neither `type` nor `action`, they follow from the default.
    """
    return dataclasses.field(default=default, metadata={"help": help, "flag": flag})


def names_of(*classes: Any) -> dict[str, Any]:
    """The fields of options classes that can be given, with their defaults."""
    return {field.name: field.default for each in classes for field in dataclasses.fields(each) if field.init}


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


def plain(value: Any) -> Any:
    """The Python number of a scalar of NumPy or JAX; anything else as it is.

    Tracers stay as they are: their values are not known, and were checked outside.
    """
    if isinstance(value, Tracer):
        return value
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | jax.Array) and value.ndim == 0):
        return value.item()
    return value


def whole(name: str, value: Any, least: int, *, also: str = "", of: str = "") -> int:
    """The Python integer of a whole number, NumPy's and JAX's included, that is large enough.

    Args:
        name: of the option, for the message.
        value: to check.
        least: the smallest that is allowed.
        also: what else would be allowed, for the message.
        of: what is counted, for the message.

    Raises:
        ValueError: it is none.
    """
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        counted = f" of {of}" if of else ""
        raise ValueError(f"{name} must be {also}a whole number{counted} of at least {least}, got {value!r}")
    return found


def number(name: str, value: Any, allowed: str, valid: Callable[[float], bool]) -> Any:
    """The Python number of a finite number, NumPy's and JAX's included, that is allowed; what stands for one in a
    transformation of JAX as it is.

    Args:
        name: of the option, for the message.
        value: to check.
        allowed: what is allowed, for the message, as in "in [0, 1]".
        valid: whether a finite number is.

    Raises:
        ValueError: it is none.
    """
    found = plain(value)
    if isinstance(found, STAND_INS) or type(found) is object:
        return found
    if isinstance(found, bool) or not isinstance(found, float | int) or not math.isfinite(found) or not valid(found):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return found


def flag(name: str, value: Any) -> bool:
    """The Python bool of a truth value, NumPy's and JAX's included.

    Raises:
        ValueError: it is none.
    """
    found = plain(value)
    if not isinstance(found, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return found


def count_or(value: object, default: int) -> int:
    """A number that may also be given as True, for the default, or False, for none."""
    return default if value is True else int(value)  # pyright: ignore[reportArgumentType]
