"""Compiled versions of the steps beyond GRIFFIN, like those of `griffin_jax.generation.jitted`."""

from __future__ import annotations

from griffin_jax.extensions import refresh as refreshing
from griffin_jax.extensions import speculative
from griffin_jax.utils import programs

decode_speculative = programs.jit(
    speculative.decode_speculative, static_argnames=("drafts", "eos"), donate_argnames=("state",)
)
refresh = programs.jit(
    refreshing.refresh, static_argnames=("width", "eos"), donate_argnames=("state", "statistics", "rows")
)
teacher_force_refreshed = refreshing.teacher_force_refreshed
"""Not jitted as a whole; its steps are jitted one by one."""
