"""What the log says of requests: as they end, and every ten seconds while there is work."""

import asyncio
import logging

import fakes
import pytest

from kairos_jax.engine.calls import Token
from kairos_jax.observe import request_log
from kairos_jax.observe.request_log import RequestLog, WorkerLog, request_line, worker_line
from kairos_jax.routing.stream import Stream
from kairos_jax.worker.messages import Output
from kairos_jax.worker.status import Status
from schedulers.ledger.request import Request, Slo

LOGGER = request_log.__name__


def stream_of(*times: float, name: str = "mine", ttft: float = 1.0, tpot: float = 0.1) -> Stream:
    """A request of three tokens that arrived at 0 and began at 0.25, with a token at each time."""
    stream = Stream(name, Request(name, 0.0, [1, 2, 3], 9, Slo(ttft, tpot)))
    for at in times:
        stream.put(Output(name, Token(5), 0.25, at))
    return stream


class FakeRouter:
    """What the log looks at: requests in progress, and no workers."""

    peers = ()

    def __init__(self):
        self.streams: list[Stream] = []


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def said(caplog):
    """The messages since the last time."""
    caplog.set_level(logging.INFO, LOGGER)

    def take() -> list[str]:
        messages = [record.getMessage() for record in caplog.records if record.name == LOGGER]
        caplog.clear()
        return messages

    return take


def watching(router: FakeRouter, clock: Clock, each: bool = False) -> RequestLog:
    log = RequestLog(each, clock)
    log._router = router  # type: ignore[assignment]
    return log


def test_a_request_that_kept_its_slo():
    text, fields = request_line(stream_of(0.5, 0.55, 0.6), "length")
    assert text == "length, 3 + 3 tokens, TTFT 0.500 s (queued 0.250 s), TPOT 50.0 ms, SLO kept"
    assert fields == {
        "outcome": "length",
        "prompt_tokens": 3,
        "output_tokens": 3,
        "ttft_s": 0.5,
        "queue_s": 0.25,
        "tpot_s": pytest.approx(0.05),
        "slo_ttft_s": 1.0,
        "slo_tpot_s": 0.1,
        "slo": "kept",
    }


MISSED = "SLO missed: "


@pytest.mark.parametrize(
    ("stream", "outcome", "cause", "end"),
    [
        (stream_of(2.0), "stop", "", "3 + 1 tokens, TTFT 2.000 s (queued 0.250 s), "
         f"{MISSED}TTFT over 1 s"),
        (stream_of(0.5, 0.75), "stop", "", f"TPOT 250.0 ms, {MISSED}TPOT over 100 ms"),
        (stream_of(2.0, 3.0), "stop", "", f"{MISSED}TTFT over 1 s and TPOT over 100 ms"),
        (stream_of(), "failed", "poison", f"failed (poison), 3 + 0 tokens, {MISSED}failed"),
        (stream_of(), "cancelled", "", "cancelled, 3 + 0 tokens"),
    ],
)  # fmt: skip
def test_why_a_request_missed_its_slo(stream, outcome, cause, end):
    text, fields = request_line(stream, outcome, cause)
    assert text.endswith(end)
    assert fields.get("slo") == (None if outcome == "cancelled" else "missed")


def test_the_line_of_an_interval(router, clock, said, caplog):
    log = watching(router, clock)
    going, waiting = stream_of(0.5, 0.6), stream_of(name="waits")
    router.streams = [going, waiting]
    log.ended(stream_of(0.5, 0.6, 0.7), "length")
    log.ended(stream_of(4.0), "stop")
    log.ended(stream_of(), "cancelled")
    log.rejected("max_requests")
    log.rejected("bad_request")  # the client's mistake: not held against an SLO
    clock.now = 10.0
    log.tell_interval()
    assert caplog.records[-1].fields["attainment"] == pytest.approx(100 / 3)
    assert said() == [
        "0.30 requests/s, 1 waiting, 1 running, 0.6 tokens/s, SLO kept: 33 % of 3, KV used: 0 %, "
        "1 rejected: bad_request, 1 rejected: max_requests"
    ]
    # Tokens of a request in progress count in the interval in which they came.
    going.put(Output("mine", Token(5), 0.25, 12.0))
    clock.now = 20.0
    log.tell_interval()
    assert said() == [
        "0.00 requests/s, 1 waiting, 1 running, 0.1 tokens/s, SLO kept: -, KV used: 0 %"
    ]


def test_without_work_nothing_is_said(router, clock, said):
    log = watching(router, clock)
    clock.now = 10.0
    log.tell_interval()
    assert said() == []


def test_lines_of_requests_can_be_switched_off(router, clock, said):
    for each in (True, False):
        log = watching(router, clock, each)
        log.failed(stream_of(), "no_worker")
        log.ended(stream_of(), "failed")
        assert len(said()) == each


def test_a_failed_request_tells_its_cause_and_no_other_does(router, clock, said):
    log = watching(router, clock, each=True)
    log.failed(stream_of(name="one"), "poison")
    log.ended(stream_of(name="two"), "cancelled")
    log.ended(stream_of(name="one"), "failed")
    first, second = said()
    assert "poison" not in first
    assert second.startswith("failed (poison)")


@fakes.served_as(fakes.CONFIG)
async def test_a_served_request_is_logged_under_its_id(harness):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        harness.router.observers.append(RequestLog())
        await harness.generate([1, 2, 3], 5, request_id="mine")
        await asyncio.wait_for(harness.router.drained(), 30)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    (record,) = records
    assert record.request == "mine"
    assert record.fields["output_tokens"] == 5
    assert record.getMessage().startswith("length, 3 + 5 tokens, TTFT ")
    assert record.getMessage().endswith(" ms, SLO kept")


def status(**values) -> Status:
    zeros = dict.fromkeys(Status.__dataclass_fields__, 0) | {"num_pages": 8, "begun": ()}
    return Status(**zeros | values)


def test_the_line_of_a_worker(clock, said):
    now = status(steps=20, running=2, used_pages=4)
    text, fields = worker_line(status(), now, 10.0) or ("", {})
    assert text == "2.0 steps/s, 0 waiting, 2 running, 0 parked, KV used: 50 %"
    assert fields["steps_per_s"] == 2.0
    states = iter([status(), now, now, status(steps=20)])
    log = WorkerLog(lambda: next(states), clock)
    for clock.now in (10.0, 20.0, 30.0):
        log.tell_interval()
    assert [line[:8] for line in said()] == ["2.0 step", "0.0 step"]
