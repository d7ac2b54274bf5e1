"""Old names that work for one more version, with a warning that says what to write instead."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class GriffinDeprecationWarning(DeprecationWarning):
    """A name of griffin_jax that the next version will not have.

    This is a separate category, so that a test suite can turn these warnings into errors and leave those of other
    packages alone.
    """


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn the caller of the function that calls this one that `old` is now called `new`."""
    message = f"{old} is deprecated and will be removed in the next version; use {new}"
    warnings.warn(message, GriffinDeprecationWarning, stacklevel=stacklevel)


def renamed_attribute(new: str) -> Any:
    """A descriptor that makes an attribute available under its old name, with a warning.

    Assign the descriptor to the old name in the class.

    Args:
        new: present name of the attribute.
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
    """Let a function also take keyword arguments under their old names, with a warning.

    Args:
        **renamed: new name of each argument, by its old name.

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
