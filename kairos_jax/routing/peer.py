"""A worker as its router knows it: its last summary, and what was sent to it since."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from kairos_jax.worker.messages import Cancel, Handover, Message, Prefetch, Submit
from kairos_jax.worker.status import Status
from kairos_jax.worker.unseen import Unseen
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies.routing import Summary, prompt_s


class Peer:
    """One worker, in this process or another.

    post: sends it a message. cost: of its own steps. summary: of its ledger; from then on `update`
    tells. kv_tokens: whose KV its pool holds, 0 if that is not known.
    page_size: tokens of a page of its prefix cache, 0 if it has none. look: what it holds and has
    run, as far as it has told. draining: it takes no new requests.
    """

    def __init__(
        self,
        id: str,
        role: Role,
        post: Callable[[Message], None],
        cost: CostModel,
        summary: Summary,
        kv_tokens: int = 0,
        page_size: int = 0,
        look: Callable[[], Status | None] = lambda: None,
    ):
        self.id, self.role, self.post, self.cost = id, role, post, cost
        self.kv_tokens, self.page_size, self.look = kv_tokens, page_size, look
        self.draining = False
        self._unseen = Unseen(summary)
        # Keys of the pages that it had to compute or to find, those of the latest last.
        self._pages: OrderedDict[int, None] = OrderedDict()

    @property
    def noun(self) -> str:
        """What clients are told of it: not its id, which may hold an address."""
        return f"a {self.role.value} instance" if self.role is not Role.BOTH else "an instance"

    @property
    def summary(self) -> Summary:
        """Its state as far as is known. May be read from any thread."""
        return self._unseen.summary

    def update(self, summary: Summary, num_received: int) -> None:
        """Takes a new summary, in which the first `num_received` requests sent here count."""
        self._unseen.update(summary, num_received)

    def submit(self, message: Submit, now: float) -> None:
        """Sends a request to prefill, and perhaps to decode too."""
        request, cached = message.request, self.cached(message.request)
        self.post(message)
        self._unseen.sent(lambda summary: _with_request(summary, request, self.cost, cached, now))
        for key in reversed(request.page_keys):
            self._pages[key] = None
            self._pages.move_to_end(key)
        while self._pages and len(self._pages) * self.page_size > self.kv_tokens:
            self._pages.popitem(last=False)

    def cached(self, request: Request) -> int:
        """Tokens of a prompt that it has cached, as far as can be told from what was sent to it."""
        if not (keys := request.page_keys) or not self.page_size:
            return 0
        pages = next((i for i, key in enumerate(keys) if key not in self._pages), len(keys))
        return min(pages, (len(request.prompt) - 1) // self.page_size) * self.page_size

    def prefetch(self, message: Prefetch, slo: Slo) -> None:
        """Announces a request that will be handed over, and keeps a place for it."""
        self.post(message)
        self.book(message.ticket.request_id, len(message.prompt) + 1, slo)

    def book(self, id: str, length: int, slo: Slo) -> None:
        """Keeps a place for a sequence of so many tokens that will be handed over."""
        self._unseen.book(id, lambda summary: summary.with_context(length, slo, self.cost))

    def expect(self, request: Request) -> None:
        """Keeps its time for a prompt that another worker is to give back."""
        self._unseen.book(request.id, lambda summary: replace(summary, spare=0.0))

    def stays(self, length: int, slo: Slo) -> None:
        """A sequence whose prompt it has computed will be decoded here too."""
        self._unseen.told(
            lambda summary: replace(summary, load=summary.with_context(length, slo, self.cost).load)
        )

    def unbook(self, id: str) -> None:
        """Gives up a place that was kept."""
        self._unseen.unbook(id)

    def fits(self, length: int, slo: Slo) -> bool:
        """Whether it has room and time for a further sequence of so many tokens."""
        after = self.summary.with_context(length, slo, self.cost)
        return after.room >= 0 and (after.load <= 1 or not self.summary.load)

    def cancel(self, id: str) -> None:
        """The request is to be forgotten there."""
        self._unseen.unbook(id)
        self.post(Cancel(id))

    def hand_over(self, message: Handover) -> None:
        """Sends a request to decode."""
        request = message.request
        length, slo = len(request.prompt) + len(message.tokens), request.slo
        late = message.first_token_at > request.deadline
        self._unseen.unbook(request.id)
        self.post(message)
        self._unseen.sent(lambda summary: summary.with_context(length, slo, self.cost, late))


def _with_request(
    summary: Summary, request: Request, cost: CostModel, cached: int, now: float
) -> Summary:
    own_s = prompt_s(request, summary, cost, cached)
    summary = replace(summary.with_prompt(request.deadline, own_s, now), spare=0.0)
    if summary.role is Role.BOTH:
        after = summary.with_context(len(request.prompt), request.slo, cost)
        # Where roles flow, a prompt is no load: it may go on elsewhere.
        summary = replace(after, load=summary.load) if summary.flows else after
    return replace(summary, parked_room=summary.parked_room - len(request.prompt))
