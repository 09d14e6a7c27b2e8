"""What is compared before KV is taken."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kairos_jax.kv.manifest import (
    Facts,
    ManifestMismatch,
    describe,
    facts,
    fingerprint,
    from_proto,
    grid_of,
    shards_of,
    to_proto,
)
from kairos_jax.kv.transport import Ticket
from kairos_jax.rpc import kv_pb2 as pb
from models.checkpoint import open_checkpoint
from models.sharding import Rules, make_mesh

OURS = Facts("tiny", "f00d", "float32", 2, (2, 8, 4, 2, 8), 8)
TICKET = Ticket("a", 20)


def told(**changes):
    block = np.zeros(OURS.block_shape, np.float32)
    manifest = describe(OURS, TICKET, block, "10.0.0.1:7", 2**64 - 1)
    return replace(manifest, **changes)


def test_a_manifest_goes_over_the_wire_unchanged():
    manifest = told()
    assert manifest.num_blocks == 3
    sent = pb.Manifest.FromString(to_proto(manifest).SerializeToString())
    assert from_proto(sent) == manifest
    manifest.check(OURS, TICKET)


@pytest.mark.parametrize(
    ("field", "value", "ours"),
    [
        ("model", "other", "'tiny'"),
        ("fingerprint", "beef", "'f00d'"),
        ("dtype", "bfloat16", "'float32'"),
        ("page_size", 4, "2"),
        ("block_shape", (2, 8, 2, 2, 8), r"\(2, 8, 4, 2, 8\)"),
        ("num_tokens", 19, "20"),
        ("num_blocks", 2, "3"),
    ],
)
def test_a_mismatch_names_the_field_and_both_values(field, value, ours):
    quoted = repr(value).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ManifestMismatch, match=rf"{field}: .*{quoted}, this instance {ours}$"):
        told(**{field: value}).check(OURS, TICKET)


def test_shards_that_do_not_make_up_a_block_are_refused():
    whole = tuple((0, size) for size in OURS.block_shape)
    half = ((0, 1), *whole[1:])
    for shards in ((), (half,), (half, half), (whole, whole), (((1, 2), *whole[1:]), half)):
        with pytest.raises(ManifestMismatch, match="shards"):
            told(shards=shards).check(OURS, TICKET)


@pytest.mark.parametrize("spec", [(), ("x",), (None, "x"), ("x", "y"), (("x", "y"),)])
def test_each_part_of_a_block_is_sent_once(spec):
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    block = jax.device_put(
        np.arange(64.0, dtype=np.float32).reshape(4, 4, 4),
        NamedSharding(mesh, PartitionSpec(*spec)),
    )
    parts = shards_of(block)
    boxes = [box for box, _ in parts]
    assert np.prod(grid_of(boxes, block.shape)) == len(parts)
    for box, data in parts:
        place = tuple(slice(*bounds) for bounds in box)
        np.testing.assert_array_equal(np.asarray(data), np.asarray(block)[place])


def test_weights_have_one_fingerprint_on_any_mesh(tiny_llama):
    checkpoint = open_checkpoint(tiny_llama)
    config = checkpoint.config
    prints = set()
    for count in (1, 2, 4):
        mesh = make_mesh(jax.devices()[:count])
        params = checkpoint.load(mesh, Rules(), np.float32)
        prints.add(fingerprint(config, params))
    assert len(prints) == 1
    name = sorted(params)[0]
    other = params | {name: params[name] + 1}
    assert fingerprint(config, other) not in prints
    assert fingerprint(replace(config, rope_theta=config.rope_theta + 1), params) not in prints
    described = facts("tiny", config, params, "float32", 4)
    assert described.block_shape[1] == described.block_tokens == 16
    assert described.num_blocks(17) == 2
