"""Reads what XLA made of a decode loop: how many kernels a token launches, and what is copied that should not be.

The text comes from `jax.stages.Compiled.as_text()`, and is the optimised HLO of one module. Only the part of its
grammar that this needs is read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "add-dependency", "opt-barrier",
    "partition-id", "replica-id",
}  # fmt: skip
"""Opcodes that run nothing."""

CONTROL = {"while", "conditional", "call"}
"""Opcodes that run other computations instruction by instruction."""

COLLECTIVES = {
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast", "send",
}  # fmt: skip
"""Opcodes by which devices communicate; each may be followed by `-start`."""

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_CALLED = re.compile(r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_ORIGIN = re.compile(r'\bop_name="([^"]*)"')
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class HloArray:
    """An array that an instruction makes: dimensions, memory space (0 is the main one) and bytes of an element."""

    dims: tuple[int, ...]
    space: int
    itemsize: float

    @property
    def elements(self) -> int:
        return math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: unique within its computation.
        opcode: such as `fusion` or `copy-start`.
        results: the arrays that it makes; for `-start`, without those that it reads.
        operands: names of what it reads.
        called: computations that it runs, by role: `body`, `condition`, `calls`, ...
        attributes: the rest of the line.
    """

    name: str
    opcode: str
    results: tuple[HloArray, ...]
    operands: tuple[str, ...]
    called: tuple[tuple[str, str], ...]
    attributes: str

    @property
    def origin(self) -> tuple[str, ...]:
        """Names of what it was traced from, from the function to the operation; empty if XLA does not say."""
        name = _ORIGIN.search(self.attributes)
        return tuple(name[1].split("/")) if name else ()

    @property
    def aliases(self) -> dict[int, int]:
        """The results that a custom call writes into an operand's memory: numbers of results, mapped to numbers of
        operands."""
        _, _, aliases = self.attributes.partition("output_to_operand_aliasing={")
        found = _ALIAS.findall(aliases[: _closing(aliases, "{}")]) if aliases else []
        return {int(result or 0): int(operand) for result, operand in found}

    @property
    def runs(self) -> bool:
        """Whether it costs a separate launch."""
        return self.opcode not in FREE and not self.opcode.endswith("-done") and "Bitcast" not in self.attributes


@dataclasses.dataclass(frozen=True)
class Collective:
    """An instruction by which devices communicate.

    Attributes:
        kind: such as `all-reduce`.
        size: bytes that it sums, puts together or sends: the larger of what goes in and what comes out, on each device.
        origin: as for the instruction.
    """

    kind: str
    size: int
    origin: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of an HLO module by name, and the name of the one that runs first."""

    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Module:
        """Parse the text of a module.

        Raises:
            ValueError: the text has no entry computation.
        """
        computations: dict[str, list[Instruction]] = {}
        entry, current = None, None
        for line in text.splitlines():
            if current is None:
                if header := _COMPUTATION.match(line):
                    current = computations.setdefault(header[2], [])
                    entry = header[2] if header[1] else entry
            elif line.startswith("}"):
                current = None
            elif instruction := _INSTRUCTION.match(line):
                current.append(_instruction(instruction[2], instruction[3]))
        if entry is None:
            raise ValueError("this is no text of an HLO module: it has no ENTRY")
        return cls(computations, entry)

    def loop(self) -> Instruction:
        """The one loop of the entry computation.

        Raises:
            ValueError: the entry computation has no loop, or more than one.
        """
        loops = [i for i in self.computations[self.entry] if i.opcode == "while"]
        if len(loops) != 1:
            raise ValueError(f"the program has {len(loops)} loops where decoding has one")
        return loops[0]

    def computations_of(self, instruction: Instruction) -> Iterator[list[Instruction]]:
        """The computations that an instruction runs instruction by instruction, and those that these run."""
        for _, name in instruction.called:
            yield (computation := self.computations[name])
            for inner in computation:
                if inner.opcode in CONTROL:
                    yield from self.computations_of(inner)

    def run(self) -> Iterator[list[Instruction]]:
        """Every computation that the program runs instruction by instruction."""
        yield self.computations[self.entry]
        for instruction in self.computations[self.entry]:
            if instruction.opcode in CONTROL:
                yield from self.computations_of(instruction)

    def kernels(self, loop: Instruction) -> int:
        """Number of launches in one turn of a loop, its condition included; inner loops count one turn."""
        return sum(i.runs and i.opcode not in CONTROL for c in self.computations_of(loop) for i in c)

    def copies(
        self, computations: Collection[Sequence[Instruction]], shapes: Collection[tuple[int, ...]], on_chip: int | None
    ) -> list[str]:
        """Instructions that read an array of one of these shapes and write at least half as many elements.

        Copies do that, and so do gathers, transpositions, conversions, slices and paddings; products do not, nor do
        updates in place. Arrays of any dtype count, also with axes split or merged. Writing an array of one of these
        shapes counts, too: scales that were repeated for each number are a matrix as well. Copies to on-chip memory or
        from it do not count: an array that is there for a while is read there instead of in main memory.

        Args:
            computations: the computations to look through; the arrays in question come into a computation from outside.
            shapes: the shapes of these arrays.
            on_chip: number of the memory space that is on the chip; None if the chip shows none.

        Returns:
            For each such instruction its opcode, or `fusion of` and the opcode of what the fusion makes last.
        """
        found = []

        def alike(array: HloArray) -> bool:
            return (array.space != on_chip or not on_chip) and any(_reshaped(array.dims, shape) for shape in shapes)

        for computation in computations:
            sources: dict[str, int] = {}
            for i in computation:
                if i.opcode in ("parameter", "get-tuple-element") and len(i.results) == 1:
                    if alike(i.results[0]):
                        sources[i.name] = i.results[0].elements
                elif i.opcode == "bitcast" and i.operands[0] in sources:
                    sources[i.name] = sources[i.operands[0]]
                elif i.runs and i.opcode not in CONTROL:
                    aliases = i.aliases
                    operands = [name for at, name in enumerate(i.operands) if at not in aliases.values()]
                    results = [result for at, result in enumerate(i.results) if at not in aliases]
                    read = max((sources.get(name, 0) for name in operands), default=0)
                    written = max((r.elements for r in results if r.space != on_chip or not on_chip), default=0)
                    copied = bool(read) and 2 * written >= read
                    # Any other copy is of an array that comes from on-chip memory.
                    copied = copied or (i.opcode not in ("copy", "copy-start") and any(map(alike, results)))
                    if copied and not self._updates_in_place(i):
                        found.append(self._described(i))
        return found

    def collectives(self, computations: Iterable[Sequence[Instruction]]) -> list[Collective]:
        """The instructions of these computations, and of their fusions, that make devices communicate."""
        found = []
        for computation in computations:
            sizes = {i.name: math.ceil(sum(a.elements * a.itemsize for a in i.results)) for i in computation}
            for i in computation:
                kind = i.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    size = max(sizes[i.name], sum(sizes.get(name, 0) for name in i.operands))
                    found.append(Collective(kind, size, i.origin))
                elif i.opcode in ("fusion", "async-start"):
                    found += self.collectives([self._inside(i)])
        return found

    def _inside(self, fusion: Instruction) -> list[Instruction]:
        return [i for _, name in fusion.called for i in self.computations[name]]

    def _updates_in_place(self, i: Instruction) -> bool:
        # If XLA cannot update in place, it puts an instruction that copies before the update.
        if i.opcode == "fusion":
            return any(inner.opcode == "dynamic-update-slice" for inner in self._inside(i))
        return i.opcode == "dynamic-update-slice"

    def _described(self, i: Instruction) -> str:
        if i.opcode != "fusion":
            return i.opcode.removesuffix("-start")
        return f"fusion of {next((x.opcode for x in reversed(self._inside(i)) if x.runs), 'nothing')}"


def _reshaped(dims: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether these are the dimensions of an array of this shape, perhaps with axes split or merged."""
    if math.prod(dims) != math.prod(shape):
        return False
    strides = [{math.prod(sizes[axis:]) for axis in range(len(sizes))} for sizes in (dims, shape)]
    return strides[0] <= strides[1] or strides[0] >= strides[1]


def _instruction(name: str, line: str) -> Instruction:
    shape, rest = _split_shape(line)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest)
    operands, attributes = rest[:end], rest[end + 1 :]
    called = [(role, computation) for role, computation in _CALLED.findall(attributes)]
    called += [("branch", branch) for names in _BRANCHES.findall(attributes) for branch in _NAME.findall(names)]
    if opcode.endswith("-start") and shape.startswith("(") and opcode != "all-reduce-start":
        parts = list(_parts(shape[1:-1]))
        shape = parts[0] if opcode == "copy-start" else parts[1]
    return Instruction(name, opcode, tuple(_arrays(shape)), tuple(_NAME.findall(operands)), tuple(called), attributes)


def _split_shape(line: str) -> tuple[str, str]:
    if not line.startswith("("):
        shape, _, rest = line.partition(" ")
        return shape, rest
    end = _closing(line[1:]) + 1
    return line[: end + 1], line[end + 1 :].lstrip()


def _closing(text: str, brackets: str = "()") -> int:
    """Index of the bracket that closes the one opened just before the text."""
    depth = 0
    for bracket in re.finditer(f"[{re.escape(brackets)}]", text):
        depth += 1 if bracket[0] == brackets[0] else -1
        if depth < 0:
            return bracket.start()
    return len(text)


def _parts(text: str) -> Iterator[str]:
    """The pieces of the text between commas that are outside of all brackets."""
    start = depth = 0
    for mark in re.finditer(r"[(){}\[\],]", text):
        if mark[0] == "," and depth == 0:
            yield text[start : mark.start()].strip()
            start = mark.end()
        elif mark[0] != ",":
            depth += 1 if mark[0] in "({[" else -1
    yield text[start:].strip()


def _arrays(shape: str) -> Iterator[HloArray]:
    for element, dims, layout in _ARRAY.findall(shape):
        space, bits = _SPACE.search(layout), re.search(r"\d+", element)
        itemsize = int(bits[0]) / 8 if bits else 1
        yield HloArray(tuple(int(n) for n in dims.split(",") if n), int(space[1]) if space else 0, itemsize)
