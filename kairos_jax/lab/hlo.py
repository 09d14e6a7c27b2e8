"""What a compiled program does, read from its optimized HLO: the text that XLA gives of it.

The text has no promise of stability. What is read here is held by tests on programs that do, and on
ones that do not do, what is looked for.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
_MOVES = ("copy", "transpose", "reshape")
_FAST = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\([1-9]")
# Of a copy that has begun: what it is of lies in fast memory.
_FROM_FAST = re.compile(r"^\(\w+\[[\d,]*\]\{[^}]*\}, \w+\[[\d,]*\]\{[^}]*S\([1-9]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|token|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ALIAS = re.compile(r"\((\d+), \{[\d, ]*\}, (?:may|must)-alias\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Shape(NamedTuple):
    """Of an array on one device. dtype: as HLO writes it, such as bf16."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int(re.sub(r"\D.*", "", self.dtype.lstrip("bfcsu")))
        return math.ceil(bits * math.prod(self.dims) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line. shapes: of its results. rest: what follows its opcode. in_fast_memory: its first
    result does not lie in a device's main memory, but where it is brought to be computed with.
    from_fast_memory: it is a copy that brings it back from there.
    """

    opcode: str
    shapes: tuple[Shape, ...]
    rest: str
    is_root: bool
    in_fast_memory: bool
    from_fast_memory: bool

    @property
    def largest(self) -> Shape | None:
        return max(self.shapes, key=lambda shape: shape.num_bytes, default=None)

    @property
    def called(self) -> list[str]:
        """The computations that it calls."""
        listed = _CALLED.findall(self.rest)
        if branches := _BRANCHES.search(self.rest):
            listed += re.findall(r"[\w.\-]+", branches[1])
        return listed

    @property
    def cycles(self) -> int:
        """As XLA for TPU estimates them; 0 where nothing is said."""
        said = _CYCLES.search(self.rest)
        return int(said[1]) if said else 0


@dataclass(slots=True)
class Program:
    """A compiled program on one device.

    Attributes:
        aliased: how many of its arguments' arrays its results are written into.
        collectives: how many of each, such as "all-reduce f32[16,4096]".
        moves: arrays that are copied or laid out anew within main memory, and how often.
        returned: arrays that come back from fast memory, in which they were changed, and how often.
        custom_calls: how many of each target.
        cycles: estimated, without kernels and collectives, where XLA says so: of the longest way
            through each conditional.
    """

    aliased: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    gathered: Counter[Shape] = field(default_factory=Counter)
    moves: Counter[Shape] = field(default_factory=Counter)
    returned: Counter[Shape] = field(default_factory=Counter)
    custom_calls: Counter[str] = field(default_factory=Counter)
    cycles: int = 0

    def moved(self, shapes: Collection[Shape], but: Collection[Shape] = ()) -> int:
        """How many arrays of these shapes, or of a permutation of their dimensions, are copied or
        laid out anew. but: of just these shapes, what they are does not matter.
        """
        sought = {_sorted(shape) for shape in shapes}
        found = (shape for shape in self.moves if _sorted(shape) in sought and shape not in but)
        return sum(self.moves[shape] for shape in found)

    def gathers(self, num_bytes: Collection[int]) -> int:
        """How many all-gathers have a result of one of these sizes."""
        return sum(n for shape, n in self.gathered.items() if shape.num_bytes in num_bytes)


def _sorted(shape: Shape) -> Shape:
    """Without dimensions of one, which a layout adds and drops at will."""
    return Shape(shape.dtype, tuple(sorted(size for size in shape.dims if size > 1)))


def read(text: str) -> Program:
    """Reads the optimized HLO of `jax.stages.Compiled.as_text`."""
    computations, entry = _parse(text)
    head = text.partition("\n")[0]
    program = Program(aliased=len(_ALIAS.findall(head)))
    fused = _fused(computations)
    channels: set[tuple[str, str]] = set()
    for name, lines in computations.items():
        for line in lines:
            kind = line.opcode.removesuffix("-start")
            if kind in COLLECTIVES and (shape := line.largest):
                channel = _CHANNEL.search(line.rest)
                # Of one that was cut into pieces and fused with other work, all have its channel.
                if name in fused and channel:
                    if (kind, channel[1]) in channels:
                        continue
                    channels.add((kind, channel[1]))
                program.collectives[f"{kind} {shape}"] += 1
                if kind == "all-gather":
                    program.gathered[shape] += 1
            if name in fused:
                continue
            if line.opcode == "custom-call" and (target := _TARGET.search(line.rest)):
                program.custom_calls[target[1]] += 1
            if (shape := line.largest) and line.from_fast_memory:
                program.returned[shape] += 1
            elif shape and _is_move(line, computations):
                program.moves[shape] += 1
    program.cycles = _cycles(entry, computations)
    return program


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """All computations by name, and the name of the entry."""
    found: dict[str, list[Instruction]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            name = ""
        elif name and (parts := _LINE.match(line)):
            root, _, result, opcode, rest = parts.groups()
            shapes = tuple(
                Shape(dtype, tuple(int(size) for size in dims.split(",") if size))
                for dtype, dims in _SHAPE.findall(result)
                if dtype != "token"
            )
            fast = bool(_FAST.match(result.lstrip("(")))
            back = bool(_FROM_FAST.match(result))
            found[name].append(Instruction(opcode, shapes, rest, bool(root), fast, back))
    return found, entry


def _fused(computations: dict[str, list[Instruction]]) -> set[str]:
    """Those whose instructions do not run one by one."""
    return {
        called
        for lines in computations.values()
        for line in lines
        if line.opcode not in ("while", "conditional", "call", "async-start")
        for called in line.called
    }


def _is_move(line: Instruction, computations: dict[str, list[Instruction]]) -> bool:
    if line.in_fast_memory:
        return False
    if line.opcode == "fusion":
        roots = [root for root in _roots(line, computations) if root is not None]
        return any(root.opcode in _MOVES for root in roots)
    return line.opcode in ("copy", "copy-start", "transpose")


def _roots(
    line: Instruction, computations: dict[str, list[Instruction]]
) -> Iterator[Instruction | None]:
    for called in line.called:
        yield next((each for each in computations.get(called, ()) if each.is_root), None)


def _cycles(name: str, computations: dict[str, list[Instruction]]) -> int:
    total = 0
    for line in computations.get(name, ()):
        total += line.cycles
        if line.opcode == "conditional":
            total += max((_cycles(each, computations) for each in line.called), default=0)
        elif line.opcode == "call":
            total += sum(_cycles(each, computations) for each in line.called)
    return total
