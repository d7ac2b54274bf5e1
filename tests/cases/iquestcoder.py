"""IQuest-Coder."""

from __future__ import annotations

from cases import LLAMA_LIKE, Cases

CASES = Cases(config={**LLAMA_LIKE, "head_dim": 16}, variants={"gqa": {}})
