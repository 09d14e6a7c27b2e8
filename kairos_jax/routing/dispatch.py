"""A request's way from worker to worker: to prefill, to decode, elsewhere when one is lost."""

import asyncio
import contextlib
import functools
import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

import grpc

from kairos_jax.engine.calls import wants_prompt_logprobs
from kairos_jax.kv.transport import Ticket
from kairos_jax.routing.fleet import Fleet, WorkerLost
from kairos_jax.routing.observer import Observer
from kairos_jax.routing.peer import Peer
from kairos_jax.routing.stream import RequestFailed, Stream
from kairos_jax.routing.trials import Trials
from kairos_jax.routing.waiting_room import WaitingRoom
from kairos_jax.worker import codec
from kairos_jax.worker.codec import For
from kairos_jax.worker.messages import (
    Died,
    Draining,
    Event,
    Failed,
    GoOn,
    Kept,
    Lost,
    Moved,
    Offered,
    Outlined,
    Output,
    Parked,
    Prefetch,
    Recall,
    Release,
    Returned,
    Stay,
    Submit,
)
from kairos_jax.worker.page_keys import page_keys
from schedulers.ledger.instance import Role
from schedulers.policies.routing import Summary, fitting

log = logging.getLogger(__name__)

# After so many losses a stream fails: what is lost wherever it goes may be the cause of it.
MAX_RECOVERIES = 3
# A request that so many workers had when they failed may be the cause of it.
MAX_ABOARD = 2
# Before a request whose KV did not come over is prefilled again; it doubles with each try.
_BACKOFF_S, _MOST_BACKOFF_S = 0.1, 2.0


class Dispatch:
    """Takes requests from worker to worker until they are over. Used on one event loop.

    A request that a lost worker had goes on at another: its prompt and the tokens so far are
    prefilled again, under a new id, so that events about the old id are ignored.

    over: called with each stream that ends by its workers or for want of them, and with how.
    rejoin_s: how long a stream waits for a worker where none can go on with it. streams: in
    progress, by the ids by which workers know them. serials: of requests, by which workers order
    them.
    """

    def __init__(
        self,
        fleet: Fleet,
        observers: Sequence[Observer],
        over: Callable[[Stream, str], None],
        loop: asyncio.AbstractEventLoop,
        rejoin_s: float = 0.0,
    ):
        self.fleet, self._observers, self._over = fleet, observers, over
        self.rejoin_s, self._waiting, self._trials = rejoin_s, WaitingRoom(loop), Trials(loop)
        self.streams: dict[str, Stream] = {}
        self.serials = itertools.count(1)
        # Workers may have several routers, so ids must differ from those of every other.
        self._identity, self._secret = secrets.token_hex(8), secrets.token_bytes(32)

    def start(self, stream: Stream, serial: int, to: Peer | None = None) -> None:
        """Sends a stream to prefill, to that worker if it takes requests. Inside, ids never come
        back, so that a late message can never meet a new try.
        """
        id = f"{self._identity}/{stream.name}#{serial}"
        stream.request = replace(stream.request, id=id, serial=serial)
        self.streams[id] = stream
        self._prefill(stream, to)

    def _prefill(self, stream: Stream, to: Peer | None = None) -> None:
        """to: where it goes if that worker takes requests."""
        fleet = self.fleet
        try:
            fleet.check_served()
        except WorkerLost as error:
            return self._await_worker(stream, str(error), lambda: self._prefill(stream))
        peers, request = fleet.taking(prefill=True), stream.rest(fleet.clock(), fleet.cost)
        shares = len(peers) > 1 and not wants_prompt_logprobs(request)
        if shares and (size := peers[0].page_size):
            # To choose by alone: workers have keys of their own.
            keys = page_keys(size, self._secret, request.prompt)
            request = replace(request, page_keys=keys)
        submit = Submit(request, stream.trace)
        peer = to if to in peers else fleet.choose_prefill(peers, submit)
        stream.peers, stream.unplaced = [peer], True
        peer.submit(submit, fleet.clock())

    def forget(self, stream: Stream) -> bool:
        """The stream is over. False if it was before."""
        if self.streams.get(stream.request.id) is not stream:
            return False
        del self.streams[stream.request.id]
        self._waiting.leave(stream)
        self._trials.leave(stream)
        return True

    def joined(self, peer: Peer) -> None:
        """A worker has joined the fleet: streams that wait for one go on. One that is back had not
        failed: only the way to it had.
        """
        for stream in self.streams.values():
            stream.aboard.discard(peer.id)
        self._waiting.joined()

    def drop(self, stream: Stream) -> None:
        """Cancels what workers may have of a stream."""
        self._forget_recall(stream)
        for peer in stream.peers:
            peer.cancel(stream.request.id)
        stream.peers = []

    def _forget_recall(self, stream: Stream) -> None:
        """It has begun where it is, or is over."""
        if stream.recalled_to:
            stream.recalled_to.unbook(stream.request.id)
            stream.recalled_to = None

    def lose(self, peer: Peer, reason: str, alive: bool, failed: bool = True) -> None:
        """Does without a worker; its requests go on elsewhere. alive: it is still to be told what
        to forget. failed: it counts among the failures that a request may survive.
        """
        self.fleet.remove(peer, reason)
        for stream in [each for each in self.streams.values() if peer in each.peers]:
            if alive:
                peer.cancel(stream.request.id)
            goes_on = stream.peers[-1] is not peer
            stream.peers.remove(peer)
            # Where its KV was being fetched from the lost one, the fetch will tell how it ended.
            if not goes_on:
                stream.num_lost += failed
                self._recover(stream, reason, "handed_back" if peer.draining else "worker_lost")

    def on_event(self, event: Event) -> None:
        """Takes an event from a worker. One about a request that is over, or a worker that has
        left, is ignored: they have been told, or are gone.
        """
        match codec.address_of(event):
            case For.OUTPUTS, outputs:
                for output in outputs:
                    if stream := self.streams.get(output.id):
                        self._on_output(stream, output)
            case For.REQUEST, id:
                if stream := self.streams.get(id):
                    self._on_stream(stream, event)
            case For.INSTANCE, instance:
                if peer := self.fleet.peers.get(instance):
                    self._on_peer(peer, event)

    def _on_stream(self, stream: Stream, event: Event) -> None:
        match event:
            case Offered(_, ticket):
                self._on_offered(stream, ticket)
            case Parked(_, ticket):
                self._hand_over(stream, ticket)
            case Moved(_, at):
                self._on_moved(stream, at)
            case Lost(_, error):
                self._on_transfer_failed(stream, error)
            case Failed(_, cause, error):
                self._fail(stream, RequestFailed(error), cause)
            case Returned(_, ticket):
                self._on_returned(stream, ticket)
            case Kept():
                self._forget_recall(stream)

    def _on_peer(self, peer: Peer, event: Event) -> None:
        match event:
            case Outlined(_, summary, num_received):
                peer.update(summary, num_received)
                self._recall(peer, summary)
            case Draining():
                self.fleet.drains(peer)
            case Died(stood_still=True):
                # No failure of its own, nor of a request that it had.
                reason = f"the router stood still, and {peer.noun} gave it up"
                self.lose(peer, reason, alive=False, failed=False)
            case Died(_, error, aboard):
                reason = f"{peer.noun} failed: {_words(error)}"
                if not peer.draining:
                    for each in self._observers:
                        each.lost(peer.role)
                    self._blame(peer, reason, aboard)
                self.lose(peer, reason, alive=False)

    def _blame(self, peer: Peer, reason: str, said: tuple[str, ...] | None) -> None:
        """Counts a worker's failure against the requests that may be its cause, and refuses the one
        that is, if there is one alone. said: as of `Died`; where nothing was said, all that the
        worker had, since one that crashes its process leaves no time to tell of its step.
        """
        if said is None:
            aboard = [each for each in self.streams.values() if peer in each.peers[-1:]]
        else:
            aboard = [self.streams[id] for id in said if id in self.streams]
        # Those that were suspects before are the likelier cause.
        tried = [each for each in aboard if len(each.aboard) >= MAX_ABOARD]
        for stream in tried or aboard:
            stream.aboard.add(peer.id)
        suspects = [each for each in tried or aboard if len(each.aboard) >= MAX_ABOARD]
        # Processes are also killed from outside: then two losses prove nothing yet.
        if len(suspects) == 1 and (tried or said is not None):
            (stream,) = suspects
            told = f"{reason}; {len(stream.aboard)} instances that had it failed, and it is refused"
            self._fail(stream, WorkerLost(told), "poison")

    def _on_output(self, stream: Stream, output: Output) -> None:
        last_at, stream.stalled_at = stream.last_token_at, None
        self._forget_recall(stream)
        stream.put(output)
        self._trials.progressed(stream)
        for each in self._observers:
            if last_at is None:
                each.first_token(stream)
            else:
                each.next_token(output.at - last_at)
        if output.ticket is not None:
            self._hand_over(stream, output.ticket)
        elif output.finish_reason:
            for peer in stream.peers[:-1]:  # where it was to go on
                peer.cancel(stream.request.id)
            self.forget(stream)
            self._over(stream, output.finish_reason)
        elif stream.unplaced:
            self._place(stream)
        stream.unplaced = False

    def _place(self, stream: Stream) -> None:
        """Decides where a stream goes on that has its first token, where roles flow. Until it has
        been handed over, it goes on where it is.
        """
        if len(stream.peers) != 1:  # the one that gave the token is lost, and it goes on elsewhere
            return
        (home,), request = stream.peers, stream.request
        assert stream.first_token_at is not None
        late = stream.first_token_at > request.deadline
        length = len(request.prompt) + len(stream.tokens)
        placed = self.fleet.place(home, length, request.slo, late)
        if placed is None:
            return
        peer, why = placed
        if peer is home:
            home.stays(length, request.slo)
            home.post(Stay(request.id, why))
        else:
            peer.book(request.id, length, request.slo)
            stream.peers.insert(0, peer)
            home.post(GoOn(request.id, why))
        for each in self._observers:
            each.placed(stream, peer is home)

    def _on_offered(self, stream: Stream, ticket: Ticket) -> None:
        """Its KV may go ahead of it to where it will be decoded."""
        self._forget_recall(stream)
        with contextlib.suppress(WorkerLost):
            source = stream.peers[-1]
            peer = self._choose_decode(stream, self.fleet.taking(prefill=False), source)
            stream.peers.insert(0, peer)
            peer.prefetch(Prefetch(ticket, stream.request.prompt), stream.request.slo)

    def _recall(self, told: Peer, summary: Summary) -> None:
        """Asks for late prompts back that wait for one worker while another has time for them."""
        if (found := self.fleet.recall(told, summary)) is None:
            return
        source, to, ids = found
        late = [stream for id in ids if (stream := self.streams.get(id)) and not stream.recalled_to]
        for request in fitting((stream.request for stream in late), to.summary.spare):
            self.streams[request.id].recalled_to = to
            to.expect(request)
            source.post(Recall(request.id, f"{to.id} has time for it"))

    def _on_transfer_failed(self, stream: Stream, error: Exception) -> None:
        """Prefills a request again, elsewhere if it can be, and not at once: what failed may mend
        itself.
        """
        if len(stream.peers) > 1:
            source, target = stream.peers[-2:]
            log.warning("KV did not move from %s to %s: %s", source.id, target.id, error)
            self.fleet.transfer_failed(source, target)
            for each in self._observers:
                each.transfer_failed(source.id, target.id)
        now = self.fleet.clock()
        stream.num_lost += 1
        if stream.refused_at is None:
            stream.refused_at = now
        reason = "the KV transfer failed"
        if stream.num_lost > MAX_RECOVERIES and now >= stream.refused_at + self.rejoin_s:
            error = WorkerLost(f"{reason} (lost {stream.num_lost} times)")
            return self._fail(stream, error, "lost_too_often")
        pause_s = min(_BACKOFF_S * 2 ** (stream.num_lost - 1), _MOST_BACKOFF_S)
        self.drop(stream)
        again = functools.partial(self._go_on_elsewhere, stream, reason, "transfer_failed")
        self._waiting.pause(stream, pause_s, again)

    def _on_returned(self, stream: Stream, ticket: Ticket | None) -> None:
        """Goes on elsewhere: with its KV, if the worker that offers it is still there."""
        if to := stream.recalled_to:
            stream.peers.clear()  # the one that had it has forgotten it
            self._begin_again(stream, to)
            if stream.peers == [to]:
                for each in self._observers:
                    each.recalled(stream)
            return
        if ticket is None or len(stream.peers) == 1:
            return self._recover(stream, "the instance that had it is draining", "handed_back")
        stream.peers.pop()  # which has forgotten it
        self._hand_over(stream, ticket)

    def _on_moved(self, stream: Stream, at: float) -> None:
        stream.refused_at = None
        if stream.moved_at is None:
            stream.moved_at = at
        # Those before the last had its KV until now, save for one that was lost since then.
        *before, last = stream.peers
        for peer in before:
            peer.post(Release(stream.request.id))
            self.fleet.transferred(peer, last)
        stream.peers = [last]

    def _hand_over(self, stream: Stream, ticket: Ticket) -> None:
        """Sends a stream to decode. The last of its peers has the KV; those before, what came of it
        ahead.
        """
        try:
            peers = self.fleet.onward(stream.peers[-1])
        except WorkerLost as error:
            if stream.peers[-1].role is Role.BOTH:  # which can do it all again
                return self._recover(stream, str(error), "handed_back")
            again = functools.partial(self._hand_over, stream, ticket)
            return self._await_worker(stream, str(error), again)
        *ahead, source = stream.peers
        peer = self._choose_handover(stream, peers, ahead, source)
        for other in ahead:
            if other is not peer:
                other.cancel(stream.request.id)
        stream.peers = [source, peer]
        peer.hand_over(stream.handover(ticket))

    def _choose_handover(
        self, stream: Stream, peers: Sequence[Peer], ahead: Sequence[Peer], source: Peer
    ) -> Peer:
        """The worker to which its KV was sent ahead, unless that has filled up since."""
        length = len(stream.request.prompt) + len(stream.tokens)
        for peer in ahead:
            peer.unbook(stream.request.id)  # or it would count twice
            if peer in peers and (len(peers) == 1 or peer.fits(length, stream.request.slo)):
                return peer
        return self._choose_decode(stream, peers, source)

    def _choose_decode(self, stream: Stream, peers: Sequence[Peer], source: Peer) -> Peer:
        length = len(stream.request.prompt) + len(stream.tokens)
        return self.fleet.choose_decode(peers, length, stream.request.slo, source)

    def _recover(self, stream: Stream, reason: str, cause: str) -> None:
        """Goes on with a stream that its workers will not bring to its end. cause: in a word."""
        if stream.num_lost > MAX_RECOVERIES:
            error = WorkerLost(f"{reason} (lost {stream.num_lost} times)")
            return self._fail(stream, error, "lost_too_often")
        go_on = functools.partial(self._go_on_elsewhere, stream, reason, cause)
        if len(stream.aboard) >= MAX_ABOARD:
            self.drop(stream)
            return self._trials.enter(stream, go_on)
        go_on()

    def _go_on_elsewhere(self, stream: Stream, reason: str, cause: str) -> None:
        """Prefills a stream again, as soon as there are workers for it."""
        try:
            self.fleet.check_served()
        except WorkerLost as error:
            missing = str(error)
            told = missing if reason in missing else f"{reason}; {missing}"
            self.drop(stream)
            again = functools.partial(self._go_on_elsewhere, stream, reason, cause)
            return self._await_worker(stream, told, again)
        self._begin_again(stream)
        for each in self._observers:
            each.recovered(stream, cause)

    def _begin_again(self, stream: Stream, to: Peer | None = None) -> None:
        """to: as of `start`."""
        self.drop(stream)
        del self.streams[stream.request.id]
        self._waiting.leave(stream)
        self.start(stream, next(self.serials), to)

    def _await_worker(self, stream: Stream, reason: str, go_on: Callable[[], None]) -> None:
        """Goes on with a stream when a worker joins; fails it where none does in time."""
        now = self.fleet.clock()
        if stream.stalled_at is None:
            stream.stalled_at = now
        left_s = stream.stalled_at + self.rejoin_s - now
        give_up = functools.partial(self._fail, stream, WorkerLost(reason), "no_worker")
        if left_s <= 0:
            return give_up()
        self._waiting.until_joined(stream, left_s, go_on, give_up)

    def _fail(self, stream: Stream, error: Exception, cause: str) -> None:
        """Ends a stream by an error. cause: in a word."""
        self.drop(stream)
        if self.forget(stream):
            for each in self._observers:
                each.failed(stream, cause)
            self._over(stream, "failed")
        stream.fail(error)


def _words(error: BaseException) -> str:
    """What clients are told of a lost worker. The error itself is in the log, with addresses."""
    match error:
        case TimeoutError():
            return "it stopped answering"
        case ConnectionError() | grpc.aio.AioRpcError():
            return "its connection ended"
    return "its step failed"
