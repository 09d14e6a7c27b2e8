"""The workers as the router knows them: the last summary of each, and what was sent since."""

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from kairos_jax.messages import Handover, Message, Submit
from schedulers.core import Role
from schedulers.cost import CostModel
from schedulers.request import Request, Slo
from schedulers.routing import (
    Admission,
    Summary,
    is_full,
    prompt_s,
    relief_s,
    route_decode,
    route_prefill,
)

# The least that a client which is turned away is told to wait.
LEAST_RETRY_S = 0.1


class Full(Exception):
    """No request can be taken now. retry_after_s: when one may be, as predicted."""

    def __init__(self, reason: str, retry_after_s: float):
        super().__init__(reason)
        self.retry_after_s = max(retry_after_s, LEAST_RETRY_S)


class WorkerLost(Exception):
    """The instance that served this request failed, and there is no other to go on with it."""


class Peer:
    """One worker, in this process or another.

    post: sends it a message. cost: of its own steps. summary: of its ledger as it was at `now`;
    from then on `update` tells. None: of a worker that is not summed up, and passes for idle.
    draining: it takes no new requests.
    """

    def __init__(
        self,
        id: str,
        role: Role,
        post: Callable[[Message], None],
        cost: CostModel,
        summary: Summary | None,
        now: float,
    ):
        self.id, self.role, self.post, self.cost = id, role, post, cost
        self.draining = False
        self._summary, self._at = summary, now
        self._num_sent = 0
        # What each request adds that the summary does not count yet, in the order sent.
        self._unseen: deque[Callable[[Summary], Summary]] = deque()

    def submit(self, message: Submit) -> None:
        """Sends a request to prefill, and perhaps to decode too."""
        self._send(message, lambda summary: _with_request(summary, message, self.cost))

    def hand_over(self, message: Handover) -> None:
        """Sends a request to decode."""
        request = message.request
        length, slo = len(request.prompt) + len(message.tokens), request.slo
        self._send(message, lambda summary: summary.with_context(length, slo, self.cost))

    def update(self, summary: Summary, num_received: int, now: float) -> None:
        """Takes a new summary, in which the first `num_received` requests sent here count."""
        while len(self._unseen) > self._num_sent - num_received:
            self._unseen.popleft()
        for add in self._unseen:
            summary = add(summary)
        self._summary, self._at = summary, now

    def summary(self, now: float) -> Summary:
        """Its state as far as is known at `now`."""
        if self._summary is None:
            return Summary(self.id, self.role, 0.0, [], [], 1.0, 0.0, math.inf)
        free_s = max(self._summary.free_s - (now - self._at), 0.0)
        return replace(self._summary, free_s=free_s)

    def _send(self, message: Submit | Handover, add: Callable[[Summary], Summary]) -> None:
        self.post(message)
        if self._summary is not None:
            self._num_sent += 1
            self._unseen.append(add)
            self._summary = add(self._summary)


def taking(peers: Collection[Peer], prefill: bool) -> list[Peer]:
    """Those that take new requests, to prefill or to decode. A colocated one does both, and is
    never handed a request from elsewhere.
    """
    some = [peer for peer in peers if (peer.role is not Role.DECODE) == prefill]
    return [peer for peer in some if not peer.draining]


def check_admission(
    request: Request, peers: Collection[Peer], admission: Admission, cost: CostModel, now: float
) -> None:
    """Raises Full where a request should not even wait. There is a peer that prefills."""
    summaries = [peer.summary(now) for peer in taking(peers, prefill=True)]
    if is_full(len(request.prompt), summaries):
        raise Full(
            "every instance that prefills holds all the KV for decode that it may, and as much "
            "waits to be prefilled",
            wait_s(peers, now),
        )
    if (late_s := admission(request, summaries, cost, now)) > 0:
        raise Full(
            f"the first token is predicted to come {late_s:.3g} s later than slo.ttft_s allows, "
            f"{request.slo.ttft:g} s",
            late_s,
        )


def wait_s(peers: Collection[Peer], now: float) -> float:
    """Seconds until something of what is in progress has ended, as predicted."""
    prefill, decode = (taking(peers, prefill=which) for which in (True, False))
    return relief_s([peer.summary(now) for peer in prefill], [p.summary(now) for p in decode])


def choose_prefill(peers: Sequence[Peer], message: Submit, cost: CostModel, now: float) -> Peer:
    """Where a new request is best sent, of at least one."""
    if len(peers) == 1:
        return peers[0]
    summaries = [peer.summary(now) for peer in peers]
    return peers[route_prefill(message.request, summaries, cost, now)]


def choose_decode(
    peers: Sequence[Peer], length: int, slo: Slo, cost: CostModel, now: float
) -> Peer:
    """Where a request of so many tokens is best sent to decode, of at least one."""
    if len(peers) == 1:
        return peers[0]
    summaries = [peer.summary(now) for peer in peers]
    return peers[route_decode(length, slo, summaries, cost, now)]


def _with_request(summary: Summary, message: Submit, cost: CostModel) -> Summary:
    request = message.request
    summary = summary.with_prompt(request.deadline, prompt_s(request, summary, cost))
    if summary.role is Role.BOTH:
        return summary.with_context(len(request.prompt), request.slo, cost)
    return replace(summary, parked_room=summary.parked_room - len(request.prompt))
