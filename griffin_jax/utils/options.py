"""Options that stand once: fields of frozen dataclasses, with what the command line says about each.

    @dataclasses.dataclass(frozen=True)
    class Greeting:
        name: str = option("world", "whom to greet", metavar="NAME")

Checks and help texts belong to the field, so that Python and every command have the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


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


def check_whole(name: str, value: object, least: int, *, also: str = "", of: str = "") -> None:
    """Raise `ValueError` unless the value is a whole number, NumPy's included, that is large enough.

    Args:
        name: of the option, for the message.
        value: to check.
        least: the smallest that is allowed.
        also: what else would be allowed, for the message.
        of: what is counted, for the message.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        counted = f" of {of}" if of else ""
        raise ValueError(f"{name} must be {also}a whole number{counted} of at least {least}, got {value!r}")


def count_or(value: object, default: int) -> int:
    """A number that may also be given as True, for the default, or False, for none."""
    return default if value is True else int(value)  # pyright: ignore[reportArgumentType]
