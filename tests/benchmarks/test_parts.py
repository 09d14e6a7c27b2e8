"""What the benchmarks are made of: the client of vLLM's API, the ladder, what journals tell."""

import asyncio
import json
from dataclasses import astuple

import fakes
import figures
import journals
import numpy as np
import openai_replay
import pytest
import rates

from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.journal import Journal, to_lines
from schedulers.ledger.request import Slo
from schedulers.policies.colocated import policies_of, policy_for
from schedulers.simulation.attainment import Outcome
from schedulers.simulation.workload import Arrival

SLO = Slo(10.0, 10.0)


def chunk(data: str) -> bytes:
    return f"{len(data):x}\r\n{data}\r\n".encode()


def event(*ids: int) -> str:
    return f"data: {json.dumps({'choices': [{'token_ids': list(ids)}]})}\n\n"


def replay(answer: list[bytes], arrivals: list[Arrival]) -> tuple[list[Outcome], list[dict]]:
    """What the client makes of a server that answers so, and what it has asked."""
    asked = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        asked.append(json.loads(await reader.readexactly(length)))
        writer.writelines(answer)
        await writer.drain()
        writer.close()

    async def run():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            return await openai_replay.replay(f"{host}:{port}", arrivals, SLO, vocab_size=50)

    return asyncio.run(run()), asked


OK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def test_tokens_are_counted_however_the_events_are_cut():
    whole = event(1) + event(2, 3) + event()
    parts = [chunk(whole[:25]), chunk(whole[25:]), chunk("data: [DONE]\n\n")]
    arrivals = [Arrival(0.0, 5, 3), Arrival(0.01, 2, 3)]
    outcomes, asked = replay([OK, *parts, END], arrivals)
    assert [(o.done, o.num_output, o.num_asked) for o in outcomes] == [(True, 3, 3)] * 2
    assert all(o.ttft_s > 0 for o in outcomes)
    asked = sorted(asked, key=lambda body: -len(body["prompt"]))
    rng = np.random.default_rng(0)  # the prompts of kairos_jax.lab.replay
    assert [body["prompt"] for body in asked] == [rng.integers(50, size=n).tolist() for n in (5, 2)]
    assert all(body["ignore_eos"] and body["max_tokens"] == 3 for body in asked)


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], 0),
        ([OK, chunk('data: {"error": {"message": "no"}}\n\n'), END], 0),
        ([OK, chunk(event(1)), END], 1),  # no [DONE]
        ([OK, chunk(event(1))], 1),  # cut off
        ([], 0),
    ],
)
def test_what_is_not_answered_to_its_end_has_failed(answer, tokens):
    (outcome,), _ = replay(answer, [Arrival(0.0, 2, 3)])
    assert (outcome.done, outcome.num_output) == (False, tokens)


def attaining(share: float):
    """Outcomes of ten requests, of which so many keep their SLO."""

    def outcome(met: bool) -> Outcome:
        return Outcome(SLO, 0.0, 1.0 if met else 60.0, 61.0, 61)

    return [outcome(index < 10 * share) for index in range(10)]


def test_rates_go_on_to_one_and_a_half_times_the_knee():
    sent = []

    def vllm(arrivals):
        sent.append(len(arrivals))
        return attaining(0.9 if len(arrivals) < 4 else 0.4)

    servers = {"ours": lambda arrivals: attaining(1.0), "vllm": vllm}
    arrivals = [Arrival(0.0, 1, 1)] * 10
    found = rates.serve(servers, lambda rate: arrivals[: round(2 * rate)], [], 0.5, 1)
    assert sent == [1, 2, 3, 4, 5, 6]
    assert found["knee_rps"] == 2.0
    assert [row["rate"] for row in found["rates"]] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert found["goodput_at_knee_of_vllm"] == {"ours": 2.5, "vllm": 1.0}


def test_who_begins_alternates():
    assert list(figures.turns(["a", "b"], 3)) == ["a", "b", "b", "a", "a", "b"]


def test_a_spread_of_what_is_there():
    assert figures.spread([3, None, 1, 2]) == {"median": 2, "low": 1, "high": 3}
    assert figures.short(figures.spread([None])) == "-"


def test_what_instances_did_is_read_from_their_journals(tmp_path):
    config = fakes.altered(fluid=True, prefill__instances=2)

    async def served():
        journal = Journal(fakes.time.monotonic)
        async with fakes.running(config, journal) as harness:
            await asyncio.gather(*(harness.generate([i] * 40, 9) for i in range(12)))
        return list(journal.take())

    begun_at, records = fakes.time.monotonic(), asyncio.run(served())
    ids = {record[0] for record in records}
    assert len(ids) == 3
    for id in ids:
        own = (record for record in records if record[0] == id)
        (tmp_path / f"{id}.jsonl").write_text("".join(to_lines(own)))
    merged = journals.read(tmp_path)
    cost = CostModel.from_profile(fakes.PROFILE)
    policies = policies_of(merged, cost, "kairos_plus", "kairos_plus", config.prefill.pack)

    work, decisions, differing = journals.account(merged, policies, begun_at, 1e6, 2)
    assert work.keys() == ids
    assert not any(any(astuple(of[1])) for of in work.values()), "all was over by then"
    done = [of[0] for of in work.values()]
    assert sum(each.prompt_tokens for each in done) == 12 * 40
    assert sum(each.answer_tokens for each in done) == 12 * 8
    assert sum(each.stayed + each.handed_over for each in done) > 0
    assert (decisions > 0, differing) == (True, 0)

    told = journals.timelines(merged, policies)
    assert told
    for name, words in (("stayed", "kept at"), ("moved", "leaves")):
        assert name not in told or any(words in line for line in told[name])
    slower = cost.scaled(2)
    other = dict.fromkeys(ids, policy_for(Role.BOTH, slower, "kairos_plus", "kairos_plus"))
    assert journals.account(merged, other, begun_at, 1e6, 2)[2] > 0
