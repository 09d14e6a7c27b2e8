"""The workers as the router knows them: the last summary of each, and what was sent since."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from kairos_jax.messages import Handover, Message, Submit
from kairos_jax.worker import Worker
from schedulers.core import Role
from schedulers.cost import CostModel
from schedulers.routing import Summary, prompt_s, route_decode, route_prefill


class Peer:
    """One worker. Its ledger is looked at once, before it starts; from then on `update` tells.

    A worker that is alone in its role is not summed up: there is nothing to choose.
    """

    def __init__(self, worker: Worker, cost: CostModel, now: float):
        self.id, self.role = worker.instance.id, worker.instance.role
        self._worker, self._cost = worker, cost
        self._summary = worker.outline(worker.instance, now) if worker.outline else None
        self._at = now
        self._num_sent = 0
        # What each request adds that the summary does not count yet, in the order sent.
        self._unseen: deque[Callable[[Summary], Summary]] = deque()

    def post(self, message: Message) -> None:
        """Sends what changes no summary by much."""
        self._worker.post(message)

    def submit(self, message: Submit) -> None:
        """Sends a request to prefill, and perhaps to decode too."""
        self._send(message, lambda summary: _with_request(summary, message, self._cost))

    def hand_over(self, message: Handover) -> None:
        """Sends a request to decode."""
        length, slo = _length(message), message.request.slo
        self._send(message, lambda summary: summary.with_context(length, slo, self._cost))

    def update(self, summary: Summary, num_received: int, now: float) -> None:
        """Takes a new summary, in which the first `num_received` requests sent here count."""
        while len(self._unseen) > self._num_sent - num_received:
            self._unseen.popleft()
        for add in self._unseen:
            summary = add(summary)
        self._summary, self._at = summary, now

    def summary(self, now: float) -> Summary:
        """Its state as far as is known at `now`."""
        assert self._summary is not None, f"worker {self.id!r} is not summed up"
        free_s = max(self._summary.free_s - (now - self._at), 0.0)
        return replace(self._summary, free_s=free_s)

    def _send(self, message: Submit | Handover, add: Callable[[Summary], Summary]) -> None:
        self._worker.post(message)
        if self._summary is not None:
            self._num_sent += 1
            self._unseen.append(add)
            self._summary = add(self._summary)


def choose_prefill(peers: Sequence[Peer], message: Submit, cost: CostModel, now: float) -> Peer:
    """Where a new request is best sent."""
    if len(peers) == 1:
        return peers[0]
    summaries = [peer.summary(now) for peer in peers]
    return peers[route_prefill(message.request, summaries, cost, now)]


def choose_decode(peers: Sequence[Peer], message: Handover, cost: CostModel, now: float) -> Peer:
    """Where a request whose prefill has ended is best sent."""
    if len(peers) == 1:
        return peers[0]
    summaries = [peer.summary(now) for peer in peers]
    return peers[route_decode(_length(message), message.request.slo, summaries, cost, now)]


def _length(message: Handover) -> int:
    return len(message.request.prompt) + len(message.tokens)


def _with_request(summary: Summary, message: Submit, cost: CostModel) -> Summary:
    request = message.request
    summary = summary.with_prompt(request.deadline, prompt_s(request, summary, cost))
    if summary.role is Role.BOTH:
        summary = summary.with_context(len(request.prompt), request.slo, cost)
    return summary
