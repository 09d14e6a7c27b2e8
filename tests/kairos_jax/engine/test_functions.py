"""The programs that an engine runs, as XLA compiles them: what they move and gather."""

import re
from collections import Counter

import jax
import pytest

from kairos_jax.engine.calls import Read, Score, Step, Write
from kairos_jax.engine.functions import Functions, Shapes
from kairos_jax.engine.lanes import Fill
from kairos_jax.lab import hlo
from models.checkpoint import open_checkpoint
from models.ops import KERNELS
from models.ops.linear import as_matrix
from models.sharding import Rules, make_mesh
from schedulers.ledger.instance import Limits, Role

LIMITS = Limits(max_batch=4, max_chunk=16, max_context=128, page_size=8, num_pages=64)


def functions(directory, num_devices, kernels, role=Role.BOTH):
    config = open_checkpoint(directory).config
    mesh = make_mesh(jax.devices()[:num_devices])
    shapes = Shapes.for_role(role, LIMITS, "cpu")
    return config, Functions(config, mesh, Rules(), LIMITS, shapes, "float32", kernels)


def test_all_that_warm_up_compiles_is_described_and_score(tiny_llama):
    _, described = functions(tiny_llama, 1, "cpu")
    kinds = Counter(type(call) for call, *_ in described.described())
    assert kinds == {Step: len(list(described.shapes)), Fill: 1, Score: 1, Read: 1, Write: 1}


@pytest.mark.parametrize(
    ("num_devices", "kernels"),
    [pytest.param(1, "cpu", marks=pytest.mark.slow), (2, "cpu"), (4, "matrices")],
)
def test_devices_exchange_sums_and_logits_and_nothing_else(
    tiny_llama, num_devices, kernels, monkeypatch
):
    """Two sums a layer and one to embed; no weight, and nothing of the pool. matrices: weights as
    accelerators pack them.
    """
    monkeypatch.setitem(KERNELS, "matrices", KERNELS["cpu"]._replace(pack=as_matrix))
    config, described = functions(tiny_llama, num_devices, kernels)
    pool = {
        hlo.Shape("f32", leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(described.pool)
    }
    few = {4, described.shapes.largest[0]}  # of decode, and the largest
    for call, _, function, arguments in described.described():
        if isinstance(call, Step) and call.tokens.shape[0] not in few:
            continue
        program = hlo.read(function.lower(*arguments).compile().as_text())
        counted = Counter()
        for what, count in program.collectives.items():
            counted[what.partition(" ")[0]] += count
            logits = re.fullmatch(rf"all-gather f32\[\d+,{config.vocab_size}\]", what)
            assert logits or what.startswith("all-reduce")
        several = num_devices > 1
        if isinstance(call, Step | Write):
            arrays = 2 * config.num_layers + isinstance(call, Step)
            assert program.aliased == arrays, "the pool and the lanes are written in place"
            assert program.moved(pool) == 0
        sums = 2 * config.num_layers + 1 if several and isinstance(call, Step) else 0
        gathers = int(several and isinstance(call, Step | Score))
        assert counted == Counter({"all-reduce": sums, "all-gather": gathers})


@pytest.mark.parametrize("kernels", ["native", "gpu"])
@pytest.mark.parametrize("role", Role)
def test_there_is_a_size_for_every_step(role, kernels):
    limits = Limits(max_batch=24, max_chunk=512, max_context=1024, page_size=64, num_pages=64)
    shapes = Shapes.for_role(role, limits, kernels)
    sizes = list(shapes)
    assert sizes == sorted(set(sizes))
    most = {Role.PREFILL: 512, Role.DECODE: 24, Role.BOTH: 536}[role]
    assert shapes.largest == (most, 24)
    for tokens in range(1, most + 1):
        for sequences in {1, min(tokens, 24)}:
            size = shapes.fitting(tokens, sequences)
            assert size in sizes
            assert size[0] >= tokens
            assert size[1] >= sequences
            # Padding wastes a third at most, where a step's time depends on it.
            assert size[0] <= max(1.5 * tokens, 512 if kernels == "gpu" else 16)
    assert len(sizes) < 21


def test_a_step_with_more_sequences_than_its_tokens_ask_for_takes_a_larger_size():
    limits = Limits(max_batch=24, max_chunk=512, max_context=1024, page_size=64, num_pages=64)
    shapes = Shapes.for_role(Role.PREFILL, limits, "cpu")
    assert shapes.fitting(17, 3) == (24, 24)
    assert shapes.fitting(24, 24) == (24, 24)
    assert shapes.sizes[0] == (16, 16)


@pytest.mark.parametrize(
    ("role", "max_batch", "tokens"),
    [
        (Role.BOTH, 64, [64, 256, 512, 1024, 1536, 2112]),
        (Role.BOTH, 24, [64, 256, 512, 1024, 1536, 2072]),
        (Role.BOTH, 256, [64, 128, 256, 512, 1024, 1536, 2048, 2304]),
        (Role.PREFILL, 256, [256, 512, 1024, 1536, 2048]),
        (Role.DECODE, 256, [64, 128, 256]),
        (Role.DECODE, 24, [24]),
    ],
)
def test_on_accelerators_small_steps_are_those_of_decodes(role, max_batch, tokens):
    limits = Limits(max_batch, max_chunk=2048, max_context=4096, page_size=64, num_pages=64)
    assert [size for size, _ in Shapes.for_role(role, limits, "gpu")] == tokens
