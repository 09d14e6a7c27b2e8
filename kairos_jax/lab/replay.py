"""Sends a workload to a server, open loop: each request goes out at its time, however slow the
server is.
"""

import asyncio
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np

from kairos_jax.net.credentials import PLAIN, Credentials
from kairos_jax.rpc import kairos_pb2, kairos_pb2_grpc
from schedulers.ledger.request import Slo
from schedulers.simulation.attainment import Outcome
from schedulers.simulation.workload import Arrival, fit_lengths

Metadata = Sequence[tuple[str, str]]
# A server does not keep up if its rate is below that share of what is sent, and it lags behind for
# so many seconds. Fewer answers tell nothing.
_KEPT_UP, _LAG_S, _FEWEST = 0.85, 1.0, 10
_MIDDLE = 0.8


@dataclass(slots=True)
class Received:
    """What has come of one answer so far. token_times: when each token came, in seconds, as
    time.monotonic() gives them.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[kairos_pb2.TokenLogprobs] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    last: kairos_pb2.GenerateResponse | None = None  # The message that ended it.

    async def read(
        self,
        stub: kairos_pb2_grpc.KairosStub,
        request: kairos_pb2.GenerateRequest,
        timeout_s: float | None = None,
        on_text: Callable[[str], object] = lambda delta: None,
        metadata: Metadata = (),
    ) -> None:
        """Sends `request` and takes in the answer to its end; what had come before an error stays.
        metadata: sent with it.

        Raises:
          grpc.aio.AioRpcError: the server refused, failed, or did not end within `timeout_s`.
          EOFError: the stream ended without a finish reason.
        """
        more = {"metadata": metadata} if metadata else {}
        async for message in stub.Generate(request, timeout=timeout_s, **more):
            self.token_times += [time.monotonic()] * len(message.token_ids)
            self.text += message.text_delta
            self.token_ids += message.token_ids
            self.logprobs += message.logprobs
            if message.text_delta:
                on_text(message.text_delta)
            if message.finish_reason:
                self.last = message
        if self.last is None:
            raise EOFError("the server ended the stream without a finish reason")

    def outcome(self, slo: Slo, arrival: float, start: float = 0.0, num_asked: int = 0) -> Outcome:
        """Its times are relative to `start`, which is on this process's clock, as `arrival` is.
        num_asked: see Outcome.
        """
        ended, times = self.last is not None, self.token_times
        if not times:
            return Outcome(slo, arrival, ok=ended, num_asked=num_asked)
        first = times[0]
        return Outcome(
            slo,
            arrival,
            first_token_at=first - start,
            last_token_at=times[-1] - start,
            num_output=len(times),
            ok=ended,
            late_s=max(at - first - k * slo.tpot for k, at in enumerate(times)),
            num_asked=num_asked,
        )


@dataclass(frozen=True, slots=True)
class Record:
    """One request of a replay.

    outcome: its times are seconds since the replay's start, and its arrival is the scheduled one.
    token_ids: of its answer. error: "STATUS: message" if it was rejected or failed.
    """

    num_prompt: int
    outcome: Outcome
    token_ids: Sequence[int] = ()
    error: str | None = None


async def replay(
    address: str,
    arrivals: Sequence[Arrival],
    slo: Slo,
    *,
    seed: int = 0,
    ignore_eos: bool = True,
    timeout_s: float = 600.0,
    on_ended: Callable[[int], object] = lambda count: None,
    net: Credentials = PLAIN,
    metadata: Metadata = (),
) -> list[Record]:
    """Replays `arrivals` with prompts of random token ids; returns a record each, in their order.

    TTFT counts from the scheduled time, so that a client or a connection that lags cannot hide
    queueing. It ends `timeout_s` after the last arrival at the latest.

    Args:
      address: host:port of the server.
      slo: sent with each request, and what the records are held against.
      seed: of the prompts. Sampling is greedy.
      ignore_eos: each request generates all of its num_output tokens.
      timeout_s: gRPC deadline of each request, from when it is sent.
      on_ended: called with the number of requests that have ended, 0 first.
      net: how the server is reached.
      metadata: sent with each call.

    Raises:
      grpc.aio.AioRpcError: the server can't be reached at the start.
    """
    async with net.channel(address) as channel:
        stub = kairos_pb2_grpc.KairosStub(channel)
        asked = kairos_pb2.GetModelRequest()
        model = await stub.GetModel(asked, timeout=timeout_s, metadata=metadata or None)
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(model.vocab_size, size=a.num_prompt).tolist() for a in arrivals]
        ended = itertools.count()
        on_ended(next(ended))
        start = time.monotonic()

        async def run(arrival: Arrival, prompt: list[int]) -> Record:
            request = kairos_pb2.GenerateRequest(
                token_ids=kairos_pb2.TokenIds(ids=prompt),
                max_tokens=arrival.num_output,
                sampling=kairos_pb2.Sampling(temperature=0, ignore_eos=ignore_eos),
                slo=kairos_pb2.Slo(ttft_s=slo.ttft, tpot_s=slo.tpot),
            )
            received, error = Received(), None
            await asyncio.sleep(start + arrival.at - time.monotonic())
            try:
                await received.read(stub, request, timeout_s, metadata=metadata)
            except (grpc.aio.AioRpcError, EOFError) as failure:
                error = error_line(failure, address)
            on_ended(next(ended))
            outcome = received.outcome(slo, arrival.at, start, arrival.num_output)
            return Record(len(prompt), outcome, received.token_ids, error)

        async with asyncio.TaskGroup() as group:
            pairs = zip(arrivals, prompts, strict=True)
            tasks = [group.create_task(run(arrival, prompt)) for arrival, prompt in pairs]
        return [task.result() for task in tasks]


def fit_to_model(
    arrivals: Sequence[Arrival],
    model: kairos_pb2.Model,
    max_prompt: int | None = None,
    max_output: int | None = None,
) -> list[Arrival]:
    """Shrinks lengths (tokens) to the model's limits, or to lower ones. A quarter of the context
    is set aside for outputs where nothing else is said.
    """
    longest_output = min(max_output or model.max_context // 4, model.max_tokens)
    room = model.max_context - longest_output
    return fit_lengths(arrivals, min(max_prompt or room, room), longest_output)


def fell_behind(outcomes: Sequence[Outcome]) -> tuple[float, float] | None:
    """The rates, in requests a second, at which requests were sent and answered, if the server did
    not keep up; else None. One that keeps up has both alike, however long an answer takes. They are
    of the middle four fifths by time, so that the start and single long answers do not count.
    """
    answered = [at for each in outcomes if each.done and (at := each.last_token_at) is not None]
    if len(answered) < _FEWEST:
        return None
    sent_in, answered_in = _middle([each.arrival for each in outcomes]), _middle(answered)
    kept = len(answered) / len(outcomes)
    if answered_in - sent_in < _LAG_S or kept * sent_in > _KEPT_UP * answered_in:
        return None
    share = _MIDDLE * len(outcomes)
    return share / sent_in if sent_in else math.inf, kept * share / answered_in


def _middle(times: Sequence[float]) -> float:
    """The seconds that the middle part takes."""
    low, high = np.quantile(times, [(1 - _MIDDLE) / 2, (1 + _MIDDLE) / 2])
    return float(high - low)


# How gRPC words what is wrong with an address, and what a user is told of it.
_OF_ADDRESSES = (
    # Not where a server's certificate was refused.
    (
        r"Failed to connect to remote host: (?!.*(?i:ssl|tls))([^;]*)",
        r"no server at {} (\1); is it running?",
    ),
    (r"errors resolving|DNS resolution failed", r"no host is known for {}: it must be host:port"),
    (r"Failed parsing HTTP/2|Received http2 header", r"what answers at {} does not speak gRPC"),
)


def error_line(error: grpc.aio.AioRpcError | EOFError, address: str) -> str:
    """Of an error, "STATUS: message" in one line. address: that was called."""
    if isinstance(error, EOFError):
        return f"INTERNAL: {error}"
    code, details = error.code(), " ".join((error.details() or "").split())
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
        for words, told in _OF_ADDRESSES:
            if found := re.search(words, details):
                return f"{code.name}: {found.expand(told).format(address)}"
    return f"{code.name}: {details}"
