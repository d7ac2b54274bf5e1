"""The steps beyond GRIFFIN, compiled."""

from __future__ import annotations

import jax

from griffin_jax.extensions import refresh as refreshing
from griffin_jax.extensions import speculative

decode_lossless = jax.jit(speculative.decode_lossless, static_argnames=("drafts", "eos"), donate_argnames=("answer",))
refresh = jax.jit(
    refreshing.refresh, static_argnames=("width", "eos"), donate_argnames=("answer", "statistics", "rows")
)
follow_refreshed = jax.jit(refreshing.follow_refreshed, static_argnames=("config", "width"))
