"""One request's way through the server, as its client sees it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from kairos_jax.messages import Handover, Output
from kairos_jax.peers import Peer
from schedulers.cost import CostModel
from schedulers.request import Request, Slo


@dataclass(eq=False, slots=True)
class Stream:
    """One request's way through the server. Times are seconds on the workers' clock.

    request: as the client asked, under the id by which the workers know it at present. peers: those
    that may hold something of it, the last of them the one that has it in hand. num_lost: how often
    it had to be recovered from a failure.
    """

    name: str
    request: Request
    peers: list[Peer] = field(default_factory=list)
    num_lost: int = 0
    begun_at: float | None = None
    first_token_at: float | None = None
    moved_at: float | None = None
    last_token_at: float | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    _queue: asyncio.Queue[Output | Exception] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[Output]:
        """The outputs, ending with the one that has a finish_reason. Raises WorkerLost."""
        while True:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish_reason:
                return

    def put(self, output: Output) -> None:
        """Books an output and passes it on to the reader."""
        if self.begun_at is None:
            self.begun_at = output.begun_at
        if self.first_token_at is None:
            self.first_token_at = output.at
        self.last_token_at = output.at
        self.tokens.append(output.token.id)
        self.finish_reason = output.finish_reason
        self._queue.put_nowait(output)

    def fail(self, error: Exception) -> None:
        """Ends the stream by an error that its reader is raised."""
        self._queue.put_nowait(error)

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
        prompt = [*request.prompt, *self.tokens]
        ttft = max(request.slo.ttft / 2, 2 * cost.prefill_s(len(prompt)))
        return replace(
            request,
            arrival=now,
            prompt=prompt,
            max_tokens=request.max_tokens - count,
            slo=Slo(ttft, request.slo.tpot),
        )

    def handover(self, output: Output) -> Handover:
        """What a decode instance is told: the request as it was asked, and all tokens, so that it
        stands to its SLO there as it does for the client, however it came by its KV.
        """
        assert output.ticket is not None
        assert self.first_token_at is not None
        return Handover(self.request, tuple(self.tokens), self.first_token_at, output.ticket)
