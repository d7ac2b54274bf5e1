"""Code World Model."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(config={**LLAMA_LIKE, "head_dim": 16, "sliding_window": 8}, variants={"every other window": {}})
