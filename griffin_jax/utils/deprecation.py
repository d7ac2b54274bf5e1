"""Old names that keep working for one version, with a warning that says what to write instead."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class GriffinDeprecationWarning(DeprecationWarning):
    """A name of griffin_jax that the next version will not have.

    A category of its own, so that a test suite can turn these into errors and leave other packages' warnings alone.
    """


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn whoever called the function that calls this: `old` is now called `new`."""
    message = f"{old} is deprecated and will be removed in the next version; use {new}"
    warnings.warn(message, GriffinDeprecationWarning, stacklevel=stacklevel)


def renamed_attribute(new: str) -> Any:
    """A descriptor that gives an attribute under its old name, with a warning; assign it to that name in the class.

    Args:
        new: what the attribute is called now.
    """

    class Renamed:
        def __set_name__(self, owner: type, name: str) -> None:
            self.name = f"{owner.__name__}.{name}"

        def __get__(self, instance: object, owner: type | None = None) -> Any:
            if instance is None:
                raise AttributeError(self.name)
            warn_renamed(self.name, new)
            return getattr(instance, new)

    return Renamed()


def renamed_arguments(**renamed: str) -> Callable[[Function], Function]:
    """Let a function take keyword arguments under their old names too, with a warning.

    Args:
        **renamed: the new name of each argument, by its old name.

    Raises:
        TypeError: the function is called with both names of an argument.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            for old in renamed.keys() & keywords.keys():
                new = renamed[old]
                if new in keywords:
                    raise TypeError(f"{function.__name__}() got {old!r} and {new!r}, which are the same argument")
                warn_renamed(f"{function.__name__}({old}=...)", f"{new}=...")
                keywords[new] = keywords.pop(old)
            return function(*arguments, **keywords)

        return call  # pyright: ignore[reportReturnType]

    return decorate
