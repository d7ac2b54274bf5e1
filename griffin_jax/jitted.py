"""The compiled steps under the names of version 0.1, for one version."""

from __future__ import annotations

from typing import Any

from griffin_jax.extensions import jitted as _extensions
from griffin_jax.generation import jitted as _generation
from griffin_jax.utils.deprecation import renamed_arguments, warn_renamed

_PLACES = {
    "begin": (_generation, "init_decode"),
    "decode_lossless": (_extensions, "decode_speculative"),
    "follow": (_generation, "teacher_force"),
    "follow_refreshed": (_extensions, "teacher_force_refreshed"),
    "refresh": (_extensions, "refresh"),
}


def __getattr__(name: str) -> Any:
    module, new = _PLACES.get(name, (_generation, name))
    if name.startswith("_") or not hasattr(module, new):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_renamed(f"{__name__}.{name}", f"{module.__name__}.{new}")
    function = getattr(module, new)
    return renamed_arguments(room="max_new_tokens")(function) if name == "prefill" else function
