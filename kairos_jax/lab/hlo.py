"""What a compiled program does, read from its optimized HLO: the text that XLA gives of it.

The text has no promise of stability. What is read here is held by tests on programs that do, and on
ones that do not do, what is looked for.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
_MOVES = ("copy", "transpose", "reshape")
# An array in a result, and how it lies.
_PLACED = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_KERNEL_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
# They move nothing, or what they begin is counted where it begins.
# Of what runs beside others, where its destination stands among its results.
_DESTINATION = {"copy-start": 0, "slice-start": 1, "dynamic-slice-start": 1}
_ROWS = ("gather", "dynamic-slice", "slice", "slice-start", "dynamic-slice-start")
_MOVE_NOTHING = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "conditional", "while", "call"),
)
# Of a copy that has begun: what it is of lies in fast memory.
_FROM_FAST = re.compile(r"^\(\w+\[[\d,]*\]\{[^}]*\}, \w+\[[\d,]*\]\{[^}]*S\([1-9]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
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
    from_fast_memory: it is a copy that brings it back from there. in_main: those of its results
    that lie in main memory. operands: names of other instructions.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    rest: str
    is_root: bool
    in_fast_memory: bool
    from_fast_memory: bool
    in_main: tuple[Shape, ...] = ()
    operands: tuple[str, ...] = ()

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
        operations: of all products, a multiplication and an addition each. Without kernels; the
            body of a loop counts once.
        arguments: those that are read from main memory, and how often. Of one from which rows are
            gathered, the rows count. Without the branches of conditionals; the body of a loop
            counts once.
        between: as `arguments`, of what is written to main memory, and what is read of that.
    """

    aliased: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    gathered: Counter[Shape] = field(default_factory=Counter)
    moves: Counter[Shape] = field(default_factory=Counter)
    returned: Counter[Shape] = field(default_factory=Counter)
    custom_calls: Counter[str] = field(default_factory=Counter)
    cycles: int = 0
    operations: int = 0
    arguments: Counter[Shape] = field(default_factory=Counter)
    between: Counter[Shape] = field(default_factory=Counter)

    def bytes_moved(self, but: Collection[Shape] = (), cache: int = 0) -> int:
        """To and from main memory. but: arrays of these shapes do not count. cache: bytes of one
        before main memory; what is written and fits is read from there.
        """
        past = {each: n for each, n in self.between.items() if each.num_bytes > cache}
        return sum(
            n * each.num_bytes
            for arrays in (self.arguments, past)
            for each, n in arrays.items()
            if each not in but
        )

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
    program.operations = sum(_operations(lines) for lines in computations.values())
    _add_traffic(program, entry, computations)
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
            root, own, result, opcode, rest = parts.groups()
            back = bool(_FROM_FAST.match(result))
            placed = [
                (Shape(dtype, tuple(int(size) for size in dims.split(",") if size)), layout or "")
                for dtype, dims, layout in _PLACED.findall(result)
            ]
            shapes = tuple(shape for shape, _ in placed)
            fast = bool(placed) and _is_fast(placed[0][1])
            in_main = tuple(shape for shape, layout in placed if not _is_fast(layout))
            if opcode in _DESTINATION:  # beside it stand its source and a mark
                shape, layout = placed[_DESTINATION[opcode]]
                shapes, in_main = (shape, *shapes), () if _is_fast(layout) else (shape,)
            operands = tuple(_OPERAND.findall(_within(rest)))
            found[name].append(
                Instruction(own, opcode, shapes, rest, bool(root), fast, back, in_main, operands)
            )
    return found, entry


def _is_fast(layout: str) -> bool:
    return bool(re.search(r"S\([1-9]", layout))


def _within(rest: str) -> str:
    """What stands before the parenthesis that closes an instruction's operands."""
    depth = 1
    for index, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:index]
    return rest


def _operations(lines: Sequence[Instruction]) -> int:
    """Of the products in a computation. XLA for TPU writes them as convolutions."""
    shapes = {line.name: line.shapes[0] for line in lines if line.shapes}
    total = 0
    for line in lines:
        if line.opcode not in ("dot", "convolution"):
            continue
        first, second = (shapes[each].dims for each in line.operands[:2])
        if line.opcode == "dot" and (found := _CONTRACTED.search(line.rest)):
            summed = math.prod(first[int(each)] for each in found[1].split(",") if each)
        elif found := _KERNEL_LABELS.search(line.rest):
            summed = math.prod(second) // second[found[1].index("o")]
        else:
            continue
        total += 2 * summed * math.prod(line.shapes[0].dims)
    return total


def _add_traffic(program: Program, name: str, computations: dict[str, list[Instruction]]) -> None:
    lines = computations.get(name, [])
    made = {line.name: line for line in lines}
    for line in lines:
        if line.opcode in ("while", "call"):
            for called in line.called:
                _add_traffic(program, called, computations)
        if line.opcode in _MOVE_NOTHING or line.opcode.endswith(("-done", "-update")):
            continue
        program.between.update(line.in_main)
        for place, operand in enumerate(line.operands):
            source = made.get(operand)
            if not source or not source.in_main or source.opcode == "tuple":
                continue
            read = _read_by(line, place, computations) or source.in_main
            while source and source.opcode == "bitcast":
                source = made.get(source.operands[0])
            given = source is not None and source.opcode == "parameter"
            (program.arguments if given else program.between).update(read)


def _read_by(
    line: Instruction, place: int, computations: dict[str, list[Instruction]]
) -> list[Shape]:
    """What an instruction reads of an operand, where that is a few rows of it; else empty."""
    if line.opcode in _ROWS and not place:
        return [line.shapes[0]]
    for called in line.called if line.opcode == "fusion" else ():
        inside = computations.get(called, [])
        own = next(
            (x.name for x in inside if x.opcode == "parameter" and x.rest.startswith(f"{place})")),
            None,
        )
        users = [each for each in inside if own in each.operands]
        if users and all(each.opcode in _ROWS and each.operands[0] == own for each in users):
            return [each.shapes[0] for each in users]
    return []


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
