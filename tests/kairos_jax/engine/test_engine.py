"""The real engine with a tiny model: the same tokens on every mesh, and no late compilation."""

import asyncio
import dataclasses
import functools
import json

import fakes
import jax
import numpy as np
import pytest
from steps import packed

from kairos_jax.engine.calls import PromptLogprobs
from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.functions import BLOCK_PAGES, Shapes, bucket_sizes
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.worker.page_keys import page_keys
from models import kv_cache, transformer
from models.checkpoint import open_checkpoint
from models.ops import KERNELS
from models.sampling import SamplingParams
from models.sharding import Rules, make_mesh
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.request import Request, Seq, Slo
from schedulers.ledger.rows import Column

SLO = Slo(30.0, 30.0)
PAGE = 8
LIMITS = Limits(max_batch=4, max_chunk=32, max_context=128, page_size=PAGE, num_pages=64)


def build(directory, devices, role, limits=LIMITS, kernels="cpu", few=False):
    checkpoint = open_checkpoint(directory)
    mesh, rules = make_mesh(devices), Rules()
    params = checkpoint.load(mesh, rules, "float32")
    shapes = (fakes.few_shapes if few else Shapes.for_role)(role, limits, kernels)
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


def ahead(engine, requests):
    """As `colocated`, but each step is dispatched before the result of the one before is read.
    Returns the number of rows that were computed for nothing, too.
    """
    instance = Instance("both", Role.BOTH, engine.limits)
    tokens, under_way, wasted = {request.id: [] for request in requests}, [], 0
    for each in requests:
        instance.add(each)
    while True:
        if batch := both(instance, 0.0):
            instance.begin(batch, 0.0)
            work = [(instance.running[id], count) for id, count in batch.work.items()]
            under_way.append((batch, dict(batch.work), engine.start(work)))
        if len(under_way) == 2 or not batch:
            batch, wanted, wait = under_way.pop(0)
            sampled = {id: token for id, token in wait().items() if id in wanted}
            for id, token in sampled.items():
                instance.get(id).tokens.append(token.id)
                tokens[id].append(token)
            stopped = [id for id in sampled if tokens[id][-1].id in instance.get(id).request.stop]
            instance.end(batch, 0.0, stopped)
            for _, later, _ in under_way:
                wasted += sum(later.pop(id, 0) for id in stopped)
        if not under_way:
            break
        instance.expect(0.0)
    instance.check()
    return tokens, wasted


def disaggregated(prefill_engine, decode_engine, requests):
    return asyncio.run(fakes.serve((prefill_engine, decode_engine), requests))


def ids(tokens):
    return {id: [token.id for token in answer] for id, answer in tokens.items()}


@pytest.fixture(scope="module")
def one_device(tiny_llama):
    engine = build(tiny_llama, jax.devices()[:1], Role.BOTH, few=True)
    engine.warm_up()
    return engine


def golden_requests(directory):
    cases = golden_cases(directory)
    requests = [request(str(i), case["prompt"], 32) for i, case in enumerate(cases)]
    return requests, {str(i): case["output"] for i, case in enumerate(cases)}


def test_one_device_gives_the_golden_tokens(tiny_llama, one_device):
    requests, expected = golden_requests(tiny_llama)
    assert ids(colocated(one_device, requests)) == expected


def test_tokens_that_are_on_the_device_alone_are_the_golden_ones(tiny_llama, one_device):
    requests, expected = golden_requests(tiny_llama)
    compiled = one_device.num_compiled
    tokens, wasted = ahead(one_device, requests)
    assert ids(tokens) == expected
    assert (one_device.num_compiled, wasted) == (compiled, 0)


@pytest.mark.parametrize(
    ("family", "prefill", "decode"),
    # qwen2 has two kv heads, of which four devices have two copies each.
    [
        pytest.param("llama", 1, 1, marks=pytest.mark.slow),
        ("llama", 2, 3),
        ("qwen2", 4, 2),
        pytest.param("qwen2", 1, 4, marks=pytest.mark.slow),
    ],
)
def test_disjoint_meshes_give_the_golden_tokens(golden, family, prefill, decode):
    requests, expected = golden_requests(golden / family)
    devices = jax.devices()
    mine, others = devices[:prefill], devices[prefill : prefill + decode]
    prefill_engine = build(golden / family, mine, Role.PREFILL, few=True)
    decode_engine = build(golden / family, others, Role.DECODE, few=True)
    assert not set(prefill_engine.mesh.devices.flat) & set(decode_engine.mesh.devices.flat)
    assert ids(disaggregated(prefill_engine, decode_engine, requests)) == expected


def test_kv_is_the_same_bits_on_meshes_that_split_and_that_copy_its_heads(golden):
    one, two, four = (build(golden / "qwen2", jax.devices()[:n], Role.DECODE) for n in (1, 2, 4))
    sent = np.random.default_rng(0).normal(size=one.block.shape).astype(np.float32)
    kv = [sent]
    for engine in (four, one, four, two, four):
        kv = [jax.device_put(block, engine.wire_sharding) for block in kv]
        engine.write_pages([5, 3, 8, 1], kv)
        kv = engine.read_pages([5, 3, 8, 1])
        np.testing.assert_array_equal(kv[0], sent)


def test_colocated_instances_give_the_golden_tokens(tiny_llama, one_device):
    requests, expected = golden_requests(tiny_llama)
    # 33: a whole chunk, and one of a single token, which looks like a decode step.
    assert LIMITS.max_chunk + 1 in [len(each.prompt) for each in requests]
    two_devices = build(tiny_llama, jax.devices()[1:3], Role.BOTH, few=True)
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
    engine = build(tiny_llama, jax.devices()[:1], Role.BOTH, kernels=kernels, few=True)
    assert ids(colocated(engine, requests)) == expected


def test_sampled_tokens_do_not_depend_on_batch_or_server(tiny_llama, one_device):
    rng = np.random.default_rng(0)
    requests = [
        request(
            str(i),
            rng.integers(0, 264, 10 + 17 * i).tolist(),
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
        build(tiny_llama, [device], role, few=True)
        for device, role in zip(jax.devices(), (Role.PREFILL, Role.DECODE), strict=False)
    ]
    transport = LocalTransport()
    again = [dataclasses.replace(each, id=f"{each.id} again") for each in requests]
    apart = ids(asyncio.run(fakes.serve(engines, requests, transport=transport, again=again)))
    assert apart == together | {f"{id} again": tokens for id, tokens in together.items()}
    # Of 10, 27, 44 and 61 tokens, in blocks of 32; those that are here are not sent again.
    block_bytes = engines[1].block.size * engines[1].block.dtype.itemsize
    assert transport.received_bytes == (1 + 1 + 2 + 2 + 4 * 1) * block_bytes


def test_logprobs_sum_to_one_and_rank(tiny_llama, one_device):
    (answer,) = colocated(one_device, [request("a", [5, 6, 7], 4, logprobs=5)]).values()
    for token in answer:
        values = [value for _, value in token.top]
        assert token.top[0] == (token.id, pytest.approx(token.logprob))
        assert values == sorted(values, reverse=True)
        assert 0 < np.exp(values).sum() < 1


def test_a_second_pass_over_all_shapes_compiles_nothing(tiny_llama, one_device):
    compiled = one_device.num_compiled
    assert compiled == len(list(one_device.shapes)) + 3
    one_device.warm_up()
    requests, _ = golden_requests(tiny_llama)
    colocated(one_device, requests)
    kv = one_device.read_pages(list(range(2 * BLOCK_PAGES + 1)))
    one_device.write_pages(list(range(10, 10 + 2 * BLOCK_PAGES + 1)), kv)
    assert one_device.num_compiled == compiled


@pytest.mark.parametrize("kernels", ["cpu", "gpu"])
def test_pages_of_any_number_and_order_are_copied_out_and_in(tiny_llama, kernels):
    """By calls of several blocks: one page, all of the pool, and what fills no call."""
    checkpoint, limits = open_checkpoint(tiny_llama), dataclasses.replace(LIMITS, num_pages=61)
    mesh, rules = make_mesh(jax.devices()[:1]), Rules()
    params = checkpoint.load(mesh, rules, "float32")
    shapes = Shapes(Role.DECODE, (), (1, 2, 4))
    engine = JaxEngine(checkpoint.config, params, mesh, rules, limits, shapes, kernels=kernels)
    engine.warm_up()
    assert engine.copy_s > 0
    asked = []
    engine.dispatch = lambda call: asked.append(call) or engine.run(call)
    rng = np.random.default_rng(0)
    content = rng.normal(size=(16, *engine.block.shape)).astype(np.float32)
    blocks = [content[:, :, at * PAGE : (at + 1) * PAGE] for at in range(BLOCK_PAGES)]
    pages = [block[at] for at in range(16) for block in blocks]  # of each page of the pool
    engine.write_pages(range(61), list(content))
    compiled = engine.num_compiled
    for count in (1, 3, 4, 5, 16, 23, 61):
        some = rng.permutation(61)[:count].tolist()
        asked.clear()
        kv = engine.read_pages(some)
        assert len(asked) == {1: 1, 3: 1, 4: 1, 5: 1, 16: 1, 23: 2, 61: 4}[count]
        read = np.concatenate(kv, axis=1)[:, : count * PAGE]
        np.testing.assert_array_equal(read, np.concatenate([pages[page] for page in some], axis=1))
        others = rng.permutation(61)[:count].tolist()
        others[0] = 61  # dropped
        engine.write_pages(others, kv)
        for page, was in zip(others, some, strict=True):
            if page < 61:
                pages[page] = read_at(read, some.index(was))
    every = np.concatenate(engine.read_pages(range(61)), axis=1)[:, : 61 * PAGE]
    np.testing.assert_array_equal(every, np.concatenate(pages[:61], axis=1))
    assert engine.num_compiled == compiled
    with pytest.raises(ValueError, match="5 pages are not 1 blocks"):
        engine.write_pages(range(5), kv[:1])


def read_at(read, at):
    return read[:, at * PAGE : (at + 1) * PAGE]


@pytest.fixture(scope="module")
def scored(tiny_llama):
    """The longest prompt, and the log-probabilities after each of its tokens: of one plain step."""
    prompt = golden_cases(tiny_llama)[-1]["prompt"]
    checkpoint, kernels = open_checkpoint(tiny_llama), KERNELS["reference"]
    config = checkpoint.config
    params = checkpoint.load(make_mesh(jax.devices()[:1]), Rules(), "float32")
    cache = kv_cache.allocate(kv_cache.abstract(config, kernels.layout, 8, 8, "float32"))
    step = packed([(0, 0, len(prompt))], np.arange(8)[None], 8, 8, tokens=[prompt])

    @jax.jit
    def plain(params, cache):
        hidden, _ = transformer.hidden_states(config, params, cache, step, kernels)
        return jax.nn.log_softmax(transformer.logits(config, params, hidden, kernels))

    return prompt, np.asarray(plain(params, cache))


def check_scores(scored, token, width, length=None):
    """Those that came with the first token of a prompt, or its beginning, are the plain step's."""
    prompt, logprobs = scored[0][:length], scored[1]
    assert len(token.prompt.logprobs) == len(prompt) - 1
    for at, told in enumerate(token.prompt.tokens(prompt)):
        row, best = logprobs[at], -np.sort(-logprobs[at])[:width]
        assert told.id == prompt[at + 1]
        assert told.logprob == pytest.approx(row[told.id], abs=2e-4)
        assert [value for _, value in told.top] == pytest.approx(best, abs=2e-4)
        assert [row[id] for id, _ in told.top] == pytest.approx(best, abs=2e-4)


def test_prompt_logprobs_are_those_of_a_plain_step(tiny_llama, one_device, scored):
    """Alone, in chunks that end anywhere, beside others, and where its pages may be shared."""
    prompt, _ = scored
    keys = functools.partial(page_keys, LIMITS.page_size, b"secret")
    asked = request("a", prompt, 3, prompt_logprobs=3)
    others = [
        dataclasses.replace(request("b", prompt, 4, logprobs=1), page_keys=keys(prompt)),
        request("c", prompt[:20], 4, prompt_logprobs=0),
        request("d", prompt[:1], 2, prompt_logprobs=2),
    ]
    plain = colocated(one_device, [request("a", prompt, 3)])["a"]
    for beside in ([], others):
        tokens = colocated(one_device, [*beside, asked])
        first, *rest = tokens["a"]
        check_scores(scored, first, 3)
        assert [token.id for token in tokens["a"]] == [token.id for token in plain]
        assert not any(token.prompt for token in rest)
    check_scores(scored, tokens["c"][0], 0, length=20)
    assert tokens["d"][0].prompt == PromptLogprobs()
    assert not any(token.prompt for token in tokens["b"])
    for count in (1, 7, 16):
        seq = Seq(asked)
        seq.pages = list(range(LIMITS.pages_for(len(prompt))))
        while not (sampled := one_device.step([(seq, min(count, seq.remaining))])):
            seq.cells[Column.COMPUTED] += count
        check_scores(scored, sampled["a"], 3)
        assert not seq.scored


def test_steps_ahead_change_no_token_and_no_logprob(tiny_llama, one_device):
    """Drawn ones, with stop tokens in their midst, and with log-probabilities of the prompt."""
    asked = [
        request("drawn", [5, 6, 7], 20, temperature=0.9, seed=1),
        request("stops", [8, 9], 20, temperature=1.2, top_p=0.9, seed=2),
        request("told", list(range(40)), 6, logprobs=3, prompt_logprobs=2),
        request("one", [1] * 33, 1),
    ]
    plain = colocated(one_device, asked)
    stop = plain["stops"][7].id
    first = next(at for at, token in enumerate(plain["stops"]) if token.id == stop)
    asked[1] = dataclasses.replace(asked[1], stop=frozenset({stop}))
    tokens, wasted = ahead(one_device, asked)
    assert tokens == plain | {"stops": plain["stops"][: first + 1]}
    assert wasted == 1


@pytest.mark.slow
def test_prompt_logprobs_on_two_devices(tiny_llama, scored):
    prompt, _ = scored
    engine = build(tiny_llama, jax.devices()[:2], Role.PREFILL)
    seq = Seq(request("a", prompt[:20], 1, prompt_logprobs=2))
    seq.pages = list(range(LIMITS.pages_for(20)))
    check_scores(scored, engine.step([(seq, 20)])["a"], 2, length=20)


def test_more_sequences_than_the_largest_shape_holds_take_further_runs(tiny_llama, one_device):
    requests = [request(str(i), [i + 4] * 3, 2) for i in range(7)]
    instance = Instance("both", Role.BOTH, LIMITS)
    for each in requests:
        instance.add(each)
    instance.begin(Batch({each.id: 3 for each in requests}), 0.0)
    work = [(seq, 3) for seq in instance.running.values()]
    packed = {id: token.id for id, token in one_device.step(work).items()}
    alone = {id: tokens[0] for id, tokens in ids(colocated(one_device, requests)).items()}
    assert packed == alone


def test_no_size_is_hardly_less_than_the_largest_unless_more_is_wasted_without_it():
    assert bucket_sizes(2112)[-2:] == (1536, 2112)
    assert bucket_sizes(2112, coarse=1024)[-2:] == (1536, 2112)
    assert bucket_sizes(288)[-2:] == (256, 288)
    assert bucket_sizes(100)[-2:] == (96, 100)
    assert bucket_sizes(536, coarse=1024)[-2:] == (512, 536)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 9, 24, 36, 100, 256, 2112])
def test_bucket_sizes(limit):
    sizes = bucket_sizes(limit)
    assert sizes == tuple(sorted(set(sizes)))
    assert (sizes[0], sizes[-1]) == (1, limit)
    for n in range(4, limit + 1):
        assert min(size for size in sizes if size >= n) < 1.5 * n
