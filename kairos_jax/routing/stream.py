"""One request's way through the server, as its client sees it."""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kairos_jax.kv.transport import Ticket
from kairos_jax.routing.peer import Peer
from kairos_jax.worker.messages import Handover, Output
from schedulers.cost import CostModel
from schedulers.ledger.request import Request, Slo

# Outputs, or log-probabilities, that one take gives: to write that many takes some 10 ms, while all
# others wait, however slowly a client reads.
_MOST_TAKEN = 1000


class RequestFailed(Exception):
    """This one request cannot be served, by any worker; the message says why."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went, in seconds; queue_s, prefill_s and decode_s make total_s.

    transfer_s: from the first token to its KV being on the decode instance, None if it did not
    move. decode_s: from the first token to the last. tpot_s: None where there is no second token.
    laxity_s: from the first step to when the first token was due. slack_s: by how much the last
    token was ahead of the line of its TPOT; worst_slack_s: the least of that over all tokens after
    the first, infinite where there is none.
    """

    queue_s: float
    prefill_s: float
    transfer_s: float | None
    decode_s: float
    ttft_s: float
    tpot_s: float | None
    total_s: float
    laxity_s: float
    slack_s: float
    worst_slack_s: float
    ttft_met: bool
    tpot_met: bool


@dataclass(eq=False, slots=True)
class Stream:
    """One request's way through the server. Times are seconds on the workers' clock.

    request: as the client asked, under the id by which the workers know it at present. peers: those
    that may hold something of it, the last of them the one that has it in hand. num_lost: how often
    it had to be recovered from a failure; aboard: ids of the workers that failed and may have done
    so by it. stalled_at: since when no worker could go on with it. trace: W3C headers of the trace
    that it is a part of, at first the client's. span: of `Tracing`, its own in that. worst_slack_s:
    see `Timing`. unplaced: where it goes on after its first token is not decided yet. recalled_to:
    where it is to begin, if the one that has it in hand gives it back.
    cached_tokens: of the prompt as the client sent it, found in the prefix cache.
    """

    name: str
    request: Request
    peers: list[Peer] = field(default_factory=list)
    num_lost: int = 0
    aboard: set[str] = field(default_factory=set)
    stalled_at: float | None = None
    refused_at: float | None = None
    unplaced: bool = True
    recalled_to: Peer | None = None
    trace: Mapping[str, str] = field(default_factory=dict)
    span: Any = None
    begun_at: float | None = None
    first_token_at: float | None = None
    moved_at: float | None = None
    last_token_at: float | None = None
    worst_slack_s: float = math.inf
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    _queue: asyncio.Queue[Output | Exception] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[Output]:
        """The outputs, ending with the one that has a finish_reason. Raises WorkerLost and
        RequestFailed.
        """
        while True:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish_reason:
                return

    async def take(self) -> list[Output]:
        """The next outputs: those that are there, and at least one; a thousand at most, or, with
        log-probabilities, so many as have a thousand of these. None come after one that has a
        finish_reason. Raises WorkerLost and RequestFailed, once what came before was taken.
        """
        how = self.request.sampling
        count = 0 if how is None or how.logprobs is None else how.logprobs
        most = max(1, _MOST_TAKEN // (1 + count))
        outputs: list[Output] = []
        item = await self._queue.get()
        while True:
            if isinstance(item, Exception):
                if not outputs:
                    raise item
                self._queue.put_nowait(item)  # nothing comes after it
                return outputs
            outputs.append(item)
            if self._queue.empty() or len(outputs) == most:
                return outputs
            item = self._queue.get_nowait()

    def put(self, output: Output) -> None:
        """Books an output and passes it on to the reader."""
        if self.begun_at is None:
            self.begun_at = output.begun_at
        if self.first_token_at is None:
            self.first_token_at, self.cached_tokens = output.at, output.cached
        self.last_token_at = output.at
        if count := len(self.tokens):
            due = self.first_token_at + count * self.request.slo.tpot
            self.worst_slack_s = min(self.worst_slack_s, due - output.at)
        self.tokens.append(output.token.id)
        self.finish_reason = output.finish_reason
        self._queue.put_nowait(output)

    def fail(self, error: Exception) -> None:
        """Ends the stream by an error that its reader is raised."""
        self._queue.put_nowait(error)

    def timing(self) -> Timing:
        """Of the tokens so far. Raises ValueError before the first."""
        request, begun = self.request, self.begun_at
        first, last = self.first_token_at, self.last_token_at
        if begun is None or first is None or last is None:
            raise ValueError(f"request {self.name!r} has no token yet, and so no timing")
        count, slo = len(self.tokens) - 1, request.slo
        ttft_s, tpot_s = first - request.arrival, (last - first) / count if count else None
        return Timing(
            queue_s=begun - request.arrival,
            prefill_s=first - begun,
            transfer_s=None if self.moved_at is None else self.moved_at - first,
            decode_s=last - first,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            total_s=last - request.arrival,
            laxity_s=request.deadline - begun,
            slack_s=first + count * slo.tpot - last,
            worst_slack_s=self.worst_slack_s,
            ttft_met=ttft_s <= slo.ttft,
            tpot_met=tpot_s is None or tpot_s <= slo.tpot,
        )

    def rest(self, now: float, cost: CostModel) -> Request:
        """What is still to be computed from the beginning, where nothing is left of its KV: the
        prompt, and the tokens that the client has as a part of it. Sampling depends on a token's
        place in the whole and on the seed, so the next token is the one that would have come.

        With tokens, it counts as arrived now, and due in half of its TTFT: a client is waiting in
        the midst of an answer, so it goes before those that came lately; but as one that is late
        already, policies would put it behind all others. A long one needs more than half: twice
        its prefill is the least that others beside it leave it a chance.
        """
        request, count = self.request, len(self.tokens)
        if not count:
            return request
        prompt, how = [*request.prompt, *self.tokens], request.sampling
        if how is not None:  # those of the prompt have come with its first token
            how = replace(how, prompt_logprobs=None)
        ttft = max(request.slo.ttft / 2, 2 * cost.prefill_s(len(prompt)))
        return replace(
            request,
            arrival=now,
            prompt=prompt,
            max_tokens=request.max_tokens - count,
            slo=Slo(ttft, request.slo.tpot),
            sampling=how,
        )

    def handover(self, ticket: Ticket) -> Handover:
        """What a decode instance is told: the request as it was asked, and all tokens, so that it
        stands to its SLO there as it does for the client, however it came by its KV.
        """
        assert self.first_token_at is not None
        tokens = tuple(self.tokens)
        return Handover(self.request, tokens, self.first_token_at, ticket, self.trace)
