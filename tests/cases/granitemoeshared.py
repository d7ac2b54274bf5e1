"""Granite 3 with routed experts and a shared one."""

from __future__ import annotations

from cases import Cases
from cases.granitemoe import CASES as ROUTED

CASES = Cases(
    config=ROUTED.config,
    variants={"no shared expert": {}, "usual": {"shared_intermediate_size": 20}},
    not_in_gguf={"no shared expert": "it is read as a Granite without one"},
    routed=True,
)
