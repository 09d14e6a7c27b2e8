"""Logits that are not finite end the request that they are of, and no other."""

import asyncio
import functools
import json
from collections.abc import Awaitable

import cluster
import fakes
import grpc
import http_fakes
import jax
import numpy as np
import pytest
from http_fakes import of, says

from kairos_jax.engine.engine import JaxEngine
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.observe.metrics import Metrics
from kairos_jax.routing.router import Router
from kairos_jax.routing.stream import RequestFailed
from kairos_jax.worker.build import build_workers
from models.checkpoint import open_checkpoint
from models.sampling import INVALID, SamplingParams
from models.sharding import Rules, make_mesh
from schedulers.cost import CostModel
from schedulers.ledger.instance import Limits, Role
from schedulers.ledger.journal import Journal, check
from schedulers.ledger.request import Request, Seq, Slo

TEXT = "/v1/completions"
BAD = 50
PART = "logits are not finite"
LAYOUTS = pytest.mark.parametrize("colocated", [False, True])


def counted(metrics: Metrics) -> float | None:
    name, labels = "kairos_requests_failed_total", {"cause": "not_finite"}
    return metrics.registry.get_sample_value(name, labels)


async def refusal(call: Awaitable) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details()


def prompt_that_leads_to(token: int, after: int) -> list[int]:
    """One whose output has this token at this place first, and which has not itself."""
    for first in range(fakes.VOCAB):
        for second in range(fakes.VOCAB):
            output = fakes.expected_tokens([first, second], after + 1)
            if output[after:] == [token] and token not in [first, second, *output[:after]]:
                return [first, second]
    raise AssertionError


@LAYOUTS
def test_a_prompt_that_gives_none_fails_and_the_others_go_on(colocated, caplog):
    async def main():
        async with fakes.running(fakes.altered(colocated=colocated)) as harness:
            for engine in harness.engines:
                engine.bad = BAD
            good = [[3, i] for i in range(20, 30)]
            # In a chunk that samples nothing, too: a chunk has 32 tokens.
            bad = [[7, BAD], [BAD, *range(40)], [*range(40), BAD]]
            answers = [asyncio.ensure_future(harness.generate(prompt, 20)) for prompt in good]
            for prompt in bad:
                code, details = await refusal(harness.generate(prompt, 9))
                assert (code, PART in details) == (grpc.StatusCode.INTERNAL, True)
            for prompt, answer in zip(good, answers, strict=True):
                assert fakes.ids(await answer) == fakes.expected_tokens(prompt, 20)
            assert counted(harness.metrics) == len(bad)
            await harness.assert_nothing_held()
        lines = [record for record in caplog.records if PART in record.message]
        assert len(lines) == len(bad)

    asyncio.run(main())


@LAYOUTS
def test_an_output_may_fail_after_some_tokens(colocated):
    async def main():
        async with fakes.running(fakes.altered(colocated=colocated)) as harness:
            harness.engines[-1].bad = BAD
            prompt = prompt_that_leads_to(BAD, after=4)
            _, answers, first = await harness.stream(prompt, 30)
            seen = fakes.ids([first])

            async def read():
                async for answer in answers:
                    seen.extend(fakes.ids([answer]))

            code, details = await refusal(read())
            assert (code, PART in details) == (grpc.StatusCode.INTERNAL, True)
            assert seen == fakes.expected_tokens(prompt, 5)
            await harness.assert_nothing_held()

    asyncio.run(main())


@LAYOUTS
def test_nothing_of_it_is_cached(colocated):
    """Its pages would serve other prompts that begin alike, once what was wrong is over."""

    async def main():
        async with fakes.running(fakes.altered(colocated=colocated)) as harness:
            engine = harness.engines[0]
            engine.bad = BAD
            prompt = [BAD, *range(30)]
            await refusal(harness.generate(prompt, 9))
            engine.bad = None
            *_, last = answer = await harness.generate(prompt, 9)
            assert fakes.ids(answer) == fakes.expected_tokens(prompt, 9)
            assert last.usage.cached_tokens == 0
            await harness.assert_nothing_held()

    asyncio.run(main())


def test_a_run_with_such_requests_can_be_replayed():
    async def main():
        journal = Journal(fakes.time.monotonic)
        async with fakes.running(journal=journal) as harness:
            for engine in harness.engines:
                engine.bad = BAD
            prompts = [prompt_that_leads_to(BAD, after=3), [BAD], [BAD, *range(60)]]
            calls = [harness.generate(prompt, 20) for prompt in prompts]
            fine = [[i] for i in range(40) if BAD not in fakes.expected_tokens([i], 20)]
            good = [harness.generate(prompt, 20) for prompt in fine]
            await asyncio.gather(*map(refusal, calls), *good)
            await harness.assert_nothing_held()
            policies = {worker.instance.id: worker.policy for worker in harness.workers}
        assert check(list(journal.take()), policies)

    asyncio.run(main())


@pytest.mark.parametrize("after", [0, 4])
def test_http_clients_are_told(after):
    async def main():
        async with http_fakes.serving() as served:
            for engine in served.harness.engines:
                engine.bad = BAD
            prompt = prompt_that_leads_to(BAD, after)
            body = http_fakes.ASK | {"prompt": prompt, "max_tokens": 20}
            other = asyncio.ensure_future(served.complete(prompt="hello", max_tokens=20))
            whole = await served.post(TEXT, body)
            assert whole.status_code == 500
            error = whole.json()["error"]
            assert (error["code"], error["type"]) == ("request_failed", "server_error")
            assert PART in error["message"]
            streamed = await served.post(TEXT, body | {"stream": True})
            *events, last, rest = streamed.text.split("\n\n")
            told = json.loads(last.removeprefix("data: "))["error"]
            assert told == error
            assert (len(events) > 0, rest) == (True, "")
            bad = await served.post(TEXT, body | {"prompt": [BAD], "stream": True})
            assert bad.status_code == 500, "before the first event there is a status"
            assert of(await other)["text"] == says("hello", 20)
            assert counted(served.harness.metrics) == 3
            await served.harness.assert_nothing_held()

    asyncio.run(main())


def test_workers_in_other_processes_tell_of_it_too():
    async def main():
        async with cluster.running() as (nodes, front, _):
            for node in nodes:
                node.engine.bad = BAD
            for prompt in ([BAD], prompt_that_leads_to(BAD, after=3)):
                with pytest.raises(RequestFailed, match=PART):
                    await front.ask(prompt, 20)
            assert await front.ask([1, 2], 9) == fakes.expected_tokens([1, 2], 9)
            for node in nodes:
                await cluster.idle(node)

    asyncio.run(main())


# The real engine.

LIMITS = Limits(max_batch=4, max_chunk=32, max_context=128, page_size=8, num_pages=64)
SLO = Slo(30.0, 30.0)


class Shared:
    """Programs of engines that differ by their weights alone, which are arguments: each is compiled
    once. As `kairos_jax.engine.programs.Programs`, in memory.
    """

    def __init__(self):
        self._made = {}

    def compiled(self, name, function, *args):
        key = name, *(f"{each.dtype}{each.shape}" for each in jax.tree.leaves(args))
        if key not in self._made:
            self._made[key] = function.lower(*args).compile()
        return self._made[key]


@functools.cache
def shared(directory, role: Role) -> Shared:
    return Shared()


def engines(directory, weight: str | None, at: int = 0) -> list[JaxEngine]:
    """One that prefills and one that decodes. weight: has NaN in its row `at`."""
    checkpoint, rules = open_checkpoint(directory), Rules()
    made = []
    for role, device in zip((Role.PREFILL, Role.DECODE), jax.devices(), strict=False):
        mesh = make_mesh([device])
        params = dict(checkpoint.load(mesh, rules, "float32"))
        if weight:
            params[weight] = params[weight].at[at].set(np.nan)
        shapes = fakes.few_shapes(role, LIMITS)
        programs = shared(directory, role)
        made.append(
            JaxEngine(checkpoint.config, params, mesh, rules, LIMITS, shapes, programs=programs)
        )
    return made


def asked(id: str, prompt: list[int], **sampling) -> Request:
    return Request(id, 0.0, prompt, 12, SLO, sampling=SamplingParams(**sampling))


def test_a_model_with_a_nan_fails_what_meets_it(golden):
    directory = golden / "qwen2"  # whose head is not the embedding
    good = [asked(str(i), [5 + i, 9, 17, 4], temperature=i % 2, seed=i) for i in range(3)]
    expected = asyncio.run(fakes.serve(engines(directory, None), good))
    said = {token.id for answer in expected.values() for token in answer}
    bad = next(id for id in range(100, 256) if id not in said)

    async def main():
        cost, metrics = CostModel.from_profile(fakes.PROFILE), Metrics()
        router = Router(asyncio.get_running_loop(), 100, cost, observers=[metrics])
        transport = LocalTransport()
        both = engines(directory, "embed", bad)
        workers = build_workers(fakes.CONFIG, both, cost, transport, router.emit)
        router.connect(workers)
        for worker in workers:
            worker.start()

        async def read(request):
            return [output.token async for output in router.submit(request)]

        poisoned = [
            asked("a", [1, bad, 3]),
            asked("b", [bad] + [7] * 50),  # of several chunks; the last of them alone samples
            asked("c", [7] * 50 + [bad], prompt_logprobs=2),
            asked("d", [4, bad], temperature=1.0, logprobs=5),
        ]
        for _ in range(2):  # the second time in pages that the first has used
            answers = await asyncio.gather(*map(read, poisoned + good), return_exceptions=True)
            failed = answers[: len(poisoned)]
            assert all(isinstance(each, RequestFailed) for each in failed), failed
            for request, answer in zip(good, answers[len(poisoned) :], strict=True):
                assert answer == expected[request.id]
        assert counted(metrics) == 2 * len(poisoned)
        await fakes.assert_nothing_held(workers, transport)
        transport.close()

    asyncio.run(main())


@pytest.mark.parametrize("weight", ["norm.scale", "layers.1.attention.k", "layers.0.mlp.down"])
def test_a_model_that_is_all_wrong_fails_every_request(tiny_llama, weight):
    prefill, _ = engines(tiny_llama, weight)
    seq = Seq(asked("a", [5, 9, 17]))
    seq.pages = [3]
    assert prefill.step([(seq, 3)])["a"].id == INVALID
    seq = Seq(asked("a", [5] * 40))
    seq.pages = list(range(5))
    assert prefill.step([(seq, 16)])["a"].id == INVALID, "in a chunk that samples nothing"
