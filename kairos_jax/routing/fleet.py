"""The workers of a router: who takes a request, and who is turned away."""

from collections.abc import Collection, Sequence

from kairos_jax.routing.peer import Peer
from kairos_jax.worker.messages import Submit
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies.routing import (
    Admission,
    is_full,
    relief_s,
    route_decode,
    route_prefill,
)

# The least that a client which is turned away is told to wait.
LEAST_RETRY_S = 0.1


class Full(Exception):
    """No request can be taken now. limit: which one was reached, in a word. retry_after_s: when a
    request may be taken, as predicted.
    """

    def __init__(self, reason: str, limit: str, retry_after_s: float):
        super().__init__(reason)
        self.limit = limit
        self.retry_after_s = max(retry_after_s, LEAST_RETRY_S)


class WorkerLost(Exception):
    """The instance that served this request failed, and there is no other to go on with it."""


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
            "parked_kv",
            wait_s(peers, now),
        )
    if (late_s := admission(request, summaries, cost, now)) > 0:
        raise Full(
            f"the first token is predicted to come {late_s:.3g} s later than slo.ttft_s allows, "
            f"{request.slo.ttft:g} s",
            "predicted_ttft",
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
    cached = [peer.cached(message.request) for peer in peers]
    return peers[route_prefill(message.request, summaries, cost, now, cached)]


def choose_decode(
    peers: Sequence[Peer], length: int, slo: Slo, cost: CostModel, now: float
) -> Peer:
    """Where a request of so many tokens is best sent to decode, of at least one."""
    if len(peers) == 1:
        return peers[0]
    summaries = [peer.summary(now) for peer in peers]
    return peers[route_decode(length, slo, summaries, cost, now)]
