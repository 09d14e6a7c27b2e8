"""What is asked of compiled programs: each demand can fail."""

import dataclasses
import math
import os

import jax
import pytest

from kairos_jax.config.chips import CHIPS
from kairos_jax.engine.calls import Read, Score, Step, Write
from kairos_jax.engine.functions import Functions, Shapes
from kairos_jax.engine.lanes import Fill
from kairos_jax.lab import ahead, hlo
from kairos_jax.lab.shapes import SHAPES
from models.sharding import Rules, make_mesh
from schedulers.ledger.instance import Limits, Role

LIMITS = Limits(max_batch=2, max_chunk=4, max_context=64, page_size=8, num_pages=16)
MODEL = SHAPES["tiny"]


@pytest.fixture(scope="module")
def functions():
    mesh = make_mesh(jax.devices()[:2])
    shapes = Shapes.for_role(Role.BOTH, LIMITS)
    return Functions(MODEL, mesh, Rules(), LIMITS, shapes, "float32", "cpu")


@pytest.fixture(autouse=True)
def small_arrays_count(monkeypatch):
    monkeypatch.setattr(ahead, "_LEAST_BYTES", 1)


def call_of(functions, kind):
    return next(call for call, *_ in functions.described() if isinstance(call, kind))


def good(functions, kind):
    """What such a program is to be like."""
    layers, step = MODEL.num_layers, kind is Step
    pool, lanes = 2 * layers * (kind in (Step, Write)), kind in (Step, Fill)
    program = hlo.Program(aliased=pool + lanes)
    if step:
        program.collectives["all-reduce f32[2,64]"] = 2 * layers + 1
    if kind in (Step, Score):
        program.collectives["all-gather f32[2,512]"] = 1
        program.gathered[hlo.Shape("f32", (2, 512))] = 1
    return program


def shard(array):
    return hlo.Shape("f32", tuple(array.sharding.shard_shape(array.shape)))


@pytest.mark.parametrize("kind", [Step, Fill, Score, Read, Write])
def test_a_program_as_it_is_to_be_has_no_faults(functions, kind):
    assert ahead.faults_of(good(functions, kind), call_of(functions, kind), functions) == []


def not_in_place(program, functions):
    program.aliased -= 1
    return "1 arrays of the pool and lanes are not written in place"


def pool_moved(program, functions):
    program.moves[shard(functions.pool[0].v)] += 2
    return "the pool is copied or laid out anew 2 times"


def pool_transposed(program, functions):
    of_pool = shard(functions.pool[0].k)
    program.moves[hlo.Shape(of_pool.dtype, of_pool.dims[::-1])] += 1
    return "the pool is copied or laid out anew 1 times"


def weight_gathered(program, functions):
    whole = functions.params["layers.0.mlp.gate"]
    program.gathered[hlo.Shape("f32", whole.shape)] += 1
    return "1 weights are gathered"


def weight_moved(program, functions):
    program.moves[shard(functions.params["layers.0.mlp.down"])] += 1
    return "1 weights are copied or laid out anew"


def pool_brought_back(program, functions):
    program.returned[shard(functions.pool[0].v)] += 2
    return "the pool of 2 layers comes back from fast memory"


def one_sum_more(program, functions):
    program.collectives["all-reduce f32[2,64]"] += 1
    return "6 all-reduces where 5 do"


def exchanged(program, functions):
    program.collectives["all-to-all f32[2,64]"] += 1
    return "2 other collectives where 1 does"


@pytest.mark.parametrize(
    "spoil",
    [
        *(not_in_place, pool_moved, pool_transposed, weight_gathered, weight_moved),
        *(one_sum_more, exchanged, pool_brought_back),
    ],
)
def test_each_fault_is_told(functions, spoil):
    program = good(functions, Step)
    words = spoil(program, functions)
    assert ahead.faults_of(program, call_of(functions, Step), functions) == [words]


def test_a_step_that_moves_or_computes_too_much_is_told(functions):
    def faults(size, moved, operations):
        program = hlo.Program(operations=operations)
        built = ahead.Built(Role.BOTH, "", 2, size=size, moved=moved, program=program)
        return ahead.excess(built, functions)

    shards = [w.sharding.shard_shape(w.shape) for w in functions.params.values()]
    weights = 4 * sum(map(math.prod, shards))  # the embedding is the head
    enough = 2 * 2 * weights // 4
    assert faults((2, 2), weights, enough) == []
    assert faults((2, 2), 2 * weights, enough)[0].startswith("moves 0.00 GB where the weights")
    assert faults((2, 2), weights, 2 * enough)[0].startswith("computes 0 Gflop where")
    assert faults((4, 2), 2 * weights, enough) == [], "prompts have activations"
    assert faults(None, 2 * weights, 2 * enough) == []


def test_kernels_that_spill_are_told():
    clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert ahead.spills(f"ptxas info: {clean}\nptxas info: Used 171 registers") == []
    spilling = clean.replace("0 bytes spill stores", "24 bytes spill stores")
    assert ahead.spills(f"{clean}\n{spilling}") == ["a kernel spills 24 bytes of registers"]


def test_what_a_compiler_says_past_python_is_read_and_kept_from_the_terminal(capfd):
    with ahead._said_by_compiler() as said:
        os.write(1, b"out\n")
        os.write(2, b"err\n")
    os.write(1, b"after\n")
    assert said.getvalue() == "out\nerr\n"
    assert capfd.readouterr() == ("after\n", "")


def test_all_programs_are_compiled_the_small_ones_with_few_layers(functions):
    """By XLA for CPU, whose step of a tiny model does what it should too."""
    few = Functions(
        ahead.with_layers(MODEL, 1),
        *(functions.mesh, Rules(), LIMITS, functions.shapes, "float32", "cpu"),
    )
    chip = CHIPS["v5e"]
    built = list(ahead.build(Role.BOTH, MODEL, functions, few, chip))
    assert [(each.name, each.layers) for each in built] == [
        ("step 1 of 1", 1),
        ("step 2 of 2", 2),
        ("step 4 of 2", 1),
        ("step 6 of 2", 2),
        ("score 6", 2),
        ("fill lanes", 2),
        ("read 4 pages", 2),
        ("write 4 pages", 2),
    ]
    assert all(each.memory.arguments > 0 and not each.error for each in built)
    steps = [each for each in built if each.name.startswith(("step", "write"))]
    assert not any(fault for each in steps for fault in each.faults if "pool" in fault)
    small = dataclasses.replace(chip, memory=1)
    fault = next(iter(ahead.build(Role.BOTH, MODEL, functions, few, small))).faults[-1]
    assert fault.startswith("takes 0.0 GB of the 0.0 GB")


def test_a_program_that_does_not_compile_is_a_fault(functions, monkeypatch):
    def refuse(*arguments):
        raise ValueError("scoped VMEM:\n 16.4 of 16.0 MB")

    monkeypatch.setattr(functions, "_read", jax.jit(refuse))
    shapes = Shapes(Role.BOTH, functions.shapes.sizes[:1])
    monkeypatch.setattr(functions, "shapes", shapes)
    built = ahead.build(Role.BOTH, MODEL, functions, functions, CHIPS["v5e"])
    (read,) = [each for each in built if each.name == "read 4 pages"]
    assert read.error == "ValueError: scoped VMEM: 16.4 of 16.0 MB"
    assert read.faults == [f"does not compile: {read.error}"]
    assert math.isclose(read.compile_s, 0.0)
