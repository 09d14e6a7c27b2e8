"""The programs that an engine runs, as XLA compiles them: what they move and gather."""

import re
from collections import Counter

import jax
import pytest

from kairos_jax.engine.calls import Read, Score, Step, Write
from kairos_jax.engine.functions import Functions, Shapes
from kairos_jax.lab import hlo
from models.checkpoint import open_checkpoint
from models.ops import KERNELS
from models.ops.linear import as_matrix
from models.sharding import Rules, make_mesh
from schedulers.ledger.instance import Limits, Role

LIMITS = Limits(max_batch=4, max_chunk=32, max_context=128, page_size=8, num_pages=64)


def functions(directory, num_devices, kernels, role=Role.BOTH):
    config = open_checkpoint(directory).config
    mesh = make_mesh(jax.devices()[:num_devices])
    shapes = Shapes.for_role(role, LIMITS, row_tokens=16)
    return config, Functions(config, mesh, Rules(), LIMITS, shapes, "float32", kernels)


def test_all_that_warm_up_compiles_is_described_and_score(tiny_llama):
    _, described = functions(tiny_llama, 1, "cpu")
    kinds = Counter(type(call) for call, *_ in described.described())
    assert kinds == {Step: len(list(described.shapes)), Score: 1, Read: 1, Write: 1}


@pytest.mark.parametrize(("num_devices", "kernels"), [(1, "cpu"), (2, "cpu"), (4, "matrices")])
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
    for call, _, function, arguments in described.described():
        program = hlo.read(function.lower(*arguments).compile().as_text())
        counted = Counter()
        for what, count in program.collectives.items():
            counted[what.partition(" ")[0]] += count
            logits = re.fullmatch(rf"all-gather f32\[\d+,{config.vocab_size}\]", what)
            assert logits or what.startswith("all-reduce")
        several = num_devices > 1
        if isinstance(call, Step | Write):
            assert program.aliased == 2 * config.num_layers, "the pool is written in place"
            assert program.moved(pool) == 0
        sums = 2 * config.num_layers + 1 if several and isinstance(call, Step) else 0
        gathers = int(several and isinstance(call, Step | Score))
        assert counted == Counter({"all-reduce": sums, "all-gather": gathers})
