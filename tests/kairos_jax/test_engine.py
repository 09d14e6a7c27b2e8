"""The real engine with a tiny model: the same tokens on every mesh, and no late compilation."""

import asyncio
import dataclasses
import functools
import json

import fakes
import jax
import numpy as np
import pytest

from kairos_jax.engine import BLOCK_PAGES, JaxEngine, Shapes, bucket_sizes
from kairos_jax.page_keys import page_keys
from models.checkpoint import open_checkpoint
from models.sampling import SamplingParams
from models.sharding import Rules, make_mesh
from schedulers.core import Batch, Instance, Limits, Role
from schedulers.request import Request, Slo

SLO = Slo(30.0, 30.0)
LIMITS = Limits(max_batch=4, max_chunk=32, max_context=128, page_size=8, num_pages=64)


def build(directory, devices, role, limits=LIMITS, kernels="cpu"):
    checkpoint = open_checkpoint(directory)
    mesh, rules = make_mesh(devices), Rules()
    params = checkpoint.load(mesh, rules, "float32")
    shapes = Shapes.for_role(role, limits, row_tokens=16)
    return JaxEngine(checkpoint.config, params, mesh, rules, limits, shapes, kernels=kernels)


def golden_cases(directory):
    return json.loads((directory / "golden.json").read_text())["cases"]


def request(id, prompt, max_tokens, **sampling):
    return Request(id, 0.0, prompt, max_tokens, SLO, sampling=SamplingParams(**sampling))


def both(instance, now):
    """Decodes what runs and prefills one chunk of the oldest that waits."""
    work = {}
    for seq in (*instance.running.values(), *instance.waiting.values()):
        if seq.remaining == 1 or not any(n > 1 for n in work.values()):
            work[seq.request.id] = min(seq.remaining, instance.limits.max_chunk)
    return Batch(work)


def colocated(engine, requests, instance=None):
    """Runs one instance that does both jobs. Returns the sampled tokens by id."""
    instance = instance or Instance("both", Role.BOTH, engine.limits)
    tokens = {request.id: [] for request in requests}
    for each in requests:
        instance.add(each)
    while batch := both(instance, 0.0):
        instance.begin(batch, 0.0)
        sampled = engine.step([(instance.running[id], count) for id, count in batch.work.items()])
        for id, token in sampled.items():
            instance.running[id].tokens.append(token.id)
            tokens[id].append(token)
        instance.end(batch, 0.0)
    instance.check()
    return tokens


def disaggregated(prefill_engine, decode_engine, requests):
    return asyncio.run(fakes.serve((prefill_engine, decode_engine), requests))


def ids(tokens):
    return {id: [token.id for token in answer] for id, answer in tokens.items()}


@pytest.fixture(scope="module")
def one_device(tiny_llama):
    engine = build(tiny_llama, jax.devices()[:1], Role.BOTH)
    engine.warm_up()
    return engine


def golden_requests(directory):
    cases = golden_cases(directory)
    requests = [request(str(i), case["prompt"], 32) for i, case in enumerate(cases)]
    return requests, {str(i): case["output"] for i, case in enumerate(cases)}


def test_one_device_gives_the_golden_tokens(tiny_llama, one_device):
    requests, expected = golden_requests(tiny_llama)
    assert ids(colocated(one_device, requests)) == expected


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 1), (1, 3), (4, 2)])
def test_disjoint_meshes_give_the_golden_tokens(tiny_llama, prefill, decode):
    requests, expected = golden_requests(tiny_llama)
    devices = jax.devices()
    prefill_engine = build(tiny_llama, devices[:prefill], Role.PREFILL)
    decode_engine = build(tiny_llama, devices[prefill : prefill + decode], Role.DECODE)
    assert not set(prefill_engine.mesh.devices.flat) & set(decode_engine.mesh.devices.flat)
    assert ids(disaggregated(prefill_engine, decode_engine, requests)) == expected


def test_colocated_instances_give_the_golden_tokens(tiny_llama, one_device):
    requests, expected = golden_requests(tiny_llama)
    # 33: a whole chunk, and one of a single token, which looks like a decode step.
    assert LIMITS.max_chunk + 1 in [len(each.prompt) for each in requests]
    two_devices = build(tiny_llama, jax.devices()[1:3], Role.BOTH)
    engines = one_device, two_devices
    assert ids(asyncio.run(fakes.serve(engines, requests, colocated=True))) == expected


def test_prompts_that_begin_alike_get_the_golden_tokens(tiny_llama, one_device):
    """Of an instance that shares their pages, computed at other boundaries than without."""
    requests, expected = golden_requests(tiny_llama)
    keys = functools.partial(page_keys, LIMITS.page_size, b"secret")
    again = [
        dataclasses.replace(each, id=f"{i}.{each.id}", page_keys=keys(each.prompt))
        for i in range(2)
        for each in requests
    ]
    instance = Instance("both", Role.BOTH, LIMITS)
    tokens = {}
    for each in again:  # one after the other, each beside the one that came before it
        tokens |= colocated(one_device, [each], instance)
    assert ids(tokens) == {f"{i}.{id}": out for i in range(2) for id, out in expected.items()}
    instance.add(dataclasses.replace(again[-1], id="last"))
    most = (len(again[-1].prompt) - 1) // LIMITS.page_size
    assert instance.waiting["last"].computed == most * LIMITS.page_size > 0


@pytest.mark.parametrize("kernels", ["reference", "native"], indirect=True)
def test_the_kernels_agree(tiny_llama, kernels):
    requests, expected = golden_requests(tiny_llama)
    engine = build(tiny_llama, jax.devices()[:1], Role.BOTH, kernels=kernels)
    assert ids(colocated(engine, requests)) == expected


def test_sampled_tokens_do_not_depend_on_batch_or_server(tiny_llama, one_device):
    rng = np.random.default_rng(0)
    requests = [
        request(
            str(i),
            rng.integers(0, 264, 10 + 7 * i).tolist(),
            12,
            temperature=0.8,
            top_p=0.9 if i % 2 else 1.0,
            top_k=20 if i == 2 else 0,
            seed=i,
        )
        for i in range(4)
    ]
    together = ids(colocated(one_device, requests))
    alone = {}
    for each in requests:
        alone |= ids(colocated(one_device, [each]))
    assert together == alone
    engines = [
        build(tiny_llama, [device], role)
        for device, role in zip(jax.devices(), (Role.PREFILL, Role.DECODE), strict=False)
    ]
    assert ids(disaggregated(*engines, requests)) == together


def test_logprobs_sum_to_one_and_rank(tiny_llama, one_device):
    (answer,) = colocated(one_device, [request("a", [5, 6, 7], 4, logprobs=5)]).values()
    for token in answer:
        values = [value for _, value in token.top]
        assert token.top[0] == (token.id, pytest.approx(token.logprob))
        assert values == sorted(values, reverse=True)
        assert 0 < np.exp(values).sum() < 1


def test_a_second_pass_over_all_shapes_compiles_nothing(tiny_llama, one_device):
    compiled = one_device.num_compiled
    assert compiled == len(list(one_device.shapes)) + 2
    one_device.warm_up()
    requests, _ = golden_requests(tiny_llama)
    colocated(one_device, requests)
    kv = one_device.read_pages(list(range(2 * BLOCK_PAGES + 1)))
    one_device.write_pages(list(range(10, 10 + 2 * BLOCK_PAGES + 1)), kv)
    assert one_device.num_compiled == compiled


def test_a_prompt_longer_than_the_largest_shape_takes_further_runs(tiny_llama, one_device):
    """Many short prompts in one step fill more rows than the chunk limit alone would."""
    requests = [request(str(i), [i + 4] * 3, 2) for i in range(7)]
    instance = Instance("both", Role.BOTH, LIMITS)
    for each in requests:
        instance.add(each)
    instance.begin(Batch({each.id: 3 for each in requests}), 0.0)
    work = [(seq, 3) for seq in instance.running.values()]
    packed = {id: token.id for id, token in one_device.step(work).items()}
    alone = {id: tokens[0] for id, tokens in ids(colocated(one_device, requests)).items()}
    assert packed == alone


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 24, 100, 256])
def test_bucket_sizes(limit):
    sizes = bucket_sizes(limit)
    assert sizes == tuple(sorted(set(sizes)))
    assert (sizes[0], sizes[-1]) == (1, limit)
    for n in range(4, limit + 1):
        assert min(size for size in sizes if size >= n) < 1.5 * n
