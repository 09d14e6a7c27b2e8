"""The client and the replay against a fake server, over loopback gRPC."""

import asyncio
import contextlib
import json
import math
import re
import signal
import sys

import grpc
import pytest
from absl import flags

from kairos_jax import client
from kairos_jax.client import define_flags, run
from kairos_jax.lab.replay import Received, error_line, fell_behind, fit_to_model, replay
from kairos_jax.rpc import kairos_pb2, kairos_pb2_grpc
from schedulers.ledger.request import Slo
from schedulers.simulation.attainment import Outcome
from schedulers.simulation.workload import Arrival

SLO = Slo(ttft=30.0, tpot=30.0)
MODEL = kairos_pb2.Model(
    name="fake",
    max_context=64,
    vocab_size=100,
    max_tokens=32,
    default_slo=kairos_pb2.Slo(ttft_s=30, tpot_s=30),
    prefill_policy="urgency",
    decode_policy="slack",
)


class FakeServer(kairos_pb2_grpc.KairosServicer):
    """Answers with the tokens 0, 1, 2, ... and their text; some prompts make it do otherwise."""

    def __init__(self):
        self.requests: list[kairos_pb2.GenerateRequest] = []
        self.keys: list[str | None] = []  # with which each call came
        self.cancelled = asyncio.Event()
        self.second = asyncio.Event()  # A second request has come.

    async def GetModel(self, request, context):
        self._note_key(context)
        return MODEL

    def _note_key(self, context):
        self.keys.append(dict(context.invocation_metadata()).get("authorization"))

    async def Generate(self, request, context):
        self.requests.append(request)
        self._note_key(context)
        if len(self.requests) == 2:
            self.second.set()
        if request.text == "bad":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "max_tokens is\n-1, under 1")
        if request.text == "full" or len(request.token_ids.ids) == 13:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
        if len(request.token_ids.ids) == 7:
            await self.second.wait()
        for id in range(request.max_tokens):
            yield kairos_pb2.GenerateResponse(
                request_id="r1",
                text_delta=f"é{id} ",
                token_ids=[id],
                logprobs=[kairos_pb2.TokenLogprobs(token_id=id, logprob=-0.5)]
                if request.sampling.HasField("logprobs")
                else [],
            )
            if request.text == "hang":
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
        if request.text != "cut":
            yield kairos_pb2.GenerateResponse(
                request_id="r1",
                finish_reason=kairos_pb2.FINISH_REASON_LENGTH,
                usage=kairos_pb2.Usage(prompt_tokens=3, completion_tokens=request.max_tokens),
                timing=kairos_pb2.Timing(queue_s=0.25, ttft_met=True),
            )


@contextlib.asynccontextmanager
async def serving():
    server, fake = grpc.aio.server(), FakeServer()
    kairos_pb2_grpc.add_KairosServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield fake, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def start_client(*arguments: str) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "kairos_jax.client", *arguments]
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)


def run_client(*arguments: str) -> tuple[int, str, str, FakeServer]:
    async def run():
        async with serving() as (fake, address):
            process = await start_client(f"--address={address}", *arguments)
            out, err = await process.communicate()
            return process.returncode or 0, out.decode(), err.decode(), fake

    return asyncio.run(run())


def test_text_streams_to_stdout():
    code, out, err, fake = run_client("--prompt=hello", "--max_tokens=3")
    assert (code, out, err) == (0, "é0 é1 é2 \n", "")
    # What was not asked for is not sent: the server's defaults are its own.
    sampling, slo = kairos_pb2.Sampling(), kairos_pb2.Slo()
    expected = kairos_pb2.GenerateRequest(text="hello", max_tokens=3, sampling=sampling, slo=slo)
    assert fake.requests == [expected]


def test_help_lists_the_flags_of_other_modules_too():
    code, out, _, _ = run_client("--help")
    assert code == 0
    assert "--tls_ca=VALUE              PEM file" in out


def test_a_key_goes_with_each_call(tmp_path):
    key = tmp_path / "key"
    key.write_text("secret\n")
    _, _, _, fake = run_client("--prompt=hello", "--max_tokens=1")
    assert fake.keys == [None]
    given = f"--api_key_file={key}"
    code, _, _, fake = run_client("--prompt=hello", "--max_tokens=1", given)
    assert (code, fake.keys) == (0, ["Bearer secret"])
    _, _, _, fake = run_client("--trace=synthetic", "--num_requests=2", "--rate=100", given)
    assert set(fake.keys) == {"Bearer secret"}
    assert len(fake.keys) == 2 + 2  # it asks for the model, and so does the replay
    key.write_text("two words")
    code, _, err, _ = run_client("--prompt=hello", given)
    assert code == 2
    assert f"--api_key_file {key} must hold one word of printable ASCII" in err


def test_json_has_everything():
    code, out, err, fake = run_client(
        *("--prompt_token_ids=1,2,3", "--max_tokens=2", "--temperature=0", "--output=json"),
        *("--ignore_eos", "--ttft=1.5", "--tpot=0.25", "--top_k=4", "--top_p=0.5", "--min_p=0.25"),
        *("--seed=9", "--logprobs=0", "--stop_token_ids=5", "--model=fake", "--request_id=mine"),
    )
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer.pop("ttft_s") > 0
    assert answer.pop("tpot_s") >= 0
    timing = answer.pop("timing")
    assert (timing["queue_s"], timing["ttft_met"], timing["tpot_met"]) == (0.25, True, False)
    assert answer == {
        "request_id": "r1",
        "text": "é0 é1 ",
        "token_ids": [0, 1],
        "finish_reason": "length",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0},
        "logprobs": [{"token_id": id, "logprob": -0.5, "top": []} for id in (0, 1)],
    }
    (request,) = fake.requests
    assert request == kairos_pb2.GenerateRequest(
        request_id="mine",
        model="fake",
        token_ids=kairos_pb2.TokenIds(ids=[1, 2, 3]),
        max_tokens=2,
        sampling=kairos_pb2.Sampling(
            temperature=0,
            top_k=4,
            top_p=0.5,
            min_p=0.25,
            seed=9,
            logprobs=0,
            stop_token_ids=[5],
            ignore_eos=True,
        ),
        slo=kairos_pb2.Slo(ttft_s=1.5, tpot_s=0.25),
    )


def test_chat_goes_as_a_message():
    code, _, _, fake = run_client("--prompt=hello", "--chat", "--max_tokens=1")
    assert code == 0
    assert [(m.role, m.content) for m in fake.requests[0].chat.messages] == [("user", "hello")]


@pytest.mark.parametrize(
    ("prompt", "code", "line"),
    [
        ("bad", 2, "error: INVALID_ARGUMENT: max_tokens is -1, under 1\n"),
        ("full", 1, "error: RESOURCE_EXHAUSTED: no room\n"),
        ("cut", 1, "error: INTERNAL: the server ended the stream without a finish reason\n"),
    ],
)
def test_errors_are_one_line(prompt, code, line):
    assert run_client(f"--prompt={prompt}", "--output=json", "--max_tokens=1")[:3] == (
        code,
        "",
        line,
    )


def test_no_server_is_unavailable():
    code, _, err, _ = run_client("--prompt=x", "--address=127.0.0.1:1")
    assert code == 1
    assert err == (
        "error: UNAVAILABLE: no server at 127.0.0.1:1 (Connection refused); is it running?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --prompt or --prompt_token_ids"),
        (["--prompt=a", "--prompt_token_ids=1"], "give either"),
        (["--prompt_token_ids=1,x"], "'x'"),
        (["--prompt=a", f"--top_k={2**40}"], "can't be sent"),
        (["--prompt_token_ids=1", "--chat"], "--chat goes with --prompt"),
        (["stray"], "unexpected argument 'stray'"),
        (["--prompt=a", "--tls_cert=x"], "--tls_ca is missing"),
        (["--prompt=a", "--tls_ca=no/such.pem"], "--tls_ca no/such.pem: No such file"),
        (["--trace=synthetic", "--prompt=a"], "leave --prompt out"),
        (["--trace=synthetic", "--temperature=1"], "leave --temperature out"),
        (["--prompt=a", "--rate=2"], "--rate goes with --trace"),
        (["--trace=absent.csv"], "absent.csv"),
        (["--trace=notes.txt"], "--trace=notes.txt: No such file"),
        (["--trace=synthetic", "--rate=0"], "rate must be positive"),
    ],
)
def test_wrong_flags_are_usage_errors(arguments, message, capsys):
    values = flags.FlagValues()
    define_flags(values)
    # Nothing listens there: it's found out before any server is asked.
    rest = values(["client", "--address=127.0.0.1:1", *arguments])
    assert run(rest[1:], values) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: INVALID_ARGUMENT: ")
    assert message in err


def test_a_flag_that_absl_refuses_is_a_usage_error():
    code, out, err, _ = run_client("--max_tokens=many")
    assert (code, out) == (2, "")
    assert err.startswith("error: INVALID_ARGUMENT: flag --max_tokens=many")
    assert err.count("\n") == 1


def test_ctrl_c_cancels_the_call():
    async def run():
        async with serving() as (fake, address):
            process = await start_client(f"--address={address}", "--prompt=hang", "--max_tokens=9")
            assert process.stdout is not None
            first = await process.stdout.readuntil(b" ")
            process.send_signal(signal.SIGINT)
            _, err = await process.communicate()
            await asyncio.wait_for(fake.cancelled.wait(), 30)
            return process.returncode, first.decode(), err

    assert asyncio.run(run()) == (130, "é0 ", b"")


def test_replay_is_open_loop_and_records_failures():
    # The first of these is held until the second has come; the third is rejected.
    arrivals = [Arrival(0.0, 7, 2), Arrival(0.01, 3, 1), Arrival(0.02, 13, 4)]

    async def run():
        async with serving() as (fake, address):
            done = []
            records = await replay(
                address, arrivals, SLO, seed=1, timeout_s=60, on_ended=done.append
            )
            return fake, records, done

    fake, records, done = asyncio.run(run())
    assert done == [0, 1, 2, 3]
    assert [r.num_prompt for r in records] == [7, 3, 13]
    assert [r.error for r in records] == [None, None, "RESOURCE_EXHAUSTED: no room"]
    assert [r.outcome.num_output for r in records] == [2, 1, 0]
    assert [r.outcome.num_asked for r in records] == [2, 1, 4]
    assert [r.outcome.late_s is None for r in records] == [False, False, True]
    assert [r.outcome.arrival for r in records] == [0.0, 0.01, 0.02]
    assert [r.outcome.met_ttft for r in records] == [True, True, False]
    assert records[0].outcome.ttft_s >= 0.01  # It had to wait for the second to arrive.
    for request in fake.requests:
        assert request.sampling.ignore_eos
        assert (request.slo.ttft_s, request.slo.tpot_s) == (30, 30)
        assert all(0 <= id < MODEL.vocab_size for id in request.token_ids.ids)


def test_lateness_is_of_the_latest_token_on_the_line_of_its_tpot():
    # The third token stalls, and comes with the fourth; the fifth has caught up.
    received = Received(
        token_times=[10.0, 10.1, 10.7, 10.7, 10.8], last=kairos_pb2.GenerateResponse()
    )
    outcome = received.outcome(Slo(1.0, 0.2), arrival=9.0, start=0.5, num_asked=5)
    assert outcome.late_s == pytest.approx(10.7 - 10.0 - 2 * 0.2)
    assert (outcome.first_token_at, outcome.last_token_at) == (9.5, 10.3)
    assert (outcome.num_output, outcome.ok) == (5, True)
    nothing = Received().outcome(SLO, arrival=0.0, num_asked=5)
    assert (nothing.late_s, nothing.done, nothing.num_asked) == (None, False, 5)


def test_replay_of_a_same_seed_sends_the_same_prompts():
    async def prompts(seed: int) -> list[list[int]]:
        async with serving() as (fake, address):
            await replay(address, [Arrival(0.0, 20, 1)], SLO, seed=seed, timeout_s=60)
            return [list(request.token_ids.ids) for request in fake.requests]

    assert asyncio.run(prompts(5)) == asyncio.run(prompts(5)) != asyncio.run(prompts(6))


@pytest.mark.parametrize(
    ("status", "details", "told"),
    [
        (
            "UNAVAILABLE",
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:9: Failed to "
            "connect to remote host: Connection refused",
            "UNAVAILABLE: no server at here:9 (Connection refused); is it running?",
        ),
        (
            "UNAVAILABLE",
            "errors resolving here:9: [field:hostname lookup error:address lookup failed]",
            "UNAVAILABLE: no host is known for here:9: it must be host:port",
        ),
        (
            "UNIMPLEMENTED",
            "Received http2 header with status: 404",
            "UNIMPLEMENTED: what answers at here:9 does not speak gRPC",
        ),
        ("UNAVAILABLE", "the server is\n draining", "UNAVAILABLE: the server is draining"),
    ],
)
def test_an_error_speaks_of_the_address(status, details, told):
    none = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode[status], none, none, details)
    assert error_line(error, "here:9") == told


def test_fit_to_model_keeps_within_its_limits():
    arrivals = [Arrival(i, 10 * i + 1, 10 * i + 1) for i in range(100)]
    fitted = fit_to_model(arrivals, MODEL)
    assert max(a.num_prompt for a in fitted) == 48
    assert max(a.num_output for a in fitted) == 16
    fitted = fit_to_model(arrivals, MODEL, max_prompt=10, max_output=1000)
    assert max(a.num_prompt for a in fitted) == 10
    assert max(a.num_output for a in fitted) == 32


def outcomes(rate: float, capacity: float, latency: float = 30.0) -> list[Outcome]:
    """Of a server that answers so many a second, each after its latency."""
    slo, made, free = Slo(1, 1), [], 0.0
    for number in range(100):
        arrival = number / rate
        free = max(free, arrival) + 1 / capacity
        made.append(Outcome(slo, arrival, free, free + latency, 2))
    return made


def test_a_server_that_falls_behind_is_told_of_and_a_slow_one_is_not():
    assert fell_behind(outcomes(rate=4, capacity=100)) is None
    assert fell_behind(outcomes(rate=4, capacity=4.1)) is None
    assert fell_behind(outcomes(rate=1000, capacity=500)) is None  # in a tenth of a second
    assert fell_behind(outcomes(rate=4, capacity=2)[:9]) is None
    sent, answered = fell_behind(outcomes(rate=4, capacity=2))
    assert (round(sent, 1), round(answered, 1)) == (4.0, 2.0)
    # Half of them refused, the others served at their pace.
    some = outcomes(rate=4, capacity=100)
    refused = [Outcome(Slo(1, 1), each.arrival, ok=False) for each in some[::2]]
    assert fell_behind(some[1::2] + refused) is None
    assert fell_behind([Outcome(Slo(1, 1), 0.0, at, at, 2) for at in range(20)])[0] == math.inf


def test_the_warning_says_what_to_try(capsys):
    client._warn_if_behind(outcomes(rate=8, capacity=2))
    err = capsys.readouterr().err
    assert re.match(r"warning: 8\.\d requests/s were sent, and 2 requests/s answered: ", err)
    assert "Try --rate=1.8, " in err


def test_workload_prints_its_summary():
    flags = ["--trace=synthetic", "--rate=1000", "--num_requests=20", "--max_prompt=6"]
    code, out, err, fake = run_client(*flags)
    assert code == 0
    assert err.splitlines() == ["replay: 20 to do", "replay: done"]
    assert "urgency + slack" in " ".join(out.split())
    assert "100.0" in out
    assert len(fake.requests) == 20


def test_workload_from_a_trace_as_json(tmp_path):
    rows = [{"timestamp": t, "input_length": n, "output_length": 2} for t, n in ((0, 5), (1, 13))]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _, _ = run_client(f"--trace={trace}", "--output=json")
    assert code == 0
    summary = json.loads(out)
    assert summary["policy"] == "urgency + slack"
    assert (summary["num_requests"], summary["num_failed"]) == (2, 1)
    assert summary["ttft_attainment"] == 50
    assert summary["errors"] == {"RESOURCE_EXHAUSTED: no room": 1}
