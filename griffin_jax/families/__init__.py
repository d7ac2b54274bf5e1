"""Model families, one file each. A new family is one new file here that defines `FAMILY`."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from griffin_jax.families.base import Family, Layout, TensorRule

__all__ = ["Family", "Layout", "TensorRule", "families", "family_of", "gguf_family_of"]


@functools.cache
def families() -> dict[str, Family]:
    """All families by `model_type`."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


def family_of(model_type: object, where: str) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: there is none; it names those there are.
    """
    if not isinstance(model_type, str) or model_type not in families():
        raise ValueError(
            f"{where}: model_type {model_type!r} is not supported; supported are {', '.join(sorted(families()))}"
        )
    return families()[model_type]


def gguf_family_of(architecture: object, where: str) -> Family:
    """The family of a GGUF file.

    Raises:
        ValueError: there is none; it names those there are.
    """
    known = {name: family for family in families().values() if family.gguf for name in family.gguf.architectures}
    if not isinstance(architecture, str) or architecture not in known:
        raise ValueError(
            f"{where}: GGUF architecture {architecture!r} is not supported; supported are {', '.join(sorted(known))}"
        )
    return known[architecture]
