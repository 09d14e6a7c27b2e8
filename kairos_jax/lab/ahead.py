"""Compiles what the engines of a config would run, for devices that are not here."""

import contextlib
import dataclasses
import io
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from kairos_jax.config import ServerConfig
from kairos_jax.config.chips import Chip
from kairos_jax.engine.calls import Call, Read, Score, Step, Write
from kairos_jax.engine.functions import Functions, Shapes
from kairos_jax.engine.lanes import Fill
from kairos_jax.lab import hlo
from kairos_jax.process.command import UsageError
from models.config import ModelConfig
from models.sharding import make_mesh
from schedulers.ledger.instance import Role

# Smaller arrays are moved for nothing that matters.
_LEAST_BYTES = 1 << 20
# XLA for TPU brings a layer's pool into fast memory where it fits, appends there and brings it
# back, in one or two layers of a step. And for the log-probabilities of prompts, which few ask for,
# it lays the head out anew once.
_KNOWN = ((Step, "comes back from fast memory"), (Score, "1 weights are copied"))
# A step of as many tokens as sequences moves little beside the weights, and no step computes much
# beside its tokens: so much more than that is a fault.
_MOST_MOVED, _MOST_OPERATIONS = 1.15, 1.1
_DTYPES = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "int32": "s32"}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one device. arguments: weights and pool, for the most part. temporaries: beside
    them, at most. peak: of all at once.
    """

    arguments: int
    temporaries: int
    peak: int


@dataclass(slots=True)
class Built:
    """A program that was compiled, or not. faults: what it does that it should not, in words.
    known: the same, where it is known and stays. error: of the compiler; the fields after it are
    then as they were. size: of a step, its tokens and sequences. moved: bytes read from main memory
    and written to it, but for the pool, which kernels read and write in places.
    """

    role: Role
    name: str
    layers: int
    size: tuple[int, int] | None = None
    error: str = ""
    lower_s: float = 0.0
    compile_s: float = 0.0
    memory: Memory = Memory(0, 0, 0)
    program: hlo.Program = field(default_factory=hlo.Program)
    moved: int = 0
    faults: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)


def functions_of(
    config: ServerConfig, model: ModelConfig, role: Role, devices: Sequence[Any], kernels: str
) -> Functions:
    """Those of an engine of this role on these devices. Raises UsageError."""
    limits = config.limits(role)
    shapes = Shapes.for_role(role, limits, kernels)
    mesh = make_mesh(devices)
    try:
        return Functions(model, mesh, config.rules, limits, shapes, config.dtype, kernels)
    except ValueError as error:
        raise UsageError(f"kernels {kernels}: {error}") from error


def name_of(call: Call, size: tuple[int, int] | None) -> str:
    """Of a program, for people. size: of a step, its tokens and sequences."""
    match call:
        case Step():
            return "step {} of {}".format(*size or ())
        case Fill():
            return "fill lanes"
        case Score(targets):
            return f"score {targets.shape[0]}"
        case Read(pages):
            return f"read {len(pages)} pages"
        case Write(pages):
            return f"write {len(pages)} pages"


def build(
    role: Role, model: ModelConfig, functions: Functions, few_layers: Functions, chip: Chip
) -> Iterator[Built]:
    """Compiles all programs: the largest step, the largest that has a token for each sequence, and
    what moves pages, with all layers; others, which differ from them in size alone, with those of
    `few_layers`.
    """
    sizes = list(functions.shapes)
    largest = {sizes[-1]} | {max([each for each in sizes if each[0] == each[1]], default=sizes[-1])}
    small = list(few_layers.described())
    for index, (call, _, function, arguments) in enumerate(functions.described()):
        of, layers = functions, model.num_layers
        size = sizes[index] if index < len(sizes) else None  # a step of each size comes first
        if size and size not in largest:
            call, _, function, arguments = small[index]
            of, layers = few_layers, len(few_layers.pool)
        built = Built(role, name_of(call, size), layers, size)
        yield _built(built, call, function, arguments, of, chip)


def _built(
    built: Built, call: Call, function: Any, arguments: Any, functions: Functions, chip: Chip
) -> Built:
    begun = time.perf_counter()
    try:
        lowered = function.trace(*arguments).lower()
        built.lower_s = time.perf_counter() - begun
        begun = time.perf_counter()
        with _said_by_compiler() as said:
            compiled = lowered.compile()
        built.compile_s = time.perf_counter() - begun
        built.faults += spills(said.getvalue())
    except Exception as error:  # whatever a compiler raises is what is to be told
        built.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
        built.faults.append(f"does not compile: {built.error[:300]}")
        return built
    sizes = compiled.memory_analysis()
    if sizes is not None:
        peak = getattr(sizes, "peak_memory_in_bytes", 0)
        built.memory = Memory(sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, peak)
    built.program = hlo.read(compiled.as_text())
    pool = _shards(jax.tree.leaves(functions.pool))
    built.moved = built.program.bytes_moved(pool, chip.cache)
    for fault in faults_of(built.program, call, functions):
        known = any(isinstance(call, of) and words in fault for of, words in _KNOWN)
        (built.known if known else built.faults).append(fault)
    built.faults += excess(built, functions)
    if isinstance(call, Step) and built.memory.peak > chip.memory:
        built.faults.append(
            f"takes {built.memory.peak / 1e9:.1f} GB of the {chip.memory / 1e9:.1f} GB there are"
        )
    return built


@contextlib.contextmanager
def _said_by_compiler() -> Iterator[io.StringIO]:
    """What compilers write to this process's own standard output and error, past Python's; it is
    there when the block is over. What kernels for GPUs take of registers is told only so.
    """
    told = io.StringIO()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with tempfile.TemporaryFile() as file:
        try:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
            yield told
        finally:
            for descriptor, before in zip((1, 2), kept, strict=True):
                os.dup2(before, descriptor)
                os.close(before)
            file.seek(0)
            told.write(file.read().decode(errors="replace"))


def spills(said: str) -> list[str]:
    """Of what ptxas says of the kernels of a program: those that spill registers."""
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    worst = max((int(stores) + int(loads) for stores, loads in found), default=0)
    return [f"a kernel spills {worst} bytes of registers"] if worst else []


def faults_of(program: hlo.Program, call: Call, functions: Functions) -> list[str]:
    """What a program of these functions does that it should not, in words."""
    faults, layers = [], len(functions.pool)
    pool = _shards(jax.tree.leaves(functions.pool))
    arrays = len(jax.tree.leaves(functions.pool)) if isinstance(call, Step | Write) else 0
    arrays += isinstance(call, Step | Fill)
    if program.aliased < arrays:
        lacking = arrays - program.aliased
        faults.append(f"{lacking} arrays of the pool and lanes are not written in place")
    if copied := program.moved(pool):
        faults.append(f"the pool is copied or laid out anew {copied} times")
    weights = {path: w for path, w in functions.params.items() if _bytes(w) >= _LEAST_BYTES}
    split = {_bytes(w) for w in weights.values() if w.sharding.shard_shape(w.shape) != w.shape}
    if gathered := program.gathers(split):
        faults.append(f"{gathered} weights are gathered")
    # Activations may have the sizes of a weight.
    tokens, (_, width) = call[0].shape[-1], functions.params["embed"].shape
    hidden = {hlo.Shape(each.dtype, (tokens, width)) for each in pool}
    if moved := program.moved(_shards(weights.values()) - pool, but=hidden):
        faults.append(f"{moved} weights are copied or laid out anew")
    if through := sum(program.returned[shape] for shape in pool):
        faults.append(f"the pool of {through} layers comes back from fast memory")
    several = functions.mesh.size > 1
    sums = sum(n for what, n in program.collectives.items() if what.startswith("all-reduce "))
    others = sum(program.collectives.values()) - sums
    expected = 2 * layers + 1 if several and isinstance(call, Step) else 0
    allowed = 1 if several and isinstance(call, Step | Score) else 0
    # The logits are made whole by a gather, or, where they are few, by a sum of parts.
    if sums > expected + max(allowed - others, 0):
        faults.append(f"{sums} all-reduces where {expected} do")
    if others > allowed:
        faults.append(f"{others} other collectives where {allowed} does")
    return faults


def excess(built: Built, functions: Functions) -> list[str]:
    """Of a step, what it moves and computes beyond what it must, in words."""
    if built.size is None:
        return []
    tokens, sequences = built.size
    # A head of its own leaves of the embedding a few rows to read.
    head = "head" if "head" in functions.params else "embed"
    sizes = {
        path: math.prod(weight.sharding.shard_shape(weight.shape)) * weight.dtype.itemsize
        for path, weight in functions.params.items()
        if path == head or path != "embed"
    }
    of_number = functions.params[head].dtype.itemsize
    weights = sum(sizes.values())
    useful = tokens * (weights - sizes[head]) + sequences * sizes[head]
    useful *= 2 / of_number
    faults = []
    if tokens == sequences and built.moved > _MOST_MOVED * weights:
        faults.append(f"moves {built.moved / 1e9:.2f} GB where the weights are {weights / 1e9:.2f}")
    if (operations := built.program.operations) > _MOST_OPERATIONS * useful:
        faults.append(f"computes {operations / 1e9:.0f} Gflop where {useful / 1e9:.0f} do")
    return faults


def _shards(arrays: Any) -> set[hlo.Shape]:
    """The shapes on one device of those that are not small."""
    return {
        hlo.Shape(_DTYPES[str(a.dtype)], tuple(a.sharding.shard_shape(a.shape)))
        for a in arrays
        if _bytes(a) >= _LEAST_BYTES
    }


def _bytes(array: Any) -> int:
    return array.size * array.dtype.itemsize


def with_layers(model: ModelConfig, count: int) -> ModelConfig:
    """The same with fewer layers."""
    return dataclasses.replace(model, num_layers=min(count, model.num_layers))
