"""Which parts of given matrices a compiled decode loop reads."""

from __future__ import annotations

import re
from collections.abc import Collection

from griffin_jax.aot.hlo import FREE, Module

LOOK_UPS = ("dynamic-slice", "gather")
PASSES = ("while", "call", "conditional", "fusion")


def looked_up(text: str, elements: Collection[int]) -> tuple[int, list[str]]:
    """What one turn of the loop of a program reads of its arrays with so many elements.

    Returns:
        Numbers that are looked up, those in loops within as often as these turn; and all else that reads such an array.
    """
    module = Module.parse(text)

    def of(name: str, times: int) -> tuple[int, list[str]]:
        computation, total, others = module.computations[name], 0, []
        # Arrays that come into the computation: what is made in it may have as many elements.
        arrays: set[str] = set()
        for i in computation:
            reads = not arrays.isdisjoint(i.operands)
            given = i.opcode in ("parameter", "get-tuple-element") or (i.opcode == "bitcast" and reads)
            if given and len(i.results) == 1 and i.results[0].elements in elements:
                arrays.add(i.name)
            elif i.opcode in PASSES:
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes)
                for _, called in i.called:
                    found, more = of(called, times * int(turns[1]) if turns else times)
                    total, others = total + found, others + more
            elif reads and i.opcode in LOOK_UPS:
                total += times * sum(a.elements for a in i.results)
            elif reads and i.opcode not in FREE:
                others.append(f"{name}: {i.opcode}")
        return total, others

    return of(dict(module.loop().called)["body"], 1)
