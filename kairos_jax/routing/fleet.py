"""The workers of a router: which of them takes a request, and which requests are turned away."""

import time
from collections.abc import Callable, Sequence

from kairos_jax.routing.peer import Peer
from kairos_jax.worker.messages import Submit
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies import flowing
from schedulers.policies.routing import (
    ADMISSION,
    Summary,
    is_full,
    recall,
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


def no_slot(limit: int, wait_s: float) -> Full:
    """As many requests are in progress as `max_requests` allows."""
    reason = f"{limit} requests are in progress, the most this server takes"
    return Full(reason, "max_requests", wait_s)


class WorkerLost(Exception):
    """The instance that served this request failed, and there is no other to go on with it."""


# For how long a pair of workers between which KV did not move is avoided, at first and at most.
_AVOID_S = (1.0, 30.0)


class Fleet:
    """Workers, which join and leave at any time. Used on one event loop.

    cost: of the steps of workers in general; each has its own beside it. admission: one of
    `schedulers.policies.routing.ADMISSION`. peers: by id. last_loss: why the last one left.
    """

    def __init__(
        self,
        cost: CostModel,
        admission: str = "none",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.cost, self.clock = cost, clock
        self.peers: dict[str, Peer] = {}
        self.last_loss = "none has joined"
        self._admission = ADMISSION[admission]
        # By the ids of source and target: until when they are avoided, and for how long.
        self._failed: dict[tuple[str, str], tuple[float, float]] = {}
        # Ids of peers, as they stood when they last told: without them, each would ask all others.
        self._late: set[str] = set()  # where late prompts wait
        self._with_time: set[str] = set()  # which could begin some

    def join(self, peer: Peer) -> None:
        """Takes in a worker. Raises ValueError if its id is in use."""
        if peer.id in self.peers:
            raise ValueError(f"peer id {peer.id!r} is in use")
        self.peers[peer.id] = peer
        self._note(peer, peer.summary)

    def remove(self, peer: Peer, reason: str) -> None:
        """Does without a worker from now on."""
        del self.peers[peer.id]
        self._late.discard(peer.id)
        self._with_time.discard(peer.id)
        self.last_loss = reason
        self._failed = {pair: until for pair, until in self._failed.items() if peer.id not in pair}

    def drains(self, peer: Peer) -> None:
        """A worker takes no new requests from now on."""
        peer.draining = True
        self._note(peer, peer.summary)
        self.last_loss = f"{peer.noun} is draining"

    def transfer_failed(self, source: Peer, target: Peer) -> None:
        """KV did not move between two workers: they are not chosen together for a while."""
        pair = source.id, target.id
        _, last_s = self._failed.get(pair, (0.0, 0.0))
        avoid_s = min(max(2 * last_s, _AVOID_S[0]), _AVOID_S[1])
        self._failed[pair] = self.clock() + avoid_s, avoid_s

    def transferred(self, source: Peer, target: Peer) -> None:
        """KV has moved between two workers."""
        self._failed.pop((source.id, target.id), None)

    def taking(self, prefill: bool) -> list[Peer]:
        """The workers that take requests to prefill, or to decode. A colocated one does both, and
        is never handed a request from elsewhere. Raises WorkerLost: there is none, and why.
        """
        if peers := self._taking(prefill):
            return peers
        job = "prefills" if prefill else "decodes"
        raise WorkerLost(f"no instance that {job} takes requests ({self.last_loss})")

    def onward(self, source: Peer) -> list[Peer]:
        """The workers to which a request that `source` has may be handed over. Raises WorkerLost as
        `taking`.
        """
        if source.role is not Role.BOTH:
            return self.taking(prefill=False)
        others = [peer for peer in self.taking(prefill=True) if peer is not source]
        if not others:
            raise WorkerLost(f"no other instance takes requests ({self.last_loss})")
        return [peer for peer in others if peer.summary.receives] or others

    def place(self, home: Peer, length: int, slo: Slo, late: bool) -> tuple[Peer, str] | None:
        """Where a request of so many tokens goes on that has its first token, and why: on `home`,
        which has its KV, or elsewhere. late: it has missed its TTFT. None where roles do not flow.
        """
        now, peers = self.clock(), [home]
        for peer in self._taking(prefill=True):
            if peer is not home and peer.role is Role.BOTH and not self._avoided(home, peer, now):
                peers.append(peer)
        summaries = [peer.summary for peer in peers]
        if home.role is not Role.BOTH or not flowing.flows(summaries):
            return None
        placed = flowing.place(length, slo, late, summaries, 0, self.cost, now)
        return peers[placed.index], placed.why

    def recall(self, told: Peer, summary: Summary) -> tuple[Peer, Peer, Sequence[str]] | None:
        """Where `told` has told how it stands: which worker is to give late prompts back, which is
        to get them, and their ids.
        """
        self._note(told, summary)
        if not (self._late and self._with_time):
            return None
        peers = self._prefilling(self._taking(prefill=True))
        summaries = [peer.summary for peer in peers]
        for index, peer in enumerate(peers):
            if peer.id in self._with_time and (found := recall(summaries, index)):
                return peers[found[0]], peer, found[1]
        return None

    def check_served(self) -> None:
        """Raises WorkerLost where no request could be brought to its end."""
        if any(peer.role is Role.PREFILL for peer in self.taking(prefill=True)):
            self.taking(prefill=False)

    def check_admission(self, request: Request) -> None:
        """Raises Full where a request should not even wait, and WorkerLost where none is served."""
        self.check_served()
        now = self.clock()
        summaries = [peer.summary for peer in self._taking(prefill=True)]
        if is_full(len(request.prompt), summaries):
            raise Full(
                "every instance that prefills holds all the KV for decode that it may, and as much "
                "waits to be prefilled",
                "parked_kv",
                self.wait_s(),
            )
        if (late_s := self._admission(request, summaries, self.cost, now)) > 0:
            raise Full(
                f"the first token is predicted to come {late_s:.3g} s later than slo.ttft_s "
                f"allows, {request.slo.ttft:g} s",
                "predicted_ttft",
                late_s,
            )

    def wait_s(self) -> float:
        """Seconds until something of what is in progress has ended, as predicted."""
        prefill, decode = (
            [peer.summary for peer in self._taking(prefill=which)] for which in (True, False)
        )
        return relief_s(prefill, decode, self.clock())

    def choose_prefill(self, peers: Sequence[Peer], message: Submit) -> Peer:
        """Where a new request is best sent, of at least one worker."""
        if len(peers) == 1:
            return peers[0]
        peers = self._prefilling(peers)
        summaries = [peer.summary for peer in peers]
        cached = [peer.cached(message.request) for peer in peers]
        route = flowing.route_prompt if flowing.flows(summaries) else route_prefill
        return peers[route(message.request, summaries, self.cost, self.clock(), cached)]

    def choose_decode(
        self, peers: Sequence[Peer], length: int, slo: Slo, source: Peer | None = None
    ) -> Peer:
        """Where a request of so many tokens is best sent to decode, of at least one worker. source:
        the worker that has its KV.
        """
        now = self.clock()
        if source:
            peers = [peer for peer in peers if not self._avoided(source, peer, now)] or peers
        if len(peers) == 1:
            return peers[0]
        summaries = [peer.summary for peer in peers]
        return peers[route_decode(length, slo, summaries, self.cost, now)]

    def _note(self, peer: Peer, summary: Summary) -> None:
        for ids, applies in ((self._late, summary.late), (self._with_time, summary.spare)):
            (ids.add if applies and not peer.draining else ids.discard)(peer.id)

    def _prefilling(self, peers: Sequence[Peer]) -> Sequence[Peer]:
        """Of those that prefill, the ones from which KV comes to where it is decoded, if any."""
        now, targets = self.clock(), self._taking(prefill=False)
        return [
            peer
            for peer in peers
            if peer.role is Role.BOTH or any(not self._avoided(peer, each, now) for each in targets)
        ] or peers

    def _avoided(self, source: Peer, target: Peer, now: float) -> bool:
        failed = self._failed.get((source.id, target.id))
        return failed is not None and now < failed[0]

    def _taking(self, prefill: bool) -> list[Peer]:
        return [
            peer
            for peer in self.peers.values()
            if (peer.role is not Role.DECODE) == prefill and not peer.draining
        ]
