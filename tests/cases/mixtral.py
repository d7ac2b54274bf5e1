"""Mixtral."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(
    config={**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
    variants={"usual": {}, "windows": {"sliding_window": 9}},
    not_in_gguf={"windows": "no field for the window"},
    routed=True,
)
