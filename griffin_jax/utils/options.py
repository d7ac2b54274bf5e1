"""Options that are declared once: fields of frozen dataclasses, with what the command line says about each.

    @dataclasses.dataclass(frozen=True)
    class Greeting:
        name: str = option("world", "whom to greet", metavar="NAME")

Checks and help texts belong to the field, so Python and every command share them.
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
"""What JAX puts into a pytree in place of its numbers when it traces, lowers or describes the pytree."""


def option(default: Any, help: str, **flag: Any) -> Any:
    """A field of an options class.

    Args:
        default: value of the option if none is given.
        help: what the option means, for the command line.
        **flag: further arguments of `argparse.ArgumentParser.add_argument`: `metavar`, `choices`, `type`, `nargs`,
            `const`, `action`. If neither `type` nor `action` is given, they follow from the default.
    """
    return dataclasses.field(default=default, metadata={"help": help, "flag": flag})


def names_of(*classes: Any) -> dict[str, Any]:
    """The fields of options classes that can be set, with their defaults."""
    return {field.name: field.default for each in classes for field in dataclasses.fields(each) if field.init}


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the value is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")


def plain(value: Any) -> Any:
    """The Python number of a NumPy or JAX scalar; anything else unchanged.

    Tracers are returned unchanged: their values are unknown here, and were checked outside.
    """
    if isinstance(value, Tracer):
        return value
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | jax.Array) and value.ndim == 0):
        return value.item()
    return value


def whole(name: str, value: Any, least: int, *, also: str = "", of: str = "") -> int:
    """The Python integer of a whole number that is large enough, which may be a NumPy or JAX scalar.

    Args:
        name: name of the option, for the message.
        value: value to check.
        least: smallest value that is allowed.
        also: what else would be allowed, for the message.
        of: what is counted, for the message.

    Raises:
        ValueError: value is not a whole number of at least `least`.
    """
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        counted = f" of {of}" if of else ""
        raise ValueError(f"{name} must be {also}a whole number{counted} of at least {least}, got {value!r}")
    return found


def number(name: str, value: Any, allowed: str, valid: Callable[[float], bool]) -> Any:
    """The Python number of a finite number that is allowed, which may be a NumPy or JAX scalar.

    A value that stands for a number in a transformation of JAX is returned unchanged.

    Args:
        name: name of the option, for the message.
        value: value to check.
        allowed: what is allowed, for the message, as in "in [0, 1]".
        valid: function that says whether a finite number is allowed.

    Raises:
        ValueError: value is not a finite number, or not one that is allowed.
    """
    found = plain(value)
    if isinstance(found, STAND_INS) or type(found) is object:
        return found
    if isinstance(found, bool) or not isinstance(found, float | int) or not math.isfinite(found) or not valid(found):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return found


def flag(name: str, value: Any) -> bool:
    """The Python bool of a truth value, which may be a NumPy or JAX scalar.

    Raises:
        ValueError: value is not a truth value.
    """
    found = plain(value)
    if not isinstance(found, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return found


def count_or(value: object, default: int) -> int:
    """A number that may also be given as True, for the default, or as False, for zero."""
    return default if value is True else int(value)  # pyright: ignore[reportArgumentType]
