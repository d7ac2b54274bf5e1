"""`griffin_jax.evaluation.lm_eval` under its name of version 0.1, for one version."""

from __future__ import annotations

from typing import Any

from griffin_jax.utils.deprecation import warn_renamed


def __getattr__(name: str) -> Any:
    if name != "GriffinLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from griffin_jax.evaluation.lm_eval import GriffinLM

    warn_renamed("griffin_jax.harness.GriffinLM", "griffin_jax.evaluation.lm_eval.GriffinLM")
    return GriffinLM
