"""What is read from optimized HLO: held on programs that do, and on ones that do not do it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kairos_jax.lab import hlo
from models.sharding import make_mesh

POOL = hlo.Shape("f32", (64, 8, 512))


def compiled(function, *shapes, **how):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.read(jax.jit(function, **how).lower(*arguments).compile().as_text())


def append(pool, row):
    return pool.at[3].set(row, mode="drop")


def test_a_pool_is_written_in_place_only_if_it_is_given_away():
    shapes = POOL.dims, POOL.dims[1:]
    donated = compiled(append, *shapes, donate_argnums=0)
    assert (donated.aliased, donated.moved({POOL})) == (1, 0)
    kept = compiled(append, *shapes)
    assert (kept.aliased, kept.moved({POOL})) == (0, 1)


def test_a_pool_that_is_laid_out_anew_is_told_whatever_the_order_of_its_dimensions():
    turned = compiled(lambda pool: pool.transpose(2, 1, 0), POOL.dims)
    assert turned.moved({POOL}) == 1
    assert compiled(lambda pool: pool * 2, POOL.dims).moved({POOL}) == 0
    assert turned.moved({hlo.Shape("f32", (64, 9, 512))}) == 0


def test_activations_of_a_weights_size_can_be_left_out():
    turned = compiled(lambda pool: pool.transpose(2, 1, 0), POOL.dims)
    moved = hlo.Shape("f32", POOL.dims[::-1])
    assert turned.moved({POOL}, but={moved}) == 0
    assert turned.moved({POOL}, but={POOL}) == 1, "of just these shapes"


@pytest.mark.parametrize("whole_first", [False, True])
def test_a_weight_that_is_gathered_is_told(whole_first):
    """As the head's was, where the logits were asked to be whole and not in parts before."""
    mesh = make_mesh(jax.devices()[:2])
    split, whole = (NamedSharding(mesh, PartitionSpec(None, each)) for each in ("tensor", None))

    def head(x, w):
        if whole_first:
            w = jax.lax.with_sharding_constraint(w, whole)
        logits = jax.lax.with_sharding_constraint(x @ w, split)
        return jax.lax.with_sharding_constraint(logits, whole)

    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=how)
        for shape, how in (((4, 64), whole), ((64, 512), split))
    ]
    text = jax.jit(head).lower(*arguments).compile().as_text()
    program = hlo.read(text)
    assert program.gathers({4 * 64 * 512}) == int(whole_first)
    assert program.gathers({4 * 4 * 512}) == 1  # the logits
    assert ("all-gather f32[64,512]" in program.collectives) == whole_first


TPU = """\
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }

%fused_computation.1 (param_0.1: bf16[64,128]) -> bf16[128,64] {
  %param_0.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.1 = bf16[128,64]{0,1:T(8,128)(2,1)} copy(%param_0.1)
}

%branch_a (arg.1: bf16[64,128]) -> bf16[64,128] {
  ROOT %x.1 = bf16[64,128]{1,0} copy(%arg.1), backend_config={"estimated_cycles":"500"}
}

%branch_b (arg.2: bf16[64,128]) -> bf16[64,128] {
  ROOT %x.2 = bf16[64,128]{1,0} add(%arg.2, %arg.2), backend_config={"estimated_cycles":"20"}
}

ENTRY %main.1 (p0.1: bf16[64,128], p1.1: bf16[64,128]) -> (bf16[64,128]) {
  %p0.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p1.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %near.1 = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0}, u32[]) copy-start(%p0.1)
  %fusion.1 = bf16[128,64]{0,1} fusion(%p0.1), kind=kLoop, calls=%fused_computation.1
  %k.1 = bf16[64,128]{1,0} custom-call(%p0.1), custom_call_target="tpu_custom_call"
  %c.1 = bf16[64,128]{1,0} conditional(%p, %p0.1, %p1.1), branch_computations={%branch_a, %branch_b}
  ROOT %t.1 = (bf16[64,128]{1,0}) tuple(%c.1), backend_config={"estimated_cycles":"7"}
}
"""


def test_what_xla_for_tpu_writes():
    program = hlo.read(TPU)
    assert program.aliased == 1
    assert program.custom_calls == {"tpu_custom_call": 1}
    # Not what is brought to fast memory; a fusion that ends in a copy, and a branch that copies.
    assert program.moved({hlo.Shape("bf16", (64, 128))}) == 2
    assert program.cycles == 7 + 500


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [
        (hlo.Shape("bf16", (3, 5)), 30),
        (hlo.Shape("f8e4m3fn", (3, 5)), 15),
        (hlo.Shape("s4", (3,)), 2),
        (hlo.Shape("pred", (7,)), 7),
        (hlo.Shape("u32", ()), 4),
    ],
)
def test_sizes(shape, num_bytes):
    assert shape.num_bytes == num_bytes


@pytest.mark.parametrize(
    ("to", "source", "told"),
    [("S(1)", "", (0, 0)), ("", "S(1)", (0, 1)), ("", "", (1, 0))],
)
def test_a_copy_is_told_by_where_it_comes_from(to, source, told):
    """Into fast memory, back from it, and within main memory."""
    shape = hlo.Shape("bf16", (1024, 64, 4, 128))
    kind = "{3,2,1,0:T(4,128)(2,1)%s}"
    line = (
        f"  %copy-start.1 = ({shape}{kind % to}, {shape}{kind % source}, u32[]{{:S(2)}}) "
        "copy-start(%param.1)"
    )
    program = hlo.read(f"HloModule m\n\nENTRY %main (p: bf16[2]) -> bf16[2] {{\n{line}\n}}\n")
    assert (program.moved({shape}), program.returned[shape]) == told


def test_operations_are_those_of_products():
    def two(x, w, v):
        return jnp.tanh(x @ w) @ v

    program = compiled(two, (16, 512), (512, 1024), (1024, 256))
    assert program.operations == 2 * 16 * (512 * 1024 + 1024 * 256)
    assert compiled(lambda x: x + 1, (16, 512)).operations == 0


def test_bytes_are_those_of_arguments_and_of_what_is_written():
    weight, table = (2048, 2048), (4096, 2048)

    def product(x, w, rows):
        return jnp.tanh(x @ w) + rows[jnp.array([3, 5, 8, 9])]

    program = compiled(product, (4, 2048), weight, table)
    small, large = 4 * 4 * 2048, 4 * 2048 * 2048
    # The weight is read once, of the table four rows; the rest is small.
    assert large < program.bytes_moved() < large + 12 * small
    assert program.bytes_moved({hlo.Shape("f32", weight)}) < 12 * small
    cached = program.bytes_moved(cache=small)
    assert large < cached < program.bytes_moved(), "what fits into a cache is read from there"


# FAST and MAIN: how an array lies in fast and in main memory.
PREFETCHED = """
HloModule jit_step

%fused (p.0: bf16[4096,512], p.1: bf16[64,4096]) -> bf16[64,512] {
  %p.0 = bf16[4096,512]FAST parameter(0)
  %p.1 = bf16[64,4096]FAST parameter(1)
  ROOT %c.1 = bf16[64,512]FAST convolution(%p.1, %p.0), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[64,4096], w: bf16[4096,512]) -> bf16[64,512] {
  %x = bf16[64,4096]MAIN parameter(0)
  %w = bf16[4096,512]MAIN parameter(1)
  %near = (bf16[64,4096]FAST, bf16[64,4096]MAIN, u32[]{:S(2)}) copy-start(%x)
  %near.1 = bf16[64,4096]FAST copy-done(%near)
  %first = ((bf16[4096,512]MAIN), bf16[2048,512]FAST, s32[]{:S(2)}) slice-start(%w)
  %first.1 = bf16[2048,512]FAST slice-done(%first)
  %second = ((bf16[4096,512]MAIN), bf16[2048,512]FAST, s32[]{:S(2)}) slice-start(%w)
  %second.1 = bf16[2048,512]FAST slice-done(%second)
  %whole = bf16[4096,512]FAST custom-call(%first.1, %second.1), custom_call_target="ConcatBitcast"
  %fusion.1 = bf16[64,512]FAST fusion(%whole, %near.1), kind=kOutput, calls=%fused
  ROOT %copy.2 = bf16[64,512]MAIN copy(%fusion.1)
}
""".replace("FAST", "{1,0:T(8,128)(2,1)S(1)}").replace("MAIN", "{1,0:T(8,128)(2,1)}")


def test_what_a_tpu_brings_into_fast_memory_in_parts_is_read_once():
    program = hlo.read(PREFETCHED)
    assert program.operations == 2 * 64 * 4096 * 512
    assert program.bytes_moved() == 2 * (64 * 4096 + 4096 * 512 + 64 * 512)
